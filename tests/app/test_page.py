"""The page's fields are the edit's, its errors are sentences, and its command fails in one line."""

from __future__ import annotations

import inspect
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sparse_ref_attn import extras
from sparse_ref_attn.app.edit import Edit
from sparse_ref_attn.app.serve import check_place, launch
from sparse_ref_attn.app.session import Session
from sparse_ref_attn.cli import main
from sparse_ref_attn.vocabulary import METHODS
from tests import programs

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="no gradio")

FIELDS = {
    "images": None, "prompt": "a cup", "way": "edges", "share": 50, "steps": 2, "seed": 1, "width": None,
    "height": None, "execute": "the rule's own", "refresh": "",
}  # fmt: skip


class Asked(Session):
    """Takes what it is asked, and fails as it is told."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def run(self, edit: Edit, told: Any = None) -> Any:
        self.edit = edit
        raise self.error


def handlers(session: Session) -> Any:
    """What the page calls; gradio is imported for it."""
    from sparse_ref_attn.app.handlers import Handlers

    return Handlers(session)


def said(values: list[Any]) -> str:
    return values[0].value


def test_fields_become_the_edit() -> None:
    session = Asked(MemoryError())
    more = {"images": [("a.png", None), ("b.png", "words")], "width": 64, "height": 32, "execute": "cache"}
    values = handlers(session).run(**FIELDS | more | {"refresh": "never"})
    assert session.edit == Edit(
        ("a.png", "b.png"), "a cup", "edges", 0.5, 2, 1, width=64, height=32, execute="cache", refresh="never"
    )
    assert said(values).startswith("Memory ran out: ")
    assert len(values) == 8


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "There must be a photo, got none: drop one in."),
        ({"images": [("a.png", None)], "way": None}, "The rule must be one of faithful, balanced, fast, recast"),
    ],
)
def test_mistakes_are_sentences(more: dict[str, Any], words: str) -> None:
    assert said(handlers(Session()).run(**FIELDS | more)).startswith(words)


def test_an_error_that_nobody_knows_is_words_too(caplog: pytest.LogCaptureFixture) -> None:
    values = handlers(Asked(KeyError("blocks"))).run(**FIELDS | {"images": [("a.png", None)]})
    assert said(values) == "Unexpected, KeyError: 'blocks'."
    assert caplog.records[0].exc_info is not None  # where it came from is told to whoever started the page


def test_an_edit_fills_the_page(session: Session, drawn: tuple[str, str]) -> None:
    fields = FIELDS | {"images": [(drawn[0], None)], "prompt": drawn[1]}
    status, made, sparse, dense, kept, numbers, beside, undo = handlers(session).run(**fields)
    assert status.value.endswith("patched with edges at 50 %.")
    assert sparse.size == (128, 128)
    assert not dense.visible
    assert kept.visible
    assert numbers.splitlines()[0].split("|")[1:-1] == ["  ", " dense ", " sparse ", " gain "]
    assert beside.interactive
    assert undo.interactive
    assert handlers(session).dense(made)[3].visible
    assert not handlers(session).undo()[1].interactive


def test_a_model_that_cannot_be_loaded_leaves_the_one_that_there_is(session: Session) -> None:
    values = handlers(session).load("/nowhere")
    assert said(values).startswith("A pipeline's directory must hold model_index.json, got /nowhere. The small trained")


def test_the_page_has_the_vocabulary_and_tells_nobody(session: Session) -> None:
    page, address = launch(session, "127.0.0.1", check_place("127.0.0.1", None))
    try:
        config = page.get_config_file()
        fields = {part["props"].get("elem_id"): part["props"] for part in config["components"]}
        assert {choice[0] for choice in fields["way"]["choices"]} > set(METHODS)
        assert "path" in fields
        assert not page.analytics_enabled
        assert not page.share
        assert address.startswith("http://127.0.0.1:")
        runs = [d for d in config["dependencies"] if d["queue"] and d["backend_fn"]]
        assert {page.fns[d["id"]].concurrency_id for d in runs} == {"model"}
    finally:
        page.close(verbose=False)


def test_other_machines_do_not_choose_the_model(session: Session) -> None:
    page, _ = launch(session, "0.0.0.0", check_place("0.0.0.0", None))
    try:
        assert "path" not in {part["props"].get("elem_id") for part in page.get_config_file()["components"]}
    finally:
        page.close(verbose=False)


def test_a_missing_package_is_one_line_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = extras.versions()
    monkeypatch.setattr(extras, "versions", lambda: installed | {"gradio": None})
    assert main(["app"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "sra: error: sra app cannot run: gradio not installed: pip install 'sparse-ref-attn[app]'"


def test_a_port_that_is_taken_and_settings_of_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["app", "--port", str(port)]) == 2
    assert f"a free port, got 127.0.0.1:{port}" in capsys.readouterr().err
    for arguments, words in (
        (["--port", "70000"], "from 1 to 65535, got '70000'"),
        (["--device", "cpu", "--set", "a=1"], "--device and --set must come with --model"),
        (["--host", "no where"], "a host of this machine"),  # which no name server is asked for
        (["--model", "/nowhere"], "must hold model_index.json, got /nowhere"),
    ):
        assert main(["app", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line


def without_the_page() -> int:
    """What a process of its own does."""
    import sparse_ref_attn.app.session
    import sparse_ref_attn.cli.serving  # noqa: F401

    return "gradio" in sys.modules


def test_gradio_is_imported_by_the_page_alone(tmp_path: Path) -> None:
    programs.run(without_the_page, log=tmp_path / "log")


def test_run_takes_the_fields_in_the_order_of_the_page() -> None:
    names = list(inspect.signature(handlers(Session()).run).parameters)
    assert names == [*FIELDS, "progress"]
