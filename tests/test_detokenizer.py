"""The streamed text equals the text of the tokens, for every kind of tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tokenizer_kinds as kinds  # type: ignore[import-not-found]  # found beside this file
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import tokenizer_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import decoders, pre_tokenizers

from mlx_flash.text.detokenizer import WINDOW_TOKENS, Detokenizer
from mlx_flash.text.tokenizer import load_tokenizer

EXAMPLES = settings(max_examples=10, derandomize=True, database=None, deadline=None)
SPACES = ["    ", "\t", "\n", "\r\n", "\n\n", "\xa0", "\u2028", "\u3000", "\v\f", " \n", " .", " ' ", " n't", " 's"]
TEXTS = st.lists(st.text(max_size=5) | st.sampled_from(SPACES) | st.sampled_from(kinds.LINES), max_size=6).map("".join)
DRAWS = st.lists(st.tuples(st.sampled_from(["any", "byte", "same", "text"]), st.integers(0, 10**6)), max_size=14)
REPORTED = [  # from public bug reports of these and other programs
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1eb\U0001f1f7 e\u0301x '\ufe0f",
    "こんにちは。私の名前は、龘です。ďábelské 한국어 ខ្មែរ မြန်မာ བོད་སྐད",
    "def f():\n    if x:\n\t\treturn  1\r\n\r\n\n    # \xa0\u2028\ufeff end   ",
    "\ufffd a\ufffd\ufffd \ufffd\ufffd\ufffd\ufffd b\ufffd",
    "  leading and trailing  ",
    "don't , it 's . I 'm ' quoted ' !",
    "שלום \u202bعربي\u202c \ue000\U0010ffff \x00\x1b[31m",
]


def tokens_of(kind: str, draws: list[tuple[str, int]]) -> list[int]:
    """Random ids, some beyond the vocabulary, with more byte runs, repetitions and texts than by chance."""
    tokenizer = kinds.made(kind)
    size = max(tokenizer.get_vocab().values()) + 20
    pieces = tokenizer.get_vocab()
    byte = [pieces[piece] for piece in kinds.BYTES if piece in pieces] or list(range(size))
    ids: list[int] = []
    for way, number in draws:
        if way == "any":
            ids.append(number % size)
        elif way == "byte":
            ids += [byte[number // 7**i % len(byte)] for i in range(number % 5 + 1)]
        elif way == "same":
            ids += [number % size] * (number % 40)
        else:
            ids += tokenizer.encode(REPORTED[number % len(REPORTED)], add_special_tokens=False)[: number % 30]
    if kind.startswith("sentencepiece's own"):  # a special token moves the text before it
        ids = [token for token in ids if token not in tokenizer.all_special_ids]
    return ids


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """Decodes without ids outside of the vocabulary, if the tokenizer rejects them."""

    def known(token: int) -> bool:
        try:
            tokenizer.decode([token])
        except Exception:
            return False
        return True

    try:
        return str(tokenizer.decode(ids))
    except Exception:
        return str(tokenizer.decode([token for token in ids if known(token)]))


def assert_streams(tokenizer: Any, ids: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer)
    final = decoded(tokenizer, ids)
    streamed = ""
    for token in ids:
        detokenizer.add_token(token)
        streamed += detokenizer.last_segment
        assert final.startswith(streamed), (streamed[-20:], final[len(streamed) - 20 : len(streamed) + 20])
    detokenizer.finalize()
    assert streamed + detokenizer.last_segment == final == detokenizer.text
    assert detokenizer.tokens == ids and not detokenizer.last_segment


@pytest.mark.parametrize("kind", kinds.KINDS)
@given(draws=DRAWS)
@EXAMPLES
def test_any_tokens(kind: str, draws: list[tuple[str, int]]) -> None:
    assert_streams(kinds.made(kind), tokens_of(kind, draws))


@pytest.mark.parametrize("kind", kinds.KINDS)
@given(text=TEXTS)
@EXAMPLES
def test_any_text(kind: str, text: str) -> None:
    tokenizer = kinds.made(kind)
    assert_streams(tokenizer, tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_reported_texts(kind: str) -> None:
    tokenizer = kinds.made(kind)
    for text in REPORTED:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert_streams(tokenizer, ids)
        if kind.startswith("byte-level") or kind == "byte fallback":
            assert tokenizer.decode(ids) == text


def test_nothing_complete_is_held_back() -> None:
    for kind in ("byte-level", "byte fallback", "CTC", "WordPiece", "sentencepiece BPE"):
        tokenizer = kinds.made(kind)
        for text in REPORTED[:3]:
            ids = tokenizer.encode(text, add_special_tokens=False)
            detokenizer = Detokenizer(tokenizer)
            for count, token in enumerate(ids, 1):
                detokenizer.add_token(token)
                if (now := decoded(tokenizer, ids[:count])).endswith("\ufffd"):
                    assert detokenizer.text == now[: len(detokenizer.text)]
                elif not (tokenizer.convert_ids_to_tokens(token) or "").startswith("<0x"):
                    assert detokenizer.text == now and not detokenizer.holds_back


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_token_costs_a_window(kind: str) -> None:
    """The number of tokens decoded per token does not grow with the text."""
    tokenizer = kinds.made(kind)
    ids = tokenizer.encode("".join(kinds.LINES * 3), add_special_tokens=False)
    long = [*ids, *[ids[-1]] * 200, *ids]
    detokenizer = Detokenizer(tokenizer)
    count = 0
    decode = tokenizer.decode

    def counted(ids: list[int]) -> str:
        nonlocal count
        count += len(ids)
        return str(decode(ids))

    with patch.object(tokenizer, "decode", counted):
        for token in long:
            detokenizer.add_token(token)
    assert count < 2 * WINDOW_TOKENS * len(long)


def test_a_long_run_of_bytes_is_decoded_once() -> None:
    tokenizer = kinds.made("byte fallback")
    ids = tokenizer.encode("\U0001f600" * 500 + " end", add_special_tokens=False)
    assert_streams(tokenizer, ids)
    detokenizer = Detokenizer(tokenizer)
    lengths: list[int] = []
    decode = tokenizer.decode

    def counted(ids: list[int]) -> str:
        lengths.append(len(ids))
        return str(decode(ids))

    with patch.object(tokenizer, "decode", counted):
        for token in ids:
            detokenizer.add_token(token)
    assert sum(lengths) < 3 * len(ids)


# -- continued texts -----------------------------------------------------------------------------------------


def continued(tokenizer: Any, before: list[int], ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer, before)
    for token in ids:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return detokenizer.text


@pytest.mark.parametrize("kind", kinds.KINDS)
@given(text=TEXTS, cut=st.integers(0, 100))
@EXAMPLES
def test_a_text_that_is_continued(kind: str, text: str, cut: int) -> None:
    tokenizer = kinds.made(kind)
    ids = tokenizer.encode(f"a {text}", add_special_tokens=False)
    cut = 1 + cut % len(ids) if ids else 0
    before, whole = decoded(tokenizer, ids[:cut]), decoded(tokenizer, ids)
    if ids and whole.startswith(before) and not {*ids} & {*tokenizer.all_special_ids}:
        assert continued(tokenizer, ids[:cut], ids[cut:]) == whole[len(before) :]


def test_the_first_space() -> None:
    """The first space belongs to a text that continues another. Without a text before it, decode drops it."""
    for kind in ("byte fallback", "sentencepiece BPE", "a gap in the vocabulary"):
        tokenizer = kinds.made(kind)
        pieces = tokenizer.get_vocab()
        word = pieces["▁Paris"] if "▁Paris" in pieces else tokenizer.encode("x Paris", add_special_tokens=False)[1]
        alone = decoded(tokenizer, [word])
        begin, newline = pieces["<s>"], pieces["<0x0A>"]
        assert not alone.startswith(" ")
        assert continued(tokenizer, [], [word]) == continued(tokenizer, [begin], [word]) == alone
        a = pieces["a"]
        for before in ([a], [begin, newline], [begin, word, newline], [word] * 100, [9999, a, 9999]):
            assert continued(tokenizer, before, [word]) == f" {alone}"
        assert continued(tokenizer, [a, begin], [word, word]) == f"{alone} {alone}"
        assert continued(tokenizer, [word], []) == ""
    tokenizer = kinds.made("byte-level")
    ids = tokenizer.encode(" Paris is", add_special_tokens=False)
    assert continued(tokenizer, [], ids) == continued(tokenizer, ids, ids) == " Paris is"


def test_a_prompt_of_nothing_but_bytes() -> None:
    tokenizer = kinds.made("byte fallback")
    pieces = tokenizer.get_vocab()
    spelt = [pieces[f"<0x{byte:02X}>"] for byte in "\u1000".encode() * 11]
    for cut in range(len(spelt), len(spelt) - 9, -3):
        for before in (spelt[1:cut], spelt[:cut]):
            assert continued(tokenizer, before, [*spelt[:6], pieces["▁the"]]) == "\u1000\u1000 the"
            wrong = [pieces["<0xFF>"], pieces["▁the"]]
            assert continued(tokenizer, before, wrong) == "\ufffd the"


def test_a_character_that_the_prompt_begins() -> None:
    """vllm#48853: such a character belongs to the answer, and no other part of the prompt does."""
    for kind in ("byte-level", "byte fallback", "sentencepiece Unigram"):
        tokenizer = kinds.made(kind)
        start = tokenizer.encode("Paris ", add_special_tokens=False)
        ids = tokenizer.encode("Paris \U0001f336 is", add_special_tokens=False)
        count = next(i for i, (a, b) in enumerate(zip(ids, [*start, -1], strict=False)) if a != b) + 2
        assert continued(tokenizer, ids[:count], ids[count:]) == "\U0001f336 is"
        assert continued(tokenizer, ids[:count], []) == ""
    tokenizer = kinds.made("byte-level")
    ids = tokenizer.encode("a\ufffd", add_special_tokens=False)  # a whole U+FFFD of the text
    assert continued(tokenizer, ids, tokenizer.encode("b")) == "b"


