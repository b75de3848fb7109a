"""Loads a path or a Hugging Face id as (model, tokenizer), like mlx-lm, with the FFN streamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import FlashError, UsageError
from ..flash.files import is_store
from ..flash.random_state import kept_random_state
from ..flash.wiring import Wiring
from ..ranks.group import Group
from ..source.adapter_files import FUSE, find_adapter
from ..source.checkpoint_files import files_in, small_files_in
from ..source.compared_copies import compared_copies, name_themselves
from ..source.kept_swaps import swapped_lately
from ..source.model_kind import refuse_own_code
from ..source.resolve import cached_store_path, ensure_store, resolve_source
from ..source.zoos import INSTALL_MLX_VLM, MLX_VLM, has_vision, mlx_vlm_is_installed, mlx_vlm_module, zoo_of
from ..text.generation_config import read_generation_config
from ..text.image_prompts import ImageProcessor
from ..text.tokenizer import load_tokenizer, require_tokenizer
from .adapter import Adapter, open_adapter
from .config import holds_mixture, read_config
from .draft_model import PlannedDrafts, plan_drafts
from .fill_slots import fill_slots
from .forecast import Forecast
from .in_place_loading import plan_in_place
from .in_place_model import open_in_place
from .layer_ranks import DividedLayers
from .model_types import runs_as_it_is
from .options import LoadOptions
from .plan import Plan
from .planned import Planned
from .ranked_loading import Ranks
from .runtime import BUFFER_CACHE
from .store import plan_store
from .verification import compare_small_file


def load(
    path: str | os.PathLike[str] | None = None,
    options: LoadOptions | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
    fetch: bool = True,
    group: Group | None = None,
    **fields: Any,
) -> tuple[Any, Any]:
    """Loads a store (or converts a checkpoint first) within a memory budget.

    Args:
        path: folder of a store or of a checkpoint, or a Hugging Face id; None for the packaged demo model.
        options: see LoadOptions.
        say: called with the plan and notes, before anything large is allocated.
        fetch: whether the Hub may be asked for a newer version of a repository; False for the copy on the disk.
        group: other processes, on this machine or others, that hold and read parts of the model; None for none. The
            experts of a mixture, the neurons of a store and the layers of a dense model are divided. The group is not
            closed with the model.
        fields: the fields of LoadOptions, in place of `options`: `load(path, memory="6GB", context=4096)`.

    Returns:
        (model, tokenizer) for `mlx_flash.stream_generate` or mlx-lm's own functions. `model.flash` is the Runtime.

    A mixture of experts, and a dense model without exact zeros, is read from the checkpoint as it is, without a
    conversion.

    Everything that is read of a store is compared with its checksums.

    MLX's settings belong to the process. Until the last model is closed (`model.flash.close()`), MLX keeps at most
    32 MiB of freed buffers (`mx.set_cache_limit`). On the CPU backend, `mx.compile` needs g++; without it, `mx.compile`
    is switched off for good. The random state (`mx.random.state`) does not change.

    Raises:
        BudgetError, UsageError, StoreError and its subclasses, CheckpointError, ConversionError, ReadError.
    """
    options = _options(options, fields)
    ranks = (
        None if group is None or group.size == 1 else Ranks(group, None if path is None else os.fspath(path), options)
    )
    with contextlib.nullcontext() if ranks is None else ranks.loading():
        return _load(path, options, say, fetch, ranks)


def _load(
    path: str | os.PathLike[str] | None,
    options: LoadOptions,
    say: Callable[[str], None],
    fetch: bool,
    ranks: Ranks | None,
) -> tuple[Any, Any]:
    with _planned(path, options, say, fetch=fetch, ranks=ranks) as planned:
        say(planned.plan.describe())
        if ranks is None and (forecast := _forecast(planned)) is not None:
            say(forecast.describe())
        model = planned.build(say)
        assert planned.folder is not None
        fill_slots(model.flash, planned.folder, options.warm_start and ranks is None)
        if ranks is not None:
            ranks.finish()
        if planned.drafts is not None:
            model.flash.drafting = planned.drafts.load(model)
        _wire(model, planned.folder, options.wire, say)
    model.flash.defaults, model.flash.folder = planned.defaults, planned.folder
    return model, planned.tokenizer


def _wire(model: Any, folder: Path, wire: str, say: Callable[[str], None]) -> None:
    """Keeps what was loaded in memory, if it is asked for, or `auto` and the system swapped it before."""
    from mlx.utils import tree_flatten

    parameters: Any = tree_flatten(model.parameters())
    model.flash.wiring = Wiring(len(parameters))
    if wire == "on" or (wire == "auto" and swapped_lately(folder)):
        reason = model.flash.wiring.wire(careful=wire == "auto")
        if reason is None:
            say(f"{model.flash.wiring.nbytes / 1e9:.3f} GB of memory are wired, so that the system does not swap them")
        elif wire == "on":
            say(f"note: nothing is wired: {reason}")


def plan(
    path: str | os.PathLike[str] | None = None,
    options: LoadOptions | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
    **fields: Any,
) -> Plan:
    """The memory plan that `load` would follow in a process such as this one. No weights are read.

    The arguments are those of `load`; `verify` does not change the plan. Nothing is downloaded, and only the demo model
    is converted. The plan counts the memory of predictors, so a checkpoint that needs a conversion must already be
    converted. A memory of `loading.plan.ENDLESS` is never refused; it serves to get `Plan.smallest`.

    Raises the errors of `load`, and UsageError for a checkpoint that was not converted yet.
    """
    with planned_model(path, _options(options, fields), say) as planned:
        return planned.plan


def plan_with_forecast(
    path: str | os.PathLike[str] | None, options: LoadOptions, say: Callable[[str], None] = lambda _: None
) -> tuple[Plan, Forecast | None]:
    """The plan as `plan` makes it, and how fast a token will be that reads; None if it reads nothing.

    It measures for up to a second how fast the disk reads. Raises the errors of `plan`.
    """
    with planned_model(path, options, say) as planned:
        return planned.plan, _forecast(planned)


@contextlib.contextmanager
def planned_model(
    path: str | os.PathLike[str] | None, options: LoadOptions, say: Callable[[str], None] = lambda _: None
) -> Iterator[Planned]:
    """The model at `path` as it would be loaded inside this context. Raises the errors of `plan`."""
    given = replace(options, verify=False)  # verify would make checksums
    given.check()
    with _planned(path, given, say, prepare=False, fetch=False) as planned:
        BUFFER_CACHE.release()  # no model is loaded whose `close` would do this
        yield planned


def _forecast(planned: Planned) -> Forecast | None:
    """The forecast of a token; None if it reads nothing, or if it cannot be told."""
    plan: Any = planned.plan
    if planned.foresight is None or not planned.foresight.reads(plan):
        return None
    return planned.foresight.of_token(plan)


def _options(options: LoadOptions | None, fields: dict[str, Any]) -> LoadOptions:
    """`options`, or those made from `fields`, after a check. Raises TypeError or UsageError."""
    if options is not None and (fields or not isinstance(options, LoadOptions)):
        raise TypeError("expected either a LoadOptions or its fields, by name")
    given = LoadOptions(**fields) if options is None else options
    given.check()
    return given


@contextlib.contextmanager
def _planned(
    path: str | os.PathLike[str] | None,
    options: LoadOptions,
    say: Callable[[str], None],
    prepare: bool = True,
    fetch: bool = True,
    ranks: Ranks | None = None,
) -> Iterator[Planned]:
    """The model at `path`, ready to be loaded inside this context. prepare: convert it. fetch: download it. ranks: that
    it is divided among; None for this process alone."""
    name = None if path is None else os.fspath(path)
    source = resolve_source(name, options.revision, say, fetch=fetch)
    _import_mlx_lm()  # takes a second, so wrong names are refused first
    with BUFFER_CACHE.limited(), kept_random_state(), contextlib.ExitStack() as copies:
        drafts = plan_drafts(options, source, say, fetch=fetch)
        adapter = None if options.adapter is None else open_adapter(find_adapter(options.adapter, say, fetch))
        planned = _plan(source, name, options, say, prepare or name is None, copies, drafts, adapter, ranks)
        if drafts is not None and drafts.model is not None:
            drafts.model.check(planned.tokenizer)
        yield planned


def _plan(
    source: Path,
    name: str | None,
    options: LoadOptions,
    say: Callable[[str], None],
    prepare: bool,
    copies: contextlib.ExitStack,
    drafts: PlannedDrafts | None,
    adapter: Adapter | None,
    ranks: Ranks | None,
) -> Planned:
    """name: the user's name for the folder `source`. copies: keeps copies of small files until all is loaded."""
    if problem := _unencodable(source):
        raise UsageError(f"{source!s} cannot be used: {problem}. Rename it.")
    small = source
    if options.verify and not is_store(source):
        files_in(source)  # raises an error for entries that are not files or lead out of the folder
        small = copies.enter_context(compared_copies(source, small_files_in(source), compare_small_file))
    if options.images:
        _require_vision(source, small)
    if not is_store(source):
        mixture = holds_mixture(source, small)
        if mixture or runs_as_it_is(read_config(small), source):  # raises its errors before a conversion starts
            unit = "expert" if mixture else "layer"
            planned = _plan_as_it_is(source, small, options, say, copies, drafts, adapter, unit, ranks)
            return planned._replace(folder=source)
        read_generation_config(source)
        require_tokenizer(source)
    if adapter is not None:
        raise UsageError(
            f"{source} is streamed neuron by neuron, and its predictors were fitted to it without an adapter. Write "
            f"the changed model once, {FUSE}, and run FUSED."
        )
    folder = ensure_store(source, name, say) if prepare else converted_before(source, name)
    check_compiler(say)
    return plan_store(folder, options, copies, drafts, ranks)._replace(folder=folder)


