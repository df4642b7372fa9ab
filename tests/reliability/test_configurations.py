"""Random configurations and layouts: no foreign exception, no half-patched pipeline, no wrong output (see `trials`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.reliability import trials
from tests.reliability.trials import KINDS, Trial, TrialError, explore

SHARD, SHARDS = 100, 100


def record(found: Counter[str], note: Callable[[str, object], None]) -> None:
    note("count", sum(found[kind] for kind in KINDS))
    note("ran", found["ran"])
    note("detail", ", ".join(f"{name} {count}" for name, count in sorted(found.items()) if name != "ran"))


def test_some_random_configurations() -> None:
    found = explore(seed=1, first=0, last=20)
    assert all(found[kind] for kind in KINDS)
    assert found["ran"] > 5
    assert found["ConfigError"] > 1


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_ten_thousand_random_configurations(shard: int, record_property: Callable[[str, object], None]) -> None:
    record(explore(0, SHARD * shard, SHARD * (shard + 1)), record_property)


def test_a_trial_is_the_same_again() -> None:
    first, second = Trial(0, 3), Trial(0, 3)
    assert first.run() == second.run()
    assert first.notes == second.notes
    assert first.notes != Trial(1, 3).notes


def test_a_failure_says_how_to_see_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def foreign(*arguments: Any) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(trials.sra, "patch", foreign)
    with pytest.raises(TrialError, match=r"KeyError: 'planted'(.|\n)*--trial 0 \d+"):
        explore(0, 0, 20)


@pytest.mark.parametrize("bug", ["hook", "attribute", "backend"])
def test_what_is_left_behind_is_found(bug: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The trials see a patch that leaves a hook, an attribute or a private attention backend on the model."""
    remove = trials.sra.PatchHandle.remove

    def forgetful(handle: Any) -> None:
        model = handle._transformer()
        remove(handle)
        if bug == "hook":
            model.register_forward_hook(lambda *arguments: None)
        elif bug == "attribute":
            model.left_behind = True
        else:
            next(iter(model.attn_processors.values()))._attention_backend = "sparse_ref_attn_1_2"

    monkeypatch.setattr(trials.sra.PatchHandle, "remove", forgetful)
    try:
        with pytest.raises(TrialError, match="AssertionError"):
            explore(0, 0, 20)
    finally:
        trials.pipeline.cache_clear()
        trials.transformer.cache_clear()
