"""The sweep over configurations, interpreted: it measures what agrees and stops at what does not."""

from __future__ import annotations

import pytest
import torch

from benchmarks.tune import candidates, kernels, operands, sweep
from sparse_ref_attn.ops.shared.launch_config import Config

CPU = torch.device("cpu")
BASE = Config(32, 32, 4, 2)


@pytest.mark.parametrize("kernel", ["forward", "grad_q", "grad_kv", "lse", "mass", "mass per tile"])
def test_candidates_give_the_same_result_and_are_ranked_by_time(kernel: str) -> None:
    launch = kernels(operands(40, 20, 30, 1, 32, CPU), BASE)[kernel]
    tried = [candidates(kernel)[0], Config(16, 32, 4, 2)]
    found = sweep(launch, BASE, tried, CPU, rounds=1)
    assert {config for _, config in found} == set(tried)
    assert [ms for ms, _ in found] == sorted(ms for ms, _ in found)


@pytest.mark.parametrize("kernel", ["forward", "mass"])
def test_a_candidate_with_another_result_stops_the_sweep(kernel: str) -> None:
    launch = kernels(operands(40, 20, 30, 1, 32, CPU), BASE)[kernel]

    def wrong(config: Config) -> tuple[torch.Tensor, ...]:
        return tuple(x * (1 + 0.1 * (config != BASE)) for x in launch(config))

    with pytest.raises(AssertionError, match="not close"):
        sweep(wrong, BASE, [Config(16, 32, 4, 2)], CPU, rounds=1)
