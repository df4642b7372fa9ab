"""What a user would do without this library, beside it on the clock: fewer steps in no more time, and step caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..batching.progress import NoBar, SequentialBar
from ..cost import Flops
from ..errors import ConfigError, SparseRefError
from ..hooks.compiled import compiled_blocks, unwrap
from ..models import adapter_for
from ..patching import patched
from ..report.work import recorded_flops
from .clock import CallTimes, time_call
from .compare import Made, one_bar
from .comparison import Comparison, psnr
from .counted import counted_work
from .settings import Setting
from .step_caches import step_cached

__all__ = ["DENSE", "RivalRun", "Rivals", "run_rivals"]

DENSE = "dense"
"""The name of the dense run."""


@dataclass(frozen=True)
class RivalRun:
    """What was measured of one rival.

    Parameters
    ----------
    setting : Setting
    steps : int
        That ran.
    image : PIL.Image.Image
        Of the last repeat.
    times : tuple of CallTimes
        One a repeat.
    flops : Flops, optional
        Of what really ran in the transformer; None where it cannot be counted: a model whose shape is not known, and
        compiled blocks or reading per tile under a step cache.
    tokens : float
        Reference tokens a step.
    """

    setting: Setting
    steps: int
    image: Any
    times: tuple[CallTimes, ...]
    flops: Flops | None
    tokens: float

    @property
    def seconds(self) -> float:
        """Of the whole call, median over the repeats."""
        return median(times.whole for times in self.times)

    @property
    def transformer_seconds(self) -> float:
        """Of it inside the transformer."""
        return median(times.transformer for times in self.times)


@dataclass(frozen=True)
class Rivals:
    """Runs without this library or beside something else, and who is as fast as whom.

    Parameters
    ----------
    dense : Comparison
        One with the dense run that all are compared with.
    steps : int
        Of the dense run.
    runs : mapping of str to RivalRun
        Runs in fewer steps by `Setting.name`, the others by the names that they were given.
    methods : mapping of str to (float, picture)
        Seconds and picture of each method that fewer steps were matched with.
    equal : mapping of str to (str or None)
        For each of these the run in fewer steps that takes no longer, with the most steps; `DENSE` where the dense run
        itself takes no longer, None where one step already does.
    """

    dense: Comparison
    steps: int
    runs: Mapping[str, RivalRun]
    methods: Mapping[str, tuple[float, Any]]
    equal: Mapping[str, str | None]

    def psnr(self, name: str) -> float:
        """PSNR of a run's or method's picture against the dense one, dB; infinite for the dense run's own."""
        if name == DENSE:
            return float("inf")
        picture = self.runs[name].image if name in self.runs else self.methods[name][1]
        found = psnr(self.dense.dense_image, picture)
        return float("inf") if found is None else found

    def loses(self, method: str) -> bool:
        """Whether fewer steps are nearer to the dense picture in no more time."""
        rival = self.equal[method]
        return rival is not None and self.psnr(rival) > self.psnr(method)

    def flop_ratio(self, name: str) -> float | None:
        """Dense work of the transformer over that of a run."""
        done, dense = self.runs[name].flops, self.dense.dense_flops
        return None if done is None or dense is None else dense.total / done.total

    def told(self) -> str:
        """Who wins at equal time, one sentence or two."""
        lost = [method for method in self.equal if self.loses(method)]
        if not lost:
            return (
                "No method loses to fewer steps here: in no more time they are further from the dense picture (PSNR)."
            )
        parts = [f"{method} ({self._words(method)})" for method in lost]
        every = "every method" if len(lost) == len(self.equal) else f"{len(lost)} of {len(self.equal)} methods"
        return (
            f"Fewer steps win against {every}: in no more time, all tokens in fewer steps are nearer to the dense "
            f"picture than {', '.join(parts)}. Try fewer steps first."
        )

    def _words(self, method: str) -> str:
        rival = self.equal[method]
        assert rival is not None
        if rival == DENSE:
            return "the dense run takes no longer"
        return f"{rival}: {self.psnr(rival):.1f} dB against {self.psnr(method):.1f}"

    def to_dict(self) -> dict[str, Any]:
        """JSON types: each run by its name, and who is as fast as whom."""
        return {
            "base_steps": self.steps,
            "runs": {
                name: {
                    "setting": run.setting.name,
                    "code": run.setting.code,
                    "steps": run.steps,
                    "seconds": run.seconds,
                    "transformer_seconds": run.transformer_seconds,
                    "each_seconds": [times.whole for times in run.times],
                    "flop_ratio": self.flop_ratio(name),
                    "psnr_db": psnr(self.dense.dense_image, run.image),
                }
                for name, run in self.runs.items()
            },
            "at_equal_time": dict(self.equal),
            "fewer_steps_win": [method for method in self.equal if self.loses(method)],
        }


