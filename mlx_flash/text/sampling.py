"""How tokens are chosen: settings, the model's own defaults for them, and mlx-lm's samplers made of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .generation_config import GenerationConfig

if TYPE_CHECKING:
    import mlx.core as mx

GREEDY_TEMPERATURE = 1e-3  # a lower temperature is 0: divided by it, half-precision numbers would overflow
GREEDY_TOP_P = 1e-6  # a smaller one keeps the likeliest token alone
PENALTY_TOKENS = 20  # that penalties look back on, mlx-lm's default

Processor = Callable[["mx.array", "mx.array"], "mx.array"]  # tokens so far (n,), logits (1, V) -> logits


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; OpenAI's defaults. 0 is off, or greedy for a temperature."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)

    def with_defaults(self, model: GenerationConfig) -> Sampling:
        """The model's own settings instead of these, where it has some."""
        return replace(self, **model.sampling)

    def describe(self) -> str:
        """Those that change anything, in a line."""
        settings = {"top-p": (self.top_p, 1.0), "top-k": (self.top_k, 0), "min-p": (self.min_p, 0.0)}
        named = [f"{name} {value:g}" for name, (value, off) in settings.items() if value != off]
        chosen = ["greedy"] if self.greedy else [f"temperature {self.temperature:g}", *named]
        penalty = [f"repetition penalty {self.repetition_penalty:g}"] if self.penalises else []
        return ", ".join(chosen + penalty)

    @property
    def penalises(self) -> bool:
        """Whether repetition is penalised at all."""
        return self.repetition_penalty not in (0, 1)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE or self.top_p < GREEDY_TOP_P


def make_sampler(sampling: Sampling, vocabulary: int) -> Callable[[mx.array], mx.array]:
    """mlx-lm's sampler: log-probabilities (B, V) -> token ids (B,)."""
    from mlx_lm.sample_utils import greedy_sampler
    from mlx_lm.sample_utils import make_sampler as make_mlx_lm_sampler

    if sampling.greedy:
        return greedy_sampler  # type: ignore[no-any-return]
    top_k = sampling.top_k if sampling.top_k < vocabulary else 0  # of all tokens: it is off
    return make_mlx_lm_sampler(  # type: ignore[no-any-return]
        sampling.temperature, sampling.top_p, sampling.min_p, top_k=top_k
    )


def make_processors(sampling: Sampling, cached: Callable[[], Sequence[int]]) -> list[Processor]:
    """mlx-lm's, for a prompt of which `cached()` is in the cache already: they see those tokens as well."""
    import mlx.core as mx
    from mlx_lm.sample_utils import make_logits_processors

    processors: list[Processor] = make_logits_processors(
        sampling.logit_bias or None,
        sampling.repetition_penalty if sampling.penalises else None,
        PENALTY_TOKENS,
        sampling.presence_penalty or None,
        PENALTY_TOKENS,
        sampling.frequency_penalty or None,
        PENALTY_TOKENS,
    )

    def seeing_all(processor: Processor) -> Processor:
        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            before = mx.array(list(cached()[-PENALTY_TOKENS:]), tokens.dtype)
            return processor(mx.concatenate([before, tokens]), logits)

        return process

    return [seeing_all(processor) for processor in processors]


# -- the arguments of commands that make text by themselves --------------------------------------------------


def add_sampling_arguments(group: Any, max_tokens: int) -> None:
    """To a parser or a group of one; `max_tokens` is the default."""
    group.add_argument(
        "--max-tokens", "-m", type=int, default=max_tokens, metavar="N", help="tokens to make (default: %(default)s)"
    )
    group.add_argument(
        "--temp",
        type=float,
        help="sampling temperature, 0 is greedy (default, here and below: what the model's generation_config.json "
        "says; else 0)",
    )
    group.add_argument("--top-p", type=float, help="nucleus sampling, 1 is off (default: 1)")
    group.add_argument("--top-k", type=int, help="sample among the k likeliest, 0 is off (default: 0)")
    group.add_argument("--min-p", type=float, help="drop what is this much less likely, 0 is off (default: 0)")
    group.add_argument(
        "--repetition-penalty", type=float, metavar="P", help="for tokens of late, 1 is off (default: 1)"
    )
    group.add_argument("--seed", type=int, help="seed of the sampler")


def check_sampling(arguments: argparse.Namespace) -> None:
    """Raises UsageError for numbers that mean nothing; before anything is loaded."""
    if arguments.max_tokens < 1:
        raise UsageError(f"--max-tokens is {arguments.max_tokens}, expected at least 1.")
    if arguments.temp is not None and not 0 <= arguments.temp <= 1e3:  # beyond, logits underflow
        raise UsageError(f"--temp is {arguments.temp}, expected 0 to 1000.")
    if arguments.top_p is not None and not 0 <= arguments.top_p <= 1:
        raise UsageError(f"--top-p is {arguments.top_p}, expected 0 to 1.")
    if arguments.min_p is not None and not 0 <= arguments.min_p <= 1:
        raise UsageError(f"--min-p is {arguments.min_p}, expected 0 to 1.")
    penalty = arguments.repetition_penalty
    if penalty is not None and not 0.01 <= penalty <= 10:  # below, logits overflow
        raise UsageError(f"--repetition-penalty is {penalty}, expected 0.01 to 10.")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**64:
        raise UsageError(f"--seed is {arguments.seed}, expected 0 to 2**64 - 1.")
    if arguments.top_k is not None and arguments.top_k < 0:
        raise UsageError(f"--top-k is {arguments.top_k}, expected 0 or more.")


def sampling_of(arguments: argparse.Namespace, model: GenerationConfig) -> Sampling:
    """What the arguments say, what they leave open as the model's own settings have it; greedy if those are silent."""
    given = {
        "temperature": arguments.temp,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
        "min_p": arguments.min_p,
        "repetition_penalty": arguments.repetition_penalty,
        "seed": arguments.seed,
    }
    base = Sampling(temperature=0.0).with_defaults(model)
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def seeded_sampler(sampling: Sampling, vocabulary: int) -> Callable[[mx.array], mx.array]:
    """`make_sampler`'s, compiled and seeded."""
    import mlx.core as mx

    sampler = make_sampler(sampling, vocabulary)
    mx.eval(sampler(mx.zeros((1, vocabulary))))  # compiled here, not in the first token's time
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    return sampler
