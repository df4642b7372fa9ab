"""``sra app``: the page in the browser."""

from __future__ import annotations

import argparse

from ..app.serve import check_place, is_loopback, serve
from ..app.session import Session
from ..errors import ConfigError
from .logs import quiet
from .terminal import show

__all__ = ["app"]


def app(options: argparse.Namespace) -> None:
    """Load the model, then serve until Ctrl-C."""
    port = check_place(options.host, options.port)
    small = options.model is None
    quiet(pipelines_too=small)
    session = Session()
    settings = {"device": options.device, "dtype": options.dtype, "offload": options.offload}
    settings |= {"more": dict(options.set or ())}
    if small and (given := [name for name, value in settings.items() if value not in (None, "none", {})]):
        given = ["set" if name == "more" else name for name in given]
        raise ConfigError(f"--{' and --'.join(given)} must come with --model, got the small model")
    session.load(**({} if small else {"name": options.model, **settings}))
    show(session.status())
    if not is_loopback(options.host):
        show("Whoever can reach this machine can use the page: there is no password.")
    serve(session, options.host, port, lambda address: show(f"Open {address} in a browser; Ctrl-C ends it."))
