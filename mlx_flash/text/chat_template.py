"""Applies the model's chat template: messages -> prompt. All of this package's prompts from messages come from here.

A template that came with the model is rendered by transformers' own function, in a process that can be killed. A
template in the code of mlx-lm or transformers (DeepSeek V3.2) is called here, as mlx-lm calls it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

from ..defaults import PREFILL_TOKENS
from ..errors import ChatTemplateError, ChatTemplateFailure
from ..source.model_kind import error_line
from .encoding import TooManyTokens, common_prefix, encode
from .template_process import TemplateProcess

LEAST_CHARACTERS = 1 << 22  # limit of a prompt's characters, or CHARACTERS_PER_TOKEN for each token if that is more
CHARACTERS_PER_TOKEN = 32
# Arguments of the function that applies a template; a user's variables may not have their names.
RESERVED_VARIABLES = {
    *("messages", "conversation", "conversations", "tools", "chat_template", "tokenizer_kwargs", "tokenize"),
    *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "return_dict"),
    *("return_tensors", "padding", "truncation", "max_length", "sanitize_control_tokens"),
}
SYSTEM_ROLES = ("system", "developer")

Message = dict[str, Any]


def with_images(text: str, images: int) -> str | list[dict[str, str]]:
    """The content of a message with so many images before its text, as chat templates take it."""
    return [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}] if images else text


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the model has a chat template, in the checkpoint or in code. tokenizer: mlx-lm's TokenizerWrapper."""
    return tokenizer.chat_template is not None or tokenizer.has_chat_template


def takes_tools(tokenizer: Any, tools: list[dict[str, Any]]) -> bool:
    """Whether the template that is used with these tools mentions tools."""
    return _in_code(tokenizer) or "tools" in _template_of(tokenizer, tools)


def prompt_ids(process: TemplateProcess, tokenizer: Any, messages: Sequence[Message], *, most: int) -> list[int]:
    """The token ids of `prompt_text`, at most `most`. Raises the errors of `prompt_text` and `tokens_of`."""
    return tokens_of(tokenizer, prompt_text(process, tokenizer, messages, most=most), most=most)


def prompt_text(
    process: TemplateProcess,
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    most: int,
    tools: list[dict[str, Any]] | None = None,
    variables: dict[str, Any] | None = None,
    generation_prompt: bool = True,
    continues: bool = False,
) -> str | list[int]:
    """The prompt as a text, or as token ids if the tokenizer's own method makes them. Any thread may call it.

    Args:
        process: the process that renders templates.
        tokenizer: mlx-lm's TokenizerWrapper; it has a chat template.
        messages: in OpenAI's form, each content one text, or parts of text and marks of images (`with_images`).
            Arguments of tool calls may be JSON texts or objects.
        most: tokens that the prompt may have. It limits the text only roughly.
        tools: JSON schemas in OpenAI's form.
        variables: further variables for the template, such as enable_thinking.
        generation_prompt: whether the prompt ends with the beginning of an answer.
        continues: whether the last message is the beginning of the answer; then there is no generation prompt. If it
            has `reasoning_content` and no content, the model continues these thoughts.

    Raises ChatTemplateFailure for errors of the template, ChatTemplateError if it exceeds a limit.
    """

    if continues and not messages[-1].get("content"):
        thoughts = str(messages[-1].get("reasoning_content") or "")
        before = prompt_text(process, tokenizer, messages[:-1], most=most, tools=tools, variables=variables)
        return _with_thoughts(tokenizer, before, thoughts)

    def make(messages: Sequence[Message]) -> str | list[int]:
        options: dict[str, Any] = {"tools": tools or None, "add_generation_prompt": generation_prompt and not continues}
        if continues:
            options["continue_final_message"] = True
        if _in_code(tokenizer):
            return _call(tokenizer, messages, options | (variables or {}))
        return _render(process, tokenizer, messages, options, variables or {}, most)

    try:
        return make(_with_arguments(messages, _as_object))
    except ChatTemplateFailure:
        if any(message.get("tool_calls") for message in messages):
            # Some templates put the JSON text of the arguments into the prompt. If this one fails with it too, the
            # first error is raised.
            with contextlib.suppress(ChatTemplateFailure):
                return make(_with_arguments(messages, _as_text))
        raise


def _with_thoughts(tokenizer: Any, prompt: str | list[int], thoughts: str) -> str | list[int]:
    """A prompt that ends within the thoughts before the answer. prompt: ends where the answer begins."""
    if not tokenizer.has_thinking:
        raise ChatTemplateError("this model's thoughts cannot be continued. Ask again with more tokens.")
    opening = tokenizer.think_start
    text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    added = thoughts if text.rstrip().endswith(opening) else f"{opening}\n{thoughts}"
    if isinstance(prompt, str):
        return prompt + added
    return [*prompt, *(int(token) for token in tokenizer.encode(added, add_special_tokens=False))]


