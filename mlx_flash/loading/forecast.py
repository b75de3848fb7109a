"""Forecasts how fast a model will speak within its plan, before its weights are loaded.

Three things are measured: how fast the disk gives what tokens read, how long the zoo's code computes without reading,
and how well both run side by side. The rest follows from the order in which a token does them. A checkpoint that is not
here yet has no files to measure with; then the rates of the disk itself serve.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import FlashError
from ..flash.layer_ring import BUFFERS
from ..layers.experts import EXPERTS_AT_ONCE
from ..machine.disk_table import DiskTable
from ..machine.kept_rates import Rate
from .in_place_model import InPlaceModel
from .in_place_plan import InPlacePlan
from .layer_trial import TokenSeconds, prompt_seconds, token_seconds
from .layer_weights import LayerWeights, spread
from .options import LoadOptions
from .unit_rates import RatesOfDisk, RatesOfFiles, UnitRates

BATCHES = 64  # of experts, drawn to measure the disk with
PROMPT_TOKENS = 512  # of the prompt before the first token
MOST_TRIED = 64  # tokens of a prompt that layers compute for the forecast, fewer if a layer is slow
TRIAL_S = 1.0  # a layer computes at most about so long


@dataclass(frozen=True)
class Forecast:
    """The expected time of a decoded token, and of the first one.

    bytes_per_token: bytes that a token reads. read_s, compute_s: seconds of its reads and of its computation, each
    alone. token_s: seconds of the token, in which they overlap. even: whether the bytes assume that a router chooses
    all experts equally often. first_token_s: seconds from a prompt of `prompt_tokens` tokens to its first token, with
    nothing read before; None if that was not worked out.
    """

    bytes_per_token: int
    read_s: float
    compute_s: float
    token_s: float
    even: bool
    first_token_s: float | None = None
    prompt_tokens: int = 0

    @property
    def disk_rate(self) -> float:
        """Bytes per second; 0 if nothing is read."""
        return self.bytes_per_token / self.read_s if self.read_s else 0.0

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.token_s

    def describe(self) -> str:
        """One sentence for the user."""
        rate = self.tokens_per_second
        about = f"about {rate:.2g} tokens per second" if rate >= 0.1 else f"about {1 / rate:.0f} seconds per token"
        if not self.bytes_per_token:
            return f"forecast: a token reads nothing: {about}"
        words = f"every token reads {self.bytes_per_token / 1e9:.3g} GB"
        if self.even:
            words = f"a token reads {self.bytes_per_token / 1e9:.3g} GB if all experts are chosen equally often"
        bound = ", bound by computing" if self.compute_s > self.read_s else ""
        return f"forecast: {words}; this disk reads {self.disk_rate / 1e9:.2g} GB/s: {about}{bound}"


class Foresight:
    """Forecasts the speed of one model for any of its plans. What was measured for one plan serves the others.

    choices: returns the number of experts that a token names in a layer. table: the rates of the disk that the
    checkpoint will be on; None if its files are here.
    """

    def __init__(
        self,
        mixture: InPlaceModel,
        choices: Callable[[], int],
        options: LoadOptions,
        table: DiskTable | None = None,
    ) -> None:
        self._mixture, self._choices, self._options, self._table = mixture, choices, options, table
        self._of_tokens: dict[int, tuple[TokenSeconds, Rate | None]] = {}
        self._of_prompts: dict[int, float] = {}

    def of_disk(self, table: DiskTable) -> Foresight:
        """The same for a checkpoint that is not on its disk yet."""
        return Foresight(self._mixture, self._choices, self._options, table)

    def reads(self, plan: InPlacePlan) -> bool:
        """Whether a token reads anything."""
        return plan.layer_bytes_per_token > 0 or any(self._missing(plan))

    def of_token(self, plan: InPlacePlan) -> Forecast | None:
        """The forecast of a decoded token; None if the model cannot be tried without its weights.

        It takes a second or two, and no more memory than the plan. Raises ReadError.
        """
        with contextlib.closing(self._disk()) as disk:
            return self._token(plan, disk)

    def of(self, plan: InPlacePlan, prompt_tokens: int = PROMPT_TOKENS) -> Forecast | None:
        """`of_token` with the time to the first token, which takes a few seconds more.

        prompt_tokens: of the prompt before it; fewer if the plan's context has no room for them.
        """
        prompt_tokens = min(prompt_tokens, plan.context)
        with contextlib.closing(self._disk()) as disk:
            if (made := self._token(plan, disk)) is None:
                return None
            try:
                return replace(
                    made,
                    prompt_tokens=prompt_tokens,
                    first_token_s=made.token_s + self._prompt_s(plan, disk, prompt_tokens),
                )
            except FlashError:
                raise
            except Exception:  # The layers of some models compute one token only.
                return made

    def _disk(self) -> UnitRates:
        if self._table is not None:
            return RatesOfDisk(self._table, self._options)
        return RatesOfFiles(self._mixture.files, self._options)

    def _token(self, plan: InPlacePlan, disk: UnitRates) -> Forecast | None:
        missing = self._missing(plan)
        of_experts = round(sum(missing) * self._mixture.expert_bytes)
        layers, batches = self._read_layers(plan)
        try:
            computing, rate = self._computing(plan, disk)
        except FlashError:
            raise
        except Exception:  # whatever a model raises that is called in another way than it expects
            return None
        reads, exposed = [], 1.0
        if rate is not None:
            reads, exposed = [int(batch[:, 2].sum()) / rate.bytes_per_second for batch in batches], rate.exposed
        token_s = _overlapped_s(_computed_between(layers, computing), reads, exposed)
        if of_experts:
            at_once = max(min(each, count) for each, count in zip(missing, plan.expert_slots, strict=True))
            reads.append(of_experts / _rate_of_experts(self._mixture, at_once, disk))
            token_s += reads[-1]  # A layer's experts are known when it needs them, so nothing computes meanwhile.
        nbytes = plan.layer_bytes_per_token + of_experts
        return Forecast(nbytes, sum(reads), computing.total, token_s, even=of_experts > 0)

    def _prompt_s(self, plan: InPlacePlan, disk: UnitRates, tokens: int) -> float:
        """The seconds of a prompt, if no expert is in memory before."""
        chunk = self._options.prefill_chunk
        chunks = -(-tokens // chunk)
        computing, rate = self._computing(plan, disk)
        compute_s = self._layers_s(plan, computing) * tokens
        read_s = hidden_s = 0.0
        if rate is not None:
            passes = -(-chunks // plan.chunks_at_once)
            read_s = passes * plan.layer_bytes_per_token / rate.bytes_per_second
            hidden_s = (1 - rate.exposed) * min(compute_s, read_s)
        if plan.expert_slots:
            count = self._mixture.experts
            # Tokens choose independently of each other, so few experts of a layer are left out by all of a chunk.
            chosen = count * (1 - (1 - self._choices() / count) ** min(tokens, chunk))
            missing = [1 - min(1.0, slots / count) for slots in plan.expert_slots]
            # The first chunk finds empty slots. Where each expert has one, loading has filled them.
            nbytes = sum(chosen * (1 + (chunks - 1) * share) for share in missing if share) * self._mixture.expert_bytes
            at_once = min(EXPERTS_AT_ONCE, chosen, *plan.expert_slots)
            read_s += nbytes / _rate_of_experts(self._mixture, at_once, disk)
        return compute_s + read_s - hidden_s

    def _missing(self, plan: InPlacePlan) -> list[float]:
        """The experts that a token reads in each layer, on average."""
        return [self._choices() * (1 - min(1.0, count / self._mixture.experts)) for count in plan.expert_slots]

    def _read_layers(self, plan: InPlacePlan) -> tuple[list[LayerWeights], list[np.ndarray]]:
        """The layers that a token reads, and their segments."""
        if not plan.layer_bytes_per_token:
            return [], []
        layers = [layer for _, layer in spread(self._mixture.layers, plan.pinned)]
        return layers, [np.concatenate([tensor.segments for tensor in layer.tensors]) for layer in layers]

    def _computing(self, plan: InPlacePlan, disk: UnitRates) -> tuple[TokenSeconds, Rate | None]:
        """The seconds of a token that reads nothing, and the rate at which layers are read; None if none is read.

        Plans that compute alike share one measurement, or a busy moment would let a plan that reads more look faster.
        """
        slots, batches = min([self._choices(), *plan.expert_slots]), self._read_layers(plan)[1]
        known = self._of_tokens.get(slots)
        if known is None or (batches and known[1] is None):
            rates: list[Rate] = []

            def beside(compute: Callable[[], object]) -> None:
                if batches:
                    rates.append(disk.rate("layers", batches, BUFFERS, compute))

            known = token_seconds(self._mixture, slots, beside), next(iter(rates), None)
            self._of_tokens[slots] = known
        return known[0], known[1] if batches else None

    def _layers_s(self, plan: InPlacePlan, computing: TokenSeconds) -> float:
        """The seconds in which all layers compute a token of a prompt."""
        slots = min([EXPERTS_AT_ONCE, *plan.expert_slots])
        if slots not in self._of_prompts:
            slowest = max(seconds for _, seconds in computing.layers)
            tried = max(2, min(MOST_TRIED, int(TRIAL_S / slowest)))
            self._of_prompts[slots] = prompt_seconds(self._mixture, slots, tried) / tried
        return self._of_prompts[slots]


def _overlapped_s(computed: Sequence[float], reads: Sequence[float], exposed: float) -> float:
    """The seconds of a token that computes while layers are read.

    computed: seconds between two waits for a layer, that layer's own included. reads: seconds of those layers' reads;
    none if no layer is read. exposed: see `ReadTrial.exposed_share`.

    With two buffers, a layer's read begins when the last but one has computed. So a layer computes while the next one
    is read, and the two after them begin when both have ended. The longer one counts, and of the shorter one that share
    which does not run beside it.
    """
    if not reads:
        return sum(computed)
    pairs = zip(computed, [*reads[1:], reads[0]], strict=True)
    return sum(max(here, read) + exposed * min(here, read) for here, read in pairs)


def _computed_between(layers: Sequence[LayerWeights], computing: TokenSeconds) -> list[float]:
    """A token's seconds from one wait for a layer to the next, see `_overlapped_s`. layers: those that are read."""
    number_of = {id(layer.module): number for number, layer in enumerate(layers)}
    computed = [0.0] * max(1, len(layers))
    now = 0
    for module, seconds in computing.layers:
        computed[now] += seconds
        now = (number_of.get(id(module), now - 1) + 1) % len(computed)
    computed[now] += computing.outside  # like the layers before the first wait of the next token
    return computed


