"""Reads every unit of the layers that have a slot for each, while a model is loaded.

Such a layer never needs to know which units a token uses, so it reads nothing back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..flash.filling import bytes_to_fill, fill, whole_layers
from ..flash.units import Units
from .load_progress import tell_progress
from .runtime import AnyStreamer

SHOWN_FROM = 500e6  # bytes; shorter reads show no progress in the terminal


def fill_whole_layers(layers: Sequence[Units], streamer: AnyStreamer, unit: str) -> None:
    """Fills the slots of the layers that have one for every unit, in the order of the files.

    streamer: of these layers; it is closed after an error or an interrupt. unit: the name of a unit, for the progress.
    Raises ReadError.
    """
    from tqdm import tqdm

    wanted = whole_layers(layers)
    total, done = bytes_to_fill(wanted), 0
    hidden = total < SHOWN_FROM
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"reading {unit}s", disable=hidden, leave=False) as bar:

        def progress(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            bar.update(nbytes)
            tell_progress(f"reading {unit}s", done, total)

        try:
            fill(wanted, progress)
        except BaseException:
            streamer.close()
            raise
