"""python -m mlx_flash.bench COMMAND: measurements that anyone can run again."""

from __future__ import annotations

import argparse
import signal
from importlib import import_module

from mlx_flash.cli.run import program, run_command

COMMANDS = {  # command -> its module
    "naive-vs-flash": "naive_vs_flash",
    "steps": "steps",
    "memory": "memory",
    "layers": "layers",
    "prompts": "prompt_times",
    "soak": "soak",
    "conversations": "conversations",
    "restart": "restart",
    "switching": "switching",
    "reads": "reads",
    "expert-reads": "expert_reads",
    "blocks": "blocks",
    "checks": "checks",
    "windows": "window_sizes",
    "predictors": "predictor_recall",
    "quality": "quality",
    "bits": "bits",
    "head-pieces": "head_pieces",
    "kv-bits": "kv_bits",
    "plan": "plan_shape",
    "eviction": "eviction",
    "drafts": "drafts_time",
    "together": "together",
    "host": "host_time",
    "neuron-pieces": "neuron_pieces",
    "rank-tokens": "rank_tokens",
    "trials": "trial_choices",
    "ranks": "several_ranks",
    "message-costs": "message_costs",
    "links": "link_table",
    "grammars": "grammars",
    "lookahead": "guesses",
    "ordering": "ordering",
    "relu-experts": "relu_experts",
    "resident-layers": "resident_layers",
    "density": "density",
    "table-rows": "row_reads",
    "warm-start": "first_tokens",
    "topk-neurons": "topk_neurons",
    "topk-hits": "topk_hits",
    "peak-memory": "peak_memory",
    "pressure": "under_pressure",
    "convert-memory": "convert_memory",
    "synthetic": "synthetic.neuron_store",
    "random-checkpoint": "synthetic.opt_checkpoint",
    "synthetic-mixture": "synthetic.mixture_checkpoint",
    "synthetic-dense": "synthetic.dense_checkpoint",
    "synthetic-tables": "synthetic.table_checkpoint",
    "memory-models": "memory_models",
    "machines": "machines",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program("bench"), description="Measurements.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, where in COMMANDS.items():
        module = import_module(f".{where}", __package__)
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(name, help=text.splitlines()[0], description=text)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    return parser


def main(arguments: argparse.Namespace) -> None:
    arguments.run(arguments)


def load_parser() -> argparse.ArgumentParser:
    """Makes the parser. Ctrl-C ends the process silently while the modules load, because nothing has begun."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # `nohup` and scripts have Ctrl-C ignored
        return make_parser()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parser = make_parser()
    signal.signal(signal.SIGINT, before)
    return parser


if __name__ == "__main__":
    run_command(load_parser(), main)
