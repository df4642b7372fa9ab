"""Random configurations, fitting and senseless ones, drawn from a `random.Random`: a seed gives the same ones again."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn import schedules
from sparse_ref_attn.config import UniformGuard
from sparse_ref_attn.presets import configuration
from sparse_ref_attn.selection import Ranking, Reducer, References, Selector, selector

JUNK: tuple[Any, ...] = (
    None, "", "mass", "text", b"bytes", -1, 0, 1, 2.5, -0.5, 10**12, float("nan"), float("inf"), 1e-320, True, False,
    1 + 2j, (), [], {}, [1, "a"], (0.5, None), {"kind": "Constant"}, object(), np.float32(0.5), np.int64(3),
    np.array([0.5, 0.5]), torch.tensor(0.5), torch.tensor([1, 2]), ((0, 1),), [[(0.1, 0.2)]], lambda references: None,
)  # fmt: skip


def ramp(references: References) -> list[Any]:
    """Scores without a pattern: torch's, numpy's, and integers."""
    random = np.random.default_rng(sum(references.sizes))
    parts: list[Any] = [random.permutation(size) for size in references.sizes]
    return [torch.from_numpy(part) if i % 2 else part for i, part in enumerate(parts)]


def wrong_size(references: References) -> list[Tensor]:
    return [torch.zeros(size + 1) for size in references.sizes]


def not_finite(references: References) -> list[Tensor]:
    return [torch.full((size,), torch.nan) for size in references.sizes]


def _by_generation(probes: Sequence[Any]) -> bool:
    return all(probe.queries == "generation" for probe in probes)


def _ranks_tiles(select: Any) -> bool:
    """Whether tiles may rank by it."""
    if isinstance(select, sra.AttentionMass):
        return select.query_stride == 1 and not select.value_norm
    return isinstance(select, str) and select == "mass"


class Settings:
    """Draws what a configuration is made of.

    Parameters
    ----------
    random : random.Random
    blocks, steps, references : int
        Of the run it is for.
    keeps : bool
        Whether the model keeps its references' keys and values.
    spoiled : bool
        Whether it may hold anything, not only what fits the run.
    """

    def __init__(self, random: Random, blocks: int, steps: int, references: int, keeps: bool, spoiled: bool) -> None:
        self.random, self.blocks, self.steps = random, blocks, steps
        self.references, self.keeps, self.spoiled = references, keeps, spoiled

    def pick(self, good: Sequence[Any], bad: Sequence[Any] = ()) -> Any:
        """One of `good`; where things are spoiled also of `bad`, and once in twenty times anything."""
        if self.spoiled and self.random.random() < 0.05:
            return self.random.choice(JUNK)
        return self.random.choice([*good, *bad] if self.spoiled else good)

    def configuration(self) -> sra.SparseRef:
        """Raises what the library raises for one that cannot be."""
        if self.random.random() < 0.15:
            return self._preset()
        fields: dict[str, Any] = {"select": self.selector(), "budget": self.budget()}
        if not self.spoiled:
            return sra.SparseRef(**self._fitting(fields))
        more = self._more()
        for name in self.random.sample(list(more), self.random.choice((0, 1, 2, 3, 5))):
            fields[name] = more[name]
        return sra.SparseRef(**fields)

    def _fitting(self, fields: dict[str, Any]) -> dict[str, Any]:
        """One of the ways to run that the model and the selector allow, and settings that go with any."""
        draw, more = self.random, self._more()
        probes = [] if isinstance(fields["select"], Reducer) else list(selector(fields["select"]).probes())
        ways = ["tokens", "both", "cache"]
        ways += ["in_flight", "from_block"] * (not self.keeps and not isinstance(fields["select"], Reducer))
        way = draw.choice(ways)
        if isinstance(fields["select"], Reducer):
            way = "tokens"
        if way in ("cache", "both"):
            fields |= {"execute": way, "cache_rows": more["cache_rows"], "refresh": more["refresh"]}
            if way == "cache" and draw.random() < 0.4:
                if not _ranks_tiles(fields["select"]):
                    blocks, steps = self._probe()
                    fields["select"] = sra.AttentionMass(blocks, steps=steps)
                fields |= {name: more[name] for name in ("per", "tile", "rest", "cell")} | {"per": "tile"}
            elif draw.random() < 0.3:
                fields["layers"] = more["layers"]
        if way == "from_block":
            fields["from_block"] = draw.randint(1, self.blocks - 1)
        if way == "in_flight" and probes and all(p.steps == (0,) and isinstance(p.blocks, str) for p in probes):
            fields |= {"profile": way, "profile_blocks": draw.choice((None, 1)), "from_block": draw.choice((0, 1))}
        elif (
            probes
            and way != "both"
            and "layers" not in fields
            and "per" not in fields
            and draw.random() < 0.3
            and (way != "cache" or _by_generation(probes))
        ):
            fields["rerank_every"] = draw.choice((1, 2))
        for name in ("floor", "weights", "multiple", "guard", "clock", "seed"):
            if draw.random() < 0.2 and not (name == "guard" and isinstance(fields["select"], Reducer)):
                fields[name] = more[name]
        return fields

    def _more(self) -> dict[str, Any]:
        weights = tuple(self.random.choice((0.5, 1.0, 9)) for _ in range(max(1, self.references)))
        guard = UniformGuard(0.5, 0.9, 0.9)
        return {
            "execute": self.pick(("tokens", "cache", "both"), ("kv", None)),
            "from_block": self.pick((0, 1, self.blocks - 1), (self.blocks, -1, 99, 1.0)),
            "profile": self.pick(("step", "in_flight"), ("flight",)),
            "profile_blocks": self.pick((None, 1, 2), (0, self.blocks, 99)),
            "floor": self.pick((0, 1, 0.1, 0.5), (3, 1.0, 70, 1.1, -1)),
            "weights": self.pick((None, weights), ((3.0,), (5, 1, 1), (0.0,), (), ("a",), 3)),
            "multiple": self.pick((1, 2, 8, 64), (0, 1.5)),
            "guard": self.pick((None, guard, UniformGuard(1.0, 1.0)), ("yes", True)),
            "clock": self.pick(("steps", "sigma"), ("time",)),
            "seed": self.pick((0, 1, 7), (-1, 2**70)),
            "cache_rows": self.pick(("budget", "all"), ("some",)),
            "layers": self.pick((None, (1.0, 0.5, 0.25, 0.8)[: self.blocks]), ((0.5,), (0.0,) * 4, (), ("a",), 2)),
            "rerank_every": self.pick((None, 1, 2), (0, 1.0)),
            "per": self.pick((None, "tile"), ("layer",)),
            "tile": self.pick((None, 1, 2, 3, 9), (0, 2.0)),
            "rest": self.pick((None, "means", "weighted", "none"), ("mean",)),
            "cell": self.pick((None, 1, 3, 4), (0, -1)),
            "refresh": self.pick(self._refreshes(), (sra.At((self.steps,)), sra.Drift(0.2), 4, "never")),
        }

    def _refreshes(self) -> list[Any]:
        """Those that fit the run: a drift is that of two full steps."""
        found: list[Any] = [None, sra.Every(1), sra.Every(2, last=1), sra.Every(3, warmup=2), sra.Every(0.4)]
        found += [sra.At((0, 0.5)), sra.At((2,)), sra.Never()]
        drifts = [sra.Drift(1e-6), sra.Drift(0.2, at_most_every=1, at_least_every=2), sra.Drift(9.0)]
        return found + drifts * (self.steps > 1)

    def _preset(self) -> sra.SparseRef:
        if self.random.random() < 0.3:
            return configuration(self.pick(("faithful", "balanced", "fast"), ("slow",)))
        ways = ("tokens", "cache", "both")
        settings = {"execute": self.pick(ways, ("cache",)), "seed": self.pick((0, 5))}
        task = self.pick(("auto", "edit", "subject", "style"), ("portrait",))
        if self.random.random() < 0.5:
            low, high = sorted((self.random.randint(1, 4096), self.random.randint(1, 4096)))
            return sra.ReCAST(self.pick((low,)), self.pick((high,)), self.pick((1.0, 2.0)), task=task, **settings)
        return sra.SparseContext(
            self.pick((0.1, 0.5, 1, 1.0), (4, 0.0)), self.pick(("cosine", "grid"), (None,)), task=task, **settings
        )

    # -- selectors ---------------------------------------------------------------------------

    def selector(self) -> Any:
        kind = self.random.random()
        if kind < 0.1:
            return self.pick(("mass", "grid", "self-attention", "random", "cosine"), ("everything",))
        if kind < 0.7:
            return self._leaf()
        if kind < 0.82:
            return sra.Mix(self.pick([[(self._leaf(), self.pick((0.5, 1, 3.0), (0, -1))) for _ in range(2)]], ([],)))
        if kind < 0.94:
            return sra.Union(self.pick([[self._leaf() for _ in range(self.random.randint(1, 3))]], ([],)))
        return sra.ToMe() if kind < 0.97 else sra.Downscale(self.pick(("pixels", "latents"), ("disk",)))

    def _probe(self) -> tuple[Any, Any]:
        good = ("single", "all", "double", (0,), (0, 1), (self.blocks - 1,))
        blocks = self.pick(good, ((1, self.blocks), (0, 9), (0, 0), (-1,), 0))
        return blocks, self.pick(((0,), (0,), tuple(range(min(2, self.steps)))), ((1,), (0, 5), (), 0))

    def _leaf(self) -> Selector:
        names = ("mass", "mass", "self", "boxes", "grid", "random", "cosine", "edges", "saliency", "function")
        kind = self.random.choice(names + ("saved", "masks") * self.spoiled)
        return getattr(self, f"_{kind}")()

    def _mass(self) -> Selector:
        return sra.AttentionMass(*self._probe(), self.pick((1, 1, 2, 70), (0, 1.5)), self.pick((False, True)))

    def _self(self) -> Selector:
        return sra.SelfAttention(*self._probe())

    def _boxes(self) -> Selector:
        count = self.pick((max(1, self.references),), (0, 1, 2))
        good, bad = (None, [(0.1, 0.2, 0.6, 0.9)]), ([], [(0.5, 0.5, 0.2, 1.0)], ["abcd"])
        boxes = [self.pick(good, bad) for _ in range(count if isinstance(count, int) and count < 9 else 1)]
        return sra.Boxes(self.pick((boxes,)))

    def _masks(self) -> Selector:
        return sra.SubjectMask(self.pick(([torch.eye(self.random.choice((8, 32)))] * max(1, self.references),)))

    def _saved(self) -> Selector:
        scores = [torch.arange(size).float() for size in self.random.choice(((96,), (64,), (96, 64)))]
        ranking = Ranking(scores, [None] * len(scores), "model", "ab" * 32)
        return sra.SavedRanking(self.pick((ranking,)), self.pick((True, False)))

    def _function(self) -> Selector:
        return sra.FromFunction(self.pick((ramp,), (wrong_size, not_finite)))

    def _grid(self) -> Selector:
        return sra.Grid()

    def _random(self) -> Selector:
        return sra.Random()

    def _cosine(self) -> Selector:
        return sra.Cosine(self.pick(("distinct", "similar"), ("same",)))

    def _edges(self) -> Selector:
        thresholds = self.pick((2.0, 0.5), (0.0, -1.0)), self.pick((0.2,), (0.9,)), self.pick((0.4,), (0.1,))
        return sra.Edges(*thresholds, self.pick(("use",), ("error", "guess")))

    def _saliency(self) -> Selector:
        return sra.Saliency(self.pick(("use",), ("error",)))

    # -- budgets -----------------------------------------------------------------------------

    def _amount(self, tokens: bool) -> Any:
        if tokens:
            return self.pick((1,), (0, -3, 4, 97, 5000))
        return self.pick((0.01, 0.1, 0.3, 0.5, 0.9, 1.0), (0.0, 1.5))

    def budget(self) -> Any:
        per, tokens = self.pick(("reference", "all"), ("item",)), self.random.random() < 0.2
        low, high = self._amount(tokens), self._amount(tokens)
        if not self.spoiled:
            low, high = sorted((low, high))
        gamma = self.pick((0.3, 1.0, 2.0), (0.0, -1.0))
        kind = self.random.randrange(9)
        bounds = self.pick(((None, None), (low, None), (None, high), (low, high)))
        made: Any
        if kind == 0:
            return high
        if kind == 1:
            made = sra.Constant(high, per)
        elif kind == 2:
            made = sra.Linear(low, high, per)
        elif kind == 3:
            made = sra.Polynomial(low, high, gamma, per)
        elif kind == 4:
            made = sra.Descending(high, low, gamma, per)
        elif kind == 5:
            made = schedules.Cosine(low, high, per)
        elif kind == 6:
            made = sra.Pieces(self.pick(((low, high),), ((), (low,))), self.pick(((0.5,),), ((), (1.0,))), per)
        elif kind == 7:
            made = sra.TopP(self.pick((0.1, 0.6, 1.0), (0.0, 2)), *self._pair(bounds), per)
        else:
            made = sra.Pieces((high, low, high), (0.3, 0.6), per)
        return made.piecewise(self.pick((1, 2, 3), (0,))) if self.random.random() < 0.25 else made

    @staticmethod
    def _pair(bounds: Any) -> tuple[Any, Any]:
        return bounds if isinstance(bounds, tuple) and len(bounds) == 2 else (bounds, None)
