"""python -m mlx_flash.convert: converts a checkpoint into a store, or into MLX's form."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_flash.cli.run import REVISION_HELP, add_lifeline_argument, obey_lifeline, program, run_command, whole_number
from mlx_flash.defaults import BITS, CALIBRATION_TOKENS, DTYPES, LEAST_CALIBRATION_TOKENS, MLX_BITS

if TYPE_CHECKING:
    from mlx_flash.flash.files import Manifest


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("convert"),
        description="Converts the Hugging Face checkpoint of a ReLU model into a store that mlx_flash streams from, "
        "and any other that mlx-lm knows into MLX's own form, quantised if wanted. An interrupted conversion continues "
        "when the same command is run again.",
    )
    parser.add_argument("--model", required=True, help="folder of a checkpoint, or a Hugging Face repository id")
    parser.add_argument("--revision", help=REVISION_HELP)
    parser.add_argument("--output", required=True, type=Path, help="folder to write; it must not exist yet")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing store at --output")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the stored numbers (default: the checkpoint's own)")
    parser.add_argument(
        "--bits",
        type=int,
        choices=MLX_BITS,
        default=16,
        help="bits per weight: in MLX's form of every matrix that mlx-lm quantises, in a store (16, 8 or 4) of the FFN "
        "weights on the SSD (default: 16, not quantised)",
    )
    parser.add_argument(
        "--expert-bits", type=int, choices=MLX_BITS, help="bits per weight of a mixture's experts (default: --bits)"
    )
    parser.add_argument(
        "--resident-bits",
        type=int,
        choices=BITS,
        default=16,
        help="in a store, bits per weight of the attention, the embeddings and the output matrix (default: 16, not "
        "quantised)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="plain text to calibrate predictors on (default: the packaged text)",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=whole_number(LEAST_CALIBRATION_TOKENS, 10**7),
        default=CALIBRATION_TOKENS,
        metavar="N",
        help="number of calibration tokens to use (default: %(default)s)",
    )
    parser.add_argument(
        "--predictor-memory",
        metavar="SIZE",
        help="memory for the low-rank predictors of all layers, such as 200MB (default: a tenth of the FFN's bytes "
        "before --bits)",
    )
    parser.add_argument(
        "--predictor-from",
        metavar="DIR_OR_ID",
        help="also import PowerInfer's predictors for this model (model_0.pt and so on) from a folder or a Hugging "
        "Face repository; they become the default predictors",
    )
    add_lifeline_argument(parser)
    return parser


def main(arguments: argparse.Namespace) -> None:
    obey_lifeline(arguments)
    import mlx.core as mx

    from mlx_flash.loading.model_types import runs_as_it_is
    from mlx_flash.loading.plan import MLX_CACHE_BYTES
    from mlx_flash.source.checkpoint_files import read_config
    from mlx_flash.source.resolve import find_checkpoint

    from .output import is_our_store

    say = partial(print, file=sys.stderr)
    source = find_checkpoint(arguments.model, arguments.revision, say)
    mx.set_cache_limit(MLX_CACHE_BYTES)  # Freed buffers of one layer often do not fit the next, so keep few.
    try:
        if not is_our_store(source) and runs_as_it_is(read_config(source), source):
            _make_mlx_form(arguments, source)
        else:
            _make_store(arguments, source, say)
    except KeyboardInterrupt:
        kept = f"{arguments.output}.partial keeps the finished part"
        print(f"\nstopped: {kept}; run the same command again to continue", file=sys.stderr)
        raise


def _make_mlx_form(arguments: argparse.Namespace, source: Path) -> None:
    from mlx_flash.errors import UsageError
    from mlx_flash.source.checkpoint_files import read_config
    from mlx_flash.source.zoos import has_vision

    from .mlx_form import Wanted, convert_to_mlx

    for flag, value, default in (
        ("--resident-bits", arguments.resident_bits, 16),
        ("--calibration", arguments.calibration, None),
        ("--calibration-tokens", arguments.calibration_tokens, CALIBRATION_TOKENS),
        ("--predictor-memory", arguments.predictor_memory, None),
        ("--predictor-from", arguments.predictor_from, None),
    ):
        if value != default:
            raise UsageError(f"{flag} is for ReLU models, which {source} is not. Leave it out.")
    wanted = Wanted(arguments.bits, arguments.expert_bits, arguments.dtype)
    if has_vision(read_config(source)):
        print(
            "note: the parts for images are left out, because the model in mlx-lm reads only text. `mlx_vlm.convert` "
            "keeps them.",
            file=sys.stderr,
        )
    nbytes = convert_to_mlx(source, arguments.output, wanted, arguments.overwrite)
    print(f"{arguments.output}: {nbytes / 1e9:.2f} GB in MLX's form", file=sys.stderr)


def _make_store(arguments: argparse.Namespace, source: Path, say: Callable[[str], None]) -> None:
    from mlx_flash.errors import UsageError
    from mlx_flash.layers.recall import PredictorSetting
    from mlx_flash.loading.plan import parse_memory

    from .conversion import Settings, convert
    from .imported import find_predictors

    if arguments.expert_bits is not None:
        raise UsageError(f"--expert-bits is for mixtures of experts, which {source} is not. Use --bits.")
    if arguments.bits not in BITS:
        raise UsageError(f"--bits {arguments.bits} is not for stores: they take {', '.join(map(str, BITS))}.")
    memory = None if arguments.predictor_memory is None else parse_memory(arguments.predictor_memory)
    settings = Settings(
        arguments.dtype,
        arguments.calibration,
        arguments.calibration_tokens,
        predictor_memory=memory,
        predictor_from=None if arguments.predictor_from is None else find_predictors(arguments.predictor_from, say),
        bits=arguments.bits,
        resident_bits=arguments.resident_bits,
    )
    manifest = convert(source, arguments.output, settings, arguments.overwrite)
    layout = manifest.layout
    print(
        f"{arguments.output}: {layout.layers} layers of {layout.neurons} neurons, {_stored(manifest)}", file=sys.stderr
    )
    for kind, report in manifest.predictors.items():
        mark = "; the default" if kind == manifest.default_predictor else ""
        ranks = ", ".join(map(str, sorted(set(report.get("rank", [])))))
        size = f"{report['bytes'] / 1e6:.1f} MB" + (f", rank {ranks}" if ranks else "")
        print(f"  {PredictorSetting.of(kind, report).describe()}; {size}{mark}", file=sys.stderr)
    if manifest.all_neurons_layers:
        print(f"  layers {list(manifest.all_neurons_layers)} are too dense: they use all neurons", file=sys.stderr)


def _stored(manifest: Manifest) -> str:
    """The types in a store, such as "float16" or "float16, neurons in 4 bits, resident matrices in 8 bits"."""
    names = {"neurons": manifest.layout.bits, "resident matrices": manifest.resident_bits}
    return ", ".join([manifest.layout.dtype, *(f"{name} in {bits} bits" for name, bits in names.items() if bits < 16)])


if __name__ == "__main__":
    run_command(make_parser(), main)
