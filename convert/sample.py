"""The activations of a layer that predictors are made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .numpy_matrix import NumpyMatrix


@dataclass(frozen=True)
class Sample:
    """The activations of one layer on calibration text. N tokens, width D, F neurons; float32."""

    x: np.ndarray  # (N, D): the FFN's inputs
    before: np.ndarray  # (N, F): scores, above 0 if a neuron is active; without a gate, the pre-activations
    up: NumpyMatrix  # (F, D), as stored: the projection whose sign decides, which is the gate if there is one, else up
    up_bias: np.ndarray  # (F,): its bias minus the activation's threshold
    held_out: np.ndarray  # bool (N,): tokens for thresholds and reports, which are not used for training
