"""A conversation with a loaded model: its answers, and what they took."""

from __future__ import annotations

import argparse
import contextlib
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BudgetError, FlashError, UsageError
from ..flash.stats import Statistics
from ..loading.plan import parse_memory
from ..ranks.group import Group
from ..text.answer_parts import AnswerFormat
from ..text.sampling import make_processors, seeded_sampler
from .answer_view import AnswerView
from .chat_settings import ChatSettings
from .model_arguments import load_model
from .terminal import Interrupts, PromptInterrupted, context_hint, progress_line, say
from .text_file import fenced


@dataclass(frozen=True)
class AskedQuestion:
    """The last question. answered: whether the conversation's last turn is its answer."""

    text: str
    pictures: Sequence[Any] = ()
    answered: bool = False


@dataclass(frozen=True)
class CutAnswer:
    """An answer that its model did not end. said: all of its text, with the thoughts and their marks."""

    prompt: list[int]
    made: list[int]
    said: str
    about_images: bool


class Chat:
    """A loaded model, the conversation with it, and the statistics of its answers."""

    def __init__(self, arguments: argparse.Namespace, group: Group | None = None) -> None:
        """group: see `load`."""
        self.arguments, self._group = arguments, group
        self.last: Statistics | None = None
        self.total: Statistics | None = None
        self.answers = 0
        self.asked: AskedQuestion | None = None
        self.cut: CutAnswer | None = None  # the last answer, if it can be continued
        self.saved = True  # whether all turns are in a file
        self._cut_before = False  # whether --max-tokens has cut an answer before
        self.files: list[str] = []  # texts that go before the next question
        self.pictures: list[Any] = []  # of the next question
        for path in arguments.image:
            self.add_picture(Path(path))
        arguments.images = arguments.images or bool(self.pictures)
        self._load()
        from ..text.conversation import Conversation

        self.conversation = Conversation(
            self.tokenizer, self.plan.context, arguments.system_prompt, not arguments.ignore_chat_template
        )
        self.conversation.images = self.model.flash.images
        self.settings = ChatSettings(arguments, self.model.flash.defaults, self.conversation.has_template)
        self.use_settings()
        if self.model.flash.defaults.sampling:
            say(f"sampling: {self.sampling.describe()} (options not given are from the model's generation_config.json)")
        if not self.conversation.has_template:
            if arguments.system_prompt is not None:
                say("note: --system-prompt is not used without a chat template")
            if not arguments.ignore_chat_template:
                say("note: this model has no chat template: your messages and its replies form one continuous text")

    @property
    def plan(self) -> Any:
        return self.model.flash.plan

    def use_settings(self) -> None:
        """Makes the settings those of the next answer."""
        self.sampling = self.settings.sampling
        self.sampler = seeded_sampler(self.sampling, self.model.flash.vocabulary)

    def add_picture(self, path: Path) -> None:
        """Adds an image to the next question. Raises ImageError."""
        from ..text.images import read_image

        self.pictures.append(read_image(str(path)))

    def add_file(self, path: Path) -> int:
        """Puts a text file before the next question. Returns its number of tokens. Raises ReadError or UsageError."""
        text, count = fenced(path, self.tokenizer, self.plan.context)
        self.files.append(text)
        return count

    def _load(self) -> None:
        self.model: Any
        self.tokenizer: Any
        self.model, self.tokenizer = load_model(self.arguments, say, self._group)
        from ..text.prompt_cache import ReusedPromptCache

        self.format = AnswerFormat(self.tokenizer)
        self.turns: Any = ReusedPromptCache(self.model)

    def close(self) -> None:
        self.conversation.close()
        self._close_model()

    def _close_model(self) -> None:
        if self.model is not None:  # None: it could not be loaded again
            self.model.flash.close()

    # -- questions -------------------------------------------------------------------------------------------

    def answer(self, question: str, interrupts: Interrupts) -> None:
        """Prints the answer while it is generated, and adds both to the conversation.

        Raises UsageError, ChatTemplateError or TokenizerError for a question that cannot be used.
        """
        files, pictures = self.files, self.pictures
        self.files, self.pictures = [], []
        try:
            self._ask("\n\n".join([*files, question]), pictures, interrupts)
        except FlashError:
            self.files, self.pictures = files, pictures
            raise

    def answer_again(self, interrupts: Interrupts, question: str | None = None) -> None:
        """Answers the last question again, or another one (None: the same) in its place.

        If no answer begins, the conversation stays as it was. Raises the errors of `answer`.
        """
        asked, cut = self.asked, self.cut
        if asked is None:
            raise UsageError("there is no question to answer again.")
        turn = self.conversation.turns.pop() if asked.answered else None
        begun = False
        try:
            begun = self._ask(asked.text if question is None else question, asked.pictures, interrupts)
        finally:
            if begun and not asked.answered:  # What went with a question that was refused has been used now.
                self.files, self.pictures = [], []
            if turn is not None and not begun:
                self.conversation.turns.append(turn)
                self.asked, self.cut = asked, cut

    def _ask(self, question: str, pictures: Sequence[Any], interrupts: Interrupts) -> bool:
        """Returns whether there is an answer, perhaps a partial one."""
        self.asked, self.cut = AskedQuestion(question, pictures), None
        prompt = self.conversation.ask(question, min(self.settings.max_tokens, self.plan.context // 4), pictures)
        if prompt.dropped:
            say(
                f"note: the context of {self.plan.context} tokens is full: dropped the oldest {turns(prompt.dropped)} "
                f"({prompt.dropped_tokens} tokens), kept {turns(len(self.conversation.turns))}"
            )
        view = self._view(prompt.tokens, "", interrupts)
        options = {"system_tokens": prompt.system_tokens, "seen": prompt.seen}
        answer = self._generate(prompt.tokens, view, interrupts, about_images=prompt.seen is not None, **options)
        if answer is None:
            say("stopped while reading the prompt; your question was dropped (/retry asks it again)")
            return False
        self.conversation.answered(question, view.text, answer.made, pictures, view.thoughts)
        self.asked = AskedQuestion(question, pictures, answered=True)
        return True

    def continue_answer(self, interrupts: Interrupts) -> None:
        """Continues the last answer if it was cut. Raises UsageError if it was not, or if the context is full."""
        cut = self.cut
        if cut is None:
            what = "the last answer is complete" if self.conversation.turns else "there is no answer yet"
            raise UsageError(f"{what}; /continue continues one that was cut or stopped.")
        if cut.about_images:
            raise UsageError("an answer to a question with images cannot be continued. /retry answers it again.")
        prompt = [*cut.prompt, *cut.made]
        if len(prompt) >= self.plan.context:
            raise UsageError(f"the context of {self.plan.context} tokens is full. {context_hint(self.model)}")
        from ..text.detokenizer import Detokenizer

        view = self._view(cut.prompt, cut.said, interrupts)
        more = self._generate(prompt, view, interrupts, detokenizer=Detokenizer(self.tokenizer, prompt))
        if more is None:
            return
        self.conversation.lengthened(view.text, more.made, view.thoughts)
        if self.cut is not None:
            self.cut = CutAnswer(cut.prompt, cut.made + more.made, cut.said + more.said, False)

    def _view(self, prompt: list[int], said: str, interrupts: Interrupts) -> AnswerView:
        return AnswerView(
            self.format.begin(prompt) if self.conversation.has_template else None,
            markdown=self.settings.markdown,
            thoughts=self.settings.thoughts,
            said=said,
            below=interrupts.rows_written,
        )

    def _generate(
        self, prompt: list[int], view: AnswerView, interrupts: Interrupts, about_images: bool = False, **options: Any
    ) -> CutAnswer | None:
        """Shows an answer to the prompt. Returns what was made, or None if Ctrl-C came before the first token.

        options: further ones of `stream_generate`. It sets `cut`.
        """
        import mlx.core as mx

        if self.sampling.seed is not None:
            mx.random.seed(self.sampling.seed)
        made: list[int] = []
        said: list[str] = []
        response: Any = None
        responses = self.turns.stream_generate(
            self.tokenizer,
            prompt,
            self.settings.max_tokens,
            sampler=self.sampler,
            logits_processors=make_processors(self.sampling, lambda: prompt[: self.turns.reused]),
            prompt_progress_callback=progress_line(interrupts),
            **options,
        )
        with view, contextlib.closing(responses), contextlib.suppress(PromptInterrupted):
            for response in responses:
                made.append(response.token)
                said.append(response.text)
                view.add(response.text)
                if interrupts.asked:
                    break
        if response is None:
            return None
        view.finish(whole=response.finish_reason == "stop")
        answer = CutAnswer(prompt, made, "".join(said), about_images)
        self.cut = None if response.finish_reason == "stop" else answer
        self.saved = False
        self._count(response.statistics)
        if interrupts.asked and response.finish_reason != "stop":
            say("stopped")
        elif response.finish_reason == "length":
            self._say_cut(len(made))
        return answer

    def _count(self, statistics: Statistics) -> None:
        self.last = statistics
        self.total = statistics if self.total is None else self.total + statistics
        self.answers += 1

    def _say_cut(self, made: int) -> None:
        if made < self.settings.max_tokens:
            say(
                f"note: the context of {self.plan.context} tokens is full, so the answer ends here. The next question "
                f"drops the oldest turns; /reset drops all of them. {context_hint(self.model)}"
            )
        elif not self._cut_before:
            self._cut_before = True
            say(f"note: answers end after {made} tokens (/set max-tokens N); /continue continues this one")
        elif self.conversation.has_template:  # A continuous text never ends by itself.
            say(f"cut after {made} tokens (/continue)")

    # -- the conversation ------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Forgets the conversation, and what was to go with the next question."""
        self.conversation.forget()
        self.turns.forget()
        self.asked, self.cut, self.saved = None, None, True
        self.files, self.pictures = [], []

    def replay(self, turns: Sequence[Any], system: str | None, unanswered: str | None) -> None:
        """Replaces the conversation. Raises TokenizerError, and changes nothing then."""
        before = self.conversation.turns
        try:
            self.conversation.replay(turns)
        except FlashError:
            self.conversation.turns = before
            raise
        self.conversation.system_prompt = system
        self.cut, self.saved = None, True
        self.asked = AskedQuestion(turns[-1].question, (), answered=True) if turns else None
        if unanswered is not None:
            self.asked = AskedQuestion(unanswered)

    # -- memory and speed ------------------------------------------------------------------------------------

    def say_statistics(self) -> None:
        if self.last is None or self.total is None:
            say("no answers yet")
        else:
            self._say_of("last answer", self.last)
            self._say_of("total of one answer" if self.answers == 1 else f"total of {self.answers} answers", self.total)
        say(self._memory_now())
        slots = f"slots for {self.plan.slot_share:.0%} of the {self.plan.units.name}"
        say(f"plan: {self.plan.total / 1e9:.3f} GB, {slots} (/memory shows all of it)")
        if self.model.flash.trials:
            say(self.model.flash.trials.line())

    def _say_of(self, what: str, statistics: Statistics) -> None:
        seconds = statistics.decode.total_s
        say(
            f"{what}: {statistics.decoded_tokens} tokens in {seconds:.1f} s, "
            f"{statistics.decoded_tokens / seconds:.1f} tokens-per-sec; "
            f"to the first token: {statistics.first_token_s:.3f} s"
        )
        for line in statistics.lines(self.model.flash.predictor):
            say(f"  {line}")

    def say_memory(self) -> None:
        say(self.plan.describe())
        say(self._memory_now())

    def _memory_now(self) -> str:
        from ..flash.system import current_memory_bytes, peak_memory_bytes

        now, peak = current_memory_bytes() / 1e9, peak_memory_bytes() / 1e9
        return (
            f"now: {now:.3f} GB of {self.plan.budget / 1e9:.3f} GB, peak {peak:.3f} GB; "
            f"{turns(len(self.conversation.turns))}, {len(self.turns.tokens)} of {self.plan.context} tokens of context"
        )

    def reload(self, memory: str) -> None:
        """Loads the model again with another budget, or with the old one if the new one is too small.

        The conversation stays; its KV cache does not. Raises UsageError for a text that is not a size.
        """
        parse_memory(memory)
        before, self.arguments.memory = self.arguments.memory, memory
        self._free()
        try:
            self._load()
        except BudgetError as refused:
            advice = str(refused).replace("--memory ", "/memory ")  # as it is typed here
            say(f"{advice} Loading it with the old budget.")
            self.arguments.memory = before
            try:
                self._load()
            except BudgetError as grown:  # the process has grown a little since it began
                self.arguments.memory = grown.smallest_bytes
                self._load()
        self.conversation.tokenizer, self.conversation.context = self.tokenizer, self.plan.context
        self.conversation.images = self.model.flash.images

    def _free(self) -> None:
        """Frees the old model. The next plan counts the memory that this process then uses."""
        import mlx.core as mx

        from ..flash.system import return_freed_memory

        self._close_model()
        self.model = self.tokenizer = self.turns = self.conversation.tokenizer = self.conversation.images = None
        gc.collect()
        mx.clear_cache()
        return_freed_memory()


def turns(count: int) -> str:
    return f"{count} turn" if count == 1 else f"{count} turns"
