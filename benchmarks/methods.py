"""What is compared: ways to run one call, by name."""

from __future__ import annotations

from dataclasses import dataclass

import sparse_ref_attn as sra

from .step_caches import STEP_CACHES

__all__ = ["FEWER", "KEPT", "METHODS", "Method", "method_of"]

KEPT = (0.50, 0.25, 0.10, 0.05)


@dataclass(frozen=True)
class Method:
    """One way to run a call.

    Parameters
    ----------
    config : sra.SparseRef, optional
        What the pipeline is patched with; None leaves it as it is.
    cached : bool
        Run `Flux2KleinKVPipeline`, which keeps its references' keys and values, around the same transformer.
    step_cache : str, optional
        A name of `step_caches.STEP_CACHES`, switched on for the call.
    steps : int, optional
        Instead of the case's.
    """

    config: sra.SparseRef | None = None
    cached: bool = False
    step_cache: str | None = None
    steps: int | None = None


FEWER = "fewer steps"
"""Beside `METHODS`: for each method of a case the dense run in as many steps as take no longer."""

METHODS: dict[str, Method] = {
    "dense": Method(),
    **{f"edges {keep:.0%}": Method(sra.SparseContext(keep, "edges")) for keep in KEPT},
    "ReCAST": Method(sra.ReCAST(task="subject")),
    "ReCAST in flight": Method(sra.ReCAST(task="subject", profile="in_flight")),
    "downscale 25%": Method(sra.SparseRef(select=sra.Downscale(), budget=0.25)),
    "downscale 10%": Method(sra.SparseRef(select=sra.Downscale(), budget=0.10)),
    "ToMe 25%": Method(sra.SparseRef(select=sra.ToMe(), budget=0.25)),
    "Klein-KV": Method(cached=True),
    **{
        f"{execute} {keep:.0%}": Method(sra.SparseRef("edges", keep, execute), cached=execute != "tokens")
        for execute in ("tokens", "cache", "both")
        for keep in KEPT
    },
    "stored": Method(sra.SparseRef("grid", 1.0, execute=sra.Cache())),
    "stored once": Method(sra.SparseRef("grid", 1.0, execute=sra.Cache(refresh=sra.Never()))),
    "isolated": Method(sra.SparseRef("grid", 1.0, execute=sra.Cache(isolated=True))),
    "stored once, 25% read": Method(sra.SparseRef("edges", 0.25, execute=sra.Cache(refresh=sra.Never()))),
    "stored, tiles": Method(sra.SparseRef("mass", 1 / 8, execute=sra.Cache(per="tile"))),
    **{name: Method(step_cache=name) for name in STEP_CACHES},
    **{f"{name} + edges 25%": Method(sra.SparseRef("edges", 0.25), step_cache=name) for name in STEP_CACHES},
    **{
        f"{name} + stored once": Method(sra.SparseRef("grid", 1.0, execute=sra.Cache(refresh=sra.Never())), False, name)
        for name in STEP_CACHES
    },
}


def method_of(name: str) -> Method:
    """The method of a row's name: one of `METHODS`, or "dense, 3 steps"."""
    if name in METHODS:
        return METHODS[name]
    return Method(steps=int(name.removeprefix("dense, ").split()[0]))
