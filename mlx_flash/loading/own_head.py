"""Plans and loads a checkpoint's own draft head (MTP), which mlx-vlm builds beside the model, wholly in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import CheckpointError, FlashError, UsageError
from ..flash.files import is_store
from ..source.checkpoint_tensors import tensors_in
from ..source.model_kind import error_line, refuse_own_code
from ..source.remote_code import refusing_remote_code
from ..source.zoos import INSTALL_MLX_VLM, mlx_vlm_is_installed
from ..text.draft_head import DraftHead, most_tokens
from ..text.drafts import HEAD, Drafting
from .config import read_config
from .graph_memory import Evaluation, peak_bytes, trace
from .lazy_model import lazy_tensors, read_all
from .memory_needs import LOGITS_COPIES
from .streaming_needs import loading_excess_bytes

TYPES = ("deepseek_v4", "qwen3_5", "qwen3_5_moe", "qwen4_exp")  # those whose heads are tested
PREFIXES = ("mtp.", "model.mtp.", "language_model.mtp.")  # of a head's tensors
REMEDY = "Use --draft ngram, or --draft-model with a small model of the same vocabulary."


@dataclass(frozen=True)
class PlannedHead:
    """A draft head whose weights are unread. config: the checkpoint's configuration."""

    folder: Path
    head: Any
    config: dict[str, Any]

    note = "the checkpoint's own head, its KV cache, work space"

    def bytes_at(self, _: int) -> int:
        """Its memory, which does not depend on the context."""
        sizes = [array.nbytes for _, array in self._weights()]
        return sum(sizes) + max(self._computing_bytes, loading_excess_bytes(sizes))

    @cached_property
    def _computing_bytes(self) -> int:
        """The head's KV cache, its work space while the cache begins again, and the model's hidden states."""
        text = self.config.get("text_config") or self.config
        try:
            width, vocabulary = int(text["hidden_size"]), int(text["vocab_size"])
            streams = int(text.get("hc_count") or text.get("hc_mult") or 1)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _cannot_load(self.folder, error) from None
        most = most_tokens(self.head)
        again = max(1, most // 2)
        target = SimpleNamespace(
            embed_tokens=lambda ids: mx.zeros((*ids.shape, width)),
            lm_head=lambda hidden: mx.zeros((*hidden.shape[:-1], vocabulary)),
        )
        weights = self._weights()

        def begin(*arrays: mx.array) -> list[mx.array]:
            self.head.load_weights([(name, array) for (name, _), array in zip(weights, arrays, strict=False)])
            self.head.reset(target)
            tokens = mx.zeros((1, again), mx.int32)
            self.head.prefill_from_target_hidden(tokens, arrays[-1], 0, lambda logits: mx.argmax(logits, axis=-1))
            state: Any = tree_flatten(self.head.draft_eval_state())
            return [array for _, array in state if isinstance(array, mx.array)]

        states = mx.zeros((1, again, streams * width))
        try:
            with refusing_remote_code():
                graph = trace(begin, *(mx.zeros(array.shape, array.dtype) for _, array in weights), states)
        except Exception as error:  # mlx-vlm's head and MLX raise plain exceptions
            raise _cannot_load(self.folder, error) from None
        finally:
            self.head.load_weights(weights)
            self.head.reset(target)
        made = [array.name for array in graph.outputs]
        work = peak_bytes(
            graph, [Evaluation(made)], [], drops_late=True
        )  # more than on the CPU, where some are dropped
        kept = sum(array.nbytes for array in graph.outputs)
        # A cache that grows exists twice, and its last step may be twice as long as what it holds. The states are held,
        # joined with new ones, and copied.
        return work + 6 * kept + 3 * states.nbytes + LOGITS_COPIES * 4 * vocabulary

    def check(self, _: Any) -> None:
        """Its vocabulary is the model's."""

    def load(self, model: Any, most_positions: int) -> Drafting:
        """Reads the weights, and makes the model note its hidden states. Raises ReadError."""
        read_all([array for _, array in self._weights()], self.folder, "a tensor of the draft head")
        made = DraftHead(self.head, model)
        model.states = made.states
        return Drafting(HEAD, most_positions, made)

    def _weights(self) -> list[tuple[str, mx.array]]:
        named: Any = tree_flatten(self.head.parameters())
        return named  # type: ignore[no-any-return]


def plan_head(folder: Path) -> PlannedHead:
    """The head of the checkpoint in `folder`. Only headers are read.

    Raises UsageError for a model without a head that can draft here, CheckpointError and UnsupportedModelError.
    """
    if is_store(folder):
        raise UsageError(f"{folder} is a store, which has no draft head. {REMEDY}")
    config = read_config(folder)
    refuse_own_code(config, folder)
    if config.get("model_type") not in TYPES:
        raise UsageError(
            f"{folder} ({config.get('model_type')}) cannot draft with a head of its own: those of {', '.join(TYPES)} "
            f"can. {REMEDY}"
        )
    tensors = tensors_in(folder)
    names = [name for name in tensors if name.startswith(PREFIXES)]
    if not names:
        raise UsageError(f"{folder} has no draft head: none of its tensors is named mtp.*. {REMEDY}")
    if not mlx_vlm_is_installed():
        raise UsageError(f"mlx-vlm runs draft heads, and it is not installed: `{INSTALL_MLX_VLM}`. {REMEDY}")
    arrays = lazy_tensors({name: tensors[name] for name in names})
    try:
        with refusing_remote_code():
            head = _built(folder, config, {name: tensors[name][0] for name in names}, arrays)
    except FlashError:
        raise
    except Exception as error:  # mlx-vlm raises plain exceptions
        raise _cannot_load(folder, error) from None
    return PlannedHead(folder, head, config)


def _built(folder: Path, config: dict[str, Any], files: dict[str, Path], arrays: dict[str, mx.array]) -> Any:
    """mlx-vlm's head, made of tensors that are not read yet. files: the file of each tensor."""
    from mlx_vlm.speculative.drafters.mtp_split import get_mtp_splitter

    splitter: Any = get_mtp_splitter(source_config=config)
    if splitter is None or not splitter.output_model_type.endswith("_mtp"):
        raise UsageError(f"{folder} has a draft head of a kind that is not used here. {REMEDY}")

    def selected(_: Path, settings: dict[str, Any]) -> list[tuple[Path, list[str]]]:
        names = [name for name in files if splitter.select_keys(name, settings)]
        return [(file, [n for n in names if files[n] == file]) for file in sorted({files[n] for n in names})]

    # It would read the tensors at once, from any file of the folder that has them.
    splitter.iter_selected = selected
    splitter.load_shard = lambda _, names: {name: arrays[name] for name in names}
    return splitter.load(folder, lazy=True, source_config=config)


def _cannot_load(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"mlx-vlm cannot run the draft head of {folder}: {error_line(error)}. Download the checkpoint again, or leave "
        "--draft mtp out."
    )
