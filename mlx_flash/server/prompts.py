"""A request's messages or prompt -> token ids, within the planned context."""

from __future__ import annotations

import threading
from typing import Any

from .engine import Engine
from .errors import ApiError
from .openai_api import ChatRequest, CompletionRequest

_encoding = threading.Lock()  # a tokenizer is not made for two threads that encode


def encode_chat(tokenizer: Any, request: ChatRequest) -> list[int]:
    """By the model's chat template. Without one, the texts one below the other: the model goes on from there."""
    from ..generation import encode_prompt

    messages = [message.plain() for message in request.messages]
    with _encoding:
        if tokenizer.chat_template is None:
            return encode_prompt(tokenizer, "\n\n".join(message["content"] for message in messages))
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        except Exception as error:  # templates are programs, and raise what they like
            raise ApiError(400, f"the model's chat template refuses: {error}.", param="messages") from None
    return list(ids)


def encode_completion(tokenizer: Any, request: CompletionRequest) -> list[int]:
    from ..generation import encode_prompt

    prompt = request.one_prompt()
    with _encoding:
        return encode_prompt(tokenizer, prompt)


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
    least = asked or 1
    if len(ids) + least > context:
        more = "start the server with a larger --context" if context < flash.positions else "the model has no more"
        answer = "at least 1 is" if asked is None else f"{asked} are" if asked > 1 else "1 is"
        raise ApiError(
            400,
            f"the prompt has {len(ids)} tokens and {answer} asked for, together {len(ids) + least}; the planned "
            f"context has {context}. Shorten the prompt, ask for fewer (max_tokens), or get more: {more}.",
            param=param,
            code="context_length_exceeded",
        )
    return asked or context - len(ids)
