"""What predictors are made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .numpy_matrix import NumpyMatrix


@dataclass(frozen=True)
class Sample:
    """What one layer did on calibration text. N tokens, D the width, F neurons; float32."""

    x: np.ndarray  # (N, D): the FFN's inputs
    before: np.ndarray  # (N, F): scores, above 0 where a neuron is active; without a gate its pre-activations
    up: NumpyMatrix  # (F, D), as it is stored: the projection whose sign decides: the gate if there is one, else up
    up_bias: np.ndarray  # (F,): its bias, less the activation's threshold
    held_out: np.ndarray  # bool (N,): tokens that thresholds and reports come from, and training does not see
