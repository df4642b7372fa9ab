"""Settings of the whole suite: one CPU thread, quiet model libraries, the `gpu` and `slow` tiers, `pytest -n auto`."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when a library loads, and by the programs that tests start
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # or each worker starts a pool of processes that import torch
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"  # or it compiles a program for each kind of vectors that a CPU may have
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # an import may ask whether there is a card: CUDA outlives no fork

import pytest
from hypothesis import HealthCheck, settings

from tests import builds

TESTS = Path(__file__).parent
NO_GPU = "no CUDA device"
WORKER_BYTES = 5 * 2**29

# What is tested must not hang on how busy the machine is.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Examples())  # hooks of this file are asked about tests/ alone
    if config.args == config.getini("testpaths") and (worker := os.environ.get("PYTEST_XDIST_WORKER")):
        workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        config.pluginmanager.register(Part(int(worker.removeprefix("gw")), workers))
    if (end := builds.begin()) is not None:
        config.add_cleanup(end)


class Examples:
    """A module without an example is not imported to look for one."""

    @pytest.hookimpl(wrapper=True)
    def pytest_collect_file(self, file_path: Path) -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
        found = yield
        return [each for each in found if type(each) is pytest.Module or ">>>" in file_path.read_text(encoding="utf-8")]


class Part:
    """Each worker imports another part of all test files first, so that it compiles that part for the others."""

    def __init__(self, worker: int, workers: int) -> None:
        files = sorted(TESTS.rglob("test_*.py"))
        self.files = files[len(files) * worker // workers :]

    @pytest.hookimpl(tryfirst=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> None:
        if isinstance(collector, pytest.Module):  # where what is printed is captured
            while self.files:
                name = ".".join(self.files.pop(0).relative_to(TESTS.parent).with_suffix("").parts)
                with suppress(Exception, pytest.skip.Exception):  # pytest imports it again, and tells
                    importlib.import_module(name)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported makes no garbage worth a search, and is compiled once for all processes of a run."""
    gc.disable()
    writes_none, sys.dont_write_bytecode = sys.dont_write_bytecode, False
    try:
        return (yield)
    finally:
        sys.dont_write_bytecode = writes_none
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A worker for each CPU that this process may use, as far as memory reaches."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    cpus = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")  # of a container, "max 100000" without one
    if quota.exists() and (limit := quota.read_text().split())[0] != "max":
        cpus = min(cpus, int(limit[0]) // int(limit[1]))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(cpus, memory // WORKER_BYTES))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch  # which the process that hands tests out to workers can do without

    no_gpu = pytest.mark.skip(reason=NO_GPU)
    not_selected = pytest.mark.skip(reason="slow: select with -m slow")
    has_gpu = torch.cuda.is_available()
    items.sort(key=lambda item: "early" not in item.keywords)
    for item in items:
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(no_gpu)
        elif "slow" in item.keywords and "slow" not in config.getoption("-m"):
            item.add_marker(not_selected)


def pytest_collection_finish(session: pytest.Session) -> None:
    # Importing diffusers sets its loggers up, so they are silenced after the tests that use it were imported.
    for name in ("diffusers", "transformers"):
        if name in sys.modules:
            sys.modules[name].utils.logging.set_verbosity_error()
    gc.freeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop() -> Generator[None, object, object]:
    """No test has run, and pytest has nothing of its own around the process yet."""
    if "tests.programs" in sys.modules:
        sys.modules["tests.programs"].begin()
    return (yield)


def freeze() -> None:
    """The collector need not search what is there now each time that a test asks it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """What the tests of earlier files imported and keep."""
    freeze()


@pytest.fixture(autouse=True)
def active_attention_backend() -> Iterator[None]:
    """The one that diffusers has for the whole process, which a model's ``set_attention_backend`` changes."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is None:
        yield
        return
    registry = dispatch._AttentionBackendRegistry
    before = registry._active_backend
    yield
    registry._active_backend = before


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(isinstance(report.longrepr, tuple) and report.longrepr[2].endswith(NO_GPU) for report in skipped)
    if count:
        terminalreporter.write_line(f"{count} GPU tests skipped: {NO_GPU} on this machine", yellow=True)
