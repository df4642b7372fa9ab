"""Orders and what is kept of them: floors, weights, ties, bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ref_attn.errors import BudgetError, ConfigError
from sparse_ref_attn.selection import fingerprint, order, per_reference, prefix
from sparse_ref_attn.types import RefSelection

SCORES = st.lists(st.lists(st.integers(-4, 4), min_size=1, max_size=12), min_size=1, max_size=4)


def tensors(lists):
    return [torch.tensor(values, dtype=torch.float32) for values in lists]


@settings(max_examples=150, deadline=None)
@given(SCORES, st.data())
def test_any_prefix_holds_the_floors_and_the_best_of_the_rest(lists, data):
    scores = tensors(lists)
    floors = [data.draw(st.integers(0, len(values))) for values in lists]
    weights = data.draw(
        st.none() | st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=len(lists), max_size=len(lists))
    )
    ranked = order(scores, floors, weights)
    joint = [value for values in lists for value in values]
    assert sorted(ranked.tolist()) == list(range(len(joint)))
    # Truth by plain Python: sort keys, floors' tokens first.
    lowest = min(joint)
    w = weights or [1.0] * len(lists)
    value, owner, protected = [], [], set()
    for i, values in enumerate(lists):
        start = len(value)
        protected |= {start + j for j in sorted(range(len(values)), key=lambda j: (-values[j], j))[: floors[i]]}
        value += [w[i] * (v - lowest) for v in values]
        owner += [i] * len(values)
    truth = sorted(range(len(joint)), key=lambda k: (k not in protected, -value[k], k))
    assert ranked.tolist() == truth
    for count in range(sum(floors), len(joint) + 1):
        kept = RefSelection(prefix(ranked, count), tuple(map(len, lists)))
        assert all(have >= floor for have, floor in zip(kept.counts(), floors, strict=True))


@settings(max_examples=80, deadline=None)
@given(SCORES, st.data())
def test_per_reference_keeps_the_best_of_each(lists, data):
    counts = [data.draw(st.integers(0, len(values))) for values in lists]
    kept = RefSelection(per_reference(tensors(lists), counts), tuple(map(len, lists)))
    assert kept.indices.dtype == torch.int64
    assert kept.counts() == tuple(counts)
    for values, count, mine in zip(lists, counts, kept.split(), strict=True):
        assert mine.tolist() == sorted(sorted(range(len(values)), key=lambda j: (-values[j], j))[:count])


def test_ties_go_to_the_lower_index():
    flat = [torch.zeros(1000), torch.zeros(500)]
    assert torch.equal(order(flat, (0, 0)), torch.arange(1500))
    assert torch.equal(per_reference(flat, (3, 2)), torch.tensor([0, 1, 2, 1000, 1001]))


def test_prefixes_are_nested_and_ascending():
    ranked = order([torch.rand(50), torch.rand(9)], (5, 2))
    previous = set()
    for count in range(60):
        kept = prefix(ranked, count)
        assert kept.tolist() == sorted(kept.tolist())
        assert previous <= set(kept.tolist())
        previous = set(kept.tolist())


def test_equal_weights_and_affine_scores_change_nothing():
    a, b = torch.randn(40), torch.randn(30)
    plain = order([a, b], (3, 3))
    assert torch.equal(plain, order([a, b], (3, 3), (4.0, 4.0)))
    weighted = order([a, b], (0, 0), (1.0, 4.0))
    assert torch.equal(weighted, order([4 * a + 8, 4 * b + 8], (0, 0), (1.0, 4.0)))


def test_a_weight_gives_its_reference_more_places():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(100, generator=generator), torch.rand(100, generator=generator)]
    counts = [RefSelection(prefix(order(scores, (0, 0), (1.0, w)), 80), (100, 100)).counts()[1] for w in (0.5, 1, 2)]
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda s: order(s, (3, 0)), BudgetError),
        (lambda s: order(s, (-1, 0)), BudgetError),
        (lambda s: order(s, (1,)), ConfigError),
        (lambda s: order(s, (0, 0), (1.0,)), ConfigError),
        (lambda s: order(s, (0, 0), (1.0, 0.0)), ConfigError),
        (lambda s: order(s, (0, 0), (1.0, float("nan"))), ConfigError),
        (lambda s: order([], ()), ConfigError),
        (lambda s: per_reference(s, (2, 4)), BudgetError),
        (lambda s: per_reference(s, (2,)), ConfigError),
        (lambda s: per_reference([], ()), ConfigError),
        (lambda s: prefix(order(s, (0, 0)), 6), BudgetError),
        (lambda s: prefix(order(s, (0, 0)), -1), BudgetError),
    ],
)
def test_impossible_requests(call, error):
    with pytest.raises(error, match="must"):
        call([torch.rand(2), torch.rand(3)])


def test_fingerprint_tells_references_apart_not_batches():
    tokens = torch.randn(1, 6, 8)
    same = {
        fingerprint(tokens),
        fingerprint(tokens[0]),
        fingerprint(tokens.expand(3, -1, -1)),
        fingerprint(tokens.double()),
    }
    assert len(same) == 1
    changed = tokens.clone()
    changed[0, 5, 7] = changed[0, 5, 7].nextafter(torch.tensor(9.0))
    others = {fingerprint(changed), fingerprint(tokens.reshape(1, 8, 6)), fingerprint(torch.cat([tokens, changed]))}
    assert len(same | others) == 4
    assert fingerprint(tokens.bfloat16()) == fingerprint(tokens.bfloat16().float())


@pytest.mark.gpu
def test_no_host_sync_on_a_gpu():
    scores = [torch.rand(4096, device="cuda"), torch.rand(1000, device="cuda")]
    torch.cuda.set_sync_debug_mode("error")
    try:
        ranked = order(scores, (10, 20), (1.0, 2.0))
        kept = prefix(ranked, 300)
        each = per_reference(scores, (5, 6))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    host = [s.cpu() for s in scores]
    assert torch.equal(kept.cpu(), prefix(order(host, (10, 20), (1.0, 2.0)), 300))
    assert torch.equal(each.cpu(), per_reference(host, (5, 6)))
