"""The contexts that fell out of memory, and those of the last run: in files, found again like those in memory.

A file is written in the model's thread, because MLX's arrays belong to it: when memory has no room for the context any
more, between two chunks of prompts, and when the server stops. That copies the bytes to the system; a thread of its
own then waits for the disk and gives the file its name. Both are bounded in time. A context that takes longer is
dropped, and so are all whose size promises the same, for some minutes or until a faster write is seen.

Nothing here fails a request. What cannot be read or written is dropped, and said once.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mlx_lm.models.cache import make_prompt_cache

from ..flash.plain_files import reason_of
from ..flash.system import sync_to_disk
from ..source.conversation_folder import (
    MOST_BYTES_PER_DAY,
    SUFFIX,
    ConversationFolder,
    FolderState,
    NoRoomError,
)
from .cached_context import CachedContext
from .context_file import ContextToWrite, TooSlowError, UnwritableError
from .written_context import WrittenContext

WRITE_S = 2.0  # the longest that an answer waits while one context is written, or until the one before is synced
CLOSE_S = 5.0  # the longest that all contexts of a server that stops may take
RATED_S = 600.0  # A rate counts for so long: the disk may have been waking up, or the process was stopped.
LEAST_GAINED = 16  # tokens; a file that saves fewer than memory does is not read
MOST_TOKENS = 1 << 20  # of all files that are known, which take four bytes each


@dataclass(frozen=True)
class DiskStatistics:
    """What is on the disk for this model and its settings, and for all of them (`used_bytes` and what follows)."""

    contexts: int
    tokens: int
    bytes: int
    used_bytes: int
    most_bytes: int
    written_today_bytes: int
    most_bytes_per_day: int
    found: int  # how often a prompt continued one since the start


class ConversationFiles:
    """The files of one model's contexts. For one thread at a time; `statistics` may be called from any thread.

    note: called with a sentence for people, once for each kind of trouble.
    """

    def __init__(self, folder: ConversationFolder, model: Any, note: Callable[[str], None]) -> None:
        self.folder, self.model = folder, model
        self.found = 0
        self._say, self._said = note, set[str]()
        self._known: dict[str, WrittenContext] = {}
        self._seen_change = -1
        self._distrusted = set[str]()
        self._bytes_per_second, self._rated_at = float("inf"), 0.0
        self._finishing: threading.Thread | None = None
        self._state: FolderState | None = None
        self._look()
        with contextlib.suppress(OSError):
            self._state = folder.state()

    def statistics(self) -> DiskStatistics:
        known, state = list(self._known.values()), self._state
        return DiskStatistics(
            len(known),
            sum(len(context.tokens) for context in known),
            sum(context.file_bytes for context in known),
            state.used_bytes if state else 0,
            state.most_bytes if state else 0,
            state.written_today_bytes if state else 0,
            MOST_BYTES_PER_DAY,
            self.found,
        )

    def longest(self, prompt: list[int], step: int, fresh: bool, beyond: int) -> tuple[WrittenContext, int] | None:
        """The file with the longest usable prefix of a prompt, and its length, if it is well beyond `beyond` tokens."""
        self._wait(WRITE_S)
        self._look()
        plan = self.model.flash.plan
        best, best_place = None, beyond + LEAST_GAINED - 1
        for context in self._known.values():
            fits = len(context.tokens) <= plan.context and context.part_bytes <= plan.demand.context_bytes
            if fits and (place := context.place_for(prompt, step, fresh)) > best_place:
                best, best_place = context, place
        return None if best is None else (best, best_place)

    def opened(self, context: WrittenContext) -> BinaryIO | None:
        """The file, which can be read even if it is removed meanwhile; None, with a note, if it is gone or foreign."""
        try:
            return os.fdopen(self.folder.open(context.name), "rb", buffering=0)
        except OSError as error:
            self._drop(context.name, error)
            return None

    def read(
        self, context: WrittenContext, file: BinaryIO, prompt: list[int], place: int, snapshot_bytes: int
    ) -> CachedContext | None:
        """The first `place` tokens of the context, with memory for the prompt; None if the file cannot be trusted.

        Such a file is removed. snapshot_bytes: memory for its snapshots.
        """
        tokens = min(len(prompt), self.model.flash.plan.context)
        try:
            made = context.read_into(make_prompt_cache(self.model), file, place, tokens, snapshot_bytes)
        except (OSError, ValueError) as error:
            self._drop(context.name, error, remove=True)
            return None
        self.found += 1
        if place == len(context.tokens):
            made.written = made.replaces = context.name
        elif (len(prompt) - 1) in context.ends and context.common(prompt) == len(prompt):
            made.replaces = context.name  # the same prompt again: its new answer takes the place of the old one
        with contextlib.suppress(OSError):
            self.folder.used_now(context.name)
        return made

    def distrust(self, context: CachedContext) -> None:
        """Removes the file that a context came from, because the model failed with it."""
        if context.replaces:
            self._drop(context.replaces, ValueError("the model failed with it"), remove=True)

    def write(self, context: CachedContext, seconds: float = WRITE_S) -> None:
        """Writes a context that memory has no room for. It must be whole and not empty."""
        deadline = time.monotonic() + seconds
        try:
            if self._is_there(context.written):
                return
            if time.monotonic() - self._rated_at > RATED_S:
                self._bytes_per_second = float("inf")
            to_write = ContextToWrite(context)
            name = to_write.name + SUFFIX
            if self._is_there(name):
                return
            if to_write.nbytes > seconds * self._bytes_per_second or not self._wait(deadline - time.monotonic()):
                raise TooSlowError
            descriptor, self._state = self.folder.begin(name, to_write.nbytes)
            self._write(to_write, name, descriptor, context.replaces, deadline)
        except NoRoomError as reason:
            self._note(f"note: a conversation is not kept on the disk: {reason}", str(reason)[:12])
        except UnwritableError as reason:
            self._note(f"note: this model's conversations are not kept on the disk: {reason}", "unwritable")
        except TooSlowError:
            self._note("note: the disk is too slow to keep a conversation on it without a longer wait", "slow")
        except OSError as error:
            self._trouble(error)

    def _is_there(self, name: str) -> bool:
        """Marks a file as used now. False if it is not there any more."""
        try:
            if name:
                self.folder.used_now(name)
            return bool(name)
        except OSError:
            return False

    def close(self, contexts: Iterable[CachedContext]) -> None:
        """Writes contexts, the most important one first, as far as they can be written within CLOSE_S."""
        deadline = time.monotonic() + CLOSE_S
        for context in contexts:
            if (left := deadline - time.monotonic()) > 0:
                self.write(context, left)
        self._wait(deadline - time.monotonic())

    # -- writing -------------------------------------------------------------------------------------------------

    def _write(self, to_write: ContextToWrite, name: str, descriptor: int, replaces: str, deadline: float) -> None:
        self._rated_at = began = time.monotonic()
        try:
            with open(descriptor, "wb", buffering=0, closefd=False) as file:
                to_write.write(file, deadline - began)
        except BaseException as error:
            if isinstance(error, TooSlowError):
                self._bytes_per_second = os.fstat(descriptor).st_blocks * 512 / (time.monotonic() - began)
            self.folder.abandon(name, descriptor)
            raise
        self._bytes_per_second = to_write.nbytes / max(time.monotonic() - began, 1e-3)

        def finish() -> None:
            try:
                sync_to_disk(descriptor)
                self.folder.finish(name, descriptor, replaces)
            except OSError as error:
                self.folder.abandon(name, descriptor)
                self._trouble(error)

        self._finishing = threading.Thread(target=finish, name="conversations", daemon=True)
        self._finishing.start()

    def _wait(self, seconds: float) -> bool:
        """Waits until the file before is synced; False if that takes longer."""
        if self._finishing is not None:
            self._finishing.join(max(0.0, seconds))
            if self._finishing.is_alive():
                return False
            self._finishing, self._seen_change = None, -1
        return True

    # -- which files there are -----------------------------------------------------------------------------------

    def _look(self) -> None:
        """Reads the headers of new files, those of other processes included, and forgets those that are gone."""
        try:
            changed = self.folder.changed()
            if changed == self._seen_change:
                return
            files = sorted(self.folder.files(), key=lambda file: -file.used)
        except FileNotFoundError:
            self._known = {}
            return
        except OSError as error:
            self._known = {}
            self._trouble(error)
            return
        known, tokens = {}, 0
        for each in files:
            if each.name in self._distrusted:
                continue
            context = self._known.get(each.name) or self._head(each.name)
            if context is not None and tokens + len(context.tokens) <= MOST_TOKENS:
                tokens += len(context.tokens)
                known[each.name] = context
        self._known, self._seen_change = known, changed

    def _head(self, name: str) -> WrittenContext | None:
        try:
            with os.fdopen(self.folder.open(name), "rb", buffering=0) as file:
                return WrittenContext(name, file)
        except (OSError, ValueError) as error:
            self._drop(name, error, remove=isinstance(error, ValueError))
            return None

    def _drop(self, name: str, error: Exception, remove: bool = False) -> None:
        self._known = {each: context for each, context in self._known.items() if each != name}
        if not isinstance(error, FileNotFoundError):
            where = self.folder.root / self.folder.name / name
            self._note(f"note: {where} is not used: {reason_of(error)}; its conversation is read again", "unusable")
        if remove:
            self._distrusted.add(name)
            with contextlib.suppress(OSError):
                self.folder.remove(name)

    def _trouble(self, error: OSError) -> None:
        where: Path = self.folder.root
        self._note(f"note: {where} cannot keep conversations: {reason_of(error)}", "trouble")

    def _note(self, text: str, kind: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._say(text)
