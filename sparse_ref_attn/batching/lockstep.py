"""Functions that run in threads of their own, one at a time: each goes on until it asks for something.

What torch keeps for each thread (autocast, inference mode, device, stream) is handed on.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["Lockstep"]


class _Ended(BaseException):
    """Unwinds a function whose answer will never come."""


class Lockstep:
    """One function in a thread that runs only while its owner waits in `resume`.

    Parameters
    ----------
    call : callable
        ``call(ask)``; ``ask(request)`` hands a request to the owner and returns the owner's answer.

    Examples
    --------
    >>> thread = Lockstep(lambda ask: ask("a number") + 1)
    >>> thread.resume(), thread.request
    (True, 'a number')
    >>> thread.resume(41), thread.result
    (False, 42)
    """

    def __init__(self, call: Callable[[Callable[[Any], Any]], Any]) -> None:
        self.request: Any = None
        self.result: Any = None
        self.error: BaseException | None = None
        self._answer: Any = None
        self._ending = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        state, context = _thread_state(), contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._run, call, state), daemon=True, name="sparse_ref_attn item"
        )
        self._running = self._begun = False

    def resume(self, answer: Any = None) -> bool:
        """Let it go on with `answer`; True when it asks again, False when it is done."""
        self._answer, self.request = answer, None
        self._running = True
        if self._begun:
            self._go.release()
        else:
            self._begun = True
            self._thread.start()
        return self._wait()

    def end(self) -> None:
        """Unwind it: its pending `ask` raises. Waits until it is gone, and raises nothing of its own."""
        if not self._begun:
            return
        self._ending = True
        if self._running:  # the owner was interrupted while it ran
            self._wait()
        if self._thread.is_alive():
            self._go.release()
            self._thread.join()

    def _wait(self) -> bool:
        self._back.acquire()
        self._running = False
        if self.request is not None:
            return True
        self._thread.join()
        return False

    def _ask(self, request: Any) -> Any:
        if not self._ending:
            self.request = request
            self._back.release()
            self._go.acquire()
        if self._ending:
            raise _Ended
        return self._answer

    def _run(self, call: Callable[[Callable[[Any], Any]], Any], state: Callable[[], Any]) -> None:
        try:
            with state():
                self.result = call(self._ask)
        except _Ended:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.request = None
            self._back.release()


def _thread_state() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What torch keeps for this thread, to be entered in another one."""
    accelerators = ["cuda"] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    autocast = [
        (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", *accelerators) if torch.is_autocast_enabled(kind)
    ]
    grad, inference, default = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_device()
    stream = torch.cuda.current_stream() if accelerators else None

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if stream is not None:
                stack.enter_context(torch.cuda.device(stream.device))
                stack.enter_context(torch.cuda.stream(stream))
            if default.type != "cpu":
                stack.enter_context(default)
            if inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype in autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            yield

    return enter
