"""A stored predictor at one recall: its thresholds, and the quality that was measured there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UsageError


@dataclass(frozen=True)
class PredictorSetting:
    """A stored predictor with its threshold set for `target`, the share of the active neurons that it should find.

    The figures were measured on calibration text that it was not trained on, with one number per layer, in order.
    """

    kind: str
    target: float
    shifts: tuple[float, ...]  # added to the thresholds that are subtracted in the store's `c`
    caught: tuple[float, ...]  # share of the active neurons that are selected
    predicted: tuple[float, ...]  # share of all neurons that are selected
    active: tuple[float, ...]  # share of all neurons that are really active
    perplexity: dict[str, float] | None  # `dense`, `predicted`, `tokens`: measured with all layers at `made_for`
    made_for: float

    @staticmethod
    def of(kind: str, report: dict[str, Any], recall: float | None = None) -> PredictorSetting:
        """The setting of `kind` from its report in the manifest, interpolated linearly between targets of its table.

        Raises UsageError for a recall outside the table.
        """
        table, made_for = report["table"], report["target"]
        targets = table["recall"]
        target = made_for if recall is None else recall
        if not targets[0] <= target <= targets[-1]:
            raise UsageError(
                f"recall is {target}; this store's {kind} predictor expects {targets[0]} to {targets[-1]} "
                f"(it was made for {made_for}). Choose one in between, or --predictor exact, which misses nothing."
            )
        shifts, caught, predicted = (
            tuple(float(np.interp(target, targets, [float(value) for value in row])) for row in table[name])
            for name in ("threshold", "caught", "predicted")
        )
        return PredictorSetting(
            kind, target, shifts, caught, predicted, tuple(report["active"]), report["perplexity"], made_for
        )

    @property
    def measured(self) -> dict[str, Any]:
        """The figures of all layers together, as `--json` prints them. perplexity_change is relative, or None if it was
        not measured."""
        predicted, active = float(np.mean(self.predicted)), float(np.mean(self.active))
        change = None if self.perplexity is None else self.perplexity["predicted"] / self.perplexity["dense"] - 1
        return {
            "target": self.target,
            "recall": float(np.dot(self.caught, self.active) / max(np.sum(self.active), 1e-9)),
            "predicted": predicted,
            "active": active,
            "predicted_per_active": predicted / max(active, 1e-9),
            "perplexity_change": change,
            "perplexity_tokens": 0 if self.perplexity is None else int(self.perplexity["tokens"]),
            "perplexity_target": self.made_for,
        }

    def describe(self) -> str:
        """One line for the user."""
        its = self.measured
        text = (
            f"predictor {self.kind}, set to catch {self.target:.4g} of the active neurons: caught {its['recall']:.1%}, "
            f"chose {its['predicted']:.1%} of the neurons where {its['active']:.1%} are active "
            f"({its['predicted_per_active']:.2f}x)"
        )
        if its["perplexity_change"] is not None:
            at = "" if self.target == self.made_for else f" at {self.made_for:.4g}"
            text += f", perplexity {its['perplexity_change']:+.2%}{at} (on {its['perplexity_tokens']} held-out tokens)"
        return text
