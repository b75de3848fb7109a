"""A tiny random mixture that says what a test has written for it, by its own engine.

Everything is real (the prompt, the caches, the experts, the sampler) but one thing: a first logits processor adds a
large number to the logit of the token that the script says next. A grammar may still forbid that token: the model then
says another one, and the script goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mixtures import make_mixture  # type: ignore[import-not-found]  # found beside this file
from serving import Server, serving  # type: ignore[import-not-found]
from templates import SPECIAL, TEMPLATES, write_tokenizer  # type: ignore[import-not-found]
from tokenizers import Tokenizer

from mlx_flash.loading.load import load
from mlx_flash.source.resolve import demo_folder
from mlx_flash.text import prompt_cache

VOCABULARY = 288  # 256 bytes, the special tokens, and some that the tokenizer lacks
PUSH = 1e4
END = "</s>"

Script = Callable[[str], str]  # the text of the whole prompt -> what the model says


def make_scripted(folder: Path, template: str = "agent", words: bool = False) -> Path:
    """Writes the checkpoint, with a template of tests/chat_templates. words: the demo's tokens, else one per byte."""
    vocabulary = 4096 + 32 if words else VOCABULARY
    make_mixture(folder, "qwen3_moe", vocab_size=vocabulary, max_position_embeddings=1 << 17)
    write_tokenizer(folder, TEMPLATES[template])
    if words:
        tokenizer = Tokenizer.from_file(str(demo_folder() / "tokenizer.json"))
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


class Scripted:
    """Makes models loaded from `folder` say what `script` returns. `prompts` has the prompts so far, as texts."""

    def __init__(self, folder: Path, monkeypatch: Any, context: int = 8192) -> None:
        self.folder, self.context = folder, context
        self.script: Script = lambda prompt: "Hello!"
        self.prompts: list[str] = []
        real = prompt_cache.stream_generate

        def stream_generate(model: Any, tokenizer: Any, prompt: list[int], *rest: Any, **options: Any) -> Iterator[Any]:
            whole = tokenizer.decode(self.tokens)
            self.prompts.append(whole)
            words = tokenizer.encode(self.script(whole) + END, add_special_tokens=False)
            processors = [_saying(words), *(options.pop("logits_processors", None) or [])]
            return real(model, tokenizer, prompt, *rest, logits_processors=processors, **options)  # type: ignore[no-any-return]

        monkeypatch.setattr(prompt_cache, "stream_generate", stream_generate)
        turns = prompt_cache.ReusedPromptCache
        real_turns = turns.stream_generate

        def of_whole_prompt(own: Any, tokenizer: Any, prompt: list[int], *rest: Any, **options: Any) -> Any:
            self.tokens = prompt
            return real_turns(own, tokenizer, prompt, *rest, **options)

        monkeypatch.setattr(turns, "stream_generate", of_whole_prompt)

    def load(self) -> tuple[Any, Any]:
        return load(self.folder, context=self.context, prompt_cache="64MB")


def _saying(words: list[int]) -> Callable[[mx.array, mx.array], mx.array]:
    """A logits processor that says these tokens."""
    start: list[int] = []

    def process(seen: mx.array, logits: mx.array) -> mx.array:
        start.append(int(seen.size))
        said = int(seen.size) - start[0]
        word = words[min(said, len(words) - 1)]
        return logits + PUSH * (mx.arange(logits.shape[-1]) == word)

    return process


# -- fixtures of the files that import them ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    with pytest.MonkeyPatch.context() as patch:
        yield Scripted(make_scripted(tmp_path_factory.mktemp("scripted")), patch)


@pytest.fixture(scope="module")
def server(scripted: Scripted) -> Iterator[Server]:
    with serving(scripted.load) as running:
        yield running
