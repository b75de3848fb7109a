"""Fuzzes one parser, guided by coverage, with atheris: `pip install -e ".[test,fuzz]"`, then for example

    python tests/fuzz/run.py header -runs=10000000
    python tests/fuzz/run.py tokenizer -max_total_time=7200 -rss_limit_mb=6000

The first argument is a target of targets.py; the others go to libFuzzer. A `-max_len` shorter than a seed cuts the seed
into something that no parser accepts (the second seed of `manifest` and `header` has less than 2,000 bytes). Inputs
that reach new code are kept in tests/fuzz/found/TARGET (not committed). An input that fails is written to the current
folder as crash-*. Once the defect is fixed, move it to tests/fuzz/corpus/TARGET, which the suite runs.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


def main() -> None:
    try:
        import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        sys.exit('this needs atheris: pip install -e ".[test,fuzz]"')

    with atheris.instrument_imports(include=["mlx_flash"]):
        from targets import TARGETS  # type: ignore[import-not-found]

    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: run.py TARGET [options of libFuzzer]; targets: {', '.join(TARGETS)}")
    name = sys.argv.pop(1)
    target = TARGETS[name]
    found = HERE / "found" / name
    found.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (found / f"seed-{number}").write_bytes(seed)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.randrange(3) == 0:
            return bytes(atheris.Mutate(data, most))
        return target.mutate(rng, data)[:most]

    corpus = HERE / "corpus" / name
    folders = [str(found), *([str(corpus)] if corpus.is_dir() else [])]
    atheris.Setup([sys.argv[0], *folders, "-max_len=200000", *sys.argv[1:]], target.run, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
