"""``RESULTS.md``: the papers' tables on the small model, made from the rows in ``results/studies``.

python -m benchmarks.results_page            # prints it
python -m benchmarks.results_page --write    # writes it and its plots
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sparse_ref_attn.config import UniformGuard
from sparse_ref_attn.eval.metrics import Interval

from .claims import CLAIMS, QUESTIONS, Claim, verdict
from .measured import Measured, Term, read
from .readings import TABLES as READINGS
from .reliability import reliability
from .results import known
from .studies import methods, sparse_context, tasks
from .study_plots import PLOTS, draw

__all__ = ["page"]

Studies = Mapping[str, Measured | None]

HERE = Path(__file__).resolve().parent
STUDIES = HERE / "results" / "studies"

HEAD = """# The papers' tables on a small model

Made by `python -m benchmarks.results_page --write` from the rows in `benchmarks/results/studies`, which
`python -m benchmarks.studies` measures; nothing on this page is written by hand.

**What the model is.** diffusers' own `FluxTransformer2DModel` in a `FluxKontextPipeline`, trained here on procedural
pictures: emoji on scenery, 128 x 128 pixels, 256 tokens a picture and a reference, prompts of a closed vocabulary.
**It is small ({parameters} parameters; FLUX.1 Kontext has 12 billion), it is not FLUX, and what holds for it need not
hold for a published model, nor the other way round.** Every table names the paper's table that it is an analogue of.
The subjects are held out, and the answer to every question is known exactly, so that quality is measured against the
truth: PSNR on the subject's pixels and on all, SSIM, and identity (cosine of MobileNetV2's features on the subject's
crop, a proxy that is neither DINO nor CLIP). 60 dB stands for equal. FLOP ratios count profiling steps and their
scoring; they are no times.

**How it is decided.** A claim is a difference of two numbers of the same subject, seed and noise. The 95 % interval
(BCa bootstrap over subjects) of its mean decides: wholly on the claimed side it *held*, wholly on the other it *did not
hold*, else it is *undecided*.
"""


def page(folder: Path = STUDIES) -> str:
    """The page's markdown; a study without rows is said to be missing."""
    studies = {study: read(folder, study) for study, _, _ in SECTIONS}
    parts = [HEAD.format(parameters=_parameters(folder)), _measured_where(studies)]
    parts += ["## What the papers say", _claims(CLAIMS, studies, "paper's number")]
    parts += ["## What they leave open", _claims(QUESTIONS, studies, None)]
    for study, title, sections in SECTIONS:
        parts.append(f"## {title}")
        measured = studies[study]
        if measured is None:
            parts.append(f"Not measured: `python -m benchmarks.studies --only {study}` makes its rows.")
            continue
        parts += [text for section in sections if (text := section(measured))]
        parts += [f"![{alt}](results/studies/{name}.png)" for name, (own, alt, _) in PLOTS.items() if own == study]
    parts += ["## Fewer steps at equal work", _fewer_steps(folder)]
    parts += ["## Reliability", _reliability(folder.parent / "reliability.csv"), "## Performance", PERFORMANCE]
    return "\n\n".join(part.strip() for part in parts) + "\n"


PERFORMANCE = """Times, bounds and rivals are not on this page: the whole-pipeline tables are on the page about
[speed](../docs/speed.md), how they and the ops' are measured in [benchmarks/README.md](README.md), and every row in
[results](results)."""


def _parameters(folder: Path) -> str:
    runs = known(folder / "runs.csv")
    return f"{int(runs[-1]['parameters']) / 1e6:.1f} million" if runs else "a few million"


def _measured_where(studies: Studies) -> str:
    header = ["study", "model", "weights", "subjects", "seeds", "steps", "date", "commit"]
    rows, where = [], []
    for study, measured in studies.items():
        for line in [] if measured is None else measured.runs:
            own = [row for row in measured.rows if row["model"] == line["model"]]
            counts = [str(len({row[name] for row in own})) for name in ("subject", "seed")]
            rows.append([study, line["model"], line["weights"], *counts, *(line[name] for name in header[5:])])
            where.append(f"{line['device']}, torch {line['torch']}, diffusers {line['diffusers']}")
    if not rows:
        return "No study was run yet."
    return "\n".join([_table(header, rows), "", f"On: {'; '.join(sorted(set(where)))}. `weights` is a hash of them."])


