"""An interpreter in which packages are not installed, and commands that are run in it."""

from __future__ import annotations

import contextlib
import importlib.machinery
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["main_without"]


def main_without(hidden: Sequence[str], commands: Sequence[Sequence[str]], *, known: bool = False) -> list[Any]:
    """Run commands one after the other where these modules cannot be found.

    Parameters
    ----------
    hidden : sequence of str
        Modules, each with all that is inside it.
    commands : sequence of sequences of str
    known : bool
        Whether their packages still count as installed, as those of a broken installation do.

    Returns
    -------
    list of [int, str, str]
        Exit code, stdout and stderr of each.
    """
    asked = json.dumps([list(hidden), [list(command) for command in commands], known])
    done = subprocess.run(
        [sys.executable, "-c", "from tests.cli.bare import serve; serve()"], input=asked, capture_output=True,
        text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def serve() -> None:
    """What the interpreter does: read what is hidden and run the commands."""
    hidden, commands, known = json.load(sys.stdin)
    _hide(hidden, known)
    from sparse_ref_attn.cli import main

    found = []
    for command in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code: Any = main(command)
            except SystemExit as left:
                code = left.code
        found.append([code, out.getvalue(), err.getvalue()])
    print(json.dumps(found))


def _hide(hidden: Sequence[str], known: bool) -> None:
    from importlib.metadata import packages_distributions

    owners = packages_distributions()
    packages = {name for module in hidden for name in owners.get(module.partition(".")[0], ())}

    class Finder(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
            absent = any(f"{name}.".startswith(f"{module}.") for module in hidden)
            return None if absent else super().find_spec(name, path, target)

        @classmethod
        def find_distributions(cls, *arguments: Any) -> Iterator[Any]:
            for found in importlib.machinery.PathFinder.find_distributions(*arguments):
                if known or found.metadata["Name"] not in packages:
                    yield found

    sys.meta_path[:] = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
