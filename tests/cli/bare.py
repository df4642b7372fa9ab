"""An interpreter in which packages are not installed, and commands that are run in it."""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import io
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Without", "main_without"]


class Without(NamedTuple):
    """Commands that are run one after the other where modules cannot be found.

    Parameters
    ----------
    hidden : sequence of str
        Modules, each with all that is inside it.
    commands : sequence of sequences of str
    known : bool
        Whether their packages still count as installed, as those of a broken installation do.
    """

    hidden: Sequence[str]
    commands: Sequence[Sequence[str]]
    known: bool = False


def main_without(*asked: Without) -> list[list[Any]]:
    """Run each in a process of its own, a fork of a new interpreter that has imported torch alone.

    Returns
    -------
    list of list of [int, str, str]
        Of each its commands' exit code, stdout and stderr.
    """
    done = subprocess.run(
        [sys.executable, "-c", "from tests.cli.bare import serve; serve()"], input=json.dumps(asked),
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def serve() -> None:
    """What the interpreter does."""
    import torch  # noqa: F401

    asked = [Without(*each) for each in json.load(sys.stdin)]
    hidden = {module for each in asked for module in each.hidden}
    _owners()
    assert not hidden & sys.modules.keys()
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(_endings, asked, chunksize=1)))


def _endings(asked: Without) -> list[Any]:
    """Hide what is hidden and run the commands."""
    _hide(asked.hidden, asked.known)
    from sparse_ref_attn.cli import main

    found = []
    for command in asked.commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code: Any = main(command)
            except SystemExit as left:
                code = left.code
        found.append([code, out.getvalue(), err.getvalue()])
    return found


@functools.cache
def _owners() -> Mapping[str, list[str]]:
    """Of each module its packages, which the forks are not to look up again."""
    return packages_distributions()


def _hide(hidden: Sequence[str], known: bool) -> None:
    packages = {name for module in hidden for name in _owners().get(module.partition(".")[0], ())}

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
