"""Another rank's part of a store: its run of every layer's neurons, and nothing else of the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..flash.files import Manifest, read_manifest
from ..flash.neurons import NeuronFile, NeuronSlots
from ..flash.system import mark_in_use
from ..flash.unit_file import UnitFile
from ..flash.unit_sums import read_block_sums
from ..layers.activations import Activation
from ..layers.neurons import StreamedNeurons
from ..layers.ranked_neurons import NEURONS, NeuronCalls
from ..ranks.group import FollowingGroup
from . import dense
from .fill_slots import fill_slots
from .neuron_ranks import DividedNeurons, neuron_capacity, plan_of_share
from .options import LoadOptions
from .rank_questions import on_host_of_rank_0
from .reading_trials import reader_for
from .runtime import Runtime
from .units_of_rank import UnitsOfRank

UP_BIAS = ".up_bias"  # ends the names of these vectors, "model.layers.3.mlp.up_bias"


class NeuronsOfRank(UnitsOfRank):
    """The same store is opened as on rank 0, and its resident weights but the biases of neurons are never read.

    A slot holds all parts of its neurons. With the exact predictor, rank 0 has the first parts of all neurons in
    memory; this rank reads its own.

    asked: the value of the question "plan". Raises StoreError and its subclasses, ReadError and BudgetError.
    """

    kind = NEURONS

    def __init__(self, group: FollowingGroup, folder: Path, options: LoadOptions, asked: dict[str, Any]) -> None:
        super().__init__()
        self._group, self._folder, self._options = group, folder, options
        self._manifest = read_manifest(folder)
        self._dtype = dense.compute_dtype(self._manifest.resident_dtype)
        self._resident = dense.stored_tensors(folder, self._manifest, Manifest.resident_file)
        arrays = self._resident.arrays
        self._biases = {int(name.split(".")[-3]): name for name in arrays if name.endswith(UP_BIAS)}
        nbytes = sum(arrays[name].size * self._dtype.size for name in self._biases.values())
        sharing, taken = on_host_of_rank_0(asked, group.size)
        self._plan = plan_of_share(self._manifest, nbytes, options, sharing, taken, group.size)

    def offer(self) -> dict[str, Any]:
        plan = self._plan
        layout, slots = self._manifest.layout, sum(plan.slots)
        return neuron_capacity(self._folder, layout, slots, plan.budget, self._options).as_answer()

    def build(self, share: dict[str, Any]) -> None:
        """Raises CorruptStoreError or ReadError."""
        manifest, options, rank = self._manifest, self._options, self._group.rank
        divided = DividedNeurons(share["counts"], share["need"])
        file = UnitFile(self._folder / Manifest.neurons_file, direct=options.io != "buffered")
        mark_in_use(file.fd)
        file.sums = read_block_sums(self._folder, manifest)
        streamer = NeuronFile(file, reader_for(options), manifest.layout)
        plan = replace(self._plan, slots=divided.slots(rank, sum(self._plan.slots)))
        layers = []
        for number, slots in enumerate(plan.slots):
            parts = manifest.layout.parts
            units = NeuronSlots(streamer, number, slots, parts, options.window, divided.of(rank))
            layers.append(self._layer(units))
        self._flash = Runtime(plan, streamer, layers, "none", vocabulary=0, positions=0, manifest=manifest)
        self._calls = NeuronCalls(layers)
        fill_slots(self._flash, self._folder, warm=False, shown=False)

    def _layer(self, units: NeuronSlots) -> StreamedNeurons:
        manifest = self._manifest
        layer = StreamedNeurons(units, Activation(**manifest.activation), manifest.decode_tokens, bias=False)
        if (name := self._biases.get(units.layer)) is not None:
            whole = self._resident.take(name).astype(self._dtype)
            layer.up_bias = mx.contiguous(whole[units.first_neuron : units.first_neuron + units.neurons])
            mx.eval(layer.up_bias)
        return layer
