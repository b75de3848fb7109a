"""Decodes token ids to text, token by token, and hands out text as soon as later tokens cannot change it.

At any time the text is a prefix of `decode` of all tokens; at the end they are equal. docs/text.md explains what that
means for each kind of tokenizer, and names those whose `decode` changes earlier text.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import json
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_lm import tokenizer_utils
from tokenizers import decoders, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

WINDOW_TOKENS = 32  # tokens that are decoded again for each new one; older ones do not affect its text
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
REPLACEMENT = "\ufffd"  # stands for bytes that are not a character, or not a complete one yet
MOST_REPLACEMENTS = 3  # An unfinished character decodes to at most this many.
# transformers' clean-up of spaces replaces only pieces of text that consist of these characters.
CLEANED_UP = " .?!,'nmtsver"


class Detokenizer(tokenizer_utils.StreamingDetokenizer):
    """A detokenizer with mlx-lm's interface, for every tokenizer of transformers.

    For each new token it decodes a window of recent tokens. Special tokens are text, as they are for `decode`; the
    caller leaves out those that end a text. Ids that the tokenizer does not know add nothing.

    A byte-level vocabulary whose file names another decoder (Mistral's tekken) gets the byte-level decoder. This
    changes the tokenizer that is passed in, so its own `decode` is right as well.
    """

    def __init__(self, tokenizer: Any, continues: Sequence[int] = ()) -> None:
        """tokenizer: a tokenizer of transformers, or mlx-lm's wrapper of one.

        continues: tokens of the text that the new text continues. Without them the new text stands alone. If the
        tokenizer writes a space before each word (sentencepiece), the first space is then left out, as in `decode`.
        With them, that space separates the two texts. It is kept, unless only special tokens come before it. A
        character that is unfinished at the end of `continues` belongs to the new text.
        """
        super().__init__()
        self._tokenizer = getattr(tokenizer.decode, "__self__", tokenizer)  # the one inside a wrapper
        use_byte_level_decoder(self._tokenizer)
        self._pieces: dict[int, str | None] = {}  # the vocabulary's entries for tokens seen so far
        self._byte_level = decoder_types(self._tokenizer) == ["ByteLevel"]
        self._late = not _never_takes_back(self._tokenizer)  # whether each token's text waits for the next token
        self._uncertain = CLEANED_UP if cleans_up(self._tokenizer) else ""
        self._context = self._context_of(continues) if continues else ([], [], "")
        self.reset()

    def reset(self) -> None:
        before, begun, said = self._context
        self.tokens: list[int] = []
        self.offset = 0
        self._parts: list[str] = []
        self._window = before + begun
        self._decoded = len(before)  # number of the window's tokens that are decoded in _text
        self._text = self._decode(before)  # the text of these tokens
        self._said = said  # the part of _text that has been handed out

    @property
    def text(self) -> str:
        """All text that is certain so far."""
        return "".join(self._parts)

    @property
    def last_segment(self) -> str:
        """The text that became certain since the last call."""
        new = "".join(self._parts[self.offset :])
        self.offset = len(self._parts)
        return new

    @property
    def holds_back(self) -> bool:
        """Whether the text of some added tokens is not certain yet."""
        return self._said != self._text or self._decoded != len(self._window)

    def add_token(self, token: int) -> None:
        self.tokens.append(token)
        if not self._knows(token):
            return
        self._window.append(token)
        # `decode` turns a run of byte tokens into characters or, if one byte is wrong, the whole run into U+FFFD.
        if not self._is_byte(token):
            self._read()
            self._shorten()

    def finalize(self) -> None:
        """Ends the text: all of it becomes certain."""
        if self.tokens:
            self._read(last=True)

    def added_by(self, tokens: Sequence[int]) -> list[bytes]:
        """The UTF-8 bytes that each of these tokens would add if it came next.

        A token that holds a part of a character gives its bytes. The joined bytes of all tokens of a text are those of
        the text, if they are valid UTF-8.
        """
        before = self._decode(self._window)
        return [self._added_by(token, before) for token in tokens]

    def _added_by(self, token: int, before: str) -> bytes:
        if not self._knows(token):
            return b""
        raw = self._bytes_of(token)
        if raw is not None and (self._byte_level or self._window or raw > b"\x7f"):
            return raw
        after = self._decode([*self._window, token])
        return after[_common(before, after) :].encode(errors="replace")

    # -- the window ------------------------------------------------------------------------------------------

    def _read(self, last: bool = False) -> None:
        text = self._decode(self._window)
        # `decode` changed text that has been handed out. Keep that text, and append the text of the newest tokens.
        if not text.startswith(self._said):
            self._hand_out(self._text, len(self._text))
            self._window, self._said, self._text = self._window[self._decoded :], "", ""
            text = self._decode(self._window)
        self._hand_out(text, len(text) if last else self._certain(text))
        self._text, self._decoded = text, len(self._window)

    def _hand_out(self, text: str, end: int) -> None:
        if end > len(self._said):
            self._parts.append(text[len(self._said) : end])
            self._said = text[:end]

    def _certain(self, text: str) -> int:
        """The number of characters of the window's text that no later token can change."""
        end = len(text)
        while end > len(text) - MOST_REPLACEMENTS and text[:end].endswith(REPLACEMENT):
            end -= 1
        if self._uncertain:
            end = len(text[:end].rstrip(self._uncertain))
        return min(end, _common(self._text, text)) if self._late else end

    def _shorten(self) -> None:
        """Drops the window's older tokens if that does not change the text from the last character handed out."""
        if len(self._window) <= WINDOW_TOKENS or not self._said:
            return
        window = self._window[-WINDOW_TOKENS // 2 :]
        text = self._decode(window)
        if text.endswith(self._text[len(self._said) - 1 :]):
            held = len(self._text) - len(self._said)
            self._window, self._text, self._said = window, text, text[: len(text) - held]
            self._decoded = len(window)

    def _context_of(self, tokens: Sequence[int]) -> tuple[list[int], list[int], str]:
        """Splits the end of a text to be continued.

        Returns (tokens at its end, byte tokens after them of an unfinished character, text before that character).
        """
        special = {token for token, added in self._tokenizer.added_tokens_decoder.items() if added.special}
        special.update(self._tokenizer.all_special_ids)
        window: list[int] = []
        for token in reversed(tokens):
            if token in special or len(window) == WINDOW_TOKENS // 2:
                break
            if self._knows(token):
                window.insert(0, token)
        run = len(window)  # start of the byte tokens at the end
        while run and self._bytes_of(window[run - 1]) is not None:
            run -= 1
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        utf8.decode(b"".join(self._bytes_of(token) or b"" for token in window[run:]))
        unfinished = len(utf8.getstate()[0])  # number of bytes
        if self._byte_level:
            text = self._decode(window)
            return window, [], text[:-1] if unfinished else text
        end = len(window) - unfinished
        # New bytes would belong to the same run, so the run's characters are left out if other tokens come before it.
        # If not, the window begins with a whole character.
        inside = (b"\x80" <= (self._bytes_of(token) or b"") < b"\xc0" for token in window[:end])
        start = next((place for place, is_inside in enumerate(inside) if not is_inside), end)
        before = window[:run] or window[start:end]
        return before, window[end:], self._decode(before)

    # -- single tokens ---------------------------------------------------------------------------------------

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens))) if tokens else ""

    def _piece(self, token: int) -> str | None:
        """The token's entry in the vocabulary; None for an unknown id."""
        if token not in self._pieces:
            self._pieces[token] = None
            with contextlib.suppress(Exception):  # Each kind of tokenizer raises its own error for an unknown id.
                piece = self._tokenizer.convert_ids_to_tokens(token)
                self._decode([token])
                self._pieces[token] = piece if isinstance(piece, str) else None
        return self._pieces[token]

    def _knows(self, token: int) -> bool:
        return self._piece(token) is not None

    def _is_byte(self, token: int) -> bool:
        """Whether the token is a byte token of a sentencepiece vocabulary."""
        if self._byte_level:
            return False
        piece = self._piece(token) or ""
        return BYTE_TOKEN.fullmatch(piece) is not None and self._decode([token]) != piece

    def _bytes_of(self, token: int) -> bytes | None:
        """The token's bytes if they are the same in every context, else None."""
        piece = self._piece(token) or ""
        if self._byte_level:
            values = [byte_values().get(character) for character in piece]
            return piece.encode() if None in values else bytes(values)  # type: ignore[arg-type]
        return bytes([int(piece[3:5], 16)]) if self._is_byte(token) else None


