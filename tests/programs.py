"""Programs that tests start, without the seconds that a new interpreter takes to import torch and diffusers.

Each is a fork of a server, a process of its own that has imported the libraries and run nothing: no state of a test,
of pytest or of CUDA is in it. What a bare interpreter imports is tested with one.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

__all__ = ["pair", "run", "run_pair", "script", "start"]

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # an import may ask whether there is a card: CUDA outlives no fork
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "peft", "sparse_ref_attn.training", "sparse_ref_attn.eval", "tests.pipelines"])


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


def _main(target: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(target(*arguments))
