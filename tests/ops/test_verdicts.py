"""Verdicts: who agrees with float64, who is fastest, what is kept, and that a wrong backend is never used."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparse_ref_attn.functional import attention_mass, gather_attention, pack_rows, unpack_rows
from sparse_ref_attn.ops.gather_attention.backends import Call
from sparse_ref_attn.ops.gather_attention.trial import kind_of
from sparse_ref_attn.ops.verdicts import JUDGED, Kind, dispatch, forget, judge, order_of, prepare, store, verdict_of
from sparse_ref_attn.ops.verdicts.dispatch import trial_of
from sparse_ref_attn.ops.verdicts.judge import ranked_by_time
from tests import stand_in_backend
from tests.cpu_kernels import used
from tests.pairwise import pairwise
from tests.stand_in_backend import calls, judged, spoiled

CPU = torch.device("cpu")


def attention(form: str = "dense", dtype: torch.dtype = torch.float32, **more: object) -> Kind:
    size = (128, 128, 0 if form == "dense" else 64, *([32] if form.startswith("tiles") else []))
    return Kind("gather_attention", form, CPU, dtype, 4, 2, 16, size=size)._replace(**more)


def mass(form: str = "LSE given") -> Kind:
    return Kind("attention_mass", form, CPU, torch.float32, 2, 2, 16, size=(128, 256, 64))


def rows(form: str = "pack") -> Kind:
    return Kind("pack_rows", form, CPU, torch.float32, size=(256, 128, 64))


@pytest.fixture
def cards(tmp_path: Path) -> Iterator[Path]:
    """Here a CPU is judged as a card is: the stand-in, and what every device can."""
    dispatch._SAID.clear()
    with judged(tmp_path, ("stand_in", "plain")):
        yield tmp_path


# -- the judge, on what a CPU has ---------------------------------------------------------------


@pairwise(form=["tiles", "tiles per head"], dtype=[torch.float32, torch.bfloat16], several=[False, True])
def test_sdpa_and_cpp_agree_on_query_tiles(form: str, dtype: torch.dtype, several: bool) -> None:
    with used():
        verdict = judge(attention(form, dtype, several=several), trial_of("gather_attention"))
    assert (set(verdict.order), verdict.unusable) == ({"cpp", "sdpa"}, {})
    assert all(0 < verdict.errors[name] <= 1 for name in verdict.order)
    assert "cannot give each query tile a selection of its own" in verdict.unable["flex"]


def test_calls_with_query_tiles_have_kinds_by_their_tiles() -> None:
    call = Call(CPU, torch.bfloat16, 128, queries=4608, keys=4864, kept=257 * 500, tiles=257)
    kind = kind_of(call)
    assert (kind.form, kind.size, kind.several) == ("tiles", (4096, 4096, 512, 16), False)
    assert kind_of(call._replace(tiles=65, kept=65 * 500)).size == (4096, 4096, 512, 64)
    assert kind_of(call._replace(per_head=True)).form == "tiles per head"


@pairwise(
    form=["dense", "gathered", "per head"], dtype=[torch.float32, torch.bfloat16], gradients=[False, True],
    several=[False, True],
)  # fmt: skip
def test_sdpa_agrees_and_flex_where_it_can(form: str, dtype: torch.dtype, gradients: bool, several: bool) -> None:
    kind = attention(form, dtype, gradients=gradients, several=several)
    verdict = judge(kind, trial_of("gather_attention"))
    assert verdict.unusable == {}
    assert set(verdict.order) == ({"sdpa", "flex"} if form != "per head" and not gradients else {"sdpa"})
    assert set(verdict.order) | set(verdict.unable) == {"sdpa", "flex", "cpp"}
    assert all(0 <= verdict.errors[name] <= 1 for name in verdict.order)
    assert len(verdict.order) == 1 or all(verdict.milliseconds[name] > 0 for name in verdict.order)


@pytest.mark.parametrize("kind", [mass("LSE given"), mass("LSE computed"), rows("pack"), rows("unpack")], ids=str)
def test_plain_pytorch_agrees_in_the_other_ops(kind: Kind) -> None:
    verdict = judge(kind, trial_of(kind.op))
    assert verdict.unusable == verdict.unable == {}
    assert verdict.order


def test_ties_go_by_the_stated_order() -> None:
    assert ranked_by_time({"a": 1.049, "b": 1.0, "c": 0.9999}) == ("a", "b", "c")
    assert ranked_by_time({"a": 1.06, "b": 1.0}) == ("b", "a")


# -- a planted wrong backend -------------------------------------------------------------------


def test_the_right_stand_in_is_used_everywhere(cards: Path) -> None:
    for kind in (attention(), attention("gathered", gradients=True), mass(), rows(), rows("unpack")):
        assert set(verdict_of(kind).order) == {"stand_in", "sdpa" if kind.op == "gather_attention" else
                                               "chunked" if kind.op == "attention_mass" else "reference"}  # fmt: skip


WRONG = {
    "a little too large": (
        "forward", lambda r: (r[0] * 1.001, r[1]), attention(), r"out: error \d.*e-\d+ where \d.*e-\d+ is allowed"
    ),
    "an lse in base 2": ("forward", lambda r: (r[0], r[1] * 1.4427), attention("gathered"), r"lse: error"),
    "NaN": ("forward", lambda r: (r[0] * float("nan"), r[1]), attention(), r"out: NaN"),
    "no gradient of the bank": (
        "backward", lambda g: g._replace(k_ref=torch.zeros_like(g.k_ref)), attention("gathered", gradients=True),
        r"gradient of k_ref: error",
    ),
    "gradients missing": (
        "backward", lambda g: g._replace(v=None), attention(gradients=True), r"must give the gradient of v, got None"
    ),
    "the mass of one key too many": ("mass", lambda m: m.roll(1, -1), mass(), r"mass.*: error"),
    "an lse of fewer keys": ("lse", lambda lse: lse - 0.01, mass("LSE computed"), r"mass.*: error"),
    "rows in another order": ("pack", lambda xs: [x.flip(1) for x in xs], rows(), r"rows .*: error 1"),
    "a row too many": ("unpack", lambda xs: [x + (x == 0) for x in xs], rows("unpack"), r"rows .*: error 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_backend_is_named_once_with_the_figures_and_never_used(
    name: str, cards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    function, spoil, kind, words = WRONG[name]
    spoiled[function] = spoil
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        for size in (kind.size, tuple(2 * n for n in kind.size)):
            verdict = verdict_of(kind.resized(size))
            assert "stand_in" not in verdict.order
            assert len(verdict.order) == 1
    assert len(caplog.messages) == 1
    assert f"{kind.op} by stand_in is unusable on this device and will not be used" in caplog.messages[0]
    assert re.search(words, caplog.messages[0]), caplog.messages[0]


def test_a_backend_that_cannot_be_launched_is_unusable(cards: Path) -> None:
    def fail(result: object) -> object:
        raise RuntimeError("no kernel image is available\nfor this device")

    spoiled["forward"] = fail
    verdict = verdict_of(attention())
    assert verdict.order == ("sdpa",)
    assert verdict.unusable == {"stand_in": "raised RuntimeError: no kernel image is available"}


def test_auto_computes_with_what_agreed(cards: Path) -> None:
    spoiled["forward"] = lambda r: (r[0] + 1, r[1])
    spoiled["mass"] = lambda m: m + 1
    spoiled["pack"] = lambda xs: [x + 1 for x in xs]
    x = torch.randn(1, 70, 2, 16)
    assert torch.equal(gather_attention(x, x, x), gather_attention(x, x, x, backend="sdpa"))
    assert torch.equal(attention_mass(x, x, (3, 70)), attention_mass(x, x, (3, 70), backend="chunked"))
    assert torch.equal(pack_rows(x, torch.tensor([1, 3])), x[:, [1, 3]])
    calls.clear()
    gather_attention(x, x, x)
    assert calls == []


def test_forward_and_backward_go_by_one_verdict(cards: Path) -> None:
    """The stand-in's gradients are wrong and its forward is right: with gradients neither is used."""
    spoiled["backward"] = lambda g: g._replace(q=g.q * 2)
    x = torch.randn(70, 2, 16, requires_grad=True)
    gather_attention(x, x, x).sum().backward()
    kinds = {kind: verdict for kind, verdict in store.known().items() if kind.op == "gather_attention"}
    assert [(kind.gradients, verdict.order) for kind, verdict in kinds.items()] == [(True, ("sdpa",))]


