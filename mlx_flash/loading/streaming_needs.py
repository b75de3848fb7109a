"""The memory that a process takes beside weights and slots, and that streamed layers take during a step."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

import mlx.core as mx

from ..flash.files import ITEM_BYTES, NeuronLayout
from ..flash.in_place import TensorParts
from ..flash.reader import BOUNCE_BYTES_PER_THREAD
from ..flash.system import current_memory_bytes, return_freed_memory
from ..layers.expert_products import WIDENED_AT_ONCE, is_widened
from .memory_needs import InputShape, StreamedNeed

PROCESS_MARGIN_BYTES = 48 << 20  # later growth of the process: threads, and freed memory that malloc keeps
LEAST_MARGIN_BYTES = 16 << 20  # the part of it that recurs with every model


class ProcessMemory:
    """Measures this process for plans.

    The growth that the first plan makes room for comes once: the threads, libraries and buffers of the first model
    stay when it is closed. Each later plan counts what has come of that, and makes room for the rest only. Otherwise a
    model would not fit again into the budget that it had before.
    """

    def __init__(self) -> None:
        self._first_bytes = 0  # as measured for the last plan before any model was closed
        self._closed = False  # whether a model was closed

    def model_closed(self) -> None:
        self._closed = True

    def planned_bytes(self) -> int:
        """The bytes of this process now, and room to grow."""
        if not self._closed:
            self._first_bytes = current_memory_bytes()
            return self._first_bytes + PROCESS_MARGIN_BYTES
        return_freed_memory()  # The loading of a tokenizer leaves tens of megabytes, which the first plan counts.
        now = current_memory_bytes()
        grown = max(0, now - self._first_bytes)
        return now + max(PROCESS_MARGIN_BYTES - grown, LEAST_MARGIN_BYTES)


PROCESS = ProcessMemory()


def process_bytes() -> int:
    """Bytes of this process, with everything that a generation loads and starts, and room to grow."""
    import_module("mlx_lm.generate")
    # A device's queues, libraries and threads come with the first operation.
    mx.eval(mx.softmax(mx.ones((8, 8)) @ mx.ones((8, 8))))
    return PROCESS.planned_bytes()


def loading_excess_bytes(sizes: Iterable[int]) -> int:
    """Bytes that loading takes beyond the tensors themselves: largest first, each with a copy of itself.

    sizes: sizes of the tensors, in bytes.
    """
    loaded = most = 0
    for size in sorted(sizes, reverse=True):
        loaded += size
        most = max(most, loaded + size)
    return most - loaded


def reading_bytes(threads: int, aligned: bool) -> int:
    """Bytes of the reader: a buffer per thread, if reads are not `aligned` to pages."""
    return 0 if aligned else threads * BOUNCE_BYTES_PER_THREAD


def scratch_bytes(layout: NeuronLayout) -> int:
    """Bytes of a store's scratch memory: two pieces of a layer, for prompts."""
    return 2 * layout.piece_blocks * layout.block_bytes


def neurons_need(layout: NeuronLayout, selects_up_to: int) -> StreamedNeed:
    """The need of an FFN: a piece of its neurons' rows, gathered and widened, and the arrays made of them.

    selects_up_to: most tokens of a call that takes the decode path, 0 if none does.
    """
    parts, neurons, width = len(layout.parts), layout.piece_neurons, layout.width

    def need(call: InputShape) -> int:
        tokens, item_bytes = call.tokens, call.item_bytes
        gathered = neurons * layout.bundle_bytes
        widened = 0
        if layout.quantised:
            # On the CPU backend, `mx.dequantize` needs its result once more, and two parts are made in parallel.
            widened = (parts + 2) * neurons * width * item_bytes
        elif item_bytes != ITEM_BYTES[layout.dtype]:
            widened = parts * neurons * width * item_bytes
        if tokens <= selects_up_to:  # too few slots for a piece: rows are gathered in rounds and then joined
            return 2 * gathered + widened + 4 * tokens * layout.neurons * item_bytes
        return gathered + widened + tokens * item_bytes * (2 * width + (parts + 1) * neurons)

    return need


def experts_need(tensors: dict[str, TensorParts], drops_late: bool) -> StreamedNeed:
    """The need of a layer of experts: arrays of (token, expert) pairs, and experts that are widened for a product.

    tensors: an entry of `InPlaceModel.switches`, with names such as "up_proj.weight". drops_late: whether arrays are
    dropped late, as on Metal (graph_memory.py).
    """
    hidden = max(tensor.shape[0] for tensor in tensors.values() if len(tensor.shape) > 1)
    matrices = [t for name, t in tensors.items() if is_widened(name.rpartition(".")[2], t.dtype)]

    def need(call: InputShape) -> int:
        pairs = call.tokens * call.choices
        # Two projections in parallel, each in 16 bits and in 32.
        widened = 2 * min(WIDENED_AT_ONCE, pairs) * max((3 * tensor.nbytes for tensor in matrices), default=0)
        # Tokens sorted by expert, up, gate and their product, down; then all pairs once more, as they were sorted.
        made = 4 * (call.width + hidden) if drops_late else max(2 * call.width, call.width + 3 * hidden)
        return pairs * (4 if matrices else call.item_bytes) * made + widened

    return need
