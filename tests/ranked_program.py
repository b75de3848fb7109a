"""Rank 0 of two processes: `python ranked_program.py FOLDER RESULT` writes the logits of `everything` to RESULT.npz."""

from __future__ import annotations

import sys

import numpy as np
from test_mixture import everything  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.ranks.hosts import local_hosts
from mlx_flash.ranks.leader import Leader
from mlx_flash.source.children import child_environment


def main(folder: str, result: str) -> None:
    group = Leader(local_hosts(2), child_environment())
    model, _ = mlx_flash.load(folder, memory="1GB", context=64, group=group, trials=False, say=print)
    np.savez(result, *everything(model))
    model.flash.close()
    group.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
