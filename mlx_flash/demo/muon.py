"""Muon, an optimiser for the matrices inside a model's layers (github.com/KellerJordan/Muon).

It replaces each matrix's momentum by the nearest orthogonal matrix, which Newton-Schulz iterations approximate. On a
small corpus it needs far fewer steps than AdamW. Embeddings, biases and norms stay with AdamW.
"""

from __future__ import annotations

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic whose repetition brings singular values near 1


class Muon:
    """The optimiser for `parameters`, matrices of any few shapes. Matrices of one shape are handled as one stack."""

    def __init__(self, parameters: list, weight_decay: float) -> None:
        groups: dict[tuple[int, ...], list] = {}
        for parameter in parameters:
            groups.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
        self.groups = list(groups.values())
        self.weight_decay = weight_decay
        self.momenta: list = [None] * len(self.groups)

    def step(self, learning_rate: float) -> None:
        """Applies the gradients and drops them. An update is as large as AdamW's with the same learning rate."""
        import torch

        with torch.no_grad():
            for index, matrices in enumerate(self.groups):
                gradient = torch.stack([m.grad if _is_wide(m) else m.grad.T for m in matrices])
                momentum = self.momenta[index]
                momentum = torch.zeros_like(gradient) if momentum is None else momentum
                self.momenta[index] = momentum = momentum.lerp(gradient, 1 - MOMENTUM)
                update = orthogonal(gradient.lerp(momentum, MOMENTUM))
                scale = 0.2 * max(gradient.shape[1:]) ** 0.5 * learning_rate
                updates = [(u if _is_wide(m) else u.T).float() for m, u in zip(matrices, update, strict=True)]
                torch._foreach_mul_(matrices, 1 - learning_rate * self.weight_decay)
                torch._foreach_add_(matrices, updates, alpha=-scale)
                for matrix in matrices:
                    matrix.grad = None


def orthogonal(stack):
    """The nearest matrices with orthonormal rows, roughly, in bfloat16. stack: (N, R, C) with R <= C."""
    first, third, fifth = COEFFICIENTS
    found = stack.bfloat16()
    found = found / (found.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = found @ found.mT
        found = first * found + (third * square + fifth * (square @ square)) @ found
    return found


def _is_wide(matrix) -> bool:
    return matrix.shape[0] <= matrix.shape[1]
