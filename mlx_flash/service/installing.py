"""Installs and removes the service: all of it, or nothing."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..cli.flag_words import flags_of
from ..cli.model_arguments import options_of
from ..errors import FlashError, UsageError
from ..server.arguments import checked, given_key, require_key
from .definition import STARTER, Definition, ServiceFiles, environment_of, lasting_python
from .service_status import address_of, answer_of, last_lines
from .system_manager import SystemManager

START_S = 30.0  # for a new server to answer
LOOK_S = 0.25
GONE_LOOKS = 8  # so many looks in a row without a process: launchd may need a moment


def defined(
    server: argparse.Namespace,
    words: Sequence[str],
    make_parser: Callable[[], argparse.ArgumentParser],
    where: ServiceFiles,
) -> Definition:
    """The definition for the server's arguments. Raises UsageError for values that no service can have.

    server: the arguments that `words` give. make_parser: makes the server's parser.
    """
    if server.exit_with_stdin:
        raise UsageError("a service has no standard input that stays open. Leave --exit-with-stdin out.")
    if server.port == 0:
        raise UsageError("--port is 0, but a service needs a port that its clients know. Give another number.")
    access, _ = checked(server)
    from ..server.serving import bind, is_loopback

    with contextlib.closing(bind(server.host, 0)) as bound:
        require_key(server, is_loopback(bound))
    made = Definition(
        lasting_python(sys.executable),
        flags_of(words, make_parser),
        environment_of(os.environ),
        where,
        key=access.key is not None,
    )
    made.check()
    return made


def install(
    definition: Definition, server: argparse.Namespace, manager: SystemManager, say: Callable[[str], None]
) -> None:
    """Installs and starts the service, in place of one that is there. Raises FlashError; then all is as before."""
    _require_package(definition)
    files = {manager.file: manager.text(definition), definition.places.key: None}
    if definition.key:
        files[definition.places.key] = f"{given_key(server)}\n".encode()
    before = {file: file.read_bytes() if file.exists() else None for file in files}
    ran_before = before[manager.file] is not None and manager.state().pid is not None
    if before[manager.file] is not None:
        manager.stop()  # It holds the port, and memory that the plan needs.
    try:
        _require_room(server, say)
        _write(files)
        manager.start()
        _wait_for_answer(definition, manager, say)
    except BaseException:
        with contextlib.suppress(FlashError):  # The first error is the one to tell.
            manager.stop()
        if before[manager.file] is None:
            _delete(manager, definition.places)
            with contextlib.suppress(FlashError):
                manager.forget()
        else:
            _write(before)
            if ran_before:
                with contextlib.suppress(FlashError):
                    manager.start()
        raise


def remove(manager: SystemManager, where: ServiceFiles) -> bool:
    """Ends the service and removes its files. Returns whether there was anything. Raises FlashError."""
    manager.stop()
    there = _delete(manager, where)
    manager.forget()
    return there


def _delete(manager: SystemManager, where: ServiceFiles) -> bool:
    """Removes the service's files, and folders that are empty then. Returns whether there were any."""
    files = [manager.file, where.key, where.log, where.log.with_name(f"{where.log.name}.1")]
    there = [file for file in files if file.exists()]
    for file in there:
        file.unlink()
    for folder in (where.key.parent, where.log.parent):
        with contextlib.suppress(OSError):  # others' files are in it
            folder.rmdir()
    return bool(there)


def _require_package(definition: Definition) -> None:
    """Raises FlashError if the interpreter finds this package in the present folder only."""
    found = subprocess.run(
        [definition.python, "-c", f"import {STARTER}"],
        cwd="/",
        env={**os.environ, **definition.environment},
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    if found.returncode:
        raise FlashError(
            f"{definition.python} does not find this package outside of the present folder. Install it first: "
            "`pip install -e .` in a clone."
        )


def _require_room(server: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Raises FlashError if the port is taken or the model does not load as the options say."""
    from ..loading.load import plan
    from ..server.serving import bind

    bind(server.host, server.port).close()
    say(plan(server.model, options_of(server), say=say).describe())
    if server.memory is None:
        say("note: without --memory, the budget is a share of what is free when the service starts.")


def _write(files: dict[Path, bytes | None]) -> None:
    """Writes or removes files, which only this user can read. Raises FlashError."""
    for file, contents in files.items():
        beside = file.with_name(f".{file.name}.new")
        try:
            if contents is None:
                file.unlink(missing_ok=True)
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            beside.unlink(missing_ok=True)
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                out.write(contents)
            beside.replace(file)
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise FlashError(f"{file} cannot be written: {error.strerror}.") from None


def _wait_for_answer(definition: Definition, manager: SystemManager, say: Callable[[str], None]) -> None:
    """Waits until the server answers. Raises FlashError if it ends instead."""
    host, port = address_of(definition.flags)
    end, gone = time.monotonic() + START_S, 0
    while answer_of(host, port) is None:
        gone = 0 if (state := manager.state()).pid is not None else gone + 1
        if gone == GONE_LOOKS:
            said = last_lines(definition.places.log, 1)
            raise FlashError(
                f"the service ended at once ({state.ended or 'no reason given'}). It said: {''.join(said)}"
            )
        if time.monotonic() > end:
            say(f"note: the service has not answered within {START_S:g} s. `mlxflash service status` says how it is.")
            return
        time.sleep(LOOK_S)