_loading = threading.Lock()


@contextlib.contextmanager
def used_by_mlx_lm() -> Iterator[None]:
    """Makes mlx-lm use this detokenizer inside the context. mlx-lm's own fails for a vocabulary with gaps."""
    names = ("NaiveStreamingDetokenizer", "SPMStreamingDetokenizer", "BPEStreamingDetokenizer")
    with _loading:
        theirs = {name: getattr(tokenizer_utils, name) for name in names}
        try:
            for name in names:
                setattr(tokenizer_utils, name, lambda tokenizer, **_: Detokenizer(tokenizer))
            yield
        finally:
            for name in names:
                setattr(tokenizer_utils, name, theirs[name])


def use_byte_level_decoder(tokenizer: Any) -> None:
    """Gives a tokenizer that splits texts into bytes a byte-level decoder, even if its file names another."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or "ByteLevel" in decoder_types(tokenizer):
        return
    parts = (backend.pre_tokenizer, backend.normalizer)
    if any(step["type"] == "ByteLevel" for part in parts if part is not None for step in _steps(part)):
        backend.decoder = decoders.ByteLevel()


def decoder_types(tokenizer: Any) -> list[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return [step["type"] for step in _steps(backend.decoder)] if backend is not None and backend.decoder else []


def _steps(part: Any) -> list[dict[str, Any]]:
    """The steps of a part of a tokenizer, as in tokenizer.json; one unknown step for a part written in Python."""

    def flat(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
        inner = next((step[key] for key in ("decoders", "pretokenizers", "normalizers") if key in step), None)
        if inner is None:
            yield step
        for each in inner or ():
            yield from flat(each)

    try:
        return list(flat(json.loads(part.__getstate__())))
    except Exception:  # The tokenizers library raises plain Exceptions.
        return [{"type": "Custom"}]


def _never_takes_back(tokenizer: Any) -> bool:
    """Whether a new token never changes `decode`'s earlier text, apart from unfinished characters and clean-up."""
    kind = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or (
        kind.decode is not PreTrainedTokenizerBase.decode or kind._decode is not PreTrainedTokenizerFast._decode
    ):
        return False
    decoder = tokenizer.backend_tokenizer.decoder
    joined = False  # whether a step has joined the tokens into one text
    for step in [] if decoder is None else _steps(decoder):
        name = step["type"]
        if name in ("ByteLevel", "Fuse"):
            joined = True
        elif name == "Replace":
            if joined and len(step["pattern"].get("String", "regex")) != 1:
                return False
        elif name in ("WordPiece", "Metaspace", "BPEDecoder", "CTC"):
            if joined:
                return False
        elif name not in ("ByteFallback", "Strip"):
            return False
    return True


def cleans_up(tokenizer: Any) -> bool:
    """Whether `decode` removes spaces before punctuation. It does if its settings say so, but not for BPE."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is None or forced or type(backend.model).__name__ != "BPE"


def _common(a: str, b: str) -> int:
    """The length of the common prefix."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@functools.cache
def byte_values() -> dict[str, int]:
    """Character of a byte-level vocabulary -> its byte: the character's own, or one without a visible form."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    itself = {character: ord(character) for character in alphabet if character < "\u0100"}
    others = sorted(set(range(256)) - set(itself.values()))
    return itself | dict(zip(alphabet[len(itself) :], others, strict=True))
