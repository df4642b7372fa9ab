"""The arguments that say where the saving happens and where attention is measured, the same for every command."""

from __future__ import annotations

import argparse
from typing import Any

from ..execution import CACHE_ROWS, EXECUTIONS, PERS, PROFILES, RESTS
from . import values

__all__ = ["MEASURING", "add_arguments", "settings"]

MEASURING = ("profile", "profile_blocks", "rerank_every")
"""Fields that mean nothing to a rule that measures no attention."""

FIELDS = (
    "execute",
    "from_block",
    "layers",
    "cache_rows",
    "refresh",
    "per",
    "tile",
    "rest",
    "cell",
    "isolated",
    *MEASURING,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of `SparseRef` named in `FIELDS`."""
    group = parser.add_argument_group("execution", "where the saving happens; default: the preset's")
    group.add_argument(
        "--execute",
        **values.one_of(EXECUTIONS),
        help="drop tokens at the transformer's input; run the references now and then and read what is stored of them "
        "(cache); or that of the kept tokens alone (both)",
    )
    group.add_argument("--from-block", type=values.above(0), metavar="N", help="drop from this block on (default: 0)")
    group.add_argument(
        "--profile",
        **values.one_of(PROFILES),
        help="measure attention in whole dense steps, or in the first blocks of step 0 (default: step)",
    )
    group.add_argument(
        "--profile-blocks",
        type=values.above(1),
        metavar="N",
        help="with --profile in_flight, how many first blocks (default: those that the rule names, else a quarter)",
    )
    group.add_argument(
        "--layers",
        type=values.factors,
        metavar="F,F,...",
        help="with the cache, factors in (0, 1] on what each attention layer reads, one a layer",
    )
    group.add_argument(
        "--cache-rows",
        **values.one_of(CACHE_ROWS),
        help="what the cache holds: the rows of the largest budget to come, or all (default: budget)",
    )
    group.add_argument(
        "--refresh",
        type=values.refresh,
        metavar="WHEN",
        help="with the cache, when references run: every 4 steps (4) or quarters of the run (25%%), at steps (0,4,8), "
        "never again (never), or when they have moved (drift:0.3); default: the preset's, else 25%%, or 50%% of up to "
        "eight steps",
    )
    group.add_argument(
        "--per",
        **values.one_of(PERS),
        help="with the cache, who ranks what is read of it: the run, or each tile of the picture in each layer, by its "
        "own attention (default: run)",
    )
    group.add_argument("--tile", type=values.above(1), metavar="N", help="with --per tile, its side (default: 4)")
    group.add_argument(
        "--rest",
        **values.one_of(RESTS),
        help="with --per tile, how it sees what it does not read: by the means of cells, by means weighted by "
        "attention, or not (default: means)",
    )
    group.add_argument("--cell", type=values.above(1), metavar="N", help="side of these cells (default: 4)")
    group.add_argument(
        "--isolated",
        type=values.isolated,
        nargs="?",
        const=True,
        metavar="WHO",
        help="with the cache, references run by themselves, once, all together (all) or each alone (reference), for "
        "weights that were trained so; default: as the weights or the LoRA say, else with the picture",
    )
    group.add_argument(
        "--rerank-every", type=values.above(1), metavar="N", help="rank again every N steps (default: never)"
    )


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of `SparseRef` that were given; the others keep the preset's values."""
    return {name: value for name in FIELDS if (value := getattr(options, name)) is not None}
