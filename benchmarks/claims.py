"""What the papers say, each as a number of the small model's rows that must exceed another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparse_ref_attn.config import UniformGuard
from sparse_ref_attn.eval.metrics import Interval

from .measured import Measured, Term
from .studies import direction, methods, reuse, sparse_context, tasks
from .studies.caches import KEEP as CACHED

__all__ = ["CLAIMS", "QUESTIONS", "Claim", "verdict"]

SUBJECT, IDENTITY = "subject_psnr", "identity"


@dataclass(frozen=True)
class Claim:
    """Holds where the interval of the sum of `terms` lies above `above`.

    Parameters
    ----------
    source : str
        Where it is said.
    text : str
        What is said, in words.
    theirs : str
        The paper's number.
    study : str
        Whose rows decide.
    terms : tuple of Term
    unit : str
        Of the sum.
    above : float
    """

    source: str
    text: str
    theirs: str
    study: str
    terms: tuple[Term, ...]
    unit: str = "dB"
    above: float = 0.0

    def interval(self, studies: Mapping[str, Measured | None]) -> Interval | None:
        """Of the sum; None where rows are missing."""
        measured = studies.get(self.study)
        return None if measured is None else measured.interval(self.terms)


def verdict(interval: Interval | None, above: float) -> str:
    """By the 95 % interval alone.

    >>> verdict(Interval(2.0, 1.0, 3.0), 0.0), verdict(Interval(2.0, 1.0, 3.0), 4.0), verdict(Interval(2, 1, 3), 2.0)
    ('held', 'did not hold', 'undecided')
    """
    if interval is None:
        return "not measured"
    if interval.low > above:
        return "held"
    return "did not hold" if interval.high < above else "undecided"


def _of(method: str, keep: float, **more: object) -> dict[str, object]:
    return {"model": "dense", "task": "place", "method": method, "keep": keep, **more}


def _better(metric: str, a: Mapping[str, object], b: Mapping[str, object], share: float = 1.0) -> tuple[Term, ...]:
    return (Term(1.0, metric, a), Term(-share, metric, b))


def _table(text: str, theirs: str, a: str, b: str, source: str = "ReCAST, Table 1") -> Claim:
    """One method ahead of another in the tables at equal budget."""
    return Claim(
        source, text, theirs, "methods", _better(SUBJECT, _of(a, methods.KEEP), _of(b, methods.KEEP))
    )  # fmt: skip


def _swept(keep: float) -> dict[str, object]:
    return _of("ReCAST fixed", keep)


def _lost(task: str) -> tuple[Term, ...]:
    """What ReCAST loses against dense on a task, whole picture."""
    return _better("psnr", _of("dense", 1.0, task=task), _of("ReCAST", tasks.KEEP, task=task))


def _minus(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    return tuple(Term(-term.weight, term.metric, term.where) for term in terms)


_STEP_0 = {"task": "place", "step": 0, "block": "single"}
_OURS, _CACHE = "ReCAST in 2 pieces", "TaylorSeer every 3"
_RULE = 0.10  # share of the tokens at which Sparse Context's claims are tried


def _ruled(rule: str, model: str, keep: float = _RULE, task: str = "place") -> dict[str, object]:
    return {"model": model, "task": task, "method": rule, "keep": keep}


def _gap(model: str) -> tuple[Term, ...]:
    return _better(SUBJECT, _ruled("mass", model), _ruled("random", model))


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "ReCAST, 2.2, Fig. 2", "the top 25 % of the reference tokens get over 80 % of the references' attention",
        "over 80 %", "mass", (Term(1.0, "top_25", _STEP_0),), "", 0.8,
    ),
    Claim(
        "ReCAST, 2.2", "the tokens of highest score are the subject's: more of them than by chance", "in words",
        "mass", (Term(1.0, "recall", _STEP_0), Term(-1.0, "chance", _STEP_0)), "",
    ),
    Claim(
        "ReCAST, 2.4", "the attention's entropy falls from the first step to the last", "11.2 to 8.4 bits",
        "mass", (Term(1.0, "bits", _STEP_0), Term(-1.0, "bits", {**_STEP_0, "step": "last"})), "bits",
    ),
    _table("ranking by cross-image attention beats random", "DINO +0.143", "ReCAST adaptive", "random"),
    _table("merging (ToMe) beats random", "DINO +0.073", "ToMe", "random"),
    _table("self-attention (Attn-Prune) beats random", "DINO +0.085", "self-attention", "random"),
    _table("cross-image attention beats self-attention", "DINO +0.045", "ReCAST fixed", "self-attention"),
    _table("cross-image attention beats merging (ToMe)", "DINO +0.057", "ReCAST fixed", "ToMe"),
    _table("the rising budget beats the fixed one", "DINO +0.013", "ReCAST adaptive", "ReCAST fixed"),
    _table(
        "the sum over the single-stream blocks beats one block", "DINO +0.022", "ReCAST adaptive", "single block",
        "ReCAST, Table 2",
    ),
    _table("self-attention beats cosine similarity", "DINO +0.008", "self-attention", "cosine", "ReCAST, Table 2"),
    _table("cosine similarity beats random", "DINO +0.077", "cosine", "random", "ReCAST, Table 2"),
    Claim(
        "ReCAST, 3.2", "97.3 % of the dense run's identity score is kept", "0.761 of 0.782", "methods",
        _better(IDENTITY, _of("ReCAST adaptive", methods.KEEP), _of("dense", 1.0), 0.973), "",
    ),
    Claim(
        "ReCAST, 3.4", "quality falls more from 1/8 of the tokens to 1/16 than from 1/4 to 1/8",
        "DINO -0.037 after -0.017", "sweep",
        (
            *_better(SUBJECT, _swept(1 / 8), _swept(1 / 16)),
            *_minus(_better(SUBJECT, _swept(1 / 4), _swept(1 / 8))),
        ),
    ),
    Claim(
        "ReCAST, 3.4", "another prompt ranks the same reference alike: Spearman of at least 0.9", "0.912", "stability",
        (Term(1.0, "spearman", {"kind": "prompt"}),), "", 0.9,
    ),
    Claim(
        "ReCAST, 3.4", "another prompt's ranking costs no more than 0.006 of identity", "DINO -0.006", "reuse",
        _better(IDENTITY, _of("another prompt", reuse.KEEP), _of("step 0", reuse.KEEP)), "", -0.006,
    ),
    Claim(
        "ReCAST, 3.4", "the loss is larger where the cue is spread over the reference (style; here a global recolour)",
        "DINO -0.027, the largest", "tasks", (*_lost("global"), *_minus(_lost("place"))),
    ),
    Claim(
        "ReCAST, 3.4", "with a step cache it saves more work than alone", "2.41x to 3.38x", "caches",
        _better("flop_ratio", _of(f"{_OURS} + {_CACHE}", CACHED), _of(_OURS, CACHED)), "x FLOPs",
    ),
    Claim(
        "ReCAST, 3.4", "with a step cache it keeps 98.8 % of its identity score", "0.752 of 0.761", "caches",
        _better(IDENTITY, _of(f"{_OURS} + {_CACHE}", CACHED), _of(_OURS, CACHED), 0.988), "",
    ),
    Claim(
        "Sparse Context", "without tuning, dropping most of the tokens (75 %, at random) costs less than 1 dB",
        "in words", "sparse_context",
        _better(SUBJECT, _ruled("random", "dense", 0.25), _of("dense", 1.0)), "dB", -1.0,
    ),
    Claim(
        "Sparse Context", "random dropping hurts the drop-tuned model less than the dense-trained one", "in words",
        "sparse_context", _better(SUBJECT, _ruled("random", "drop"), _ruled("random", "dense")),
    ),
    Claim(
        "Sparse Context", "and less than a model tuned as long without dropping", "not compared there",
        "sparse_context", _better(SUBJECT, _ruled("random", "drop"), _ruled("random", "control")),
    ),
    Claim(
        "Sparse Context", "the drop-tuned model at 10 % by edges is within 1 dB of all its tokens", "in words",
        "sparse_context", _better(SUBJECT, _ruled("edges", "drop"), _ruled("dense", "drop", 1.0)), "dB", -1.0,
    ),
    Claim(
        "Sparse Context", "tuning decouples the model from the rule: the lead of mass over random shrinks", "in words",
        "sparse_context", (*_gap("dense"), *_minus(_gap("drop"))),
    ),
    Claim(
        "Sparse Context", "on the drop-tuned model a task-aware rule (edges) beats random at equal budget", "in words",
        "sparse_context", _better(SUBJECT, _ruled("edges", "drop"), _ruled("random", "drop")),
    ),
    Claim(
        "Sparse Context", "two references save more work than one (at 5 %)", "4x and 2x in time", "sparse_context",
        _better(
            "flop_ratio", _ruled("edges", "dense", 0.05, "pair"), _ruled("edges", "dense", 0.05)
        ), "x FLOPs",
    ),
)  # fmt: skip
"""In the papers' order."""


