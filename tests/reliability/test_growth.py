"""Many generations on one handle hold no more than a few: other references, counts, prompts and sizes each time."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

import sparse_ref_attn as sra
from sparse_ref_attn.run import Run
from tests.latents import CASES
from tests.reliability.memory import Held

WARM = 6  # generations after which everything lazy exists; a multiple of the period of what they are asked for
OBJECTS = 500  # that the interpreter and libraries may come to cache: one a generation would be a leak
RESIDENT = 12 * 2**20  # bytes that the C allocator may come to hold besides, over a thousand generations

MODES = {
    "tokens": ("klein", sra.ReCAST(guard=None)),
    "in_flight": ("klein", sra.SparseRef("mass", 0.3, profile="in_flight")),
    "from_block": ("kontext", sra.SparseRef("edges", 0.3, from_block=1)),
    "reranked": ("klein_kv", sra.SparseRef("mass", sra.Linear(0.2, 0.6), "cache", rerank_every=1)),
    "cache": ("klein_kv", sra.SparseRef(sra.Edges(on_latents="use"), sra.Linear(0.2, 0.6), "cache")),
    "both": ("klein_kv", sra.SparseRef("mass", 0.3, "both")),
    "qwen": ("qwen_edit_plus", sra.SparseContext(0.2, task="auto")),
}


def generate(mode: str, count: int) -> tuple[Held, Held]:
    """What is held after `WARM` generations, and after `count` more."""
    gc.collect()
    gc.freeze()  # what was there before is not looked at again
    name, config = MODES[mode]
    case = CASES[name]
    pipe = case.build(layers=1, single=1) if name != "qwen_edit_plus" else case.build()
    handle = sra.patch(pipe, config)

    def one(i: int) -> None:
        references = case.references[i % len(case.references)]
        request: dict[str, Any] = {"references": references, "first": i, "seed": i, "steps": 2}
        case.call(pipe, **request, cfg=case.cfg and i % 2 == 1)
        assert len(handle.record.steps) == 2

    for i in range(WARM):
        one(i)
    before = Held.now()
    for i in range(WARM, WARM + count):
        one(i)
    after = Held.now()
    handle.remove()
    return before, after


def check(before: Held, after: Held) -> None:
    assert after.tensors == before.tensors
    assert after.bytes == before.bytes
    assert after.objects <= before.objects + OBJECTS
    assert after.resident <= before.resident + RESIDENT


@pytest.mark.parametrize("mode", ["tokens", "both"])
def test_a_dozen_generations(mode: str) -> None:
    generate(mode, 0)  # what libraries build up once in a process is there
    check(*generate(mode, 2 * WARM))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("mode", list(MODES))
def test_a_thousand_generations(mode: str, record_property: Callable[[str, object], None]) -> None:
    before, after = generate(mode, 1002)
    for name, value in (("count", 1002), ("resident_start", before.resident), ("resident_end", after.resident),
                        ("tensors_start", before.tensors), ("tensors_end", after.tensors),
                        ("objects_start", before.objects), ("objects_end", after.objects)):  # fmt: skip
        record_property(name, value)
    check(before, after)


def test_a_handle_that_kept_its_references_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    begin = Run.__init__

    def hoards(run: Any, config: Any, probing: Any, layout: Any, tokens: Any, *arguments: Any) -> None:
        kept.append(tokens)
        begin(run, config, probing, layout, tokens, *arguments)

    monkeypatch.setattr(Run, "__init__", hoards)
    with pytest.raises(AssertionError):
        check(*generate("tokens", WARM))
