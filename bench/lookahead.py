"""How early can a layer's neurons, or experts, be guessed: its own predictor, or router, applied to earlier states."""

from __future__ import annotations

import argparse

from . import experts_ahead, neurons_ahead, traces
from .tools.report import require_plots


def add_arguments(parser: argparse.ArgumentParser) -> None:
    traces.add_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    with traces.opened(arguments, print) as subject:
        kind = experts_ahead if traces.is_mixture(subject.model) else neurons_ahead
        kind.measure(subject, arguments)