# -- the text of each token ----------------------------------------------------------------------------------


def pieces_of(tokenizer: Any, ids: list[int], continues: list[int]) -> list[bytes]:
    detokenizer = Detokenizer(tokenizer, continues)
    pieces = []
    for token in ids:
        pieces += detokenizer.added_by([token])
        detokenizer.add_token(token)
    return pieces


LOSSLESS = [kind for kind in kinds.KINDS if not kind.startswith(("words in pieces", "bytes (")) and "up" not in kind]


@pytest.mark.parametrize("kind", LOSSLESS)
@given(text=TEXTS, cut=st.integers(0, 20))
@EXAMPLES
def test_the_bytes_of_all_tokens_are_the_texts(kind: str, text: str, cut: int) -> None:
    tokenizer = kinds.made(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if kind.startswith("sentencepiece's own"):
        ids = [token for token in ids if token not in tokenizer.all_special_ids]
    final = decoded(tokenizer, ids)
    assert b"".join(pieces_of(tokenizer, ids, [])) == final.encode()
    after = continued(tokenizer, ids[:cut], ids[cut:])
    if final.endswith(after) and not decoded(tokenizer, ids[:cut]).endswith("\ufffd"):
        assert b"".join(pieces_of(tokenizer, ids[cut:], ids[:cut])) == after.encode()


def test_bytes_that_are_not_text() -> None:
    """The bytes are reported unchanged; the text has U+FFFD in their place."""
    tokenizer = kinds.made("byte-level")
    values = {byte: tokenizer.get_vocab()[char] for char, byte in detokenizer_bytes().items()}
    raw = b"a\xf0\x9f\xff\xe2\x82b"
    pieces = pieces_of(tokenizer, [values[byte] for byte in raw], [])
    assert b"".join(pieces) == raw and all(len(piece) == 1 for piece in pieces)
    tokenizer = kinds.made("byte fallback")
    ids = [tokenizer.get_vocab()[piece] for piece in ("▁the", "<0xF0>", "<0x9F>", "is")]
    assert pieces_of(tokenizer, ids, []) == [b"the", b"\xf0", b"\x9f", b"is"]


def detokenizer_bytes() -> dict[str, int]:
    from mlx_flash.text.detokenizer import byte_values

    return byte_values()


def test_the_byte_level_alphabet() -> None:
    values = detokenizer_bytes()
    for text in REPORTED:
        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        assert bytes(values[character] for character in split[0][0]) == text.encode()
    assert sorted(values.values()) == list(range(256))


# -- with mlx-lm ---------------------------------------------------------------------------------------------


def saved(tokenizer: Any, folder: Path) -> Path:
    """Saves a tokenizer, with its decoder, as in a checkpoint's folder. Returns the folder."""
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**6, **names})
    )
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "make",
    [
        lambda: kinds.byte_level(),
        lambda: kinds.byte_level(kinds.STRIPPED),
        lambda: kinds.byte_fallback(kinds.STRIPPED),
        lambda: kinds.byte_fallback(decoders.Sequence(kinds.SPM_STEPS)),
        lambda: kinds.with_gap(),
        lambda: kinds.unigram(decoders.Metaspace()),
    ],
)
def test_mlx_lm_streams_with_it(make: Any, tmp_path: Path) -> None:
    theirs = tokenizer_utils.NaiveStreamingDetokenizer
    tokenizer = load_tokenizer(saved(make(), tmp_path))
    assert tokenizer_utils.NaiveStreamingDetokenizer is theirs
    first, second = tokenizer.detokenizer, tokenizer.detokenizer
    assert isinstance(first, Detokenizer) and first is not second
    ids = tokenizer.encode(kinds.LINES[1], add_special_tokens=False)
    for token in [*ids, 10**6]:
        first.add_token(token)
        second.add_token(ids[0])
    first.finalize()
    assert first.text == tokenizer.decode(ids) == first.last_segment and second.tokens == [ids[0]] * (len(ids) + 1)
    first.reset()
    assert first.text == "" and first.tokens == []


