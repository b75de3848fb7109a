"""Converts a checkpoint into a store. A conversion can be resumed, and always gives the same bytes."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_flash import __version__
from mlx_flash.defaults import LEAST_CALIBRATION_TOKENS
from mlx_flash.errors import CheckpointError, ConversionError, StoreError, UsageError
from mlx_flash.flash.files import MANIFEST, RECORD, VERSION, Manifest, is_store, read_manifest
from mlx_flash.flash.stored_tensors import StoredTensors
from mlx_flash.flash.system import return_freed_memory
from mlx_flash.loading.model_types import activation_of, family_of
from mlx_flash.source.checkpoint_files import matching
from mlx_flash.source.compared_copies import compared_copies
from mlx_flash.text.generation_config import check_end_tokens, read_generation_config, vocabulary_of

from . import calibrate, fitting, imported
from .checkpoint import Checkpoint
from .filled_model import FilledModel
from .neuron_file import write_neurons
from .output import PartialFolder, is_our_store, publish, taken
from .small_copies import SmallCopies
from .store_plan import Settings, StorePlan
from .sums import SUMS, WrittenSums
from .tensors import write_safetensors

DECODE_TOKENS = 8
MAX_DENSITY = 0.85  # A layer whose predictor chooses more uses all its neurons (bench/results/density.md).
DIGITS = 5  # decimal digits of the shares in the manifest
SPARE_BYTES = 64 << 20
AGAIN = "The disk or the memory of this machine may be faulty. Run the same command again: it rewrites the file."


def convert(
    source: Path,
    output: Path,
    settings: Settings,
    overwrite: bool = False,
    seconds: dict[str, float] | None = None,
) -> Manifest:
    """Converts the checkpoint in `source` into the store `output`. Returns the store's manifest.

    Everything is written into the folder `output` + ".partial" beside it, which is renamed when it is complete. A later
    run continues an unfinished one. An old store stays until then.

    overwrite: replace an existing store. seconds: receives the time in seconds that each kind of predictor took.

    Raises CheckpointError, UnsupportedModelError, UsageError (the output exists), NoSpaceError or ConversionError.
    """
    if is_our_store(source):
        raise UsageError(f"{source} is already a store. Run it, or give the checkpoint that it was made from.")
    checkpoint = Checkpoint(source)
    family = family_of(checkpoint.config, source)
    activation = activation_of(checkpoint.config, source)
    # Refuse files that would make the store unusable before the work begins.
    vocabulary = vocabulary_of(checkpoint.config)
    check_end_tokens(source / "config.json", checkpoint.config, vocabulary)
    read_generation_config(source, vocabulary)
    with taken(output, source, overwrite) as output:
        told = {} if seconds is None else seconds
        return _Conversion(StorePlan(checkpoint, family, activation, settings), output, told).run()


class _Conversion:
    def __init__(self, outline: StorePlan, output: Path, seconds: dict[str, float]) -> None:
        self.outline, self.output, self.seconds = outline, output, seconds
        self.folder = PartialFolder(output)
        self.partial = self.folder.path
        self.lowrank_left = outline.lowrank_memory  # bytes left for the remaining layers
        self.written: WrittenSums  # checksums of the partial folder, once it is claimed
        self.small: SmallCopies  # configuration and tokenizer

    # -- the steps ------------------------------------------------------------------------------------------

    def run(self) -> Manifest:
        self.small = SmallCopies(self.outline.checkpoint.folder, lambda name: name == MANIFEST or _is_work_file(name))
        sequences = self._calibration_sequences()
        self.written = self.folder.claim(self._key(), self.outline.checkpoint.shards)
        if is_store(self.partial):  # Only the last renames are missing.
            try:
                manifest = read_manifest(self.partial)
            except StoreError:
                (self.partial / MANIFEST).unlink()
            else:
                self._rename()
                return manifest
        entries = self.outline.resident.entries()
        resident_bytes = sum(int(np.prod(shape)) * dtype.size for _, shape, dtype, _ in entries)
        needed = self.outline.layout.file_bytes + resident_bytes + 2 * self._predictor_bytes()
        self.folder.check_free_space(needed, "the store")
        with tqdm(
            total=self.outline.layout.file_bytes + resident_bytes,
            unit="B",
            unit_scale=True,
            desc="writing",
            dynamic_ncols=True,
        ) as bar:
            table = write_neurons(self.partial, self.outline.layout, self.outline.layer_rows, bar.update, self.written)
            resident = self.partial / Manifest.resident_file
            if self.folder.is_finished(resident.name):
                bar.update(resident_bytes)
            else:
                write_safetensors(resident, entries, bar.update, written=partial(self.written.add, resident.name))
        self.small.copy_to(self.partial)
        perplexities = self._make_predictors(sequences)
        reports = {
            kind: self._merge_predictors(kind) | {"perplexity": perplexities[kind]} for kind in self.outline.kinds
        }
        manifest = self._manifest(reports, table)
        self._publish(manifest)
        return manifest

    def _key(self) -> dict[str, Any]:
        """What the store depends on."""
        text = self._calibration_text()
        return {
            "mlx_flash": __version__,
            "version": VERSION,
            "source": str(self.outline.checkpoint.folder.resolve()),
            "files": self.outline.checkpoint.files(),
            "modified": {shard.name: shard.stat().st_mtime_ns for shard in self.outline.checkpoint.shards},
            "config": self.outline.checkpoint.config,
            "small_files": self.small.sums,
            "dtype": self.outline.dtype,
            "bits": [self.outline.settings.bits, self.outline.settings.group_size, self.outline.settings.resident_bits],
            "calibration": [hashlib.sha256(text.encode()).hexdigest(), self.outline.settings.calibration_tokens],
            "predictors": [
                self.outline.settings.recall,
                self.outline.settings.shadow_bits,
                self.outline.lowrank_memory,
            ],
            "imported": [
                [str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in self.outline.predictor_files
            ],
        }

    def _open(self, path: Path) -> StoredTensors:
        """Opens a file that was written into the partial folder. Raises ConversionError if it is gone."""
        if (sums := self.written.of(path.name)) is None or not path.exists():
            raise ConversionError(f"{path} vanished or changed during the conversion. Run the same command again.")
        return StoredTensors(path, sums, AGAIN)

    def _read(self, path: Path, name: str) -> mx.array:
        return self._open(path).take(name)

    # -- predictors -----------------------------------------------------------------------------------------

    def _calibration_text(self) -> str:
        if self.outline.settings.calibration_text is None:
            return files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")
        try:
            return self.outline.settings.calibration_text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read --calibration {self.outline.settings.calibration_text}: {error}") from None

    def _calibration_sequences(self) -> np.ndarray:
        from mlx_flash.text.tokenizer import TOKENIZER_FILES, load_tokenizer

        folder, size = self.outline.checkpoint.folder, int(self.outline.checkpoint.config["vocab_size"])
        if self.small.sums.keys() & set(TOKENIZER_FILES):
            with compared_copies(folder, [*self.small.sums], self.small.compare) as copies:
                tokenizer = load_tokenizer(copies)
            ids = list(tokenizer.encode(self._calibration_text(), add_special_tokens=False, verbose=False))
            prefix = [i for i in tokenizer.encode("", add_special_tokens=True) if i != tokenizer.eos_token_id][:1]
            prefix = prefix or ([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else [])
        else:
            note = (
                f"note: {folder} has no tokenizer files (expected one of {', '.join(TOKENIZER_FILES)}). Predictors are "
                "calibrated on random tokens, so they are of little use."
            )
            tqdm.write(note, file=sys.stderr)
            rng = np.random.default_rng(0)
            ids, prefix = rng.integers(size, size=self.outline.settings.calibration_tokens).tolist(), []
        if len(ids) < LEAST_CALIBRATION_TOKENS:
            found = f"has {len(ids)} tokens, expected at least {LEAST_CALIBRATION_TOKENS}."
            if self.outline.settings.calibration_text is None:  # Every valid tokenizer makes thousands of it.
                raise CheckpointError(
                    f"the calibration text, by the tokenizer in {folder}, {found} Is its vocabulary empty? "
                    "Download its files again."
                )
            raise UsageError(f"the text of --calibration {found} Use a longer text.")
        if (largest := max(*prefix, *ids)) >= size:
            raise CheckpointError(
                f"the tokenizer in {folder} gives token {largest}, but the model has only {size} tokens. Do they "
                "belong together?"
            )
        return calibrate.calibration_sequences(
            ids, prefix, self.outline.settings.calibration_tokens, self.outline.positions
        )

    def _predictor_bytes(self) -> int:
        """The approximate size in bytes of all kinds of predictors for all layers."""
        shadow = fitting.shadow_bytes(self.outline.layout, self.outline.settings.shadow_bits)
        return self.outline.lowrank_memory + shadow + sum(path.stat().st_size for path in self.outline.predictor_files)

    def _make_predictors(self, sequences: np.ndarray) -> dict[str, dict[str, float]]:
        """Makes a file for each layer and kind. Files that are finished in the partial folder are not made again.

        Returns the held-out perplexity for each kind of predictor, with that kind active in all layers.
        """
        filled = FilledModel(self.outline, self.partial / Manifest.resident_file, self._open)
        norms = self.outline.model.ffn_norms
        held_out = fitting.held_out_tokens(*sequences.shape)
        measured = np.flatnonzero(held_out.reshape(sequences.shape).any(axis=1)).tolist()
        hidden = calibrate.embed(self.outline.model, sequences)
        followings = {
            kind: calibrate.PredictedPass(calibrate.embed(self.outline.model, sequences[measured]))
            for kind in self.outline.kinds
        }
        samples = self._activations(filled, hidden, list(followings.values()), held_out)
        for layer in tqdm(range(self.outline.layers), desc="predictors", unit="layer", dynamic_ncols=True):
            sample = None  # Free the previous layer first.
            return_freed_memory()
            sample = next(samples)
            dense = False
            for kind in self.outline.kinds:
                report = self._layer_predictor(layer, kind, sample, None if norms is None else norms[layer])
                followings[kind].choose = _Choice(partial(self._open, self._layer_file(layer, kind)))
                dense = dense or (kind == self.outline.default_kind and _is_dense(report["predicted"]))
            if dense:
                for following in followings.values():
                    following.choose = None
        sample = None
        next(samples, None)  # runs the last layer of the predicted passes
        filled.fill_rest()
        targets = sequences[measured]
        result = {
            "dense": calibrate.perplexity(self.outline.model, mx.concatenate(hidden)[mx.array(measured)], targets)
        }
        for kind, following in followings.items():
            result[kind] = calibrate.perplexity(self.outline.model, mx.concatenate(following.hidden), targets)
        tokens = targets.size - len(targets)
        return {
            kind: {"dense": round(result["dense"], 4), "predicted": round(result[kind], 4), "tokens": tokens}
            for kind in self.outline.kinds
        }

    def _layer_predictor(self, layer: int, kind: str, sample: fitting.Sample, norm: Any) -> dict[str, Any]:
        """Makes a layer's predictor, unless its file is finished. Returns the measurements from the file."""
        path = self._layer_file(layer, kind)
        if not self.folder.is_finished(path.name):
            return_freed_memory()
            began = time.perf_counter()
            made = self._make_predictor(layer, kind, sample, norm)
            fitting.write_layer(path, made, partial(self.written.add, path.name))
            self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - began
            del made
        stored = self._open(path)
        if kind == "lowrank":
            self.lowrank_left -= stored.arrays["a"].nbytes + stored.arrays["b"].nbytes
        return fitting.measured_of(stored)

    def _make_predictor(self, layer: int, kind: str, sample: fitting.Sample, norm: Any) -> fitting.LayerPredictor:
        dtype, recall = getattr(mx, self.outline.dtype), self.outline.settings.recall
        if kind == "lowrank":  # Later layers are denser, so they get what earlier ones left of their shares.
            later = self.outline.layers - 1 - layer
            allowed = self.lowrank_left - later * (self.outline.lowrank_memory // self.outline.layers)
            return fitting.make_lowrank(sample, recall, allowed, layer, dtype)
        if kind == "shadow":
            return fitting.make_shadow(sample, recall, self.outline.settings.shadow_bits, dtype)
        path = self.outline.predictor_files[layer]
        neurons, width = sample.up.shape
        arrays = imported.map_layer(imported.read_file(path), norm, neurons, width, path)
        made = fitting.make_imported(arrays, sample, recall, dtype)
        if made.active > 0 and made.recall < recall / 2:  # No threshold helps if all scores are equal or overflow.
            raise CheckpointError(
                f"{path} finds {made.recall:.1%} of the active neurons, with a threshold set for {recall:.1%}. Was "
                "it made for this model? Convert without --predictor-from."
            )
        return made

    def _layer_file(self, layer: int, kind: str) -> Path:
        return self.partial / f"layer-{layer:04d}-{kind}.safetensors"

    def _merge_predictors(self, kind: str) -> dict[str, Any]:
        """Merges the predictors of all layers into one file. Returns their measurements, for the manifest."""
        report: dict[str, Any] = {"recall": [], "predicted": [], "active": [], "bytes": 0}
        report["target"] = self.outline.settings.recall
        report["table"] = {"recall": fitting.recalls(self.outline.settings.recall)}
        tensors = []
        for layer in range(self.outline.layers):
            path = self._layer_file(layer, kind)
            stored = self._open(path)
            measured = fitting.measured_of(stored)
            for name in ("recall", "predicted", "active"):
                report[name].append(round(measured[name], DIGITS))
            for name, values in measured["table"].items():
                rounded = [float(f"{value:.{DIGITS}g}") for value in values]
                report["table"].setdefault(name, []).append(rounded)
            if measured["rank"] is not None:
                report.setdefault("rank", []).append(measured["rank"])
            for name, array in sorted(stored.arrays.items()):
                report["bytes"] += array.nbytes
                load = partial(self._read, path, name)
                tensors.append((f"{layer}.{name}", array.shape, array.dtype, load))
        if kind == "shadow":
            report |= {"bits": self.outline.settings.shadow_bits, "group_size": fitting.SHADOW_GROUP}
        path = self.partial / Manifest.predictor_file(kind)
        write_safetensors(path, tensors, written=partial(self.written.add, path.name))
        return report

    def _activations(
        self,
        filled: FilledModel,
        hidden: list[mx.array],
        followings: list[calibrate.PredictedPass],
        held_out: np.ndarray,
    ) -> Iterator[fitting.Sample]:
        """Yields the Sample of each layer."""
        for x, score, ffn in calibrate.layer_activations(self.outline.model, hidden, followings, filled.host_ffn):
            bias = np.zeros(ffn.matrices[0].shape[0], np.float32) if len(ffn.matrices) == 2 else ffn.up_bias
            shifted = bias - np.float32(self.outline.activation.threshold)
            sample = [fitting.Sample(x, score, ffn.matrices[0], shifted, held_out)]
            del x, score, ffn
            yield sample.pop()  # Only the caller keeps a reference to it.

    # -- the end --------------------------------------------------------------------------------------------

    def _manifest(self, reports: dict[str, dict[str, Any]], table: str) -> Manifest:
        """The manifest of the store. table: the SHA-256 of the neurons' checksums."""
        dense = [i for i, share in enumerate(reports[self.outline.default_kind]["predicted"]) if _is_dense(share)]
        present = [path.name for path in self.partial.iterdir() if path.is_file()]
        names = [name for name in matching(present, ("*",)) if not _is_work_file(name)]  # no hidden files of macOS
        return Manifest(
            model_type=str(self.outline.checkpoint.config["model_type"]),
            source=self.outline.checkpoint.files(),
            layout=self.outline.layout,
            activation=asdict(self.outline.activation),
            resident_dtype=self.outline.dtype,
            decode_tokens=DECODE_TOKENS,
            all_neurons_layers=tuple(dense),
            predictors=reports,
            default_predictor=self.outline.default_kind,
            files={name: self._file_entry(name, table) for name in names},
            resident_bits=self.outline.resident.bits,
            resident_group_size=self.outline.resident.group_size,
        )

    def _file_entry(self, name: str, table: str) -> dict[str, Any]:
        """The size and the intended checksums of a file. The neurons' file has its own table of checksums."""
        entry: dict[str, Any] = {"bytes": (self.partial / name).stat().st_size}
        if (sums := self.written.of(name)) is not None:
            return entry | {"crc32": sums}
        if name == Manifest.neurons_file:
            return entry
        return entry | {"sha256": table if name == Manifest.neurons_checksums_file else self.small.sums[name]}

    def _publish(self, manifest: Manifest) -> None:
        self.folder.check_sources()
        publish(self.partial, manifest)
        self._rename()

    def _rename(self) -> None:
        self.folder.rename(_is_work_file)


class _Choice:
    """The neurons that a layer's predictor chooses. The predictor is read from its file at the first call."""

    def __init__(self, open_file: Callable[[], StoredTensors]) -> None:
        self._open = open_file
        self._arrays: dict[str, mx.array] | None = None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x: (N, D) -> bool (N, F)"""
        if self._arrays is None:
            stored = self._open()
            self._arrays = {name: stored.take(name) for name in list(stored.arrays)}
        return fitting.chosen(self._arrays, x)


def _is_dense(predicted: float) -> bool:
    """Whether a layer is too dense for selection to pay. predicted: share of neurons that its predictor chooses."""
    return round(predicted, DIGITS) > MAX_DENSITY


def _is_work_file(name: str) -> bool:
    return name in (RECORD, SUMS) or name.startswith("layer-") or name.endswith(".partial")
