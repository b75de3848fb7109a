"""Tiny tokenizers of every kind that the libraries support, made in memory."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mlx_flash.text.detokenizer import use_byte_level_decoder
from mlx_flash.text.tokenizer import load_tokenizer

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_end|>"]
LINES = [
    "The quick brown fox jumps over the lazy dog. It doesn't care, I've heard!",
    "def f(x):\n    if x:\n\treturn [x, 'y']\n",
    "Paris is the capital of France , they 're sure . Who 's there ?",
    "ein Übergrößenträger, naïve café; Привет, мир; 你好,世界; 안녕; हिन्दी",
]
SPM_STEPS = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def fast(tokenizer: Tokenizer, **settings: Any) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **settings
    )


def byte_level(decoder: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoder or decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def byte_fallback(decoder: Any, replace: bool = True) -> Tokenizer:
    """A tokenizer like Llama's and Gemma's: byte tokens spell characters that are missing from the vocabulary."""
    letters = sorted(set("".join(LINES[:2]).replace(" ", "").replace("\n", "")))
    words = ["▁", "▁▁", "▁▁▁▁", "▁the", "▁The", "▁fox", "is", "▁is", "▁Paris"]
    pieces = [*SPECIALS, *BYTES, *words, *letters]
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("i", "s"), ("▁", "is")]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(SPECIALS)
    if replace:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoder
    return tokenizer


def unigram(decoder: Any, bytes_too: bool = False) -> Tokenizer:
    letters = sorted(set("".join(LINES).replace(" ", "")))
    pieces = [*SPECIALS, *(BYTES if bytes_too else []), "▁", "▁the", "▁Paris", "'s", "▁.", "▁'", "n't", *letters]
    vocab = [(piece, -float(number)) for number, piece in enumerate(dict.fromkeys(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=bytes_too))
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoder
    return tokenizer


def word_piece(cleanup: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    tokenizer.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIALS, show_progress=False)
    )
    return tokenizer


def word_level(decoder: Any = None) -> Tokenizer:
    words = [*SPECIALS, "<pad>", "|", *"abcdefghij.,!?", "n't", "'s", "'", "the", "The", "do", "café", "你好"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def suffixed() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIALS, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def with_gap() -> Tokenizer:
    """A tokenizer with unused ids between the vocabulary and the special tokens."""
    made = json.loads(byte_fallback(decoders.Sequence([*SPM_STEPS, decoders.Strip(" ", 1, 0)])).to_str())
    made["added_tokens"].append({**made["added_tokens"][0], "id": 400, "content": "<|far|>"})
    return Tokenizer.from_str(json.dumps(made))


@functools.cache
def sentencepiece_model(kind: str, byte_fallback: bool = True) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in LINES for line in text.split("\n") * 9),
        model_writer=model,
        model_type=kind,
        vocab_size=400 if byte_fallback else 130,
        byte_fallback=byte_fallback,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=3,
        minloglevel=3,
    )
    return model.getvalue()


def from_files(files: dict[str, bytes], model_type: str = "llama", **settings: Any) -> Any:
    """Loads a tokenizer as from a checkpoint without tokenizer.json."""
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        (Path(name) / "config.json").write_text(json.dumps({"model_type": model_type}))
        settings = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **settings}
        (Path(name) / "tokenizer_config.json").write_text(json.dumps(settings))
        return load_tokenizer(Path(name))._tokenizer


def gpt2_files() -> Any:
    made = json.loads(byte_level().to_str())["model"]
    merges = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in made["merges"])])
    files = {"vocab.json": json.dumps(made["vocab"]).encode(), "merges.txt": merges.encode()}
    return from_files(files, "gpt2", tokenizer_class="GPT2Tokenizer")


def ctrl() -> Any:
    from transformers import CTRLTokenizer

    words = ["<unk>", "he@@", "llo", "wor@@", "ld", "a", "b@@", "c"]
    with tempfile.TemporaryDirectory() as name:
        vocab, merges = Path(name) / "vocab.json", Path(name) / "merges.txt"
        vocab.write_text(json.dumps({word: number for number, word in enumerate(words)}))
        merges.write_text("#version: 0.2\nl l\n")
        return CTRLTokenizer(str(vocab), str(merges))


def byt5() -> Any:
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


STRIPPED = decoders.Sequence([*SPM_STEPS, decoders.Strip(" ", 1, 0)])
KINDS: dict[str, Callable[[], Any]] = {
    "byte-level": lambda: fast(byte_level()),
    "byte-level, clean-up asked for": lambda: fast(byte_level(), clean_up_tokenization_spaces=True),
    "byte-level with sentencepiece's decoder": lambda: fast(byte_level(STRIPPED)),
    "vocab.json and merges.txt": gpt2_files,
    "byte fallback": lambda: fast(byte_fallback(STRIPPED)),
    "byte fallback, no space stripped": lambda: fast(byte_fallback(decoders.Sequence(SPM_STEPS))),
    "byte fallback, Metaspace": lambda: fast(
        byte_fallback(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]), replace=False)
    ),
    "a gap in the vocabulary": lambda: fast(with_gap()),
    "Unigram": lambda: fast(unigram(decoders.Metaspace())),
    "Unigram with bytes": lambda: fast(unigram(STRIPPED, bytes_too=True)),
    "Unigram, cleaned up": lambda: fast(unigram(decoders.Metaspace()), clean_up_tokenization_spaces=True),
    "WordPiece": lambda: fast(word_piece(cleanup=False)),
    "WordPiece, cleaned up": lambda: fast(word_piece(cleanup=True)),
    "WordPiece, cleaned up twice": lambda: fast(word_piece(cleanup=True), clean_up_tokenization_spaces=True),
    "WordLevel": lambda: fast(word_level()),
    "WordLevel, cleaned up": lambda: fast(word_level(), clean_up_tokenization_spaces=True),
    "CTC": lambda: fast(word_level(decoders.CTC())),
    "BPE with suffixes": lambda: fast(suffixed()),
    "sentencepiece BPE": lambda: from_files(
        {"tokenizer.model": sentencepiece_model("bpe")}, tokenizer_class="LlamaTokenizer"
    ),
    "sentencepiece Unigram": lambda: from_files({"tokenizer.model": sentencepiece_model("unigram")}),
    "sentencepiece without bytes": lambda: from_files({"tokenizer.model": sentencepiece_model("unigram", False)}),
    "sentencepiece's own BPE": lambda: from_files(
        {"spiece.model": sentencepiece_model("bpe")}, tokenizer_class="GPTSw3Tokenizer"
    ),
    "sentencepiece's own Unigram": lambda: from_files(
        {"spiece.model": sentencepiece_model("unigram")}, tokenizer_class="GPTSw3Tokenizer"
    ),
    "words in pieces (CTRL)": ctrl,
    "bytes (ByT5)": byt5,
}


@functools.cache
def made(kind: str) -> Any:
    tokenizer = KINDS[kind]()
    use_byte_level_decoder(tokenizer)  # as loading does
    return tokenizer
