"""Encodes a request's messages or prompt to token ids that fit the planned context."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import ChatTemplateError, FlashError
from ..flash.system import large_memory_given_back
from ..text.encoding import TooManyTokens, too_long
from .api_errors import ApiError, PromptTooLong
from .apis.image_parts import taken_out
from .apis.question import Dialogue
from .engine import Engine

if TYPE_CHECKING:
    from ..text.image_prompts import ImagePrompt

_encoding = threading.Lock()  # A tokenizer must not encode in two threads at once.


def encode_dialogue(engine: Engine, dialogue: Dialogue) -> tuple[list[int], ImagePrompt | None]:
    """The token ids of the messages, by the model's chat template, and the prompt with its images if it has any.

    Without a template, the texts are joined by blank lines, and the model continues the last one. Raises ApiError.
    """
    from ..text.chat_template import has_chat_template, prompt_text, takes_tools, tokens_of
    from ..text.generation import encode_prompt
    from ..text.image_prompts import processor_of
    from ..text.images import check_count, decode

    tokenizer, context = engine.tokenizer, engine.model.flash.plan.context
    (messages, files), tools = taken_out(dialogue.messages), dialogue.usable_tools
    if files and engine.model.flash.images is None:
        raise ApiError(
            400,
            "this model reads text only. Leave the images out, or start the server with --images and a model that "
            "reads images.",
            param=dialogue.param,
            code="no_images",
        )
    if not has_chat_template(tokenizer):
        for name, value in {"tools": tools, "chat_template_kwargs": dialogue.variables}.items():
            if value:
                message = f"this model has no chat template, so {name} cannot be used. Choose a model that has one."
                raise ApiError(400, message, param=name)
        if files:
            message = "this model has no chat template, so it has no place for images. Choose a model that has one."
            raise ApiError(400, message, param=dialogue.param)
        text = "\n\n".join(message["content"] for message in messages)
        with _refusals(engine, dialogue.param), _encoding:
            return encode_prompt(tokenizer, text, most=context), None
    with _refusals(engine, dialogue.param):
        if tools and not takes_tools(tokenizer, tools):
            raise ApiError(
                400,
                "this model's chat template does not support tools. Choose a model that knows tools, or send none.",
                param="tools",
            )
        prompt = prompt_text(
            engine.templates,
            tokenizer,
            messages,
            most=context,
            tools=tools,
            variables=engine.template_variables | dialogue.template_variables,
            generation_prompt=dialogue.generation_prompt,
            continues=dialogue.continues,
        )
        with _encoding:
            if not files:
                return tokens_of(tokenizer, prompt, most=context), None
            check_count(len(files))
            with large_memory_given_back():  # The engine, which does so after a prompt, may never see this one.
                pictures = [decode(file, f"image {number}") for number, file in enumerate(files, 1)]
                seen = processor_of(engine.model).prompt(prompt, pictures)
            return seen.ids, seen


def system_tokens_of(engine: Engine, dialogue: Dialogue, ids: list[int]) -> int:
    """How many of the first tokens of a dialogue's prompt belong to its system prompt. ids: the prompt's tokens."""
    from ..text.chat_template import has_chat_template, system_tokens

    if not has_chat_template(engine.tokenizer):
        return 0
    with _encoding:
        return system_tokens(
            engine.templates,
            engine.tokenizer,
            dialogue.messages,
            ids,
            most=engine.model.flash.plan.context,
            tools=dialogue.usable_tools,
            variables=engine.template_variables | dialogue.template_variables,
        )


def encode_prompt_of(engine: Engine, prompt: str | list[int]) -> list[int]:
    """The token ids of a prompt. Raises ApiError."""
    from ..text.generation import encode_prompt

    if not isinstance(prompt, str):
        return prompt
    with _refusals(engine, "prompt"), _encoding:
        return encode_prompt(engine.tokenizer, prompt, most=engine.model.flash.plan.context)


@contextlib.contextmanager
def _refusals(engine: Engine, param: str) -> Iterator[None]:
    """Raises errors of a prompt, or of the model's files that encode it, as ApiError."""

    try:
        yield
    except TooManyTokens as error:
        raise _too_long(engine, f"more than {error.at_least} tokens", error.at_least, param) from None
    except ChatTemplateError as error:
        if engine.templates.closed:
            raise ApiError(503, "the server is stopping.", code="stopping") from None
        raise ApiError(400, str(error), param=param, code="chat_template") from None
    except FlashError as error:
        raise ApiError(400, str(error), param=param) from None


def room_for(engine: Engine, ids: list[int], asked: int | None, param: str) -> int:
    """Maximum tokens of the answer: `asked`, or as many as fit into the planned context (None).

    Raises ApiError for a prompt that leaves no room for a token.
    """
    flash = engine.model.flash
    context, vocabulary = flash.plan.context, flash.vocabulary
    if not ids:
        raise ApiError(400, "the prompt is empty: expected at least one token.", param=param)
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise ApiError(
            400, f"the prompt has token ids from {min(ids)} to {max(ids)}, expected 0 to {vocabulary - 1}.", param=param
        )
    if len(ids) >= context:
        raise _too_long(engine, f"{len(ids)} tokens, the answer needs at least 1", len(ids), param)
    room = context - len(ids)
    return room if asked is None else min(asked, room)


def _too_long(engine: Engine, found: str, tokens: int, param: str) -> ApiError:
    message = too_long(engine.model.flash, found, "start the server with a larger --context")
    return PromptTooLong(message, param, tokens, engine.model.flash.plan.context - 1)
