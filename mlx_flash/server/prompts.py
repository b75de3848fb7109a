"""A request's messages or prompt -> token ids, within the planned context."""

from __future__ import annotations

import threading

from .engine import Engine
from .errors import ApiError
from .openai_api import ChatRequest, CompletionRequest

PART_CHARACTERS = 1 << 15  # of a text that are encoded at once as long as it may be too long
_encoding = threading.Lock()  # a tokenizer is not made for two threads that encode


def encode_chat(engine: Engine, request: ChatRequest) -> list[int]:
    """By the model's chat template. Without one, the texts one below the other: the model goes on from there."""
    from ..generation import encode_prompt

    tokenizer = engine.tokenizer
    messages = [message.plain() for message in request.messages]
    text = "\n\n".join(message["content"] for message in messages)
    with _encoding:
        refuse_if_far_too_long(engine, text, "messages")
        if tokenizer.chat_template is None:
            return encode_prompt(tokenizer, text)
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        except Exception as error:  # templates are programs, and raise what they like
            raise ApiError(400, f"the model's chat template refuses: {error}.", param="messages") from None
    return list(ids)


def encode_completion(engine: Engine, request: CompletionRequest) -> list[int]:
    from ..generation import encode_prompt

    prompt = request.one_prompt()
    if not isinstance(prompt, str):
        return prompt
    with _encoding:
        refuse_if_far_too_long(engine, prompt, "prompt")
        return encode_prompt(engine.tokenizer, prompt)


def refuse_if_far_too_long(engine: Engine, text: str, param: str) -> None:
    """Raises ApiError for a long text of more tokens than the planned context, which it counts part by part.

    A tokenizer takes some hundred bytes for every character, for all of the text at once.
    """
    if len(text) <= PART_CHARACTERS:
        return
    context, count = engine.model.flash.plan.context, 0
    for begin in range(0, len(text), PART_CHARACTERS):
        part = text[begin : begin + PART_CHARACTERS]
        count += len(engine.tokenizer.encode(part, add_special_tokens=False)) - 1  # where it is cut, a token may be two
        if count > context:
            raise _too_long(engine, f"more than {count} tokens", param)


def room_for(engine: Engine, ids: list[int], asked: int | None, param: str) -> int:
    """How many tokens the answer may have. Raises ApiError where prompt and answer exceed the planned context."""
    flash = engine.model.flash
    context, vocabulary = flash.plan.context, flash.vocabulary
    if not ids:
        raise ApiError(400, "the prompt is empty: expected at least one token.", param=param)
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise ApiError(
            400, f"the prompt has token ids from {min(ids)} to {max(ids)}, expected 0 to {vocabulary - 1}.", param=param
        )
    if len(ids) + (asked or 1) > context:
        answer = "at least 1 is" if asked is None else f"{asked} are" if asked > 1 else "1 is"
        together = len(ids) + (asked or 1)
        raise _too_long(engine, f"{len(ids)} tokens and {answer} asked for, together {together}", param)
    return asked or context - len(ids)


def _too_long(engine: Engine, found: str, param: str) -> ApiError:
    flash = engine.model.flash
    more = "start the server with a larger --context" if flash.plan.context < flash.positions else "the model has none"
    return ApiError(
        400,
        f"the prompt has {found}; the planned context has {flash.plan.context}. Shorten the prompt, ask for less "
        f"(max_tokens), or get more context: {more}.",
        param=param,
        code="context_length_exceeded",
    )
