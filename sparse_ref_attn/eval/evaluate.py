"""A grid of models, methods and shares over a data set: pictures are made, scored, and written as rows."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
from torch import distributed

from ..errors import ConfigError, SparseRefError
from ..files import replacing
from .examples import Example, Examples
from .grid import BASE, Plan
from .models import EvalModel
from .outputs import prepare_directory
from .rows import Key, RowStore
from .scores import Scorer

__all__ = ["evaluate", "processes"]


def evaluate(
    out: str | Path,
    data: Examples,
    models: Sequence[EvalModel],
    grid: Plan,
    scorer: Scorer,
    *,
    about: Mapping[str, Any] | None = None,
    pictures: int = 0,
) -> list[dict[str, str]]:
    """Make what is missing of a grid and write a row for each picture.

    Each picture is made by itself, so that it depends neither on its neighbours in a batch nor on how work is shared
    out. Every method of an example and seed starts from the same noise. Under ``accelerate launch`` (on CPUs
    ``torchrun``) the processes share the examples, and the result is the one that a single process makes, row for row.

    Parameters
    ----------
    out : str or Path
        Folder of the results. Rows that are there already are not made again; other settings are refused.
    data : Examples
    models : sequence of EvalModel
    grid : Grid or Sweep
    scorer : Scorer
    about : mapping, optional
        JSON types for the header: where and how it ran.
    pictures : int
        Of how many examples of each family the pictures of seed 0 are kept, as PNG.

    Returns
    -------
    list of dict
        All rows of the folder, in order; in processes other than the first, nothing.

    Raises
    ------
    ConfigError
        If the folder holds results of other settings, another run writes to it, or a method cannot run.
    """
    from accelerate.utils import tqdm

    rank, world = processes()
    folder = prepare_directory(out)
    columns = {"share": None, **scorer.columns}
    settings = {"data": data.about, "columns": columns, "steps": models[0].steps}
    if grid.mean_over != "dropping":  # folders that say nothing are of the steps that drop
        settings["mean_over"] = grid.mean_over
    store = RowStore(folder, list(columns))
    if rank == 0:
        store.lock()
        _write_header(folder, settings, models, dict(about or {}))
        store.merge()
    _wait(world)
    chosen = data.chosen(grid.families, grid.count)
    runnable = {model.name: _cells(model, grid, rank == 0) for model in models}
    work = _missing(data, chosen, models, grid.seeds, runnable, store.keys())
    _wait(world)  # all have seen the same rows before the first is added
    kept = {i for family in data.families for i in [i for i in chosen if data.keys[i][1] == family][:pictures]}
    mine = work[rank::world]
    total = sum(len(cells) for *_, cells in mine)
    bar = tqdm(total=total, unit="picture", dynamic_ncols=True, main_process_only=False, disable=rank > 0)
    for model, index, seed, cells in mine:
        example = data[index]
        bar.set_postfix_str(f"{model.name}, {example.id}, seed {seed}")
        save = folder / "pictures" if index in kept and seed == 0 else None
        rows = _rows(model, example, seed, cells, grid, scorer, save)
        for row in rows:
            store.append(rank, [row])
            bar.update()
    bar.close()
    _wait(world)
    rows = store.merge() if rank == 0 else []
    _wait(world)  # whoever reads the folder next finds them
    return rows


def processes() -> tuple[int, int]:
    """This process's number and how many there are, by the launcher's account."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=timedelta(days=30))  # the first waits for the last
    return distributed.get_rank(), distributed.get_world_size()


def _wait(world: int) -> None:
    if world > 1:
        distributed.barrier()


Work = tuple[EvalModel, int, int, list[tuple[str, float]]]


def _cells(model: EvalModel, grid: Plan, told: bool) -> list[tuple[str, float]]:
    """What a model can make of a grid: not so small a share of a whole run that its dense step alone is above it."""
    found = []
    for name, keep in grid.cells():
        try:
            if (name, keep) != BASE:
                grid.setting(model, name, keep, 0, [np.ones((1, 1))])
            found.append((name, keep))
        except ConfigError as error:
            if told:
                print(f"{model.name}, {name} at {100 * keep:.3g} % is left out: {error}")
    return found


def _missing(
    data: Examples,
    chosen: Sequence[int],
    models: Sequence[EvalModel],
    seeds: int,
    cells: Mapping[str, Sequence[tuple[str, float]]],
    done: set[Key],
) -> list[Work]:
    """What is to be made, an example after the other, so that a run that is stopped has whole comparisons."""
    work = []
    for seed in range(seeds):
        for index in chosen:
            name, family = data.keys[index]
            for model in models:
                left = [
                    cell
                    for cell in cells[model.name]
                    if (model.name, family, name, str(seed), cell[0], repr(cell[1])) not in done
                ]
                if left:
                    work.append((model, index, seed, left))
    return work


def _rows(
    model: EvalModel, example: Example, seed: int, cells: Sequence[tuple[str, float]], grid: Plan, scorer: Scorer,
    save: Path | None,
) -> Any:  # fmt: skip
    """The rows of one example and seed, each when its picture is made."""
    noise = zlib.crc32(f"{example.id}/{seed}".encode())
    dense = model.run(example, noise).picture
    score = scorer.scores(example, dense)
    masks = model.masks(example)
    for name, keep in cells:
        if (name, keep) == BASE:
            image, share = dense, 1.0
        elif name.startswith("subject mask") and masks is None:
            continue
        else:
            try:
                run = model.run(example, noise, grid.setting(model, name, keep, noise, masks))
            except SparseRefError as error:
                raise ConfigError(f"{model.name}, {example.id}, {name} at {keep:.3g}: {error}") from error
            image, share = run.picture, run.share
        if save is not None:
            path = save / model.name / re.sub(r"[^\w-]+", "_", example.id) / f"{name} {keep:.3g}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        yield {
            "model": model.name, "family": example.family, "example": example.id, "seed": seed, "method": name,
            "keep": keep, "share": share, **score(image),
        }  # fmt: skip


def _write_header(folder: Path, settings: dict[str, Any], models: Sequence[EvalModel], about: dict[str, Any]) -> None:
    """``eval.json``: settings that all rows share, the models' ids, and each run's environment."""
    path = folder / "eval.json"
    settings = json.loads(json.dumps(settings))
    header: dict[str, Any] = {"settings": settings, "models": {}, "runs": []}
    if path.is_file():
        header = json.loads(path.read_text(encoding="utf-8"))
        for name in settings | header["settings"]:
            value = settings.get(name)
            if header["settings"].get(name) != value:
                raise ConfigError(
                    f"{folder} must hold results of the same settings, got {name} {header['settings'].get(name)} there "
                    f"and {value} here: use another folder"
                )
    for model in models:
        told = json.loads(json.dumps(model.about))
        known = header["models"].setdefault(model.name, {**told, "path": model.path})
        if any(known[name] != value for name, value in told.items()):
            raise ConfigError(
                f"{folder} must hold results of the same model under one name, got {known} there and {told} here for "
                f"{model.name!r}: use another name or folder"
            )
    header["runs"].append({"began": datetime.now(timezone.utc).isoformat(timespec="seconds"), **about})
    with replacing(path) as draft:
        Path(draft).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