def experts_rate(mixture: InPlaceModel, at_once: float, options: LoadOptions) -> float:
    """Bytes per second of so many experts that are read together from the checkpoint's files. Raises ReadError."""
    with contextlib.closing(RatesOfFiles(mixture.files, options)) as disk:
        return _rate_of_experts(mixture, at_once, disk)


def _rate_of_experts(mixture: InPlaceModel, at_once: float, disk: UnitRates) -> float:
    batches = _batches_of_experts(mixture, at_once)
    return disk.rate(f"{round(at_once)} experts", batches, 1).bytes_per_second


def _batches_of_experts(mixture: InPlaceModel, at_once: float) -> list[np.ndarray]:
    """What a layer reads at once, for layers and experts drawn at random. at_once: experts that it reads so."""
    random = np.random.default_rng(0)
    layers = list(mixture.switches.values())
    batches = []
    for _ in range(BATCHES):
        tensors = [tensor for tensor in layers[random.integers(len(layers))].values() if not tensor.is_table]
        count = len(tensors[0].offsets)
        chosen = random.choice(count, min(count, max(1, round(at_once))), replace=False)
        parts = [(t.file_of[chosen], t.offsets[chosen], np.full(len(chosen), t.nbytes)) for t in tensors]
        batches.append(np.concatenate([np.stack(part, axis=1) for part in parts]).astype(np.int64))
    return batches