def _require_vision(source: Path, small: Path) -> None:
    """Raises UsageError for a model that reads no images, or if mlx-vlm is not installed."""
    config = {} if is_store(source) else read_config(small)
    refuse_own_code(config, source)
    if not mlx_vlm_is_installed():
        raise UsageError(f"mlx-vlm reads images, and it is not installed: `{INSTALL_MLX_VLM}`.")
    if mlx_vlm_module(config) is None or not has_vision(config):
        raise UsageError(f"{source} ({config.get('model_type')}) is not a model that reads images. Leave images out.")


def converted_before(source: Path, name: str | None) -> Path:
    """The store at `source`, or the one that the checkpoint there was converted to. name: the user's name for it.

    Raises UsageError.
    """
    folder = source if is_store(source) else cached_store_path(source, name)[0]
    if not is_store(folder):
        raise UsageError(
            f"{source} was not converted yet, and its plan depends on its predictors. Convert it (`mlxflash convert`), "
            "or run it once, which converts it into the cache folder."
        )
    return folder


def _plan_as_it_is(
    source: Path,
    small: Path,
    options: LoadOptions,
    say: Callable[[str], None],
    copies: contextlib.ExitStack,
    drafts: PlannedDrafts | None,
    adapter: Adapter | None,
    unit: str,
    ranks: Ranks | None,
) -> Planned:
    """small: the folder that the configuration, the tokenizer and the index are read from. unit: what is streamed."""
    if options.predictor != "auto" or options.recall is not None:
        kind = "is a mixture of experts: its router chooses"
        if unit == "layer":
            kind = "has no neurons that are exactly zero: every token needs every layer"
        given = "recall" if options.predictor == "auto" else f"predictor {options.predictor}"
        raise UsageError(f"{source} {kind}, so nothing is predicted. Leave {given} out.")
    check_compiler(say)
    config, defaults = read_config(small), read_generation_config(small)
    tokenizer = load_tokenizer(small, config)  # first, because the plan counts the memory that is in use by then
    name_themselves(tokenizer, small, source)
    images = ImageProcessor(small) if options.images else None
    zoo = MLX_VLM if drafts is not None and drafts.of_own_head else None
    if adapter is not None and (options.images or zoo == MLX_VLM or zoo_of(config) == MLX_VLM):
        raise UsageError(
            f"mlx-vlm builds the model of {source}, and an adapter is put into models of mlx-lm. Leave it out."
        )
    mixture = open_in_place(source, small, zoo, images=options.images, adapter=adapter)
    copies.close()  # before the first load reads and compares all weights
    divided = None
    if ranks is not None and unit == "layer":
        divided = DividedLayers(ranks, source, mixture, options, drafts)
        options, ranks = divided.options, None
    plan, build, plan_for, foresight = plan_in_place(source, mixture, options, drafts, images, ranks, zoo)
    if divided is not None:
        plan, build = divided.planned(plan), partial(divided.build, build)
    return Planned(plan, tokenizer, defaults, build, plan_for, foresight, drafts)


def _unencodable(path: Path) -> str | None:
    """Returns why MLX, which needs UTF-8, cannot open files at a path; None if it can."""
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError:
        return "its name, or that of a folder above it, is not UTF-8 text"
    return None


def _import_mlx_lm() -> None:
    try:
        import_module("mlx_lm.utils")
    except ValueError as error:  # mlx-lm raises the limit of open files when it is imported
        raise FlashError(f"mlx-lm cannot be loaded: {error}. Allow 4096 open files: `ulimit -Hn 4096`.") from None


def check_compiler(say: Callable[[str], None]) -> None:
    """Switches `mx.compile` off on the CPU backend if there is no g++, which it needs. Raises FlashError."""
    folder = os.environ.get("TMPDIR")
    if mx.default_device() == mx.cpu and folder and not os.access(folder, os.W_OK | os.X_OK):
        raise FlashError(
            f"TMPDIR is {folder}, which is not a folder that can be written to; MLX compiles there. Set it to a "
            "writable folder, or unset it."
        )
    if mx.default_device() == mx.cpu and shutil.which("g++") is None:
        mx.disable_compile()
        say("note: there is no g++ here, so mx.compile is off (on Debian or Ubuntu: apt-get install g++)")
