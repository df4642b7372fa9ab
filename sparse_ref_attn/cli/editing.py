"""``sra run``: what it does with its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import SparseRefError
from ..estimation import Amount, estimate
from ..pictures import open_image
from . import failures
from .edits import Edit, edits_of
from .fingerprint import fingerprints
from .logs import hushed, quiet
from .models import Model, model_of
from .recorded import record_of, save
from .session import OF_DENSE, Session, shareable
from .telling import Telling
from .wanted import Wanted

__all__ = ["run"]

_LARGE = 2048  # pixels along a side of the reference that a configuration is tried on before the model is loaded


def run(options: argparse.Namespace) -> int:
    """Edit pictures; the exit code.

    Of many edits those that are there are not made again, and one that cannot be made is told while others go on.
    """
    tell = Telling(options.json, options.quiet)
    with hushed(options.quiet):
        wanted = Wanted(options)
        options.preset = wanted.preset
        edits, many = edits_of(options)
        quiet(pipelines_too=options.model is None)
        model = model_of(options)
        _check(model, edits, wanted.amount)
        waiting = []
        for edit, fingerprint in zip(edits, fingerprints(edits, options), strict=True):
            found = _there(edit, fingerprint, options.compare_dense) if many else None
            if found is None:
                waiting.append((edit, fingerprint))
            else:
                tell.result(found)
        if not waiting:
            tell.note(f"All of {len(edits)} are there already.")
            return 0
        pictures = None if many else [open_image(path) for path in edits[0].images]
        tell.note(model.about)
        session = Session(options, model, wanted)
        if options.model is not None:
            tell.note(f"Loaded {type(session.pipe).__name__} from {options.model} on {session.device}.")
        return _make(session, tell, waiting, pictures, options.compare_dense)


def _check(model: Model, edits: Sequence[Edit], amount: Amount | None) -> None:
    """Raise for what can be known to fail before the model is loaded."""
    bare = model.check(edits)
    if bare is None or amount is None:
        return
    for steps in {model.steps(edit) for edit in edits}:
        estimate(
            bare, references=[(_LARGE, _LARGE)], output=(_LARGE, _LARGE), text_tokens=0, steps=steps or 1,
            config=amount.config(bare, steps or 1),
        )  # fmt: skip


def _there(edit: Edit, fingerprint: str, dense: bool) -> dict[str, Any] | None:
    """What is told of a picture that was made already; None where it is still to make."""
    files = (edit.out, edit.dense)[: 1 + dense]
    records = [record_of(path) or {} for path in files]
    if any(record.get("made_from") != fingerprint for record in records):
        return None
    return _told("there", edit, records[0], records[1]["seconds"] if dense else None)


def _make(
    session: Session,
    tell: Telling,
    waiting: Sequence[tuple[Edit, str]],
    pictures: list[Any] | None,
    dense: bool,
) -> int:
    made, codes = 0, list[int]()

    def attempt(compute: Callable[[Edit, list[Any] | None], tuple[Any, Any]], edit: Edit, bar: str) -> Any:
        """Its result; None where an edit among others failed."""
        session.name_bar(bar)
        try:
            return compute(edit, pictures)
        except SparseRefError as error:
            line, code = " ".join(str(error).split()), failures.code_of(error)
            tell.result(_failed(edit, line, code))
            if len(waiting) == 1:
                raise
            tell.wrong(f"{edit.out}: {line}")
            codes.append(code)
            return None

    try:
        for number, (edit, fingerprint) in enumerate(waiting, 1):
            bar = (f"{number}/{len(waiting)} " if len(waiting) > 1 else "") + edit.out.name
            if (found := attempt(session.make, edit, bar)) is None:
                continue
            image, record = found
            record["made_from"] = fingerprint
            save(image, edit.out, shareable(record))
            made += 1
            seconds = None
            if dense:
                if (found := attempt(session.make_dense, edit, f"{bar}, every token")) is None:
                    continue
                image, seconds = found
                save(image, edit.dense, shareable(record | OF_DENSE | {"seconds": seconds}))
            tell.result(_told("made", edit, record, seconds))
            for note in record["notes"]:
                tell.note(f"  {note}")
    except BaseException:
        if len(waiting) > 1:
            tell.note(f"\nMade {made} of {len(waiting)} pictures before it ended.")
        raise
    if codes:
        tell.wrong(f"error: {len(codes)} of {len(waiting)} pictures could not be made, as told above")
    return codes[0] if codes else 0


def _told(status: str, edit: Edit, record: dict[str, Any], dense: float | None) -> dict[str, Any]:
    """A record as it is told: where the picture is, and the dense run beside it."""
    beside = None
    if dense is not None:
        beside = {"picture": str(edit.dense), "seconds": dense, "speedup": dense / record["seconds"]}
    here = {"status": status, "picture": str(edit.out)}
    return {**here, **record, "images": [str(path) for path in edit.images], "dense": beside}


def _failed(edit: Edit, line: str, code: int) -> dict[str, Any]:
    images = [str(path) for path in edit.images]
    return {
        "status": "failed", "picture": str(edit.out), "images": images, "prompt": edit.prompt, "error": line,
        "code": code,
    }  # fmt: skip
