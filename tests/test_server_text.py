"""The text, stop words and probabilities that a server makes from tokens. The test chooses the model's tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
import tokenizer_kinds as kinds  # type: ignore[import-not-found]  # found beside this file
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import make_mixture  # type: ignore[import-not-found]
from mlx_lm.tokenizer_utils import TokenizerWrapper
from serving import Server, serving  # type: ignore[import-not-found]

from mlx_flash.loading.load import load
from mlx_flash.server import running_answer
from mlx_flash.server.apis.openai_common import by_text
from mlx_flash.server.jobs import TokenLogprob
from mlx_flash.server.logprobs import LogprobReader
from mlx_flash.text.detokenizer import Detokenizer

VOCABULARY = 512
SMILE = "\U0001f600"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = make_mixture(tmp_path_factory.mktemp("bfloat16"), "qwen3_moe", vocab_size=VOCABULARY)
    weights: Any = mx.load(str(folder / "model.safetensors"))
    mx.save_safetensors(str(folder / "model.safetensors"), {k: v.astype(mx.bfloat16) for k, v in weights.items()})
    kinds.byte_level().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))

    def open_mixture() -> tuple[Any, Any]:
        model, tokenizer = load(folder, memory="2GB")
        assert model(mx.array([[1]])).dtype == mx.bfloat16
        return model, tokenizer

    with serving(open_mixture) as running:
        yield running


@pytest.fixture
def speak(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Returns the choices and events of a request that is answered with these tokens and the end of the text."""

    def ask(kind: str, tokens: list[int], chat: bool = False, prompt: Any = "Paris", **options: Any) -> Any:
        tokenizer = TokenizerWrapper(kinds.made(kind), Detokenizer)
        end = tokenizer.eos_token_id
        script = iter([*tokens, end])
        monkeypatch.setattr(running_answer, "make_sampler", lambda *_: lambda logprobs: mx.array([next(script)]))
        monkeypatch.setattr(server.engine.switch.loaded, "tokenizer", tokenizer)
        body = {"max_tokens": len(tokens) + 1, **options}
        body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        answer = server.post("/v1/chat/completions" if chat else "/v1/completions", body)
        assert answer.status_code == 200, answer.text
        if not options.get("stream"):
            return answer.json()["choices"][0]
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        return [choice for line in lines for choice in json.loads(line)["choices"]]

    return ask


def encode(kind: str, text: str) -> list[int]:
    return list(kinds.made(kind).encode(text, add_special_tokens=False))


def bytes_of(choice: dict[str, Any]) -> bytes:
    return b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])


def test_the_bytes_of_parts_of_characters(speak: Callable[..., Any]) -> None:
    """ollama#13497."""
    for kind in ("byte-level", "byte fallback", "sentencepiece BPE"):
        text = f"Yes {SMILE}\u200d{SMILE} end"
        choice = speak(kind, encode(kind, text), chat=True, logprobs=True, top_logprobs=3)
        assert choice["message"]["content"] == text and bytes_of(choice) == text.encode()
        entries = choice["logprobs"]["content"]
        assert "bytes:\\xf0" in [entry["token"] for entry in entries]
        for entry in entries:
            raw = bytes(entry["bytes"])
            assert entry["token"] == raw.decode(errors="ignore") or entry["token"].startswith("bytes:")
            likeliest = [each["logprob"] for each in entry["top_logprobs"]]
            assert len(likeliest) == 3 and likeliest == sorted(likeliest, reverse=True) and entry["logprob"] < 0


def test_offsets_are_of_characters(speak: Callable[..., Any]) -> None:
    kind, text = "byte-level", f" a{SMILE}\u0301 b\ufffd"
    tokens = encode(kind, text)
    choice = speak(kind, tokens, logprobs=5)
    assert choice["text"] == text
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(tokens) == len(logprobs["text_offset"])
    assert all(len(top) == 5 for top in logprobs["top_logprobs"])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or text[offset:].startswith(token)
    assert [text[offset] for offset in logprobs["text_offset"]].count(SMILE) == sum(
        token.startswith(("bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80")) for token in logprobs["tokens"]
    )


