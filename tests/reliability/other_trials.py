"""One random configuration on a pipeline with a call of its own: modular ones, and models that only these have."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.models import adapter_for
from sparse_ref_attn.selection import Reducer
from tests.adapters.witnesses import Call, HiddenKeys, sample_of, witnessed
from tests.contract.state import state
from tests.models.other_pipelines import OTHERS, Other
from tests.models.test_other_pipelines import seen_keys
from tests.reliability.alike import same, whole
from tests.reliability.settings import Settings
from tests.reliability.trials import TOLERANCE, Trial

OTHER_KINDS = ("call", "steps", "stop")
"""A whole pipeline call; the transformer's calls against the model that hides dropped tokens; a call broken off."""


@cache
def other_pipeline(name: str) -> Any:
    pipe = OTHERS[name].build()
    OTHERS[name].call(pipe, steps=1)
    return pipe


class OtherTrial(Trial):
    """Number `index` of `seed` on the pipeline `name` of `OTHERS`."""

    def __init__(self, name: str, seed: int, index: int) -> None:
        super().__init__(seed, index)
        self.other: Other = OTHERS[name]
        self.random.seed(f"{name}/{seed}/{index}")
        self.kind = self.random.choice(OTHER_KINDS)
        self.command = f"python -m tests.reliability --other '{name}' {seed} {index}"

    def run(self) -> str:
        try:
            return super().run()
        finally:
            if self.failed:
                other_pipeline.cache_clear()

    def _drawn(self) -> tuple[Any, Settings, dict[str, Any]]:
        pipe, draw = other_pipeline(self.other.name), self.random
        steps = draw.choice((1, 2, 3))
        request = {"steps": steps, "seed": draw.randrange(3)} | (self.other.guided if draw.random() < 0.5 else {})
        self._note(f"{self.other.name} {request}")
        blocks = len(adapter_for(pipe.transformer).sites(pipe.transformer))
        spoiled = draw.random() < 0.3
        return pipe, Settings(draw, blocks, steps, len(self.other.references), False, spoiled), request

    def _call(self) -> str:
        pipe, settings, request = self._drawn()
        before, found = state(pipe), []
        plain = self.other.call(pipe, **request)
        handle, picture = None, plain
        with self._refusals(pipe, found):
            handle = sra.patch(pipe, self._configuration(settings))
        if handle is not None:
            with self._refusals(pipe, found):
                picture = self.other.call(pipe, **request)
                found.append("ran")
            if found[0] == "ran":
                self._check_run(handle, {"references": len(self.other.references), **request}, picture, plain)
            handle.remove()
        assert state(pipe) == before
        assert np.array_equal(self.other.call(pipe, **request), plain), "the dense pipeline must be what it was"
        return found[0]

    @torch.no_grad()
    def _steps(self) -> str:
        pipe, settings, request = self._drawn()
        before, found = state(pipe), []
        with witnessed(pipe.transformer) as calls:
            self.other.call(pipe, **request)
        handle, outputs = None, []
        with self._refusals(pipe, found):
            handle = sra.patch(pipe.transformer, self._configuration(settings))
        if handle is not None:
            with self._refusals(pipe, found):
                outputs = self._told(pipe.transformer, handle, calls, request["steps"])
                found.append("ran")
            record, config = (handle.record if found[0] == "ran" else None), handle.config
            handle.remove()
            if record is not None:
                self._check_others(pipe.transformer, config, record, calls, outputs)
        assert state(pipe) == before
        assert same(sample_of(pipe.transformer(**calls[0].given)), calls[0].sample), (
            "the dense model must be what it was"
        )
        return found[0]

    def _told(self, model: Any, handle: Any, calls: list[Call], steps: int) -> list[torch.Tensor]:
        handle.begin(steps)
        outputs = []
        for i, call in enumerate(calls):
            handle.step(i * steps // len(calls))
            outputs.append(sample_of(model(**call.given)))
        return outputs

    def _check_others(self, model: Any, config: Any, record: Any, calls: list[Call], outputs: list[Any]) -> None:
        total, steps = record.layout.reference_tokens, record.steps
        assert [output.shape for output in outputs] == [call.sample.shape for call in calls]
        if all(whole(step, total, record.exactness in ("drifting", "fixed time")) for step in steps):
            assert all(same(output, call.sample) for output, call in zip(outputs, calls, strict=True))
            return
        if isinstance(config.select, Reducer) or config.layers:
            return
        sites = len(adapter_for(model).sites(model))
        for i, (call, output) in enumerate(zip(calls, outputs, strict=True)):
            step = steps[i * len(steps) // len(calls)]
            if step.kind == "cached" or (config.execute.name == "cache" and step.kept < total):
                continue
            kept = torch.ones(total, dtype=torch.bool)
            if step.selection is not None:
                kept = torch.zeros_like(kept)
                kept[step.selection.indices] = True
            own = len(call.attention) - sites  # before the joint ones
            keys = seen_keys(self.other, call, kept)
            with HiddenKeys(keys.seen, own + step.from_block if step.from_block else 0):
                wanted = self.other.generated(model(**call.given)[0], self.other.generation)
            got = self.other.generated(output, self.other.generation)
            error = float((got - wanted).abs().max() / wanted.abs().max())
            assert error < TOLERANCE[torch.float32], f"call {i} is {error:.1e} from the model that hides dropped tokens"

    def _stop(self) -> str:
        """A call that is broken off in some block leaves nothing to the next."""
        pipe, settings, request = self._drawn()
        settings.spoiled = False
        before, found = state(pipe), []
        handle = None
        with self._refusals(pipe, found):
            handle = sra.patch(pipe, self._configuration(settings))
        if handle is None:
            return found[0]
        try:
            want = self.other.call(pipe, **request)
        except sra.SparseRefError as error:
            found.append(type(error).__name__)
        else:
            found.append("ran")
            self._break_off(pipe, request)
            assert np.array_equal(self.other.call(pipe, **request), want)
        handle.remove()
        assert state(pipe) == before
        return found[0]

    def _break_off(self, pipe: Any, request: dict[str, Any]) -> None:
        left = [self.random.randrange(request["steps"] + 1)]

        def stop(*arguments: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise ZeroDivisionError

        blocks = adapter_for(pipe.transformer).blocks(pipe.transformer)
        hook = self.random.choice(blocks).module.register_forward_hook(stop)
        try:
            self.other.call(pipe, **request)
        except ZeroDivisionError:
            self._note("broken off")
        finally:
            hook.remove()
