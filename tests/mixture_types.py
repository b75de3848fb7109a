"""Lists the model types of the installed zoos that have switch layers, and writes the table of docs/models.md.

`python tests/mixture_types.py` writes the table, and names the types that have no verdict yet.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mixtures import FAMILIES  # type: ignore[import-not-found]
from published_layouts import CHANGED, LAYOUTS  # type: ignore[import-not-found]
from vlm_mixtures import TYPES as VLM_TYPES  # type: ignore[import-not-found]
from zoo_types import METAL_ONLY, TYPES  # type: ignore[import-not-found]

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- mixture types: tests/mixture_types.py -->", "<!-- end of mixture types -->"
SWITCH_LAYERS = "switch_layers"  # the module of a zoo that experts go through
ZOOS = {"mlx-lm": "mlx_lm", "mlx-vlm": "mlx_vlm"}
RUN_HERE, EXPECTED, REFUSED = "run here", "expected by reading", "refused"
ALIASES = {  # types that mlx-lm builds with the module of another
    "minimax": ("minimax_m2",),
    "deepseek_v3": ("joyai_llm_flash", "kimi_k2"),
    "gemma4": ("gemma4_unified",),
    "deepseek_v41": ("deepseek_v41_text",),
}
RUN_WITH_VLM = f"{RUN_HERE}, built by mlx-vlm (`pytest -m vlm`)"
# What is known of types without a test: (zoo, verdict) -> types.
OTHERS = {
    ("mlx-lm", f"{REFUSED} off Metal, which its attention needs; on Metal not tried"): ["muse_spark"],
    ("mlx-lm", f"{EXPECTED}: dense, unless its text model has experts as in `qwen3_5`"): ["prism_hadamard_qwen35"],
    ("mlx-vlm", f"{EXPECTED}, built by mlx-vlm"): [
        "deepseek_vl_v2", "deepseekocr", "deepseekocr_2", "ernie4_5_moe_vl", "glm4v_moe", "inkling", "klear",
        "minicpmv4_6", "minicpmv4_7", "minimax_m3", "mistral_large3", "nemotron_h_nano_omni", "qwen3_omni_moe",
        "unlimited_ocr", "youtu_vl", "zaya1_vl",
    ],
    ("mlx-vlm", f"{EXPECTED}: dense in its usual sizes"): [
        "hrm_text", "lfm2", "lfm2_vl", "qwen3_5_text",
    ],
    ("mlx-vlm", f"{REFUSED}: it does not write text token by token"): [
        "diffusion_gemma", "embedding_gemma2", "lfm2_colbert", "lfm2_embedding", "lfm2_encoder", "llada2_moe",
        "openai_privacy_filter",
    ],
    ("mlx-vlm", f"{REFUSED}: mlx-vlm's model has no text model apart, which could be driven alone"): [
        "clef", "d1", "d1_omni", "decider2", "indic_ocr", "moondream3", "nemotron_voicechat",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What is known of a type. original: how its makers' layout is read."""

    text: str
    original: str = "not tried"


def types_of(zoo: str) -> list[str]:
    """The model types of a zoo whose modules use switch layers, directly or through others; [] if it is not installed.

    Nothing of the zoo is imported but its package.
    """
    spec = find_spec(f"{ZOOS[zoo]}")
    if spec is None or not spec.submodule_search_locations:
        return []
    models = Path(spec.submodule_search_locations[0]) / "models"
    files = {".".join(path.relative_to(models).with_suffix("").parts): path for path in models.rglob("*.py")}
    imported = {name: imports_of(path, name, files.keys()) for name, path in files.items()}
    using = {name for name in files if SWITCH_LAYERS in _reached(name, imported)}
    tops = {name.partition(".")[0] for name in using}
    return sorted(top for top in tops if _has_model(top, files))


def imports_of(path: Path, name: str, known: object) -> set[str]:
    """The modules, out of `known`, that a module imports in part or whole. name: the module's, below `models`."""
    package = name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and 0 < node.level <= len(package) + 1:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            target = ".".join(part for part in base if part)
            for candidate in (target, f"{target}.__init__", *(f"{target}.{a.name}".strip(".") for a in node.names)):
                if candidate in known:  # type: ignore[operator]
                    found.add(candidate)
    return found


def _reached(name: str, imported: dict[str, set[str]]) -> set[str]:
    seen, waiting = set(), [name]
    while waiting:
        for following in imported.get(waiting.pop(), ()):
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return seen


def _has_model(top: str, files: dict[str, Path]) -> bool:
    """Whether a module, or a package by its __init__, offers a model and its arguments."""
    path = files.get(top) or files.get(f"{top}.__init__")
    if path is None:
        return False
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    imported = {alias.asname or alias.name for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
    names = imported | {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    return "Model" in names and bool(names & {"ModelArgs", "ModelConfig"})


def verdicts() -> dict[tuple[str, str], Verdict]:
    """(zoo that builds it, type) -> verdict, of every type that has one: of those that are tested, and of OTHERS."""
    found = {(zoo, name): Verdict(text) for (zoo, text), names in OTHERS.items() for name in names}
    for name in (TYPES.keys() | FAMILIES.keys()) - METAL_ONLY:
        original = "converted once" if name in CHANGED else "read in place" if name in LAYOUTS else "not tried"
        found["mlx-lm", name] = Verdict(RUN_HERE, original)
    of_mlx_lm = {name for zoo, name in found if zoo == "mlx-lm"}
    return found | {("mlx-vlm", name): Verdict(RUN_WITH_VLM) for name in VLM_TYPES.keys() - of_mlx_lm}


def listed() -> set[tuple[str, str]]:
    """(zoo that builds it, type) of every type of the installed zoos that may have experts. mlx-lm comes first."""
    of_mlx_lm = set(types_of("mlx-lm"))
    others = set(types_of("mlx-vlm")) - of_mlx_lm - {alias for aliases in ALIASES.values() for alias in aliases}
    return {("mlx-lm", name) for name in of_mlx_lm} | {("mlx-vlm", name) for name in others}


def table_of(found: dict[tuple[str, str], Verdict]) -> str:
    """The table of docs/models.md, with its markers."""
    groups: dict[Verdict, list[str]] = {}
    for (_, name), verdict in sorted(found.items(), key=lambda item: (item[0][0], item[0][1].lower())):
        groups.setdefault(verdict, []).append(name)
        groups[verdict] += ALIASES.get(name, ())
    rows = [
        f"| {', '.join(f'`{name}`' for name in names)} | {verdict.text} | {verdict.original} |"
        for verdict, names in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    head = ["| `model_type` | verdict | its makers' layout |", "|---|---|---|"]
    return "\n".join([BEGIN, "", *head, *rows, "", END])


if __name__ == "__main__":
    known = verdicts()
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(before + table_of(known) + rest.partition(END)[2], encoding="utf-8")
    if missing := listed() - known.keys():
        print("types without a verdict:", ", ".join(f"{name} ({zoo})" for zoo, name in sorted(missing)))