def _claims(claims: Sequence[Claim], studies: Studies, theirs: str | None) -> str:
    header = ["said in", "claim", theirs, "here", "verdict"] if theirs else ["study", "claim", "here", "verdict"]
    rows = []
    for claim in claims:
        interval = claim.interval(studies)
        bar = f" (must exceed {claim.above:g})" if claim.above and interval else ""
        here = "" if interval is None else f"{_number(interval)} {claim.unit}".rstrip() + bar
        told = verdict(interval, claim.above)
        rows.append([claim.source, claim.text, *([claim.theirs] if theirs else []), here, f"**{told}**"])
    return _table(header, rows)


def _number(interval: Interval | None) -> str:
    if interval is None:
        return ""
    digits = 1 if abs(interval.mean) >= 10 else 2 if abs(interval.mean) >= 0.1 or interval.mean == 0 else 3
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


QUALITY = {
    "subject_psnr": "subject PSNR (dB)", "psnr": "PSNR (dB)", "ssim": "SSIM", "identity": "identity (MobileNetV2)",
    "dense_subject_psnr": "subject PSNR against dense (dB)",
}  # fmt: skip


def _pictures(
    measured: Measured,
    which: Sequence[tuple[str, float]],
    metrics: Sequence[str] = tuple(QUALITY),
    **where: object,
) -> str:
    """A table of (method, keep), one row each that was measured: tokens, FLOP ratio, and metrics with intervals."""
    rows = []
    for method, keep in which:
        own = {"model": "dense", "task": "place", **where, "method": method, "keep": keep}
        cost = [measured.interval([Term(1.0, metric, own)]) for metric in ("tokens", "flop_ratio")]
        if cost[0] is None or cost[1] is None:
            continue
        cells = [_number(measured.interval([Term(1.0, metric, own)])) for metric in metrics]
        rows.append([method, f"{100 * keep:.3g} %", f"{cost[0].mean:.0f}", f"{cost[1].mean:.2f}x", *cells])
    header = ["method", "kept", "tokens a step", "FLOP ratio", *(QUALITY[metric] for metric in metrics)]
    return _table(header, rows) if rows else ""


def _which(measured: Measured) -> list[tuple[str, float]]:
    """Every (method, keep) in the order of the rows."""
    return list(dict.fromkeys((row["method"], float(row["keep"])) for row in measured.rows))


def _all(note: str) -> Callable[[Measured], str]:
    return lambda measured: f"{note}\n\n{_pictures(measured, _which(measured))}"


def _by_task(measured: Measured) -> str:
    parts = [
        "PSNR of the whole picture, since a global recolour has no background. The guard keeps more where the top "
        "quarter of the tokens holds a small share of the attention in the blocks measured: ReCAST's single-stream "
        f"ones, below {UniformGuard().top_quarter}, or all of them, below {tasks.GUARD.top_quarter}."
    ]
    for task in tasks.TASKS:
        if task in measured.distinct("task"):
            table = _pictures(measured, _which(measured), ("psnr", "subject_psnr", "identity"), task=task)
            parts.append(f"**{task}**\n\n{table}")
    return "\n\n".join(parts)


def _by_model(measured: Measured) -> str:
    parts = [
        "Tokens are gone in every step, except that `mass` runs its first with all of them. `control` was trained "
        "on as long as `drop` from the same weights, without dropping. Models that are not in the table were not given."
    ]  # fmt: skip
    for task, title in (("place", "one reference"), ("pair", "two references")):
        for model in sparse_context.MODELS:
            table = _pictures(measured, _which(measured), ("subject_psnr", "psnr", "identity"), task=task, model=model)
            if table:
                parts.append(f"**{title}, {model}**\n\n{table}")
    return "\n\n".join(parts)


def _mass(measured: Measured) -> str:
    shares = ("top_5", "top_10", "top_25", "top_50")
    rows = []
    for task in measured.distinct("task"):
        for blocks in ("double", "single", "all"):
            where = {"task": task, "block": blocks}
            first, last = ({**where, "step": step} for step in (0, "last"))
            got = _number(measured.interval([Term(1.0, "mass", first)]))
            bits = [_number(measured.interval([Term(1.0, "bits", step)])) for step in (first, last)]
            held = [_number(measured.interval([Term(1.0, share, first)])) for share in shares]
            found = [_number(measured.interval([Term(1.0, name, first)])) for name in ("recall", "chance")]
            rows.append([task, blocks, got, *bits, *held, *found])
    header = ["task", "blocks", "attention to references", "bits, first step", "bits, last step"]
    header += [*(f"top {share[4:]} %" for share in shares), "recall", "by chance"]
    return (
        "Analogue of section 2.2, Figure 2 and of the entropy curve of 2.4; means of the heads. The attention that the "
        "generation tokens pay to the references, the shares of it that the top tokens hold, and the recall of the "
        "subject's n tokens among the top n are those of the first step. A uniform mass has 8 bits (9 with two "
        f"references). ReCAST sums over the single-stream blocks.\n\n{_table(header, rows)}"
    )


