"""Grammars of tool calls in a model's own format, such that mlx-lm's parser reads back a tool's name and its arguments.

Some formats cannot carry every schema. Then `tool_calls` raises GrammarError, which names tool_choice. A text in JSON
arguments may contain the format's end marker, spelled with other tokens. The caller has to look for the marker's token,
not for its text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import GrammarError
from .grammar import Grammar, Grammars, json_rule
from .json_schema import checked_schema
from .tool_formats import FORMATS, Lark, Unsupported, call_rule, check_types, regex_literal

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
JSON_FORMATS = ("json_tools", "kimi_k2", "mistral")


@dataclass(frozen=True)
class Tool:
    """One of OpenAI's function tools. parameters: a checked schema; None for any object."""

    name: str
    parameters: dict[str, Any] | None
    given: dict[str, Any]


def tool_calls(
    grammars: Grammars, tools: list[dict[str, Any]], *, name: str | None = None, several: bool = False
) -> Grammar:
    """An answer that is a call of a tool, for tool_choice "required". Arguments fit the tool's parameters.

    tools: in OpenAI's form. name: the only tool that may be called. several: whether more calls may follow.

    Raises GrammarError for an unknown name, for parameters that cannot be enforced, and for a model without a format
    for tools, or with one that cannot carry these parameters.
    """
    known = [_tool(tool, always=True) for tool in tools]
    chosen = [tool for tool in known if name in (None, tool.name)]
    if not chosen:
        names = ", ".join(tool.name for tool in known)
        raise GrammarError(f"tool_choice names the tool {name!r}, expected one of: {names or 'none is given'}.")
    return _grammar(grammars, chosen, whole=True, several=several)


def tool_body(grammars: Grammars, tools: list[dict[str, Any]], *, several: bool = False) -> Grammar:
    """What follows the start marker of a tool call, with the end marker, for tool_choice "auto".

    Arguments of tools with `strict` true fit their parameters. Others may have any arguments. several: whether more
    calls may follow before the end marker, in formats that allow it. Raises GrammarError like `tool_calls`.
    """
    chosen = [_tool(tool, always=False) for tool in tools]
    if not chosen:
        raise GrammarError("tools is empty, expected at least one.")
    return _grammar(grammars, chosen, whole=False, several=several)


def harmony_calls(
    grammars: Grammars, tools: list[dict[str, Any]], *, name: str | None = None
) -> tuple[Grammar, Grammar]:
    """Like `tool_calls`, for gpt-oss, which names the tool in the header of a message.

    Returns the grammars of the answer's first message, which may be the header of thoughts, and of a later one. A
    message ends with the arguments: the token that ends a call ends the answer as well.
    """
    chosen = [tool for tool in (_tool(tool, always=True) for tool in tools) if name in (None, tool.name)]
    if not chosen:
        raise GrammarError(f"tool_choice names the tool {name!r}, which is not among the tools.")
    made = []
    for beginning in ("", "<|start|>assistant"):
        lark = Lark(grammars.special_tokens())
        calls = []
        for tool in chosen:
            head = f"{beginning}<|channel|>commentary to=functions.{tool.name} <|constrain|>json<|message|>"
            calls.append(lark.rule(f"{lark.spelled(head)} {json_rule(_object(tool.parameters or {}))}"))
        thoughts = [] if beginning else [lark.spelled("<|channel|>analysis<|message|>")]
        text = " | ".join([*calls, *thoughts])
        made.append(grammars.lark("\n".join([*lark.rules, f"start: {text}"]), "the grammar of the tools"))
    return made[0], made[1]


def _tool(tool: Any, always: bool) -> Tool:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise GrammarError('a tool has no function with a name, expected {"type": "function", "function": {...}}.')
    name = function["name"]
    if not NAME.fullmatch(name):
        raise GrammarError(f"the tool name {name[:80]!r} has other characters than letters, digits, and any of _.-")
    if not always and function.get("strict") is not True:
        return Tool(name, None, tool)
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    return Tool(name, checked_schema(parameters, f"the schema of the tool {name!r}"), tool)


