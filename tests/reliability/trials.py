"""One random configuration on one random layout or pipeline: it runs, or is refused in words, and leaves no trace.

Trial i of a seed is the same on every machine; a failure says how to run it alone.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
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
from tests.pictures import generator
from tests.pipeline_arguments import PROMPTS, Request
from tests.pipelines import CASES, Case, _small_references
from tests.reliability.layouts import MODELS, Layout
from tests.reliability.settings import JUNK, Settings

KINDS = {"patch": 35, "steps": 35, "run": 14, "handle": 10, "batch": 6}
"""Shares of the trials, in percent: a configuration is made and patched; a transformer's calls on a random layout;
a whole pipeline call; a random sequence of what can be done with a handle; an `sra.batch`."""
TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-6}  # of the output's scale; rotary tables are float32
SIZES = ((96, 64), (64, 64), (64, 96), (128, 64), (64, 128), (96, 96))
FLUX_SIZES = ((48, 32), (32, 32), (32, 48), (64, 16), (16, 64))


class TrialError(AssertionError):
    """A trial failed; says which and how to see it again."""


@cache
def pipeline(name: str) -> Any:
    """One for all trials: whatever a trial leaves behind, the next one trips over."""
    pipe = CASES[name].build()
    CASES[name].call(pipe, steps=1)
    return pipe


@cache
def transformer(name: str, dtype: torch.dtype) -> Any:
    return CASES[name].build().transformer.to(dtype)


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, NaN where NaN is."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _whole(step: Any, total: int, stored: bool) -> bool:
    """Whether a step did what the dense model's does."""
    return step.kept == total and not step.layers and not (stored and step.kind == "cached")


class Trial:
    """Number `index` of `seed`.

    `run` returns what came of it: "ran", or the name of the library's error that refused it.
    """

    def __init__(self, seed: int, index: int) -> None:
        self.seed, self.index = seed, index
        self.random = Random(f"{seed}/{index}")
        self.kind = self.random.choices(list(KINDS), list(KINDS.values()))[0]
        self.notes: list[str] = []

    def run(self) -> str:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return getattr(self, f"_{self.kind}")()
        except Exception as error:
            pipeline.cache_clear()
            transformer.cache_clear()
            told = "\n  ".join(self.notes)
            raise TrialError(
                f"{self.kind} trial: {type(error).__name__}: {error}\n  {told}\n"
                f"again: python -m tests.reliability --trial {self.seed} {self.index}"
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
        if record is None or all(_whole(step, total, stored) for step in record.steps):
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
        request["sizes"] = tuple(draw.choice(_sizes(case)) for _ in range(3))
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
        if all(_whole(step, total, stored) for step in steps):
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
                if not all(a.kept == b.kept and _alike(a.selection, b.selection) for a, b in pairs):
                    continue
            np.testing.assert_allclose(result.outputs[i].images, image, rtol=0, atol=1e-4)


class BatchItems:
    """One to four items of random references, and the arguments of their calls."""

    def __init__(self, draw: Random, case: Case, pipe: Any) -> None:
        self.case, self.steps = case, draw.choice((1, 2, 3))
        many = max(case.references) > 1 and not case.name.endswith("inpaint")
        cfg = case.cfg and draw.random() < 0.4
        self.counts, self.images, self.each, self.prompts = [], [], [], []
        for i in range(draw.randint(1, 4)):
            count = draw.choice((0, *case.references) if case.text_to_image else case.references)
            sizes = tuple(draw.choice(_sizes(case)) for _ in range(3))
            request = Request(count if many else min(count, 1), 1, case.side, cfg, sizes, False, i)
            arguments = case.arguments(pipe, request)
            image = arguments.pop("image", None)
            self.images.append([] if image is None else image if isinstance(image, list) else [image])
            self.prompts.append(None if "prompt_embeds" in arguments else PROMPTS[i])
            arguments.pop("prompt", None)
            if draw.random() < 0.2:
                arguments["num_inference_steps"] = draw.choice((1, 2, 4))
            if draw.random() < 0.15:
                arguments["num_images_per_prompt"] = 2
            self.counts.append(count)
            self.each.append(arguments)
        side = {"height": case.side, "width": case.side}
        self.common = {"num_inference_steps": self.steps, "output_type": "np", **side}

    def __repr__(self) -> str:
        sizes = [[getattr(image, "size", None) for image in images] for images in self.images]
        own = [{k: v for k, v in each.items() if k.startswith("num_")} for each in self.each]
        return f"{len(self.images)} items of {sizes}, {self.steps} steps, {own}"

    def together(self, pipe: Any, config: sra.SparseRef | None) -> sra.BatchResult:
        generators = [generator(i) for i in range(len(self.images))]
        with _small_references():
            return sra.batch(
                pipe, self.prompts, self.images, config=config, generators=generators, each=self.each, **self.common
            )

    def alone(self, pipe: Any, config: sra.SparseRef, i: int) -> tuple[np.ndarray, Any]:
        images = self.images[i]
        image = {} if not images else {"image": images[0] if len(images) == 1 else images}
        with sra.patched(pipe, config) as handle, _small_references():
            made = pipe(prompt=self.prompts[i], generator=generator(i), **{**self.common, **self.each[i], **image})
            return made.images, handle.record if images else None


def _sizes(case: Case) -> tuple[tuple[int, int], ...]:
    return FLUX_SIZES if case.side == 32 else SIZES


def _alike(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.indices.sort().values, other.indices.sort().values)


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
