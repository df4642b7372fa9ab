"""Programs that tests start, without the seconds that a new interpreter takes to import torch and diffusers.

Each is a fork of a server, a process of its own that has imported the libraries and run nothing: no state of a test
or of CUDA is in it. What a bare interpreter imports is tested with one.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

__all__ = ["begin", "pair", "run", "run_pair", "script", "start"]

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "peft", "sparse_ref_attn.training", "sparse_ref_attn.eval", "tests.pipelines"])


def begin() -> None:
    """Make this process's fork the server: it has imported what its tests need, and is to be asked before they run.

    Where it has used CUDA, the server is a new interpreter, started for the first program.
    """
    if not torch.cuda.is_initialized():
        with mock.patch.dict(os.environ, PYTHONWARNINGS="ignore"):  # of the semaphores of programs that are killed
            resource_tracker.ensure_running()
        with mock.patch("multiprocessing.util.spawnv_passfds", _fork):
            forkserver.ensure_running()


def start(target: Callable[..., Any], *arguments: Any, log: Path, **environment: str) -> BaseProcess:
    """A program whose main function is `target`, of a module that can be imported; what it prints goes to `log`.

    It has this process's environment with `environment` besides. What `target` returns is the exit code.
    """
    process = SERVER.Process(target=_main, args=(target, arguments, os.environ | environment, str(log)))
    process.start()
    return process


def run(target: Callable[..., Any], *arguments: Any, log: Path, **environment: str) -> str:
    """What it printed; it must end well."""
    process = start(target, *arguments, log=log, **environment)
    process.join()
    told = log.read_text()
    assert process.exitcode == 0, told[-3000:]
    return told


def pair(target: Callable[..., Any], *arguments: Any, folder: Path, **environment: str) -> list[BaseProcess]:
    """Two ranks of one program, in the environment that ``torchrun --standalone --nproc-per-node 2`` gives them.

    Their logs are ``folder / "rank-0.log"`` and ``"rank-1.log"``.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on any free port
    environment |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    ranks = []
    for rank in "01":
        log = folder / f"rank-{rank}.log"
        ranks.append(start(target, *arguments, log=log, RANK=rank, LOCAL_RANK=rank, **environment))
        ranks[-1].store = store  # which lives as long as they do
    return ranks


def run_pair(target: Callable[..., Any], *arguments: Any, folder: Path, **environment: str) -> None:
    """Both must end well; where one does not, the other is killed, which would wait for it."""
    ranks = pair(target, *arguments, folder=folder, **environment)
    while running := [rank.sentinel for rank in ranks if rank.is_alive()]:
        connection.wait(running)
        if any(rank.exitcode for rank in ranks):
            for rank in ranks:
                rank.kill()
    told = "".join(path.read_text()[-3000:] for path in sorted(folder.glob("rank-?.log")))
    assert [rank.exitcode for rank in ranks] == [0, 0], told


def script(path: str, *arguments: str) -> None:
    """A target: the Python file, as ``python path ...`` runs it."""
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def _fork(path: str, arguments: list[str], descriptors: list[int]) -> int:
    """The process that ``python -c CODE`` is in `arguments`, without a new interpreter."""
    if process := os.fork():
        return process
    try:
        with open(os.devnull, "r+b", buffering=0) as null:
            for each in range(max(map(int, os.listdir("/dev/fd"))) + 1):
                if each not in descriptors:
                    os.dup2(null.fileno(), each)  # nobody is to wait for the end of what is open here too
            exec(arguments[-1])
    finally:
        os._exit(0)


def _main(target: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(target(*arguments))