def _grammar(grammars: Grammars, tools: list[Tool], whole: bool, several: bool) -> Grammar:
    tokenizer = grammars.tokenizer
    parser = (getattr(tokenizer, "init_kwargs", None) or {}).get("tool_parser_type")
    start, end = getattr(tokenizer, "tool_call_start", None), getattr(tokenizer, "tool_call_end", None)
    if not parser or start is None:
        raise GrammarError(
            "tool_choice cannot be enforced: this model has no known format for tool calls. Use tool_choice 'auto' "
            "without strict tools."
        )
    if parser not in FORMATS and parser not in JSON_FORMATS:
        raise GrammarError(f"tool_choice cannot be enforced: no grammar is known for this model's format, {parser!r}.")
    lark = Lark(grammars.special_tokens())
    rules = []
    for tool in tools:
        try:
            rules.append(_call(lark, parser, tool, tokenizer))
        except Unsupported as error:
            raise GrammarError(
                f"tool_choice cannot be enforced for the tool {tool.name!r}: this model's format for tool calls "
                f"({parser}) does not carry {error}. Describe it with one plain type, or do not ask for it."
            ) from None
    call = lark.rule(" | ".join(rules))
    text = _answer(lark, parser, call, start, end or "", whole, several, _has_arguments_token(grammars))
    return grammars.lark("\n".join([*lark.rules, f"start: {text}"]), "the grammar of the tools")


def _call(lark: Lark, parser: str, tool: Tool, tokenizer: Any) -> str:
    """The rule of one call of this tool. Raises Unsupported."""
    if parser in FORMATS:
        form = FORMATS[parser]
        if parser == "function_gemma" and not re.fullmatch(r"\w+", tool.name):
            raise Unsupported("its name")
        if tool.parameters is not None:
            rule = call_rule(lark, form, tool.name, tool.parameters)
            check_types(form, tool.name, tool.parameters, lambda text: tokenizer.tool_parser(text, [tool.given]))
            return rule
        return call_rule(lark, form, tool.name, None)
    arguments = json_rule({"type": "object"} if tool.parameters is None else _object(tool.parameters))
    if parser == "kimi_k2":
        before = lark.spelled(f"<|tool_call_begin|>functions.{tool.name}:")
        middle = lark.spelled("<|tool_call_argument_begin|>")
        return lark.rule(f"{before} /[0-9]{{1,2}}/ {middle} {arguments} {lark.spelled('<|tool_call_end|>')}")
    if parser == "mistral" and "[ARGS]" in (lark.special.keys() | {_template(tokenizer)[1]}):
        return lark.rule(f"{lark.spelled(tool.name + '[ARGS]')} {arguments}")
    name = regex_literal(tool.name)
    return lark.rule(f'/\\{{"name": ?"{name}", ?"arguments": ?/ {arguments} "}}"')


def _object(schema: dict[str, Any]) -> dict[str, Any]:
    """The parameters as a schema of objects only: a call's arguments are an object, whatever else the schema allows."""
    if schema.get("type") == "object":
        return schema
    if "type" in schema or "$ref" in schema:
        raise Unsupported("parameters that are not described as one object")
    return {"type": "object", **schema}


def _answer(lark: Lark, parser: str, call: str, start: str, end: str, whole: bool, several: bool, headers: bool) -> str:
    """The expression of the whole answer, or of what follows the start marker."""
    form = FORMATS.get(parser)
    opening, closing = (lark.spelled(marker) if marker else "" for marker in (start, end))
    opening = opening if whole else ""
    if parser == "mistral":
        again = f"({lark.spelled(start)} {call})*" if several else ""
        if headers:
            return f"{opening} {call} {again}"
        more = f"(/, ?/ {call})*" if several else ""
        return f'{opening} /\\[ ?/ {call} {more} "]"'
    if parser == "kimi_k2" or (form and form.around):
        before, after = form.around if form and form.around else ("", "")
        between = lark.spelled(form.next_call) if form and form.next_call else ""
        calls = f"{call} ({between} {call})*" if several else call
        return f"{opening} {lark.spelled(before)} {calls} {lark.spelled(after)} {closing}"
    body = f'"\\n"? {call} "\\n"?' if form is None else call
    one = f"{opening} {body} {closing}"
    if whole and several:
        return f'{one} ("\\n"? {one})*'
    return one


def _template(tokenizer: Any) -> tuple[str, str]:
    """The chat template, and "[ARGS]" if that occurs in it."""
    template = getattr(tokenizer, "chat_template", None)
    text = template if isinstance(template, str) else ""
    return text, "[ARGS]" if "[ARGS]" in text else ""


def _has_arguments_token(grammars: Grammars) -> bool:
    """Whether a Mistral model writes name[ARGS]{...}, else a JSON list of calls."""
    return "[ARGS]" in grammars.special_tokens() or bool(_template(grammars.tokenizer)[1])
