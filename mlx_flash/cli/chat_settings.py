"""The settings of a chat, which /set shows and changes."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from ..errors import UsageError
from ..text.generation_config import GenerationConfig
from ..text.sampling import FLAGS, RANGES, Sampling, sampling_of
from .printable import lacks_styles

ABOUT = {  # name -> what it does
    "temperature": "0 is greedy",
    "top-p": "nucleus sampling, 1 is off",
    "top-k": "sample among the k likeliest, 0 is off",
    "min-p": "drop tokens below this share of the likeliest, 0 is off",
    "repetition-penalty": "1 is off",
    "presence-penalty": "per token that occurred, 0 is off",
    "frequency-penalty": "per time that it occurred, 0 is off",
    "seed": "of every answer, or random",
    "max-tokens": "of one answer",
    "markdown": "show answers as Markdown",
    "thoughts": "show what the model thinks",
}
SWITCHES = {"on": True, "off": False}
DEFAULT, RANDOM = "default", "random"


@dataclass(frozen=True)
class _Value:
    value: Any
    source: str


class ChatSettings:
    """The values of all settings, and where each comes from."""

    def __init__(self, arguments: argparse.Namespace, model: GenerationConfig, template: bool) -> None:
        """template: whether the model has a chat template; else the conversation is one text, and not Markdown."""
        flags = {name: flag for flag, name in FLAGS.items()}
        start = sampling_of(arguments, model)
        values = {name: getattr(start, name) for name in RANGES if name != "max_tokens"}
        values["max_tokens"] = arguments.max_tokens
        self._first: dict[str, _Value] = {}
        for name, value in values.items():
            source = "default"
            if name in flags and getattr(arguments, flags[name]) is not None:
                source = f"--{flags[name].replace('_', '-')}"
            elif name in model.sampling:
                source = "the model"
            self._first[name.replace("_", "-")] = _Value(value, source)
        plain = lacks_styles(sys.stdout) if template else "the model has no chat template"
        self._first["markdown"] = _Value(plain is None, plain or "default")
        self._first["thoughts"] = _Value(True, "default")
        self._values = dict(self._first)
        self._base = start

    @property
    def sampling(self) -> Sampling:
        names = {name: name.replace("-", "_") for name in self._values}
        sampled = {field: self._values[name].value for name, field in names.items() if hasattr(self._base, field)}
        return replace(self._base, **sampled)

    @property
    def max_tokens(self) -> int:
        return int(self._values["max-tokens"].value)

    @property
    def markdown(self) -> bool:
        return bool(self._values["markdown"].value)

    @property
    def thoughts(self) -> bool:
        return bool(self._values["thoughts"].value)

    def set(self, name: str, text: str) -> str:
        """Sets a value, or with "default" the first one again. Returns the setting's line.

        name: may be shortened. Raises UsageError.
        """
        name = self._full(name.replace("_", "-"))
        self._values[name] = self._first[name] if text == DEFAULT else _Value(_parsed(name, text), "/set")
        return self._line(name)

    def line(self, name: str) -> str:
        """A setting, its value, where that comes from, and what it does. name: may be shortened. Raises UsageError."""
        return self._line(self._full(name.replace("_", "-")))

    def table(self) -> str:
        return "\n".join([f"{'setting':<19}{'value':<8}{'from':<15}", *(self._line(name) for name in ABOUT)])

    def _line(self, name: str) -> str:
        shown, source = _written(self._values[name].value), self._values[name].source
        return f"{name:<19}{shown:<8}{source:<15}{ABOUT[name]}"

    def _full(self, name: str) -> str:
        found = [name] if name in ABOUT else [known for known in ABOUT if known.startswith(name)]
        if len(found) == 1:
            return found[0]
        near = get_close_matches(name, ABOUT, 1)
        hint = f"did you mean {' or '.join(found or near)}? " if found or near else ""
        raise UsageError(f"there is no setting {name}; {hint}/set lists them.")


def _written(value: Any) -> str:
    if value is None:
        return RANDOM
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value) if isinstance(value, int) else f"{value:g}"


def _parsed(name: str, text: str) -> Any:
    """The value that a text means. Raises UsageError."""
    if name in ("markdown", "thoughts"):
        if text not in SWITCHES:
            raise UsageError(f"{name} is {text!r}, expected on or off.")
        reason = lacks_styles(sys.stdout)
        if name == "markdown" and SWITCHES[text] and reason:
            raise UsageError(f"Markdown cannot be shown: {reason}.")
        return SWITCHES[text]
    if name == "seed" and text == RANDOM:
        return None
    range_ = RANGES[name.replace("-", "_")]
    expected = f"{range_.expected}{f', or {RANDOM}' if name == 'seed' else ''}"
    try:
        value = int(text) if range_.whole else float(text)
    except ValueError:
        kind = "a whole number" if range_.whole else "a number"
        raise UsageError(f"{name} is {text!r}, expected {kind}: {expected}.") from None
    if not range_.holds(value):
        raise UsageError(f"{name} is {text}, expected {expected}.")
    return value