def _scheduled(name: str, keep: float = direction.KEEPS[0]) -> dict[str, object]:
    return _of(name, keep)


QUESTIONS: tuple[Claim, ...] = (
    _table("ReCAST beats a downscaled reference of as many tokens", "", "ReCAST fixed", "downscaled", "methods"),
    _table("weighing the mass by value norms (ToPi) helps", "", "mass x values", "ReCAST fixed", "methods"),
    _table("measuring in the double-stream blocks beats the single-stream ones", "", "double blocks", "ReCAST fixed",
           "methods"),
    _table("the exact mask of the subject beats the mass", "", "exact mask", "ReCAST fixed", "methods"),
    Claim(
        "direction", "rising beats falling at equal mean, ranked by mass", "", "direction",
        _better(SUBJECT, _scheduled("mass, rising"), _scheduled("mass, falling")),
    ),
    Claim(
        "direction", "rising beats falling at equal mean, ranked by the exact mask", "", "direction",
        _better(SUBJECT, _scheduled("exact mask, rising"), _scheduled("exact mask, falling")),
    ),
    Claim(
        "direction", "rising beats flat at equal mean, ranked by mass", "", "direction",
        _better(SUBJECT, _scheduled("mass, rising"), _scheduled("mass, flat")),
    ),
    Claim(
        "reuse", "a ranking made from the mean of all steps beats that of step 0", "", "reuse",
        _better(SUBJECT, _of("mean of the steps", reuse.KEEP), _of("step 0", reuse.KEEP)),
    ),
    *(
        Claim(
            "tasks", f"the guard against near-uniform attention helps on {task} recolours, {words}", "", "tasks",
            _better("psnr", _of(f"{name}, guarded", tasks.KEEP, task=task), _of(name, tasks.KEEP, task=task)),
        )
        for task in ("global", "local")
        for name, words in (
            ("ReCAST", f"as it comes (single-stream blocks, below {UniformGuard().top_quarter})"),
            ("ReCAST of all blocks", f"over all blocks (below {tasks.GUARD.top_quarter})"),
        )
    ),
    Claim(
        "sparse_context", "on the drop-tuned model, mass beats random at 10 %", "", "sparse_context", _gap("drop"),
    ),
)  # fmt: skip
"""What the papers leave open."""

assert set(sparse_context.KEEPS) >= {_RULE, 0.25, 0.05}
