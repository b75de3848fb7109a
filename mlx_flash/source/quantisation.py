"""How a checkpoint's numbers are packed, told by its tensors, and by its configuration where that says more."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# What only such files have: the end of a tensor's name -> the kind. The first that fits is said.
_SUFFIXES = (
    (".g_idx", "GPTQ"),
    (".qzeros", "AWQ or GPTQ"),
    (".qweight", "AWQ or GPTQ"),
    (".absmax", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_inv", "FP8"),
    (".weight_scale", "FP8"),
    (".input_scale", "FP8"),
    (".W_q", "HQQ"),
    (".codebooks", "AQLM"),
    (".weight._data", "Quanto"),
)
_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt"}
_NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
}


def foreign_quantisation(config: Mapping[str, Any], files: Collection[str], dtype_of: Mapping[str, str]) -> str | None:
    """What packed the numbers of a checkpoint, such as "GPTQ, 4 bits"; None if they are plain, or MLX's own.

    files: names of the small files beside it. dtype_of: tensor -> type, as the file has it ("F8_E4M3", "float16").
    """
    found = next((kind for suffix, kind in _SUFFIXES if any(name.endswith(suffix) for name in dtype_of)), None)
    if found is None and any(dtype.upper().startswith(("F8_", "FLOAT8")) for dtype in dtype_of.values()):
        found = "FP8"
    if found is None:
        return None
    settings = settings_of(config)
    method = str(settings.get("quant_method", "")).lower()
    named = _NAMES.get(method, method) or next((kind for file, kind in _FILES.items() if file in files), None)
    bits = settings.get("bits")
    return (named or found) + (f", {bits} bits" if isinstance(bits, int) else "")


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `quantization_config` of a configuration, or of the part of it that is for the text model; {} if none is."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if isinstance(settings := part.get("quantization_config"), dict):
            return settings
    return {}


def group_problem(config: Mapping[str, Any]) -> str | None:
    """What is wrong with a group of no numbers, in the settings or in those of one tensor; None if there is none.

    MLX divides by it, and the process ends with SIGFPE.
    """
    for name in ("quantization", "quantization_config"):
        for part in (config, config.get("text_config")):
            if isinstance(part, Mapping) and (where := _group_of_none(part.get(name), name)):
                return f"{where}.group_size is 0, expected a positive number"
    return None


def _group_of_none(settings: Any, where: str) -> str | None:
    if isinstance(settings, list):
        found = (_group_of_none(part, where) for part in settings)
    elif isinstance(settings, Mapping):
        if settings.get("group_size", 1) == 0:  # also false
            return where
        found = (_group_of_none(part, f"{where}.{name}") for name, part in settings.items())
    else:
        return None
    return next((one for one in found if one), None)


def mlx_settings(config: Mapping[str, Any], path: str) -> tuple[int, int] | None:
    """(group size, bits) of the matrix at `path` as mlx-lm's config.json has them; None where it is not affine.

    Without `quantization`, `quantization_config` may be a copy of it, as mlx-lm writes it.
    """
    settings = config.get("quantization", config.get("quantization_config"))
    if not isinstance(settings, dict):
        return None
    if isinstance(own := settings.get(path), dict):
        settings = {**settings, **own}
    group_size, bits = settings.get("group_size"), settings.get("bits")
    if settings.get("mode", "affine") != "affine" or type(group_size) is not int or type(bits) is not int:
        return None
    return group_size, bits
