"""Runs zero-shot tasks of lm-eval on the streamed and the dense model, through mlx-lm's hook for lm-eval."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from mlx_flash.defaults import PREFILL_TOKENS
from mlx_flash.errors import FlashError, UsageError

from .score import all_neurons

SCORED_BY_LIKELIHOOD = ("multiple_choice", "loglikelihood")
DENSE_STEP = PREFILL_TOKENS // 4  # tokens per call; few, because the hook computes the logits of all of them


def find(names: str) -> list[Any]:
    """Loads lm-eval's tasks and their data sets. names: tasks, YAML files and folders of them, separated by commas.

    Raises UsageError if lm-eval is missing, a name is unknown, or a task needs generated text. Raises FlashError if a
    data set cannot be loaded.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UsageError('--tasks needs lm-eval: `pip install "mlx-flash-runtime[eval]"` (-e ".[eval]")') from None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import mlx_lm.evaluate  # noqa: F401  # large and needed later, so the plan must count it
    from lm_eval.tasks import TaskManager

    wanted = [name.strip() for name in names.split(",")]
    if not all(wanted):
        raise UsageError(f"--tasks is {names!r}, expected names or paths separated by commas.")
    folders = [name for name in wanted if Path(name).is_dir()]
    known = not all(Path(name).exists() for name in wanted)  # lm-eval's own tasks are thousands of files to search
    manager = TaskManager(include_path=folders or None, include_defaults=known)
    specs = []
    for name in wanted:
        if name in folders:
            own = TaskManager(include_path=name, include_defaults=False).all_subtasks
            if not own:
                raise UsageError(f"--tasks: the folder {name} has no lm-eval task file (*.yaml with a `task`).")
            specs += own
        elif Path(name).is_file() or name in manager.all_tasks:
            specs.append(name)
        else:
            raise UsageError(
                f"--tasks: {name!r} is neither a task of lm-eval (`lm-eval ls tasks` lists them) nor a file or folder."
            )
    try:
        loaded = list(manager.load(specs)["tasks"].values())
    except Exception as error:  # the data set's host, its library and the YAML parser raise many unrelated kinds
        raise FlashError(
            f"--tasks {names}: loading the tasks and their data sets failed: {error}. "
            "Data sets are downloaded once. Check that you are online and that every task file is valid."
        ) from None
    for task in loaded:
        kind = task.get_config("output_type")
        if kind not in SCORED_BY_LIKELIHOOD:
            raise UsageError(
                f"--tasks: {task.task_name} is of the kind {kind}; this command only runs tasks that are scored by "
                f"likelihood ({', '.join(SCORED_BY_LIKELIHOOD)})."
            )
    return loaded


def language_model(model: Any, tokenizer: Any, step: int) -> Any:
    """Wraps a loaded model in mlx-lm's hook, with at most `step` tokens per call."""
    from lm_eval.api.model import LM
    from mlx_lm.evaluate import MLXLM

    class LoadedLM(MLXLM):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            LM.__init__(self)  # skips MLXLM.__init__, which loads a model from a path
            self._model, self.tokenizer = model, tokenizer
            self._max_tokens = model.flash.plan.context  # longer questions lose their beginning
            self._batch_size = 1
            self.use_chat_template = False
            self._sampler = None

        def _process_prompt(self, prompt: Any, step_size: int = step) -> Any:
            return super()._process_prompt(prompt, step)

        def _score_fn(self, inputs: Any, cache: Any = None, step_size: int = step) -> Any:
            return super()._score_fn(inputs, cache, step)

    return LoadedLM()


def evaluate(model: Any, tokenizer: Any, tasks: list[Any], limit: int | None) -> list[dict[str, Any]]:
    """A row for every task and metric: the dense and the streamed model's values, and lm-eval's standard error."""
    with all_neurons(model):
        dense = _run(language_model(model, tokenizer, DENSE_STEP), tasks, limit)
    streamed = _run(language_model(model, tokenizer, model.flash.manifest.decode_tokens), tasks, limit)
    rows = []
    for task in tasks:
        name = task.task_name
        answers, dense_answers = (_answers(side["samples"][name]) for side in (streamed, dense))
        shared = {"task": name, "questions": len(dense_answers)}
        if task.get_config("output_type") == "multiple_choice":
            same = sum(answers[question] == answer for question, answer in dense_answers.items())
            shared["same_answer"] = same / len(dense_answers)
        for metric, value in dense["results"][name].items():
            # A metric is named "acc,none". Beside it are "acc_stderr,none" and the task's alias and counts.
            base, comma, filtered = metric.partition(",")
            if not comma or base.endswith("_stderr"):
                continue
            error = dense["results"][name].get(f"{base}_stderr,{filtered}")
            row = {"metric": base, "dense": value, "streamed": streamed["results"][name][metric]}
            rows.append({**shared, **row, "dense_stderr": error if isinstance(error, float) else None})
    return rows


def _run(model: Any, tasks: list[Any], limit: int | None) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    return dict(simple_evaluate(model, tasks=tasks, limit=limit, bootstrap_iters=1000))


def _answers(samples: list[dict[str, Any]]) -> dict[int, int]:
    """The answer to each question: the one with the greatest likelihood."""
    best = {}
    for sample in samples:
        likelihoods = [response[0] for response in sample["filtered_resps"]]
        best[sample["doc_id"]] = likelihoods.index(max(likelihoods))
    return best


def show(rows: list[dict[str, Any]], predictor: str) -> None:
    heads = ("metric", "questions", "dense", "stderr", predictor, "difference", "same answer")
    print(f"{'task':<20}" + "".join(f"{head:>13}" for head in heads))
    for row in rows:
        error = row["dense_stderr"]
        cells = [
            row["metric"],
            str(row["questions"]),
            f"{row['dense']:.4f}",
            "-" if error is None else f"{error:.4f}",
            f"{row['streamed']:.4f}",
            f"{row['streamed'] - row['dense']:+.4f}",
            f"{row['same_answer']:.2%}" if "same_answer" in row else "-",
        ]
        print(f"{row['task']:<20}" + "".join(f"{cell:>13}" for cell in cells))
