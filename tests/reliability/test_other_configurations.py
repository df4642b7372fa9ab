"""As `test_configurations`, on every pipeline with a call of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from tests.models.other_pipelines import OTHERS
from tests.reliability.other_trials import OTHER_KINDS, OtherTrial

EACH = 100


def explored(name: str, seed: int, trials: range) -> Counter[str]:
    found: Counter[str] = Counter()
    for index in trials:
        trial = OtherTrial(name, seed, index)
        found[trial.run()] += 1
        found[trial.kind] += 1
    return found


@pytest.mark.parametrize("name", OTHERS)
def test_some_random_configurations(name: str) -> None:
    assert explored(name, 1, range(2)).total() == 4


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", OTHERS)
def test_a_hundred_random_configurations(name: str, record_property: Callable[[str, object], None]) -> None:
    found = explored(name, 0, range(EACH))
    record_property("count", sum(found[kind] for kind in OTHER_KINDS))
    record_property("ran", found["ran"])
    record_property("detail", ", ".join(f"{kind} {count}" for kind, count in sorted(found.items()) if kind != "ran"))
    assert found["ran"] > EACH // 4