@pytest.mark.parametrize("where", ["inference mode", "autocast", "no_grad", "a default device"])
def test_a_verdict_does_not_depend_on_who_asks(where: str, cards: Path) -> None:
    contexts = {
        "inference mode": torch.inference_mode(), "autocast": torch.autocast("cpu", torch.bfloat16),
        "no_grad": torch.no_grad(), "a default device": torch.device("meta"),
    }  # fmt: skip
    with contexts[where]:
        verdict = verdict_of(attention("gathered", gradients=True))
    assert set(verdict.order) == {"stand_in", "sdpa"}
    assert verdict.errors["sdpa"] <= 1


# -- time ------------------------------------------------------------------------------------


def test_the_fastest_is_taken_and_a_slow_one_costs_no_more_than_its_time(cards: Path) -> None:
    def wait(result: object) -> object:
        time.sleep(0.25)
        return result

    spoiled["forward"] = wait
    began = time.process_time()  # without the waits, and without what other processes take
    verdict = verdict_of(attention())
    assert verdict.order == ("sdpa", "stand_in")
    slow = [name for name, _ in calls].count("forward")
    assert 3 <= slow <= 2 + 5  # the comparison, a warm-up, and rounds until a second is over
    assert time.process_time() - began < 2
    assert verdict.milliseconds["stand_in"] >= 250


