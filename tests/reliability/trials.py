"""One random configuration on one random layout or pipeline: it runs, or is refused in words, and leaves no trace.

Trial i of a seed is the same on every machine; a failure says how to run it alone.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.selection import Reducer
from tests.contract.state import state
from tests.latents import CASES
from tests.pipelines import Case
from tests.reliability.alike import alike, same, whole
from tests.reliability.drawn_batch import BatchItems, sizes_of
from tests.reliability.kept_pipelines import pipeline, transformer
from tests.reliability.layouts import MODELS, Layout
from tests.reliability.settings import JUNK, Settings

KINDS = {"patch": 35, "steps": 35, "run": 14, "handle": 10, "batch": 6}
"""Shares of the trials, in percent: a configuration is made and patched; a transformer's calls on a random layout;
a whole pipeline call; a random sequence of what can be done with a handle; an `sra.batch`."""
TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-6}  # of the output's scale; rotary tables are float32


class TrialError(AssertionError):
    """A trial failed; says which and how to see it again."""


class Trial:
    """Number `index` of `seed`.

    `run` returns what came of it: "ran", or the name of the library's error that refused it.
    """

    def __init__(self, seed: int, index: int) -> None:
        self.seed, self.index = seed, index
        self.random = Random(f"{seed}/{index}")
        self.kind = self.random.choices(list(KINDS), list(KINDS.values()))[0]
        self.notes: list[str] = []
        self.command, self.failed = f"python -m tests.reliability --trial {seed} {index}", False

    def run(self) -> str:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return getattr(self, f"_{self.kind}")()
        except Exception as error:
            self.failed = True
            pipeline.cache_clear()
            transformer.cache_clear()
            told = "\n  ".join(self.notes)
            raise TrialError(
                f"{self.kind} trial: {type(error).__name__}: {error}\n  {told}\nagain: {self.command}"
            ) from error

    def _note(self, what: object) -> None:
        self.notes.append(f"{what!r:.600}" if not isinstance(what, str) else what)

    @contextmanager
    def _refusals(self, model: Any, found: list[str]) -> Iterator[None]:
        """The library's errors end the block and are noted; the models are then as they were."""
        before = state(model)
        try:
            yield
        except sra.SparseRefError as error:
            found.append(type(error).__name__)
            self._note(f"{type(error).__name__}: {error}")
            self._check_refusal(str(error), state(model) == before)

    @staticmethod
    def _check_refusal(words: str, unchanged: bool) -> None:
        assert words, "an error must say something"
        assert "its tiles have ranked" not in words, "tiles must rank what the steps to come read"
        assert unchanged, "a refusal must change nothing"

    def _configuration(self, settings: Settings) -> sra.SparseRef:
        config = settings.configuration()
        self._note(config)
        return config

    def _settings(self, name: str, steps: int, references: int) -> Settings:
        blocks, spoiled = 2 if name.startswith("qwen") else 4, self.random.random() < 0.3
        return Settings(self.random, blocks, steps, references, name == "klein_kv", spoiled)

    # -- made and patched ----------------------------------------------------------------------

    def _patch(self) -> str:
        case = CASES[self.random.choice(list(CASES))]
        pipe = pipeline(case.name)
        before, found = state(pipe), []
        settings = self._settings(case.name, 3, 1)
        settings.spoiled = self.random.random() < 0.6
        with self._refusals(pipe, found):
            config = self._configuration(settings)
            self._travels(config)
            target = self.random.choice((pipe, pipe.transformer))
            handle = sra.patch(target, config)
            assert state(pipe) != before
            handle.remove()
            handle.remove()
            found.append("ran")
        assert state(pipe) == before
        return found[0]

    def _travels(self, config: sra.SparseRef) -> None:
        """A configuration is said in one line, and comes back from JSON or says why it cannot go there."""
        assert config.describe()
        try:
            text = config.to_json()
        except sra.ConfigError:
            return
        again = sra.SparseRef.from_json(text)
        assert again == config
        data = json.loads(text)
        spoiled = self.random.choice(list(data))
        data[spoiled] = self.random.choice([value for value in JUNK if _is_json(value)])
        try:
            sra.SparseRef.from_dict(data)
        except sra.ConfigError as error:
            self._note(f"{spoiled}={data[spoiled]!r}: {error}")

    # -- a transformer's calls -----------------------------------------------------------------

    def _steps(self) -> str:
        name = self.random.choice(MODELS)
        layout = Layout.draw(self.random, name)
        self._note(layout)
        model = transformer(name, layout.dtype)
        components = SimpleNamespace(components={"transformer": model})
        before, found = state(components), []
        dense = layout.run(model)
        settings = self._settings(name, layout.steps, len(layout.grids))
        config, handle, outputs = None, None, []
        with self._refusals(components, found):
            config = self._configuration(settings)
            handle = sra.patch(model, config)
        if handle is not None and config is not None:
            told = self.random.random() < 0.85
            with self._refusals(components, found):
                outputs = layout.run(model, handle if told else None)
                # Untold, a second run of one step is a second call of that step, as a guidance branch is.
                if self.random.random() < 0.3 and (told or layout.steps > 1):
                    again = layout.run(model, handle if told else None)
                    assert all(map(same, outputs, again)), "a run must repeat bit for bit"
                found.append("ran")
            record = None if found[0] != "ran" or not layout.grids else handle.record
            if record is not None:
                self._report(handle)
            handle.remove()
            assert state(components) == before
            if found[0] == "ran":
                assert layout.poison != "references" or not layout.grids, "references must be finite"
                self._check_steps(layout, model, config, record, outputs, dense)
        assert state(components) == before
        assert same(layout.run(model)[0], dense[0]), "the dense model must be what it was"
        return found[0]

    def _check_steps(
        self, layout: Layout, model: Any, config: sra.SparseRef, record: Any, outputs: list[Tensor], dense: list[Tensor]
    ) -> None:
        total = sum(layout.sizes)
        stored = record is not None and record.exactness in ("drifting", "fixed time")
        if record is None or all(whole(step, total, stored) for step in record.steps):
            assert all(map(same, outputs, dense)), "all tokens kept must be the dense model's bits"
            return
        assert [step.index for step in record.steps] == list(range(layout.steps))
        assert {step.calls for step in record.steps} == {layout.branches}
        assert all(1 <= step.kept <= total for step in record.steps)
        assert [out.shape for out in outputs] == [out.shape for out in dense]
        if layout.poison or isinstance(config.select, Reducer) or config.layers or layout.dtype not in TOLERANCE:
            return
        for step in record.steps:
            assert step.kept == (total if step.selection is None else step.selection.kept)
        if any(step.read is not None for step in record.steps):  # tests/adapters/test_tiles.py says what it must be
            return
        wanted = layout.masked(model, record.steps, both=config.execute.name != "cache")
        for i, (got, want) in enumerate(zip(outputs, wanted, strict=True)):
            got, want = layout.generation(got), layout.generation(want)
            error = float((got - want).abs().max() / want.abs().max())
            assert error < TOLERANCE[layout.dtype], f"call {i} is {error:.1e} from the model that hides dropped tokens"

    def _report(self, handle: sra.PatchHandle) -> None:
        json.loads(handle.summary("json"))
        assert "kept" in handle.summary()
        if handle.record.attention:
            handle.attention_table()

    # -- whole pipeline calls ------------------------------------------------------------------

    def _request(self, case: Case) -> dict[str, Any]:
        draw = self.random
        request: dict[str, Any] = {
            "references": draw.choice(((0,) if case.text_to_image else ()) + case.references),
            "batch": draw.choice(case.batch), "steps": draw.choice((3, 2, 1, 4)),
            "cfg": case.cfg and draw.random() < 0.5,
            "images_per_prompt": draw.choice((1, 1, 1, 2)), "seed": draw.randrange(3), "first": draw.randrange(3),
        }  # fmt: skip
        request["latents"] = case.latents and request["references"] > 0 and draw.random() < 0.3
        request["sizes"] = tuple(draw.choice(sizes_of(case)) for _ in range(3))
        self._note(f"{case.name} {request}")
        return request

    def _run(self) -> str:
        case = CASES[self.random.choice(("klein_kv", *CASES))]
        pipe, request = pipeline(case.name), self._request(case)
        before, found = state(pipe), []
        plain = case.call(pipe, **request)
        settings = self._settings(case.name, request["steps"], request["references"])
        handle, image = None, plain
        with self._refusals(pipe, found):
            handle = sra.patch(pipe, self._configuration(settings))
        if handle is not None:
            with self._refusals(pipe, found):
                image = case.call(pipe, **request)
                found.append("ran")
            if found[0] == "ran":
                self._check_run(handle, request, image, plain)
            handle.remove()
        assert state(pipe) == before
        assert np.array_equal(case.call(pipe, **request), plain), "the dense pipeline must be what it was"
        return found[0]

    def _check_run(
        self, handle: sra.PatchHandle, request: dict[str, Any], image: np.ndarray, plain: np.ndarray
    ) -> None:
        assert image.shape == plain.shape
        assert np.isfinite(image).all()
        if request["references"] == 0:
            assert np.array_equal(image, plain)
            return
        steps, total = handle.record.steps, handle.record.layout.reference_tokens
        assert len(steps) == request["steps"]
        assert all(1 <= step.kept <= total for step in steps)
        stored = handle.record.exactness in ("drifting", "fixed time")
        if all(whole(step, total, stored) for step in steps):
            assert np.array_equal(image, plain)
        self._report(handle)
        if self.random.random() < 0.2 and not isinstance(handle.config.select, Reducer):  # a rival chooses no tokens
            with TemporaryDirectory() as folder:
                handle.save_overlay(Path(folder) / "kept.png")
                handle.save_budget_strip(Path(folder) / "strip.png")
                assert {path.name for path in Path(folder).iterdir()} == {"kept.png", "strip.png"}

    # -- everything that can be done with a handle ------------------------------------------------

    def _handle(self) -> str:
        case = CASES[self.random.choice(("klein_kv", "klein_kv", *CASES))]
        pipe, request = pipeline(case.name), self._request(case)
        plain = case.call(pipe, **request)
        before, done = state(pipe), []
        self._handles: list[sra.PatchHandle] = []
        self._caches: list[sra.ReferenceCache] = []
        for _ in range(self.random.randint(3, 8)):
            name = self.random.choice(("patch", "call", "call", "use", "use", "stop", "batch"))
            self._note(name)
            try:
                getattr(self, f"_do_{name}")(case, pipe, request)
                done.append(name)
            except sra.SparseRefError as error:
                self._note(f"{type(error).__name__}: {error}")
        for handle in self._handles:
            handle.remove()
        assert state(pipe) == before
        assert np.array_equal(case.call(pipe, **request), plain)
        return "ran" if done else "refused"

    def _do_patch(self, case: Case, pipe: Any, request: dict[str, Any]) -> None:
        settings = self._settings(case.name, request["steps"], request["references"])
        config = self._configuration(settings)
        self._handles.append(sra.patch(self.random.choice((pipe, pipe, pipe.transformer)), config))

    def _do_call(self, case: Case, pipe: Any, request: dict[str, Any]) -> None:
        case.call(pipe, **request | {"seed": self.random.randrange(3), "first": self.random.randrange(2)})

    def _do_stop(self, case: Case, pipe: Any, request: dict[str, Any]) -> None:
        """A call that is broken off at some block of some step."""
        blocks = [*pipe.transformer.transformer_blocks, *getattr(pipe.transformer, "single_transformer_blocks", [])]
        left = [self.random.randrange(request["steps"] + 1)]
        error = self.random.choice((KeyboardInterrupt, ZeroDivisionError))

        def stop(*arguments: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise error

        hook = self.random.choice(blocks).register_forward_hook(stop)
        try:
            case.call(pipe, **request)
        except error:
            self._note(f"{error.__name__}")
        finally:
            hook.remove()

    def _do_batch(self, case: Case, pipe: Any, request: dict[str, Any]) -> None:
        items = BatchItems(self.random, case, pipe)
        items.together(pipe, None)

    def _do_use(self, case: Case, pipe: Any, request: dict[str, Any]) -> None:
        if not self._handles:
            return
        handle, draw = self.random.choice(self._handles), self.random
        kept = [*self._caches, *draw.sample(JUNK, 2)]
        uses = {
            "summary": lambda: handle.summary(draw.choice(("text", "markdown", "json", "dict"))),
            "remove": handle.remove,
            "begin": lambda: handle.begin(draw.choice((3, 1, 5, -1, 0.5, None))),
            "step": lambda: handle.step(draw.choice((0, 1, *draw.sample(JUNK, 2)))),
            "record": lambda: handle.record.steps,
            "table": handle.attention_table,
            "ranking": lambda: handle.ranking.sizes,
            "flops": handle.flops,
            "capture": lambda: handle.capture(draw.choice((True, True, False))),
            "keep": lambda: self._caches.append(handle.reference_cache),
            "reuse": lambda: handle.reuse(draw.choice((None, *kept))),
        }
        name = draw.choice(list(uses))
        self._note(f"  {name}")
        uses[name]()

    # -- batches -------------------------------------------------------------------------------

    def _batch(self) -> str:
        case = CASES[self.random.choice(("klein_kv", *CASES))]
        pipe = pipeline(case.name)
        items = BatchItems(self.random, case, pipe)
        self._note(f"{case.name} {items}")
        before, found = state(pipe), []
        settings = self._settings(case.name, items.steps, items.counts[0])
        config, result = None, None
        with self._refusals(pipe, found):
            config = self._configuration(settings)
            result = items.together(pipe, config)
            found.append("ran")
        assert state(pipe) == before
        if result is not None and config is not None:
            assert len(result.outputs) == len(items.counts)
            assert all(np.isfinite(image).all() for image in result.images)
            result.summary()
            if self.random.random() < 0.5:
                self._check_batch(items, pipe, config, result)
        assert state(pipe) == before
        return found[0]

    def _check_batch(self, items: BatchItems, pipe: Any, config: sra.SparseRef, result: sra.BatchResult) -> None:
        """Each item is what it is alone, where its ranking is (rounding may turn a near tie)."""
        for i, handle in enumerate(result.handles):
            image, record = items.alone(pipe, config, i)
            if record is not None:
                assert [(s.kind, s.calls) for s in record.steps] == [(s.kind, s.calls) for s in handle.record.steps]
                pairs = zip(record.steps, handle.record.steps, strict=True)
                if not all(a.kept == b.kept and alike(a.selection, b.selection) for a, b in pairs):
                    continue
            np.testing.assert_allclose(result.outputs[i].images, image, rtol=0, atol=1e-4)


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def explore(seed: int, first: int, last: int) -> Counter[str]:
    """Run trials `first` to `last` - 1; what came of them, and of which kind they were.

    Raises
    ------
    TrialError
        At the first that fails.
    """
    found: Counter[str] = Counter()
    for index in range(first, last):
        trial = Trial(seed, index)
        found[trial.run()] += 1
        found[trial.kind] += 1
    return found
