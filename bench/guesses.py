"""How early can a layer's neurons or experts be guessed? Applies its predictor or router to earlier hidden states."""

from __future__ import annotations

import argparse
from typing import Any

from . import experts_ahead, neurons_ahead, traces
from .tools.report import finish, require_plots


def add_arguments(parser: argparse.ArgumentParser) -> None:
    traces.add_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    with traces.opened(arguments, print) as traced:
        kind: Any = experts_ahead if traces.is_mixture(traced.model) else neurons_ahead
        result = kind.measure(traced, arguments.text)
    finish(
        arguments.output,
        "lookahead",
        result,
        lambda figure: neurons_ahead.draw(figure, result["mean"], kind.SHARES),
        size=(8, 4),
        show=lambda: kind.show(result),
    )
