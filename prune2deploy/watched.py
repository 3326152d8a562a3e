"""Runs a module in a child process that never outlives its parent, however the parent ends.

    python .../watched.py MODULE ORDER.json     (with a pipe as standard input)

Run by its path, so that the watch begins before anything large is imported. Standard input closes
when its other end is gone; then the order's folder, and those that its ``scratch`` lists, are
removed, and the process leaves at once.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path


def command(module: str, order: Path) -> list[str]:
    """Command line that runs ``module`` on ``order``; start it with a pipe as standard input."""
    return [sys.executable, str(Path(__file__).resolve()), module, str(order)]


def environment() -> dict[str, str]:
    """This process's variables, with the package findable from wherever it was imported."""
    home = str(Path(__file__).resolve().parent.parent)
    others = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([home, others] if others else [home])}


def _end_with_parent(folders: Sequence[Path]) -> None:
    while os.read(0, 1):  # not sys.stdin: its lock must be free when the interpreter ends
        pass
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def main() -> None:
    """Begin to watch, and become the module that the command line names."""
    module, order = sys.argv[1], Path(sys.argv[2])
    del sys.path[0]  # this file's folder, whose modules are no top-level ones
    scratch = json.loads(order.read_text(encoding="utf-8")).get("scratch", ())
    folders = [order.parent, *map(Path, scratch)]
    threading.Thread(target=_end_with_parent, args=(folders,), daemon=True).start()
    sys.argv = [module, str(order)]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
