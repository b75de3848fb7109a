"""Fills the slots of a model while it is loaded, before a call needs the units.

A layer with a slot for every unit gets them all. It never needs to know then which units a token uses, so a layer of
experts reads nothing back from the device. Other layers get the units that earlier runs used most, if that is asked
for.
"""

from __future__ import annotations

from pathlib import Path

from ..flash.filling import bytes_to_fill, fill, whole_layers
from ..flash.units import Units
from ..source.kept_uses import KeptUses
from .load_progress import tell_progress
from .runtime import Runtime
from .warm_start import WarmStart

SHOWN_FROM = 500e6  # bytes; shorter reads show no progress in the terminal


def fill_slots(flash: Runtime, folder: Path, warm: bool, shown: bool = True) -> None:
    """Fills the slots of a model that was just built. After an error or an interrupt, its files are closed.

    folder: the model's. warm: whether uses of units are kept for later starts, and slots filled by them. shown: whether
    long reads have a progress bar.
    Raises ReadError.
    """
    layers = [layer.units for layer in flash.layers if isinstance(layer.units, Units)]
    if not layers:
        return
    unit = "expert" if flash.predictor == "router" else "neuron"
    try:
        whole = whole_layers(layers)
        with _Shown(f"reading {unit}s", bytes_to_fill(whole), shown) as progress:
            fill(whole, progress.add)
        if warm:
            files = [file.path for file in layers[0].shared.files]
            flash.warm_start = WarmStart(layers, KeptUses(folder, files, unit, [units.count for units in layers]))
            hottest = bytes_to_fill(flash.warm_start.hottest())
            with _Shown(f"reading {unit}s that were used before", hottest, shown) as progress:
                flash.warm_start.fill(progress.add)
    except BaseException:
        flash.streamer.close()
        raise


class _Shown:
    """A progress bar, which the watchers of the load see as well. total: in bytes. bar: whether there is one."""

    def __init__(self, stage: str, total: int, bar: bool) -> None:
        from tqdm import tqdm

        self._stage, self._total, self._done = stage, total, 0
        hidden = not bar or total < SHOWN_FROM
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=stage, disable=hidden, leave=False)

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self._bar.update(nbytes)
        tell_progress(self._stage, self._done, self._total)
