"""A conversation, turned into prompts that fit the planned context: by a chat template, or as one continuous text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ImageError, UsageError
from .chat_template import has_chat_template, prompt_text, system_tokens, tokens_of, with_images
from .encoding import encode
from .generation import encode_prompt
from .image_prompts import ImageProcessor, ImagePrompt
from .images import Picture
from .template_process import TemplateProcess

MOST_CONTEXTS = 4  # size limit, in contexts, of a prompt before its oldest turns are dropped


@dataclass
class Turn:
    question: str
    answer: str
    tokens: list[int]  # question and answer; only the answer if there is a template
    pictures: Sequence[Picture] = ()  # that the question is about
    thoughts: str = ""  # before the answer; they are not part of later prompts


@dataclass(frozen=True)
class Prompt:
    tokens: list[int]
    dropped: int  # number of turns dropped to make room
    dropped_tokens: int
    system_tokens: int  # of the prompt's first tokens, those of the system message
    seen: ImagePrompt | None = None  # if a question of the prompt has images


class Conversation:
    """The turns of a conversation; makes the prompt for the next question.

    Without a template, questions and answers form one text, with a space before each question but the first. Their
    tokens are kept, not encoded again.
    """

    def __init__(self, tokenizer: Any, context: int, system_prompt: str | None = None, template: bool = True) -> None:
        """context: number of tokens for prompt and answer together. Set `images` if the model reads images."""
        self.tokenizer = tokenizer
        self.images: ImageProcessor | None = None
        self.context = context
        self.has_template = template and has_chat_template(tokenizer)
        self._process = TemplateProcess()
        self.turns: list[Turn] = []
        self.system_prompt = system_prompt  # may be changed at any time; not used without a template

    def ask(self, question: str, room: int, pictures: Sequence[Picture] = ()) -> Prompt:
        """The prompt for a question. pictures: the images that it is about.

        If it leaves less than `room` tokens for the answer, the oldest turns are dropped until half of the context is
        free, or no turn is left. Half, because after each drop the rest must be read again from its beginning.

        Raises UsageError, and drops nothing, if the question alone is too long. Raises ChatTemplateError, ImageError
        or TokenizerError if the prompt cannot be made.
        """
        asked = Turn(question, "", [], pictures)
        size = len(self._tokens([], asked)[0])
        if size > self.context:
            raise UsageError(
                f"the question makes a prompt of {size} tokens, and the plan has room for {self.context}, answer "
                "included. Shorten it, or start with a larger --context."
            )
        tokens, seen = self._tokens(self.turns, asked)
        before, dropped = len(tokens), 0
        if before + room > self.context:
            while len(tokens) > self.context // 2 and dropped < len(self.turns):
                dropped += 1
                tokens, seen = self._tokens(self.turns[dropped:], asked)
        del self.turns[:dropped]
        return Prompt(tokens, dropped, before - len(tokens), self._system_tokens(question, tokens), seen)

    def answered(
        self, question: str, answer: str, made: list[int], pictures: Sequence[Picture] = (), thoughts: str = ""
    ) -> None:
        """Adds a turn. made: tokens of the answer. pictures: the question's. thoughts: the answer's."""
        own = [] if self.has_template else self._text_tokens(question, first=not self.turns)
        self.turns.append(Turn(question, answer, own + self._without_ends(made), pictures, thoughts))

    def lengthened(self, answer: str, made: list[int], thoughts: str) -> None:
        """Replaces the last turn's answer and thoughts by longer ones. made: the tokens that were added."""
        last = self.turns[-1]
        last.answer, last.thoughts = answer, thoughts
        last.tokens = last.tokens + self._without_ends(made)

    def replay(self, turns: Sequence[Turn]) -> None:
        """Replaces the conversation by turns whose tokens are not known. Raises TokenizerError."""
        self.turns = []
        for turn in turns:
            made = [] if self.has_template else encode(self.tokenizer, turn.answer, special_tokens=False)
            self.answered(turn.question, turn.answer, made, turn.pictures, turn.thoughts)

    def forget(self) -> None:
        self.turns = []

    def close(self) -> None:
        """Ends the process that applies the chat template."""
        self._process.close()

    def _tokens(self, turns: list[Turn], asked: Turn) -> tuple[list[int], ImagePrompt | None]:
        """The prompt's tokens, and the prompt with its images if there are any."""
        pictures = [picture for turn in [*turns, asked] for picture in turn.pictures]
        if not self.has_template:
            if pictures:
                raise ImageError("without a chat template, a conversation has no place for images.")
            kept = [token for turn in turns for token in turn.tokens]
            return self._start() + kept + self._text_tokens(asked.question, first=not turns), None
        messages = self._system()
        for turn in turns:
            messages.append({"role": "user", "content": with_images(turn.question, len(turn.pictures))})
            messages.append({"role": "assistant", "content": turn.answer})
        messages.append({"role": "user", "content": with_images(asked.question, len(asked.pictures))})
        # The turns fit into the context. So does the question, unless `ask` is about to report its size.
        most = MOST_CONTEXTS * self.context
        text = prompt_text(self._process, self.tokenizer, messages, most=most)
        if not pictures:
            return tokens_of(self.tokenizer, text, most=most), None
        if self.images is None:
            raise ImageError("the model was loaded without its vision part. Start with --images.")
        seen = self.images.prompt(text, pictures)
        return seen.ids, seen

    def _system(self) -> list[dict[str, Any]]:
        return [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]

    def _without_ends(self, made: list[int]) -> list[int]:
        ends = self.tokenizer.eos_token_ids
        return [token for token in made if token not in ends]

    def _system_tokens(self, question: str, tokens: list[int]) -> int:
        if not (self._system() and self.has_template):
            return 0
        messages = [*self._system(), {"role": "user", "content": question}]
        return system_tokens(self._process, self.tokenizer, messages, tokens, most=MOST_CONTEXTS * self.context)

    def _start(self) -> list[int]:
        """The token that begins every text, if the tokenizer has one."""
        begin = encode_prompt(self.tokenizer, "")[:1]
        return begin if begin == [self.tokenizer.bos_token_id] else []

    def _text_tokens(self, question: str, first: bool) -> list[int]:
        if first:
            tokens = encode_prompt(self.tokenizer, question)  # the same tokens as in `generate`
            start = self._start()
            return tokens[len(start) :] if tokens[: len(start)] == start else tokens
        text = question if question[:1].isspace() else f" {question}"
        return encode(self.tokenizer, text, special_tokens=False)
