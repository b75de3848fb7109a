"""What is measured: the model's name and numbers without anything personal, its budgets, and the prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import BudgetError, CheckpointError, FlashError
from ..flash.files import is_store
from ..loading.config import holds_mixture, read_config
from ..loading.forecast import Forecast
from ..loading.load import plan, plan_with_forecast
from ..loading.model_types import runs_as_it_is
from ..loading.options import LoadOptions
from ..loading.plan import ENDLESS, Plan
from ..source.resolve import ensure_store, resolve_source
from .form import DEMO, LOCAL, MOST, in_name

Result = TypeVar("Result")

PACKAGE = Path(__file__).parents[1]
CALIBRATION = PACKAGE / "convert" / "calibration.txt"
CLOSE = 0.01  # Budgets that differ by less are one.
MORE = 1.03  # times a budget, at most
MORE_FOR_FORECAST = 1.25  # likewise: forecasts make the process larger than one that only runs the model
NUMBERS = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "ffn_dim", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "vocab_size",
)  # fmt: skip
QUANTISATION = ("bits", "group_size")


def made_ready(model: str | None, say: Callable[[str], None]) -> Path:
    """The folder that is measured, downloaded and, if it must be, converted. Raises the errors of `load`."""
    source = resolve_source(model, None, say)
    if is_store(source) or holds_mixture(source) or runs_as_it_is(read_config(source), source):
        return source
    return ensure_store(source, model, say)


def examined(model: str | None, folder: Path, wanted: int) -> dict[str, Any]:
    """The model and the budgets to measure it with, as in `MachineReport`. wanted: tokens of the longest answer and
    its prompt; "context" is smaller if the model has fewer positions.

    It is called in a process like those that will run the model. Raises the errors of `plan`.
    """
    first = plan(model, memory=ENDLESS, context="max")
    context = min(wanted, first.context)
    made = plan(model, memory=ENDLESS, context=context)
    usual = plan(model, context=context)
    whole = usual.slot_share == 1
    largest = made.everything if whole else usual.budget
    # Planning makes this process larger than one that only runs the model.
    smallest = made.smallest - (made.demand.process - first.demand.process)
    largest -= (made if whole else usual).demand.process - first.demand.process
    forecasts = [
        {"name": name, "bytes": size} | _forecast(model, size, context)
        for name, size in budgets(smallest, largest).items()
    ]
    config = read_config(folder)
    return {
        "model": {
            "name": public_name(model),
            "model_type": in_name(config.get("model_type")),
            "numbers": numbers_of(config),
            "units": _units_of(made),
            "layers": made.units.layers,
            "units_per_layer": made.units.per_layer,
            "unit_bytes": made.slot_bytes,
            "resident_bytes": made.demand.resident,
            "context": context,
        },
        "budgets": forecasts,
    }


def budgets(smallest: int, largest: int) -> dict[str, int]:
    """Budgets in bytes by name: the smallest that the model can run with, the largest that fits, and their mean."""
    if largest < (1 + CLOSE) * smallest:
        return {"smallest": smallest}
    return {"smallest": smallest, "middle": (smallest + largest) // 2, "largest": largest}


def _forecast(model: str | None, size: int, context: int) -> dict[str, Any]:
    def of(memory: int) -> Forecast | None:
        return plan_with_forecast(model, LoadOptions(memory=memory, context=context))[1]

    try:
        forecast = within(size, of, MORE_FOR_FORECAST)
    except FlashError:
        forecast = None
    return {
        "forecast_tokens_per_second": None if forecast is None else forecast.tokens_per_second,
        "forecast_bytes_per_token": None if forecast is None else forecast.bytes_per_token,
    }


def within(size: int, use: Callable[[int], Result], most: float = MORE) -> Result:
    """What `use` returns for a budget, or for a little more: this process may be larger than the one that planned it.

    most: times the budget. Raises the errors of `use`.
    """
    try:
        return use(size)
    except BudgetError as error:
        if error.smallest_bytes > most * size:
            raise
        return use(error.smallest_bytes)


def public_name(model: str | None) -> str:
    """The repository's id, or that the model is a folder: a folder's name may be personal."""
    if model is None:
        return DEMO
    try:
        return LOCAL if Path(model).expanduser().is_dir() else model
    except (OSError, RuntimeError):
        return LOCAL


def numbers_of(config: dict[str, Any]) -> dict[str, int]:
    """The whole numbers of a configuration that say how large the model is, and its bits."""
    inner = config.get("text_config")
    both = {**(inner if isinstance(inner, dict) else {}), **config}
    packed = config.get("quantization", config.get("quantization_config"))
    found = {name: both.get(name) for name in NUMBERS}
    found |= {name: packed.get(name) for name in QUANTISATION} if isinstance(packed, dict) else {}
    return {name: value for name, value in found.items() if type(value) is int and 0 <= value <= MOST}


def _units_of(made: Plan) -> str:
    """What is read for tokens: "neurons", "experts" or "layers"."""
    return next(word for word in ("neurons", "experts", "layers") if word in made.units.name)


def prompt_of(tokenizer: Any, count: int) -> list[int]:
    """The first `count` tokens of an old novel, with what the tokenizer puts before a text."""
    from ..text.generation import encode_prompt

    text = CALIBRATION.read_text(encoding="utf-8")
    characters = 8 * count
    while len(ids := encode_prompt(tokenizer, text[:characters])) < count:
        if characters >= len(text):
            raise CheckpointError("the model's tokenizer makes no tokens of English words.")
        characters *= 2
    return ids[:count]