def test_a_byte_level_vocabulary_is_decoded_as_such(tmp_path: Path) -> None:
    """mlx-lm#1041: Mistral's tekken."""
    for decoder in (kinds.STRIPPED, decoders.Metaspace(), None):
        made = kinds.byte_level()
        made.decoder = decoder
        tokenizer = load_tokenizer(saved(made, tmp_path))
        assert tokenizer.decode(tokenizer.encode(REPORTED[2], add_special_tokens=False)) == REPORTED[2]


# -- decode that takes back what it said ---------------------------------------------------------------------


def test_what_was_said_stays() -> None:
    """docs/text.md lists these cases."""
    tokenizer = kinds.made("sentencepiece's own BPE")
    ids = [*tokenizer.encode("Paris is", add_special_tokens=False), tokenizer.eos_token_id]
    assert tokenizer.decode(ids) == " Paris is</s>"  # the special token adds the space in front
    assert continued(tokenizer, [], ids).strip() == "Paris is </s>"


def test_a_decoder_that_is_not_known_waits_for_the_next_token() -> None:
    made = kinds.byte_fallback(
        decoders.Sequence([*kinds.SPM_STEPS, decoders.Replace("fox", "dog"), decoders.Strip(" ", 1, 0)])
    )
    detokenizer = Detokenizer(TokenizerWrapper(kinds.fast(made), Detokenizer))
    for token, text in ((made.token_to_id("▁the"), ""), (made.token_to_id("▁fox"), "the"), (300, "the dog")):
        detokenizer.add_token(token)
        assert detokenizer.text == text
