"""Random layouts: what a transformer is called with over a few steps, and the dense model that hides dropped tokens."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.adapters.witnesses import Attention, HiddenKeys, KeysOf, witnessed
from tests.training.batches import GENERATION, Batch

MODELS = ("kontext", "klein", "flux2", "klein_kv", "qwen_edit_plus", "qwen_edit_plus_2511")
ROWS = GENERATION[0] * GENERATION[1]


@dataclass(frozen=True)
class Layout:
    """Calls of one transformer: `steps` steps of `branches` calls each.

    Attributes
    ----------
    model : str
        One of `MODELS`.
    grids : tuple of (int, int)
        Of each reference, in tokens; none for a call without references.
    items : int
        Of the batch.
    seed : int
        Of every number in the calls.
    poison : str
        Which rows hold a NaN: "references", "generation" or "".
    """

    model: str
    grids: tuple[tuple[int, int], ...]
    items: int
    steps: int
    branches: int
    dtype: torch.dtype
    seed: int
    poison: str = ""

    @classmethod
    def draw(cls, random: Random, model: str) -> Layout:
        count = random.choice((0, 1, 1, 1, 2, 2, 3, 4, 6))
        grids = tuple((random.randint(1, 9), random.randint(1, 9)) for _ in range(count))
        dtype = random.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
        branches = 1 if model in ("flux2", "klein_kv") else random.choice((1, 1, 2))
        poison = random.choice(("references", "generation")) if random.random() < 0.03 else ""
        return cls(model, grids, random.choice((1, 1, 2, 3)), random.choice((1, 2, 3, 4)), branches, dtype,
                   random.randrange(1000), poison)  # fmt: skip

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(height * width for height, width in self.grids)

    @property
    def caches(self) -> bool:
        """Whether the first step stores the references' K/V."""
        return self.model == "klein_kv" and bool(self.grids)

    @property
    def references_first(self) -> bool:
        return self.caches

    def calls(self) -> list[dict[str, Any]]:
        """Arguments of every call, in order; a cached one is given its ``kv_cache`` by `run`."""
        family = "klein" if self.model == "klein_kv" else self.model
        out = []
        words = [Batch(family, self.items, self.grids, self.seed + 100 * b).kwargs for b in range(self.branches)]
        for step in range(self.steps):
            noise = Batch(family, self.items, self.grids, self.seed + 1000 + step).kwargs["hidden_states"][:, :ROWS]
            for branch in words:
                rows = torch.cat([noise, words[0]["hidden_states"][:, ROWS:]], 1).clone()
                if self.poison:
                    rows[0, -1 if self.poison == "references" and self.grids else 0, 0] = torch.nan
                call = {**branch, "hidden_states": rows, "timestep": torch.full((self.items,), 0.9 - 0.2 * step)}
                out.append(self._cached(call, step) if self.caches else call)
        return [{name: self._cast(name, value) for name, value in call.items()} for call in out]

    def _cached(self, call: dict[str, Any], step: int) -> dict[str, Any]:
        rows, ids = call["hidden_states"], call["img_ids"]
        if step:
            return {**call, "hidden_states": rows[:, :ROWS], "img_ids": ids[:ROWS], "kv_cache_mode": "cached"}
        order = [*range(ROWS, rows.shape[1]), *range(ROWS)]
        more = {"kv_cache_mode": "extract", "num_ref_tokens": sum(self.sizes)}
        return {**call, "hidden_states": rows[:, order], "img_ids": ids[order], **more}

    def _cast(self, name: str, value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point() and not name.endswith("ids")
        return value.to(self.dtype) if floats else value

    @torch.no_grad()
    def run(self, transformer: torch.nn.Module, handle: Any = None) -> list[Tensor]:
        """What every call gives; `handle`, if any, is told the steps."""
        if handle is not None:
            handle.begin(self.steps)
        outputs, cache = [], None
        for i, kwargs in enumerate(self.calls()):
            if handle is not None:
                handle.step(i // self.branches)
            if kwargs.get("kv_cache_mode") == "cached":
                kwargs["kv_cache"] = cache
            out = transformer(**kwargs)
            cache = out[1] if kwargs.get("kv_cache_mode") == "extract" else cache
            outputs.append(out[0])
        return outputs

    @torch.no_grad()
    def masked(self, transformer: torch.nn.Module, steps: list[Any], both: bool) -> list[Tensor]:
        """As `run`, by the unpatched model, where each step's dropped tokens are hidden from its attention.

        `both` says that the step which stores K/V dropped tokens too. In a cached step of a model that keeps none
        itself the references' keys and values are those of the branch's last other one.
        """
        outputs, cache = [], None
        stored: dict[int, list[Attention]] = {}
        for i, kwargs in enumerate(self.calls()):
            record = steps[i // self.branches]
            stores = kwargs.get("kv_cache_mode") == "extract"
            kept = torch.ones(sum(self.sizes), dtype=torch.bool)
            if record.selection is not None and (both or not stores):
                kept = torch.zeros_like(kept)
                kept[record.selection.indices] = True
            text = torch.ones(kwargs["encoder_hidden_states"].shape[1], dtype=torch.bool)
            generation = torch.ones(ROWS, dtype=torch.bool)
            image = [kept, generation] if self.references_first else [generation, kept]
            joint = torch.cat([text, *image])
            if kwargs.get("kv_cache_mode") == "cached":
                kwargs["kv_cache"] = cache
            branch = i % self.branches
            reads = record.kind == "cached" and not self.caches
            seen = (
                KeysOf(stored[branch], len(kept), kept)
                if reads
                else HiddenKeys({len(kept): kept, len(joint): joint}, record.from_block)
            )
            with seen, witnessed(transformer) as calls:
                out = transformer(**kwargs)
            stored[branch] = stored[branch] if reads else calls[0].attention
            cache = out[1] if stores else cache
            outputs.append(out[0])
        return outputs

    def generation(self, output: Tensor) -> Tensor:
        """The rows of the image being made."""
        return output[:, -ROWS:] if self.references_first else output[:, :ROWS]