def tokens_of(tokenizer: Any, prompt: str | list[int], *, most: int) -> list[int]:
    """The token ids of `prompt_text`'s result; for one thread at a time. Raises TooManyTokens, TokenizerError."""
    return prompt if isinstance(prompt, list) else encode(tokenizer, prompt, special_tokens=False, most=most)


def system_tokens(
    process: TemplateProcess,
    tokenizer: Any,
    messages: Sequence[Message],
    ids: list[int],
    *,
    most: int,
    tools: list[dict[str, Any]] | None = None,
    variables: dict[str, Any] | None = None,
) -> int:
    """How many of a prompt's first tokens belong to the system prompt: other conversations begin with them, too.

    They are those that the prompt has in common with another question after the same leading system messages and
    tools. 0 for a prompt of at most one chunk, for which it does not matter, and if the template refuses that question.

    ids: the prompt's tokens, from `prompt_text` with these messages, tools and variables. For one thread at a time.
    """
    if len(ids) <= PREFILL_TOKENS:
        return 0
    leading = list(itertools.takewhile(lambda message: message.get("role") in SYSTEM_ROLES, messages))
    asked = next((str(message.get("content", "")) for message in messages[len(leading) :]), "")
    other = "?" if not asked.startswith("?") else "!"
    question = [*leading, {"role": "user", "content": other}]
    try:
        text = prompt_text(process, tokenizer, question, most=most, tools=tools, variables=variables)
        return common_prefix(ids, tokens_of(tokenizer, text, most=most))
    except (ChatTemplateError, TooManyTokens):
        return 0


def _in_code(tokenizer: Any) -> bool:
    from transformers import PreTrainedTokenizerBase

    own = type(tokenizer._tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    return own or tokenizer._chat_template is not None


def _call(tokenizer: Any, messages: Sequence[Message], options: dict[str, Any]) -> str | list[int]:
    """The prompt from code: a text from a template of mlx-lm, or token ids from the tokenizer's own method."""
    gives_text = tokenizer._chat_template is not None
    try:
        made = tokenizer.apply_chat_template(list(messages), tokenize=not gives_text, **options)
    except Exception as error:
        raise ChatTemplateFailure(f"the model's chat template cannot be applied: {error_line(error)}.") from None
    return str(made) if gives_text else [int(token) for token in made]


def _template_of(tokenizer: Any, tools: list[dict[str, Any]] | None) -> str:
    try:
        template = tokenizer.get_chat_template(None, tools or None)
    except ValueError:  # There are several templates, and none is the default.
        names = ", ".join(sorted(map(str, tokenizer.chat_template)))
        raise ChatTemplateFailure(f"the model has several chat templates ({names:.200}) but no default.") from None
    if not isinstance(template, str):
        raise ChatTemplateFailure(f"the model's chat template is {template!r:.80}, expected a text.")
    return template


def _render(
    process: TemplateProcess,
    tokenizer: Any,
    messages: Sequence[Message],
    options: dict[str, Any],
    variables: dict[str, Any],
    most: int,
) -> str:
    template = _template_of(tokenizer, options["tools"])
    if "developer" not in template:
        messages = [m | {"role": "system"} if m.get("role") == "developer" else m for m in messages]
    # Values of None are left out, as transformers does; mlx-lm knows whether the model has tokens for thoughts.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    arguments = tokenizer.special_tokens_map | {"enable_thinking": tokenizer.has_thinking} | variables | options

    def render(messages: Sequence[Message]) -> str:
        characters = max(LEAST_CHARACTERS, CHARACTERS_PER_TOKEN * most)
        return process.render(arguments | {"conversations": [messages], "chat_template": template}, characters)

    text = render(messages)
    if any(isinstance(message.get("content"), list) for message in messages):
        return text
    if (asked := _last_question(messages)) in text:
        return text
    # Some templates expect contents that are lists of parts, and ignore a plain text.
    try:
        of_parts = render([m | {"content": [{"type": "text", "text": m.get("content", "")}]} for m in messages])
    except ChatTemplateFailure:
        return text
    return of_parts if asked in of_parts else text


def _last_question(messages: Sequence[Message]) -> str:
    asked = [str(message.get("content", "")) for message in messages if message.get("role") == "user"]
    return asked[-1].strip() if asked else ""


def _with_arguments(messages: Sequence[Message], form: Callable[[Any], Any]) -> list[Message]:
    """The messages with the arguments of their tool calls converted by `form`."""

    def changed(call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or "arguments" not in function:
            return call
        return call | {"function": function | {"arguments": form(function["arguments"])}}

    return [
        message | {"tool_calls": [changed(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _as_object(arguments: Any) -> Any:
    """The object in a JSON text; any other value unchanged."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
