"""The conversion: a checkpoint in, a store out; resumable, and the same bytes every time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from mlx_flash.errors import CheckpointError, ConversionError, NoSpaceError, UsageError
from mlx_flash.flash.files import MANIFEST, VERSION, Manifest, NeuronLayout, is_store

from . import calibrate, predictors
from .checkpoint import Checkpoint
from .families import Family, family_of
from .neurons import write_neurons
from .tensors import tensor_checksums, write_safetensors

DTYPES = ("float32", "float16", "bfloat16")
DECODE_TOKENS = 8
MAX_DENSITY = 0.5  # a layer whose predictor chooses more uses all its neurons (bench/RESULTS.md)
DEFAULT_PREDICTOR = "shadow"  # bench/RESULTS.md
CALIBRATION_TOKENS = 4096
SPARE_BYTES = 64 << 20
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


@dataclass(frozen=True)
class Settings:
    """What a user may choose; everything here changes the bytes of the store."""

    dtype: str | None = None  # None: the checkpoint's own
    calibration_text: Path | None = None  # None: the packaged text
    calibration_tokens: int = CALIBRATION_TOKENS


def convert(source: Path, output: Path, settings: Settings, overwrite: bool = False) -> Manifest:
    """Converts the checkpoint in `source` into the store `output`.

    Everything is written into `output` + ".partial" beside it, which a later run goes on with, and renamed when
    it is whole. Raises CheckpointError, UnsupportedModelError, UsageError (the output is there already),
    NoSpaceError or ConversionError.
    """
    checkpoint = Checkpoint(source)
    family = family_of(checkpoint.config, source)
    if output.exists() and not overwrite and (is_store(output) or any(output.iterdir())):
        kind = "a complete store" if is_store(output) else "a folder with other files in it"
        raise UsageError(f"{output} is already {kind}. Choose another --output, or replace it with --overwrite.")
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(output) + ".lock")
    try:
        with lock.acquire(timeout=0):
            return _Conversion(checkpoint, family, output, settings).run()
    except Timeout:
        raise ConversionError(f"another process is converting into {output}. Wait for it, or stop it.") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NoSpaceError(
                f"the disk of {output} is full. What was written is kept in {output}.partial: make room and run the "
                "same command again to go on, or remove that folder."
            ) from None
        raise ConversionError(f"cannot write {output}: {error}. Run the same command again to go on.") from None
    finally:
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink()


class _Conversion:
    def __init__(self, checkpoint: Checkpoint, family: Family, output: Path, settings: Settings) -> None:
        from mlx_flash.loading import model_classes

        self.checkpoint, self.family, self.output, self.settings = checkpoint, family, output, settings
        self.partial = output.with_name(output.name + ".partial")
        model_class, args_class = model_classes(checkpoint.config)
        try:
            self.model = model_class(args_class.from_dict(checkpoint.config))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{checkpoint.folder / 'config.json'}: {error}") from None
        # What the model calls a tensor -> what the checkpoint calls it.
        self.original = {new: old for old in checkpoint.names for new in self.model.sanitize({old: mx.array(0)})}
        self.layers = int(checkpoint.config[family.layers_key])
        self.layout, self.dtype = self._plan_layout()
        self.resident = self._resident_tensors()

    def _plan_layout(self) -> tuple[NeuronLayout, str]:
        up, down = (self._lazy(name.format(0)) for name in (self.family.up, self.family.down))
        neurons, width = up.shape
        if down.shape != (width, neurons):
            raise CheckpointError(
                f"{self.checkpoint.folder}: up projection {up.shape} and down projection {down.shape} do not fit "
                "together; expected (F, D) and (D, F)."
            )
        dtype = self.settings.dtype or str(up.dtype).removeprefix("mlx.core.")
        if dtype not in DTYPES:
            raise CheckpointError(f"{self.checkpoint.folder} is stored in {dtype}; expected {', '.join(DTYPES)}.")
        return NeuronLayout.plan(dtype, self.layers, neurons, width, ("up", "down")), dtype

    def _resident_tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored name -> (model's name, shape) of everything that is not streamed; checks that all is there."""
        from mlx.utils import tree_flatten

        wanted = dict(tree_flatten(self.model.parameters()))
        result = {}
        for name in sorted(wanted):
            shape = self._lazy(name).shape
            if shape != wanted[name].shape:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {self.original[name]} has shape {shape}, expected {wanted[name].shape}."
                )
            result[name] = (name, shape)
        for layer in range(self.layers):
            for part in (self.family.up, self.family.down):
                result.pop(part.format(layer))
            for old, new in (
                (self.family.up_bias, self.family.streamed_up_bias),
                (self.family.down_bias, self.family.streamed_down_bias),
            ):
                if old.format(layer) in result:
                    result[new.format(layer)] = result.pop(old.format(layer))
        return result

    def _lazy(self, name: str) -> mx.array:
        if name not in self.original:
            raise CheckpointError(f"{self.checkpoint.folder} has no tensor {name}. Is the checkpoint complete?")
        return self.checkpoint.lazy(self.original[name])

    def _load(self, name: str) -> mx.array:
        return self.checkpoint.load(self.original[name])

    # -- the steps ------------------------------------------------------------------------------------------

    def run(self) -> Manifest:
        self._claim_partial_folder()
        dtype = getattr(mx, self.dtype)
        resident_bytes = sum(int(np.prod(shape)) * dtype.size for _, shape in self.resident.values())
        self._check_free_space(self.layout.file_bytes + resident_bytes)
        with tqdm(
            total=self.layout.file_bytes + resident_bytes, unit="B", unit_scale=True, desc="writing", dynamic_ncols=True
        ) as bar:
            write_neurons(self.partial, self.layout, self._layer_rows, bar.update)
            if (self.partial / Manifest.resident_file).exists():
                bar.update(resident_bytes)
            else:
                write_safetensors(
                    self.partial / Manifest.resident_file,
                    (
                        (name, shape, dtype, lambda source=source: self._load(source))  # type: ignore[misc]
                        for name, (source, shape) in sorted(self.resident.items())
                    ),
                    bar.update,
                )
        self._copy_small_files()
        reports = self._make_predictors()
        manifest = self._manifest(reports)
        self._publish(manifest)
        return manifest

    def _claim_partial_folder(self) -> None:
        """Goes on with a partial conversion of the same input, or begins anew."""
        text = self._calibration_text()
        stat = {shard.name: shard.stat().st_mtime_ns for shard in self.checkpoint.shards}
        key = {
            "version": VERSION,
            "source": str(self.checkpoint.folder.resolve()),
            "files": self.checkpoint.files(),
            "modified": stat,
            "config": self.checkpoint.config,
            "dtype": self.dtype,
            "calibration": [hashlib.sha256(text.encode()).hexdigest(), self.settings.calibration_tokens],
        }
        record = self.partial / "conversion.json"
        if record.is_file() and record.read_text(encoding="utf-8") == json.dumps(key, sort_keys=True):
            tqdm.write(f"going on with the conversion in {self.partial}")
            return
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)
        record.write_text(json.dumps(key, sort_keys=True), encoding="utf-8")

    def _check_free_space(self, needed: int) -> None:
        present = sum(file.stat().st_size for file in self.partial.iterdir() if file.is_file())
        needed = needed + needed // 50 + SPARE_BYTES - present
        free = shutil.disk_usage(self.partial).free
        if free < needed:
            raise NoSpaceError(
                f"the store needs {needed / 1e9:.2f} GB more at {self.output}, where {free / 1e9:.2f} GB are free. "
                "Make room, or choose an --output on another disk. Nothing was written."
            )

    def _layer_rows(self, layer: int) -> tuple[mx.array, ...]:
        dtype = getattr(mx, self.dtype)
        up = self._load(self.family.up.format(layer)).astype(dtype)
        down = self._load(self.family.down.format(layer)).astype(dtype)
        return up, down.T

    def _copy_small_files(self) -> None:
        """Configuration, tokenizer and generation settings."""
        for pattern in SMALL_FILES:
            for path in sorted(self.checkpoint.folder.glob(pattern)):
                if path.is_file() and not path.name.endswith(".index.json") and path.name != MANIFEST:
                    shutil.copyfile(path, self.partial / path.name)

    # -- predictors -----------------------------------------------------------------------------------------

    def _calibration_text(self) -> str:
        if self.settings.calibration_text is None:
            return files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")
        try:
            return self.settings.calibration_text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read --calibration {self.settings.calibration_text}: {error}") from None

    def _calibration_sequences(self) -> np.ndarray:
        from mlx_flash.loading import load_tokenizer

        positions = int(self.checkpoint.config[self.family.positions_key])
        try:
            tokenizer = load_tokenizer(self.partial)
            ids = list(tokenizer.encode(self._calibration_text(), add_special_tokens=False))
            prefix = [i for i in tokenizer.encode("", add_special_tokens=True) if i != tokenizer.eos_token_id][:1]
            prefix = prefix or ([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else [])
        except CheckpointError as error:
            tqdm.write(f"note: {error} Predictors are calibrated on random tokens and mean little.")
            rng = np.random.default_rng(0)
            size = int(self.checkpoint.config["vocab_size"])
            ids, prefix = rng.integers(size, size=self.settings.calibration_tokens).tolist(), []
        return calibrate.calibration_sequences(ids, prefix, self.settings.calibration_tokens, positions)

    def _make_predictors(self) -> dict[str, list[predictors.LayerPredictor]]:
        """Both kinds for every layer. What is found finished in the partial folder is not made again."""
        made: dict[str, list[predictors.LayerPredictor]] = {"lowrank": [], "shadow": []}
        dtype = getattr(mx, self.dtype)
        activations = self._activations()
        for layer in tqdm(range(self.layers), desc="predictors", unit="layer", dynamic_ncols=True):
            paths = {kind: self.partial / f"layer-{layer:04d}-{kind}.safetensors" for kind in made}
            x, before, up, held_out = next(activations)
            for kind, path in paths.items():
                predictor = _read_layer_predictor(path)
                if predictor is None:
                    if kind == "lowrank":
                        predictor = predictors.lowrank_predictor(x, before, up, held_out, layer, dtype)
                    else:
                        bias = self._bias(self.family.up_bias, layer, up.shape[0])
                        predictor = predictors.shadow_predictor(x, before, up, held_out, bias, dtype)
                    if predictor is not None:
                        _write_layer_predictor(path, predictor)
                if predictor is not None:
                    made[kind].append(predictor)
        finished = {kind: layers for kind, layers in made.items() if len(layers) == self.layers}
        for kind, layers in finished.items():
            arrays = {f"{i}.{name}": a for i, layer in enumerate(layers) for name, a in sorted(layer.arrays.items())}
            write_safetensors(
                self.partial / Manifest.predictor_file(kind),
                ((name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()),  # type: ignore[misc]
                lambda _: None,
            )
        return finished

    def _activations(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Per layer: FFN inputs, pre-activations, up projection, and which tokens are held out."""
        weights = mx.load(str(self.partial / Manifest.resident_file))
        back = {new: old for new, (old, _) in self.resident.items()}
        self.model.load_weights(
            [(back[name], w.astype(mx.float32)) for name, w in weights.items()],
            strict=False,  # type: ignore[union-attr]
        )
        sequences = self._calibration_sequences()
        held_out = np.repeat(
            np.arange(len(sequences)) % predictors.HELD_OUT == predictors.HELD_OUT - 1, sequences.shape[1]
        )
        if not held_out.any():  # a single short sequence: measure on what it was trained on
            held_out[len(held_out) // 2 :] = True
        for x, before, up in calibrate.layer_activations(self.model, sequences, self._host_ffn):
            yield x, before, up, held_out

    def _host_ffn(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        up, down = (np.array(rows.astype(mx.float32)) for rows in self._layer_rows(layer))
        return (
            up,
            self._bias(self.family.up_bias, layer, up.shape[0]),
            down,
            self._bias(self.family.down_bias, layer, up.shape[1]),
        )

    def _bias(self, name: str, layer: int, size: int) -> np.ndarray:
        if name.format(layer) not in self.original:
            return np.zeros(size, np.float32)
        return np.array(self._load(name.format(layer)).astype(mx.float32))

    # -- the end --------------------------------------------------------------------------------------------

    def _manifest(self, made: dict[str, list[predictors.LayerPredictor]]) -> Manifest:
        reports = {}
        for kind, layers in made.items():
            reports[kind] = {
                "recall": [round(p.recall, 5) for p in layers],
                "predicted": [round(p.predicted, 5) for p in layers],
                "active": [round(p.active, 5) for p in layers],
                "bytes": sum(a.nbytes for p in layers for a in p.arrays.values()),
            }
        if "shadow" in reports:
            reports["shadow"] |= {"bits": predictors.SHADOW_BITS, "group_size": predictors.SHADOW_GROUP}
        default = DEFAULT_PREDICTOR if DEFAULT_PREDICTOR in made else "lowrank"
        dense = [i for i, p in enumerate(made[default]) if p.predicted > MAX_DENSITY]
        names = sorted(p.name for p in self.partial.iterdir() if p.is_file() and not _is_work_file(p.name))
        return Manifest(
            model_type=str(self.checkpoint.config["model_type"]),
            source=self.checkpoint.files(),
            layout=self.layout,
            resident_dtype=self.dtype,
            decode_tokens=DECODE_TOKENS,
            all_neurons_layers=tuple(dense),
            predictors=reports,
            default_predictor=default,
            files={name: _file_entry(self.partial / name) for name in names},
        )

    def _publish(self, manifest: Manifest) -> None:
        for path in self.partial.iterdir():
            if _is_work_file(path.name):
                path.unlink()
            else:
                _fsync(path)
        with (self.partial / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        _fsync(self.partial)
        if self.output.exists():
            # Moved to a name of its own first, so that a kill between the two leaves one whole store.
            replaced = Path(tempfile.mkdtemp(prefix=f".{self.output.name}-replaced-", dir=self.output.parent))
            self.output.rename(replaced / "store")
            self.partial.rename(self.output)
            shutil.rmtree(replaced)
        else:
            self.partial.rename(self.output)
        _fsync(self.output.parent)


def _is_work_file(name: str) -> bool:
    return name == "conversion.json" or name.startswith("layer-") or name.endswith(".partial")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_entry(path: Path) -> dict[str, Any]:
    """Size and checksums. The bundle file has its own table of checksums and is not read again here."""
    entry: dict[str, Any] = {"bytes": path.stat().st_size}
    if path.name == Manifest.neurons_file:
        return entry
    if path.suffix == ".safetensors":
        entry["crc32"] = tensor_checksums(path)
        return entry
    entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return entry


def _write_layer_predictor(path: Path, predictor: predictors.LayerPredictor) -> None:
    measured = {name: getattr(predictor, name) for name in ("recall", "predicted", "active")}
    partial = path.with_name(path.stem + "-new.safetensors")
    mx.save_safetensors(str(partial), predictor.arrays, {"measured": json.dumps(measured)})
    _fsync(partial)
    partial.replace(path)


def _read_layer_predictor(path: Path) -> predictors.LayerPredictor | None:
    if not path.exists():
        return None
    arrays, metadata = mx.load(str(path), return_metadata=True)
    return predictors.LayerPredictor(arrays, **json.loads(metadata["measured"]))
