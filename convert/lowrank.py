"""The paper's predictor (section 3.1): x A B + c, with the smallest rank that is enough for a layer. NumPy, seeded."""

from __future__ import annotations

import numpy as np

from .sample import Sample

# A rank that chooses at most this many neurons per active one, at the target recall, is enough
# (bench/results/predictors.md).
CHOSEN_PER_ACTIVE = 2.0
LEAST_RANK = 8
RIDGE = 1e-3  # relative to the inputs' mean square
EPOCHS = 8
BATCH = 256

Factors = tuple[np.ndarray, np.ndarray, np.ndarray]  # a (D, r), b (r, F), c (F,), float32


def largest_rank(memory_bytes: int, rank_bytes: int) -> int:
    """The largest rank that fits: a multiple of LEAST_RANK, and at least that. rank_bytes: size of a rank of 1."""
    fits = memory_bytes // rank_bytes
    return max(LEAST_RANK, fits - fits % LEAST_RANK)


def candidate_ranks(largest: int) -> list[int]:
    """The ranks to try: 8, 16, 24, 32, 48, 64, 96, 128, ..., and `largest` as the last."""
    powers = [LEAST_RANK << i for i in range(largest.bit_length())]
    return sorted({r for p in powers for r in (p, p + p // 2) if r < largest and r % LEAST_RANK == 0} | {largest})


def fit(sample: Sample, recall: float, largest: int, seed: int) -> Factors:
    """Factors of the smallest rank up to `largest` that chooses at most CHOSEN_PER_ACTIVE neurons per active one.

    Ranks are compared by the closed-form solution, which contains those of all smaller ranks. If none is enough, the
    largest is also trained with the logistic loss of the paper, and the better of the two is returned.
    """
    rng = np.random.default_rng(seed)
    a, b, mean, c = reduced_rank(sample, min(largest, *sample.up.shape), rng)
    for rank in candidate_ranks(b.shape[0]):
        own = a[:, :rank], b[:rank], c - mean @ a[:, :rank] @ b[:rank]
        chosen = chosen_per_active(sample, own, recall)
        if chosen <= CHOSEN_PER_ACTIVE:
            return own
    trained = train_logistic(sample, own, rng)
    return trained if chosen_per_active(sample, trained, recall) < chosen else own


def chosen_per_active(sample: Sample, factors: Factors, recall: float) -> float:
    """The number of chosen neurons per active one, at the threshold that finds the share `recall` of the active ones.

    It is measured on the half of the held-out tokens that thresholds come from.
    """
    a, b, c = factors
    half = int(sample.held_out.sum()) // 2
    x, active = sample.x[sample.held_out][:half], sample.before[sample.held_out][:half] > 0
    if not active.any():
        return 0.0
    score = x @ a @ b + c
    return float((score > np.quantile(score[active], 1 - recall)).sum() / active.sum())


def reduced_rank(sample: Sample, rank: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """The best low-rank approximation of the scores on the training tokens: score = c + (x - mean) a b.

    Returns a (D, r), b (r, F), mean (D,) and c (F,), the mean of the scores. b has orthonormal rows, the most important
    first (from a randomised range finder). So the first columns of a and rows of b are the best of that rank.
    """
    trained = ~sample.held_out
    mean, y = sample.x[trained].mean(axis=0), sample.before[trained]
    c = y.mean(axis=0)
    y -= c
    rank = min(rank, *y.shape)
    size = min(rank + 8, *y.shape)
    basis = np.linalg.qr(y.T @ rng.standard_normal((len(y), size), dtype=np.float32))[0]
    for _ in range(2):
        basis = y @ basis  # frees the larger basis before the next one is made
        basis = np.linalg.qr(y.T @ basis)[0]
    top = np.linalg.svd(y @ basis, full_matrices=False)[2][:rank]
    b = (basis @ top.T).T.copy()
    if is_projection(sample):  # The weights are known, so no regression is needed.
        return sample.up.sum_of_rows(b).T, b, mean, c
    x = sample.x[trained] - mean
    square = x.T @ x
    square[np.diag_indices_from(square)] += RIDGE * np.trace(square) / len(square)
    return np.linalg.solve(square, x.T @ (y @ b.T)), b, mean, c


def is_projection(sample: Sample) -> bool:
    """Whether the scores are x @ up.T + up_bias, apart from rounding."""
    x, before = sample.x[:16], sample.before[:16]
    return bool(np.allclose(sample.up.rows_dot(x) + sample.up_bias, before, atol=1e-3 * float(np.abs(before).max())))


def train_logistic(sample: Sample, factors: Factors, rng: np.random.Generator) -> Factors:
    """Trains `factors` with Adam on the mean logistic loss. Positives and negatives have the same total weight."""
    x, scores = sample.x[~sample.held_out], sample.before[~sample.held_out]
    y = scores > 0
    scale = np.float32(3.0) / max(scores.std(), np.float32(1e-6))  # gives a spread that suits a logistic loss
    del scores
    active = max(1e-4, float(y.mean()))
    weight_on, weight_off = np.float32(0.5 / active), np.float32(0.5 / (1 - min(active, 0.9999)))
    parameters = [factors[0] * scale, factors[1].copy(), factors[2] * scale]
    means = [np.zeros_like(p) for p in parameters]
    squares = [np.zeros_like(p) for p in parameters]
    # Learning rates in proportion to the scale of each matrix.
    rates = [np.float32(2e-3) * max(float(np.abs(p).mean()), 1e-3) * 10 for p in parameters[:2]] + [np.float32(2e-2)]
    steps = EPOCHS * -(-len(x) // BATCH)
    step = 0
    for _ in range(EPOCHS):
        order = rng.permutation(len(x))
        for begin in range(0, len(x), BATCH):
            rows = order[begin : begin + BATCH]
            batch, wanted = x[rows], y[rows]
            thin = batch @ parameters[0]  # (n, D) @ (D, r)
            score = thin @ parameters[1]  # (n, r) @ (r, F)
            score += parameters[2]
            np.clip(score, -30, 30, out=score)
            np.exp(np.negative(score, out=score), out=score)
            score += 1
            error = np.reciprocal(score, out=score)
            error -= wanted
            error *= np.where(wanted, weight_on, weight_off) / len(error)
            gradients = [batch.T @ (error @ parameters[1].T), thin.T @ error, error.sum(axis=0)]
            step += 1
            decay = np.float32(1 - step / (steps + 1))
            for i, gradient in enumerate(gradients):  # All in place, because b may be large.
                gradient *= np.float32(0.1)
                means[i] *= np.float32(0.9)
                means[i] += gradient
                np.square(gradient, out=gradient)  # The square of a tenth is the hundredth that Adam adds.
                squares[i] *= np.float32(0.99)
                squares[i] += gradient
                np.divide(squares[i], np.float32(1 - 0.99**step), out=gradient)
                np.sqrt(gradient, out=gradient)
                gradient += np.float32(1e-8)
                np.divide(means[i], gradient, out=gradient)
                gradient *= rates[i] * decay / np.float32(1 - 0.9**step)
                parameters[i] -= gradient
    return parameters[0], parameters[1], parameters[2]
