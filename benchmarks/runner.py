"""Commands that run one after another within a time: what they print is shown and logged, the rest is stopped."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from . import results

__all__ = ["LATE", "MISSING", "Log", "carry_out"]

LATE = 124
"""Exit code of a part that ran out of time, as `timeout` has it."""
MISSING = 127
"""Exit code of a part whose program is not installed, as a shell has it."""


class Log(Protocol):
    """Where what is printed goes too."""

    def write(self, text: str, /) -> int: ...

    def flush(self) -> None: ...


def carry_out(lines: Sequence[Sequence[str]], seconds: float, log: Log, **variables: str) -> int:
    """Run commands one after another until one fails or the time is over; the exit code.

    What they print is printed, and written to `log`. At the end of the time the running command gets SIGTERM, with all
    that it started, and SIGKILL ten seconds later.
    """
    ends = time.monotonic() + seconds
    for line in lines:
        _tell(f"$ {shlex.join(line)}", log)
        try:
            running = subprocess.Popen(
                line, cwd=results.RESULTS.parent.parent, env={**os.environ, **variables}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except FileNotFoundError:
            _tell(f"{line[0]} must be installed for this part, and is not on the PATH", log)
            return MISSING
        late = _stopped_at(running, ends, log)
        if late or running.returncode:
            why = f"stopped after {seconds:.0f} s" if late else f"exit code {running.returncode}"
            _tell(f"{why}; rows of finished cases are written, and the same part goes on with the others", log)
            return LATE if late else running.returncode
    return 0


def _stopped_at(running: subprocess.Popen[str], ends: float, log: Log) -> bool:
    """Copy what a process prints until it ends; True if it had to be stopped."""
    assert running.stdout is not None
    late = threading.Event()

    def stop(number: int) -> None:
        late.set()
        if running.poll() is None:
            os.killpg(running.pid, number)

    left = max(0.0, ends - time.monotonic())
    alarms = [threading.Timer(left, stop, (signal.SIGTERM,)), threading.Timer(left + 10, stop, (signal.SIGKILL,))]
    for alarm in alarms:
        alarm.start()
    try:
        for text in running.stdout:
            _tell(text.rstrip("\n"), log)
        running.wait()
    finally:
        for alarm in alarms:
            alarm.cancel()
        if running.poll() is None:  # this process was interrupted
            os.killpg(running.pid, signal.SIGTERM)
    return late.is_set()


def _tell(text: str, log: Log) -> None:
    print(text, flush=True)
    log.write(text + "\n")
    log.flush()
