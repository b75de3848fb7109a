"""lm-eval's model for servers that speak OpenAI's completions: lm_eval_cases.py URL FOLDER_OF_THE_TOKENIZER."""

from __future__ import annotations

import sys
from typing import Any

from cases import URL, run  # type: ignore[import-not-found]  # found beside this file
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI


def model() -> Any:
    return LocalCompletionsAPI(
        model="demo", base_url=f"{URL}/v1/completions", tokenizer=sys.argv[2], tokenizer_backend="huggingface", seed=1
    )


def ask(kind: str, *arguments: Any) -> Any:
    return getattr(model(), kind)([Instance(kind, {}, arguments, 0)])[0]


run(
    {
        "loglikelihood": lambda: ask("loglikelihood", "It was a dark", " night."),
        "generate_until": lambda: ask("generate_until", "It was a dark", {"until": ["\n"], "max_gen_toks": 20}),
    }
)
