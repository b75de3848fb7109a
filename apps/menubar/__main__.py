"""python -m mlx_flash.apps.menubar: the menu bar app."""

from __future__ import annotations

import argparse
import os
import runpy
import signal
import sys
from importlib.util import find_spec

from mlx_flash.cli.run import program

INSTALL = 'the menu bar app needs the packages of its extra: pip install -e ".[app]"'


def main() -> None:
    # A packaged app is its own interpreter (`sys.executable`). If it is started with -m, it runs that module instead.
    if sys.argv[1:2] == ["-m"] and len(sys.argv) > 2:
        module = sys.argv[2]
        sys.argv = [module, *sys.argv[3:]]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    parser = argparse.ArgumentParser(
        prog=program("apps.menubar"),
        description="Puts an item into the menu bar that runs the server, asks it questions, and shows its tokens per "
        "second.",
    )
    parser.parse_args()
    lacking = [name for name in ("toga", "PIL", "platformdirs") if find_spec(name) is None]
    if lacking:
        sys.exit(f"{parser.prog}: {lacking[0]} is not installed; {INSTALL}")
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        sys.exit(f"{parser.prog}: there is no display (DISPLAY is not set). Run it in a desktop session.")
    # Ctrl-C ends the app at once, like SIGTERM, whatever the toolkit does. The engine ends with its standard input.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .view import make_app

    make_app().main_loop()


if __name__ == "__main__":
    main()
