"""Serves the page until Ctrl-C: on this machine alone unless told otherwise, and with nothing sent anywhere."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError
from .session import Session

__all__ = ["HOST", "check_place", "is_loopback", "launch", "serve"]

HOST = "127.0.0.1"
_FIRST_PORT, _PORTS = 7860, 100


def is_loopback(host: str) -> bool:
    """Whether this machine alone can reach a host.

    Examples
    --------
    >>> is_loopback("localhost"), is_loopback("127.0.0.1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_place(host: str, port: int | None) -> int:
    """A port that is free; the first of a hundred from 7860 on where none is asked for.

    Raises
    ------
    ConfigError
        If the port is taken or not allowed, or the host is none of this machine.
    """
    ports = range(_FIRST_PORT, _FIRST_PORT + _PORTS) if port is None else (port,)
    why: OSError | None = None
    for number in ports:
        try:
            with socket.create_server((host, number)):
                return number
        except OSError as error:
            why = error
    asked = f"{host}:{port}" if port is not None else f"{host}, ports {ports[0]} to {ports[-1]}"
    raise ConfigError(f"the page must have a host of this machine and a free port, got {asked}: {why}")


def launch(session: Session, host: str, port: int) -> tuple[Any, str]:
    """Start serving in a thread; the page, which `close` ends, and its address.

    Whoever is let in from other machines may use the model, and not load another.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    from .page import STYLE, build, theme

    page = build(session, choose_model=is_loopback(host))
    page.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, inbrowser=False,
        show_error=False, ssr_mode=False, mcp_server=False, footer_links=[], run_history=False, theme=theme(),
        css=STYLE,
    )  # fmt: skip
    return page, f"http://{'localhost' if host in ('0.0.0.0', '::') else host}:{port}"


def serve(session: Session, host: str, port: int, told: Callable[[str], None]) -> None:
    """Serve until Ctrl-C; `told` hears the address once the page is there."""
    page, address = launch(session, host, port)
    try:
        told(address)
        page.block_thread()
    finally:
        page.close(verbose=False)
