"""Sampling: the settings, the model's own defaults for them, and the mlx-lm samplers that follow them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .generation_config import GenerationConfig

if TYPE_CHECKING:
    import mlx.core as mx

GREEDY_TEMPERATURE = 1e-3  # A lower temperature counts as 0: division by it would overflow half-precision numbers.
GREEDY_TOP_P = 1e-6  # A smaller value keeps only the likeliest token.
PENALTY_TOKENS = 20  # number of recent tokens that penalties consider; mlx-lm's default

Processor = Callable[["mx.array", "mx.array"], "mx.array"]  # (tokens so far (n,), logits (1, V)) -> logits


@dataclass(frozen=True)
class Sampling:
    """The settings for choosing a token, with OpenAI's defaults. 0 means off; for the temperature, greedy.

    For the repetition penalty, 1 means off as well.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)

    def with_defaults(self, model: GenerationConfig) -> Sampling:
        """These settings, replaced by the model's own where it has some."""
        return replace(self, **model.sampling)

    def describe(self) -> str:
        """The settings that have an effect, in one line."""
        settings = {"top-p": (self.top_p, 1.0), "top-k": (self.top_k, 0), "min-p": (self.min_p, 0.0)}
        named = [f"{name} {value:g}" for name, (value, off) in settings.items() if value != off]
        chosen = ["greedy"] if self.greedy else [f"temperature {self.temperature:g}", *named]
        penalty = [f"repetition penalty {self.repetition_penalty:g}"] if self.penalises else []
        return ", ".join(chosen + penalty)

    @property
    def penalises(self) -> bool:
        """Whether repetition is penalised."""
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
    top_k = sampling.top_k if sampling.top_k < vocabulary else 0  # As large as the vocabulary means off.
    return make_mlx_lm_sampler(  # type: ignore[no-any-return]
        sampling.temperature, sampling.top_p, sampling.min_p, top_k=top_k
    )


def make_processors(sampling: Sampling, cached: Callable[[], Sequence[int]]) -> list[Processor]:
    """mlx-lm's logits processors, which also see `cached()`, the prompt's tokens that are in the cache already."""
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


# -- the arguments of commands that generate text ------------------------------------------------------------


def add_sampling_arguments(group: Any, max_tokens: int) -> None:
    """Adds the arguments to a parser or to a group of one; `max_tokens` is the default."""
    group.add_argument(
        "--max-tokens",
        "-m",
        type=int,
        default=max_tokens,
        metavar="N",
        help="tokens to generate (default: %(default)s)",
    )
    group.add_argument(
        "--temp",
        type=float,
        help="sampling temperature, 0 is greedy (default: from the model's generation_config.json, as for the other "
        "sampling options; else 0)",
    )
    group.add_argument("--top-p", type=float, help="nucleus sampling, 1 is off (default: 1)")
    group.add_argument("--top-k", type=int, help="sample among the k likeliest tokens, 0 is off (default: 0)")
    group.add_argument(
        "--min-p",
        type=float,
        help="drop tokens below this share of the likeliest token's probability, 0 is off (default: 0)",
    )
    group.add_argument(
        "--repetition-penalty", type=float, metavar="P", help="penalise recent tokens, 1 is off (default: 1)"
    )
    group.add_argument("--seed", type=int, help="seed of the sampler (default: random)")


@dataclass(frozen=True)
class SettingRange:
    """The numbers that a setting may be: `least` to `most`, in words `expected`."""

    least: float
    most: float
    expected: str
    whole: bool = False

    def holds(self, value: float) -> bool:
        return self.least <= value <= self.most


RANGES = {  # field of Sampling, or max_tokens -> its range
    "max_tokens": SettingRange(1, 2**63 - 1, "at least 1", whole=True),
    "temperature": SettingRange(0, 1e3, "0 to 1000"),  # Above it, logits underflow.
    "top_p": SettingRange(0, 1, "0 to 1"),
    "top_k": SettingRange(0, 2**63 - 1, "0 or more", whole=True),
    "min_p": SettingRange(0, 1, "0 to 1"),
    "repetition_penalty": SettingRange(0.01, 10, "0.01 to 10"),  # Below 0.01, logits overflow.
    "presence_penalty": SettingRange(-2, 2, "-2 to 2"),
    "frequency_penalty": SettingRange(-2, 2, "-2 to 2"),
    "seed": SettingRange(0, 2**64 - 1, "0 to 2**64 - 1", whole=True),
}
FLAGS = {"temp": "temperature"} | {  # attribute of the parsed arguments -> the setting
    name: name for name in ("max_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
}


def check_sampling(arguments: argparse.Namespace) -> None:
    """Raises UsageError for invalid numbers, before anything is loaded."""
    for flag, name in FLAGS.items():
        value = getattr(arguments, flag)
        if value is not None and not RANGES[name].holds(value):
            raise UsageError(f"--{flag.replace('_', '-')} is {value}, expected {RANGES[name].expected}.")


def sampling_of(arguments: argparse.Namespace, model: GenerationConfig) -> Sampling:
    """The settings from the arguments; the others from the model's own settings; greedy if neither sets any."""
    given = {name: getattr(arguments, flag) for flag, name in FLAGS.items() if name != "max_tokens"}
    base = Sampling(temperature=0.0).with_defaults(model)
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def seeded_sampler(sampling: Sampling, vocabulary: int) -> Callable[[mx.array], mx.array]:
    """The sampler of `make_sampler`, compiled and seeded."""
    import mlx.core as mx

    sampler = make_sampler(sampling, vocabulary)
    mx.eval(sampler(mx.zeros((1, vocabulary))))  # Compile now, so that the first token does not wait for it.
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    return sampler