def test_wrong_bytes_do_not_move_what_follows(speak: Callable[..., Any]) -> None:
    pieces = kinds.made("byte fallback").get_vocab()
    tokens = [pieces[piece] for piece in ("▁the", "<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "is", "▁Paris")]
    choice = speak("byte fallback", tokens, logprobs=0)
    assert choice["text"] == " the\ufffd\ufffd\ufffd\ufffdis Paris"  # as `decode` gives it
    offsets = dict(zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True))
    assert (offsets[" the"], offsets[" Paris"]) == (0, 10)


def test_completions_continue_the_prompt_and_answers_stand_alone(speak: Callable[..., Any]) -> None:
    """mlx-lm's pull request 1754."""
    pieces = kinds.made("byte fallback").get_vocab()
    tokens = [pieces["▁Paris"], pieces["▁is"]]
    for options in ({}, {"stream": True}):
        shown = speak("byte fallback", tokens, **options)
        assert (shown["text"] if not options else "".join(each["text"] for each in shown)) == " Paris is"
    assert speak("byte fallback", tokens, prompt=[1])["text"] == "Paris is"  # without a text before it
    assert speak("byte fallback", tokens, chat=True)["message"]["content"] == "Paris is"
    for chat in (False, True):
        choice = speak("byte-level", encode("byte-level", " Paris is"), chat=chat)
        assert (choice["message"]["content"] if chat else choice["text"]) == " Paris is"


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "sentencepiece Unigram"])
def test_a_stream_has_no_halves_of_characters(speak: Callable[..., Any], kind: str) -> None:
    text = f"{SMILE}龘é\u200d{SMILE}\n\n  x"
    tokens = encode(kind, text)
    events = speak(kind, tokens, chat=True, stream=True, logprobs=True)
    pieces = [event["delta"].get("content") or "" for event in events]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    entries = [entry for event in events if event["logprobs"] for entry in event["logprobs"]["content"]]
    assert b"".join(bytes(entry["bytes"]) for entry in entries) == text.encode() and len(entries) == len(tokens)
    cut = speak(kind, tokens[:2], chat=True, stream=True, max_tokens=2)  # the bytes so far come at the end
    assert "".join(event["delta"].get("content") or "" for event in cut) == kinds.made(kind).decode(tokens[:2])


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_stop_words_across_tokens(speak: Callable[..., Any], kind: str) -> None:
    text = f"the fox {SMILE} is brown"
    tokens = encode(kind, text)
    for stop in ("ox", f"x {SMILE}", SMILE, f"{SMILE} is b", "n"):
        shown = text[: text.index(stop)]
        for stream in (False, True):
            choices = speak(kind, tokens, chat=True, stop=[stop, "nowhere"], logprobs=True, stream=stream)
            choices = choices if stream else [{**choices, "delta": choices["message"]}]
            assert "".join(each["delta"].get("content") or "" for each in choices) == shown
            assert choices[-1]["finish_reason"] == "stop"
            entries = [entry for each in choices if each["logprobs"] for entry in each["logprobs"]["content"]]
            joined = b"".join(bytes(entry["bytes"]) for entry in entries)
            assert joined.startswith(shown.encode()) and len(entries) <= len(tokens)
            last = len(entries[-1]["bytes"]) if entries else 0  # the last token may be shown in part
            assert len(joined) - last < len(shown.encode()) or not shown


def test_what_stays_behind_a_stop_word_is_not_told(speak: Callable[..., Any]) -> None:
    """Covers a token whose text is held back, because a stop word may begin with it, after text that is shown."""
    kind = "byte-level"
    tokens = [token for letter in "xababc" for token in encode(kind, letter)]
    events = speak(kind, tokens, chat=True, stop=["abc"], logprobs=True, stream=True)
    assert "".join(event["delta"].get("content") or "" for event in events) == "xab"
    entries = [entry["token"] for event in events if event["logprobs"] for entry in event["logprobs"]["content"]]
    assert entries == ["x", "a", "b"]


def test_ids_past_the_vocabulary_are_answered(speak: Callable[..., Any]) -> None:
    for kind in ("byte-level", "a gap in the vocabulary", "sentencepiece BPE", "bytes (ByT5)"):
        for chat in (False, True):
            choice = speak(kind, [510, *encode(kind, "a"), 510], chat=chat, logprobs=True if chat else 2)
            assert (choice["message"]["content"] if chat else choice["text"]) in ("a", " a")
            entries = choice["logprobs"]["content"] if chat else choice["logprobs"]["tokens"]
            assert len(entries) == 2 + len(encode(kind, "a"))


TOPS = st.dictionaries(st.integers(0, 20), st.sampled_from([b"", b"a", b"b", b"\xf0"]), max_size=8)


@given(TOPS, st.integers(0, 20))
@settings(max_examples=60, derandomize=True, database=None, deadline=None)
def test_tokens_of_one_text_stay_as_many_as_they_are(tops: dict[int, bytes], chosen: int) -> None:
    top = tuple(TokenLogprob(token, added, -float(place)) for place, (token, added) in enumerate(tops.items()))
    entry = TokenLogprob(chosen, tops.get(chosen, b"a"), -1.5, 0, top)
    named = by_text(entry)
    assert list(named.values()) == [-float(place) for place in range(len(top))]
    assert {each.text for each in top} <= {*named}
    if chosen in tops:
        assert named[entry.text] == -float([*tops].index(chosen))


def test_a_vocabulary_may_be_smaller_than_what_is_asked_for() -> None:
    response = SimpleNamespace(logprobs=mx.array([-1.0, -3.0, -2.0], mx.bfloat16), token=2)
    entry = LogprobReader(kinds.made("byte-level"), []).read(response, 20)
    assert [each.token for each in entry.top] == [0, 2, 1] and entry.logprob == -2.0
