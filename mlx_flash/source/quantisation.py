"""Finds out how a checkpoint's numbers are packed, from its tensors, and from its configuration for the details."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# (end of a tensor's name that only this kind has, kind). The first that matches is reported.
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
    """The format of a checkpoint's packed numbers, such as "GPTQ, 4 bits"; None if they are plain or in MLX's format.

    files: names of its small files. dtype_of: tensor -> type, as written in the file ("F8_E4M3", "float16").
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
    """The `quantization_config` of a configuration, or of its part for the text model; {} if there is none."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if isinstance(settings := part.get("quantization_config"), dict):
            return settings
    return {}


def group_problem(config: Mapping[str, Any]) -> str | None:
    """Describes a group size of 0 in the settings, or in those of one tensor; None if there is none.

    MLX would divide by it, and the process would end with SIGFPE.
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
        if settings.get("group_size", 1) == 0:  # `false` counts as 0.
            return where
        found = (_group_of_none(part, f"{where}.{name}") for name, part in settings.items())
    else:
        return None
    return next((one for one in found if one), None)


def mlx_settings(config: Mapping[str, Any], path: str) -> tuple[int, int] | None:
    """(group size, bits) of the matrix at `path`, from mlx-lm's config.json; None if it is not affine.

    mlx-lm writes `quantization`, and `quantization_config` as a copy; the copy is used if only that is present.
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