def run_rivals(
    pipe: Any,
    results: Mapping[str, Comparison],
    call: Callable[[int], Any],
    *,
    steps: int,
    repeats: int = 1,
    others: Mapping[str, Setting] | None = None,
    refused: dict[str, str] | None = None,
    made: Made | None = None,
) -> Rivals:
    """Run what else would save time: `others`, and for each method the dense pipeline in no more time than it took.

    The number of steps that fits is told by the dense run's time and then held to the clock: where the run takes longer
    after all, it runs again in a step less.

    Parameters
    ----------
    pipe, call, steps, repeats, made
        As for `compare_all`.
    results : mapping of str to Comparison
        Of `compare_all`, with dense runs.
    others : mapping of str to Setting, optional
        Further runs, by name; each is given its own match in fewer steps.
    refused : dict, optional
        Takes the name of each of `others` that cannot run and why; without it the first such error is raised.

    Raises
    ------
    ConfigError
        If there is no result, or no dense run.
    SparseRefError
        As `compare_all`, and as `step_cached`.

    Examples
    --------
    >>> from PIL import Image
    >>> import torch, sparse_ref_attn as sra
    >>> from sparse_ref_attn.eval.compare import compare
    >>> from sparse_ref_attn.eval.embedded import kontext_pipeline
    >>> pipe = kontext_pipeline("tiny")
    >>> pipe.set_progress_bar_config(disable=True)
    >>> call = lambda steps: pipe(
    ...     prompt="a cup", image=Image.new("RGB", (32, 32)), height=32, width=32, max_area=32 * 32,
    ...     _auto_resize=False, max_sequence_length=16, num_inference_steps=steps,
    ...     generator=torch.Generator().manual_seed(0)).images[0]
    >>> sparse = compare(pipe, sra.SparseContext(0.25, "grid"), call, steps=4)
    >>> rivals = run_rivals(pipe, {"grid": sparse}, call, steps=4, others={"half": Setting(2)})
    >>> rivals.runs["half"].steps, rivals.flop_ratio("half"), sorted(rivals.equal)
    (2, 2.0, ['grid', 'half'])
    """
    dense = next(iter(results.values()), None)
    if dense is None or dense.dense is None:
        raise ConfigError("rivals must be compared with a result that has a dense run, got none")
    base, made = dense.dense, made or (lambda name, picture: None)
    others = dict(others or {})
    make = getattr(pipe, "progress_bar", NoBar)
    bar = SequentialBar(make, sum(2 + repeats * (setting.steps or steps) for setting in others.values()))
    runs: dict[str, RivalRun] = {}

    def run(name: str, setting: Setting) -> RivalRun:
        bar.say(name)
        return _run(pipe, call, setting, steps, repeats, dense)

    with one_bar(pipe, bar):
        for name, setting in others.items():
            try:
                bar.say("warm-up")
                _run(pipe, call, setting, 2, 1, dense)
                runs[name] = run(name, setting)
            except SparseRefError as error:
                if refused is None:
                    raise
                refused[name] = str(error)
            else:
                made(name, runs[name].image)
        methods = {name: (result.sparse.whole, result.sparse_image) for name, result in results.items()}
        methods |= {name: (found.seconds, found.image) for name, found in runs.items()}
        equal: dict[str, str | None] = {}
        each = base.transformer / steps
        for name, (seconds, _) in sorted(methods.items(), key=lambda item: -item[1][0]):
            if seconds >= base.whole:
                equal[name] = DENSE
                continue
            equal[name] = None
            for fewer in range(min(steps - 1, int((seconds - base.fixed) / each)), 0, -1):
                setting = Setting(fewer)
                if setting.name not in runs:
                    bar.fewer(-repeats * fewer)
                    runs[setting.name] = run(setting.name, setting)
                    made(setting.name, runs[setting.name].image)
                if runs[setting.name].seconds <= seconds:
                    equal[name] = setting.name
                    break
    return Rivals(dense, steps, runs, methods, {name: equal[name] for name in methods})


def _run(
    pipe: Any, call: Callable[[int], Any], setting: Setting, steps: int, repeats: int, dense: Comparison
) -> RivalRun:
    """Each repeat with the step cache and the patch anew."""
    transformer, record = unwrap(pipe.transformer), dense.handle.record
    own, config, cached = setting.steps or steps, setting.config, setting.step_cache is not None
    tiles = config is not None and config.per == "tile"
    counts = cached and dense.dense_flops is not None and not tiles and not compiled_blocks(transformer)
    times, image, work, tokens = [], None, None, float(record.layout.reference_tokens)
    for _ in range(repeats):
        with ExitStack() as stack:
            stack.enter_context(step_cached(pipe, setting.step_cache))
            handle = None if config is None else stack.enter_context(patched(pipe, config))
            work = stack.enter_context(counted_work(transformer)) if counts else None
            image, taken = time_call(lambda: call(own), transformer, ())
        times.append(taken)
        if handle is not None:
            record, tokens = handle.record, handle.record.mean_tokens
    flops = None if work is None else work() + Flops(0, 0 if config is None else int(record.scoring_flops))
    if not cached and dense.dense_flops is not None:
        if config is not None:
            flops = recorded_flops(adapter_for(transformer).shape(transformer), record)
        else:
            whole = dense.dense_flops
            flops = Flops(whole.matmul * own // steps, whole.attention * own // steps)
    return RivalRun(setting, own, image, tuple(times), flops, tokens)
