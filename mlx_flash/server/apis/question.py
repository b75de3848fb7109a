"""What a request of any API asks of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...text.sampling import Sampling


@dataclass(frozen=True)
class Structure:
    """What the answer's text must be. value: a JSON schema, or a grammar. param: the request's parameter."""

    kind: Literal["json_object", "json_schema", "lark", "regex"]
    value: Any
    param: str


@dataclass(frozen=True)
class Dialogue:
    """Messages to be answered.

    messages, tools: in OpenAI's form, each content one text, or parts if it has images (image_parts.py). one_call:
    whether the answer ends after one call. variables: for the template. thinks: whether the model may think (None: as
    the template does); a model without a template does not. param: the name of the request's parameter with the
    messages.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] = "auto"
    tool_name: str | None = None  # the tool that must be called
    one_call: bool = False
    variables: dict[str, Any] = field(default_factory=dict)
    thinks: bool | None = None
    generation_prompt: bool = True
    continues: bool = False  # whether the last message is the beginning of the answer
    structure: Structure | None = None
    thinking_tokens: int | None = None  # None: the server's default
    param: str = "messages"

    @property
    def template_variables(self) -> dict[str, Any]:
        return self.variables if self.thinks is None else {"enable_thinking": self.thinks} | self.variables

    @property
    def usable_tools(self) -> list[dict[str, Any]] | None:
        return None if self.tool_choice == "none" else self.tools or None


@dataclass(frozen=True)
class Question:
    """What a request asks: to answer a dialogue, or to continue each of several prompts. Without a prompt it asks only
    whether the model is loaded."""

    of: Dialogue | Sequence[str | list[int]]
    max_tokens: int | None  # None: as many as fit
    sampling: Sampling
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    answers: int = 1  # for each prompt
    echo: bool = False  # whether the answer to a prompt begins with it
