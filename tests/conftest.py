"""Settings of the whole suite: one CPU thread, quiet libraries, the `gpu` and `slow` tiers."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped, and counted, where there is none")
    config.addinivalue_line("markers", "slow: runs only when selected, with -m slow")
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"diffusers|transformers")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    selected = config.getoption("-m")
    has_gpu = torch.cuda.is_available()
    for item in items:
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
            config.stash[SKIPPED_GPU] = config.stash.get(SKIPPED_GPU, 0) + 1
        elif "slow" in item.keywords and "slow" not in selected:
            item.add_marker(pytest.mark.skip(reason="slow: select with -m slow"))


SKIPPED_GPU = pytest.StashKey[int]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    count = config.stash.get(SKIPPED_GPU, 0)
    if count:
        terminalreporter.write_line(f"{count} GPU tests skipped: no CUDA device on this machine")