# -- what is kept -----------------------------------------------------------------------------


def test_a_verdict_is_kept_for_the_process_and_the_next(cards: Path) -> None:
    kind = attention("gathered", torch.bfloat16, gradients=True, several=True)
    verdict = verdict_of(kind)
    calls.clear()
    assert verdict_of(kind) is verdict
    forget()  # another process
    assert verdict_of(kind) == verdict
    assert calls == []
    (path,) = (cards / "sparse_ref_attn" / "verdicts").iterdir()
    data = json.loads(path.read_text())
    assert {"device", "driver", "torch", "triton", "sparse-ref-attn"} <= set(data["environment"])
    assert data["environment"]["torch"] == torch.__version__
    verdict_of(rows())
    assert len(json.loads(path.read_text())["verdicts"]) == 2
    assert verdict_of(kind, again=True) is not verdict
    assert calls


@pytest.mark.parametrize("content", ["", "{", "[]", '{"environment": 3, "verdicts": []}', "\x00\xff"])
def test_a_file_that_says_nothing_of_use_is_measured_again(content: str, cards: Path) -> None:
    verdict_of(rows())
    (path,) = (cards / "sparse_ref_attn" / "verdicts").iterdir()
    path.write_text(content, encoding="latin-1")
    forget()
    calls.clear()
    assert verdict_of(rows()).order
    assert calls
    assert len(json.loads(path.read_text())["verdicts"]) == 1
    assert len(list(path.parent.iterdir())) == 1  # no draft is left


def test_other_versions_are_other_verdicts(cards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict_of(rows())
    forget()
    calls.clear()
    newer = {**store.environment(CPU), "torch": "99.0"}
    monkeypatch.setattr(store, "environment", lambda device: newer)
    verdict_of(rows())
    assert calls
    assert len(list((cards / "sparse_ref_attn" / "verdicts").iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_said_once(
    cards: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cards / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cards / "file"))
    store._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        assert verdict_of(rows()).order
        assert verdict_of(rows("unpack")).order
    assert len(caplog.messages) == 1
    assert "kept for this process alone" in caplog.messages[0]


# -- where nothing is measured ---------------------------------------------------------------


def test_a_cpu_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "judge", lambda *of: pytest.fail("a CPU must not be judged"))
    assert "cpu" not in JUDGED
    x = torch.randn(1, 70, 2, 16)
    gather_attention(x, x, x)
    attention_mass(x, x, (3, 70))
    unpack_rows(pack_rows(x, torch.tensor([1, 3])), torch.tensor([1, 3]), 70)
    prepare([attention()])
    assert order_of(attention(), ("sdpa",)) == ("sdpa",)


def test_a_captured_graph_takes_the_next_size_or_what_needs_no_proof(
    cards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_can_measure", lambda device: False)
    assert order_of(attention(), ("sdpa",)) == ("sdpa",)
    prepare([attention()])
    assert store.known() == {}
    monkeypatch.undo()
    with judged(cards):
        near, far = verdict_of(attention()), attention().resized((8192, 8192, 0))
        monkeypatch.setattr(dispatch, "_can_measure", lambda device: False)
        assert order_of(far, ("sdpa",)) == near.order == ("stand_in",)
        assert order_of(attention(several=True), ("sdpa",)) == ("sdpa",)


def test_prepared_kinds_are_those_of_the_calls(cards: Path) -> None:
    """Judged once for both: what `prepare` names is what a call asks for."""
    with judged(cards):
        x, bank = torch.randn(1, 130, 4, 16), torch.randn(300, 2, 16)
        keys = torch.randn(1, 130, 2, 16)
        prepare([attention("gathered"), mass("LSE given")])
        before = dict(store.known())
        gather_attention(x, keys, keys, bank, bank, torch.arange(60))
        q, k = torch.randn(1, 130, 2, 16), torch.randn(1, 250, 2, 16)
        attention_mass(q, k, (0, 66), lse=torch.zeros(1, 2, 130))
        assert store.known() == before


def test_the_stand_in_is_a_backend_of_tests_alone() -> None:
    assert stand_in_backend.__name__ not in trial_of("gather_attention").CANDIDATES["cuda"]