def _stability(measured: Measured) -> str:
    kinds = {
        "prompt": "another prompt, step 0", "seed": "another seed, step 0", "step": "two steps of one run",
        "block": "one block and the single-stream blocks' mean, step 0",
    }  # fmt: skip
    rows = []
    for kind, words in kinds.items():
        found = [
            _number(measured.interval([Term(1.0, name, {"kind": kind})]))
            for name in ("spearman", "overlap_15", "overlap_25")
        ]
        rows.append([words, *found])
    return (
        "Analogue of section 3.4 (Spearman 0.912 over 10 references and 15 prompts). Overlap: the share of one "
        "ranking's top 15 and 25 % that the other has there too; by chance 0.15 and 0.25.\n\n"
        f"{_table(['compared with', 'Spearman', 'overlap of the top 15 %', 'of the top 25 %'], rows)}"
    )


Section = Callable[[Measured], str]
SECTIONS: tuple[tuple[str, str, tuple[Section, ...]], ...] = (
    ("methods", "Methods at equal budget (ReCAST, Tables 1 and 2)", (_all(
        f"Every method runs step 0 with all tokens and keeps {100 * methods.KEEP:.1f} % on average after it (the "
        "paper's 600 of 4,096), so that all of them spend the same. `self-attention` is its Attn-Prune. The paper does "
        f"not say which block `single block` is; here it is block {methods.SINGLE_BLOCK}, and a table below tries all. "
        "`exact mask` knows the subject's pixels."
    ),)),
    ("sweep", "Budget sweep (ReCAST, section 3.4)", (_all(
        "A fixed share after a step with all tokens; the paper's 2,048, 1,024, 512 and 256 of 4,096."
    ),)),
    ("direction", "Rising, flat or falling", (_all(
        "Budgets of one mean, N_max four times N_min, gamma 2. Ranked by mass, step 0 has all tokens and the mean is "
        "of the steps after it; ranked by the exact mask, no step has all of them and the mean is of every step."
    ),)),
    ("mass", "Entropy and mass share (ReCAST, sections 2.2 and 2.4)", (_mass,)),
    ("stability", "Stability of the ranking (ReCAST, section 3.4)", (_stability,)),
    ("reuse", "A ranking made elsewhere (ReCAST, sections 2.3 and 3.4)", (_all(
        "Equal cost in every row: all tokens in step 0, then the share kept by a ranking that a dense run gave "
        "beforehand. `step 0` is ReCAST's own."
    ),)),
    ("caches", "Beside a step cache (ReCAST, section 3.4: ToCa)", (_all(
        "diffusers' FirstBlockCache (by threshold) and TaylorSeer (by interval, order 1) in place of ToCa. The FLOPs "
        "are those that the transformer executed, counted operation by operation."
    ),)),
    ("tasks", "By task, and the guard against near-uniform attention", (_by_task,)),
    ("sparse_context", "Sparse Context: drop-tuning and rules at equal budget", (_by_model,)),
)  # fmt: skip


FEWER = """The papers do not compare with fewer steps, which is what a user would do without them. PSNR against the
dense picture of 12 steps (dB), each setting less dense runs in 6, 4 and 3 steps: mixed so that the work is
the same, or 6 steps where the setting does more work than they do (below 2x), at FLUX.1 Kontext's size with
1 and with 4 references; paired, 95 % intervals. **Below zero, fewer steps are better.** The tasks have one
right answer, so that the small model's flow is almost straight and few steps lose little; on a published
model that need not be so."""


def _fewer_steps(folder: Path) -> str:
    try:
        return f"{FEWER}\n\n{READINGS['reading_steps'](folder)}"
    except ValueError:
        return "Not measured: the studies `reading` and `reading_work` make its rows."


def _reliability(path: Path) -> str:
    rows = known(path)
    if not rows:
        return "Not measured: `python -m tests.reliability` makes its rows."
    return reliability(rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


if __name__ == "__main__":
    text = page()
    if "--write" in sys.argv[1:]:
        (HERE / "RESULTS.md").write_text(text, encoding="utf-8")
        draw(STUDIES)
    else:
        print(text)
