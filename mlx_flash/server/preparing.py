"""Turns what a request asks into jobs for the engine: token ids, room, grammars."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import FlashError
from .api_errors import ApiError
from .apis.question import Dialogue, Question
from .engine import Engine
from .jobs import Steering
from .prompts import encode_dialogue, encode_prompt_of, room_for, system_tokens_of


def jobs_for(engine: Engine, question: Question) -> list[dict[str, Any]]:
    """The arguments of a Job for each answer, in order. Takes long enough to need a thread. Raises ApiError."""
    of = question.of
    if isinstance(of, Dialogue):
        ids, seen = encode_dialogue(engine, of)
        prompts, param, continues = [ids], of.param, of.continues
        room_for(engine, ids, question.max_tokens, param)
        steering = steering_of(engine, of)
        system_tokens = 0 if seen else system_tokens_of(engine, of, ids)
    else:
        steering, system_tokens, seen = None, 0, None
        prompts, param, continues = [encode_prompt_of(engine, prompt) for prompt in of], "prompt", True
    jobs = []
    for ids in prompts:
        for number in range(question.answers):
            sampling = question.sampling
            if sampling.seed is not None and number:
                sampling = replace(sampling, seed=(sampling.seed + number) % 2**64)
            jobs.append(
                {
                    "ids": ids,
                    "max_tokens": room_for(engine, ids, question.max_tokens, param),
                    "sampling": sampling,
                    "stop": question.stop,
                    "top_logprobs": question.top_logprobs,
                    "continues": continues,
                    "steering": steering,
                    "echo": question.echo,
                    "system_tokens": system_tokens,
                    "seen": seen,
                }
            )
    return jobs


def steering_of(engine: Engine, dialogue: Dialogue) -> Steering:
    """How the answer to a dialogue is divided and steered. Raises ApiError for grammars that cannot be used."""
    from ..text.tool_grammar import harmony_calls, tool_body, tool_calls  # It imports mlx-lm.

    tools = dialogue.usable_tools
    forced = dialogue.tool_choice == "required"
    grammar = call_grammar = headers = None
    param = "tool_choice"
    strict = not forced and any(tool["function"].get("strict") for tool in tools or ())
    strict = strict and engine.tokenizer.has_tool_calling  # Other formats have no grammar.
    if (tools and forced) or dialogue.structure is not None or strict:
        engine.make_room_for_grammars()
    try:
        if tools and forced and engine.format.harmony:
            headers = harmony_calls(engine.grammars, tools, name=dialogue.tool_name)
        elif tools and forced:
            grammar = tool_calls(engine.grammars, tools, name=dialogue.tool_name, several=not dialogue.one_call)
        elif (structure := dialogue.structure) is not None:
            param = structure.param
            make = getattr(engine.grammars, structure.kind)
            grammar = make() if structure.kind == "json_object" else make(structure.value)
        param = "tools"
        if tools and strict:
            call_grammar = tool_body(engine.grammars, tools)
    except FlashError as error:
        raise ApiError(400, str(error), param=param, code="invalid_grammar") from None
    budget = dialogue.thinking_tokens if dialogue.thinking_tokens is not None else engine.thinking_tokens
    return Steering(
        tools=tools,
        one_call=dialogue.one_call,
        thinking_tokens=budget,
        grammar=grammar,
        call_grammar=call_grammar,
        may_think=(engine.template_variables | dialogue.template_variables).get("enable_thinking") is not False,
        may_call=tools is not None and not forced,
        headers=headers,
    )
