"""What a run reads of stored reference K/V is what the setting says, and its work is that of the operations."""

from __future__ import annotations

import math
import shutil
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import readings
from benchmarks.studies import caches, cases, reading, reading_work
from benchmarks.studies.generator import Generator, Run
from benchmarks.studies.questions import Question
from benchmarks.studies.stored import Reading, StoredRun, _cells, stored, work
from benchmarks.studies.study import DIGITS
from sparse_ref_attn.eval.models import EvalModel
from sparse_ref_attn.eval.rows import Rows
from sparse_ref_attn.models import adapter_for, named_model
from sparse_ref_attn.toy.pipeline import TRAINED, toy_pipeline
from sparse_ref_attn.toy.words import LENGTH
from sparse_ref_attn.types import Reference, TokenLayout
from tests.small_model import looking_transformer

STEPS = 4
EVERY = tuple(range(STEPS))
SOME = (0, 1, 3)
PLACE, PAIR = Question("place", 0), Question("pair", 1)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """Of a transformer that is not trained, and does look at its references."""
    folder = tmp_path_factory.mktemp("model")
    looking_transformer().save_pretrained(folder)
    with torch.no_grad():
        yield Generator(EvalModel("dense", str(folder), steps=STEPS))


@pytest.fixture(scope="module")
def trained():
    with torch.no_grad():
        yield Generator(EvalModel("dense", TRAINED, steps=STEPS))


def picture(generator, question, setting):
    with stored(generator.pipe.transformer, generator.adapter, setting):
        return generator.picture(question, 0)


@cache
def everything(generator):
    """The picture whose steps read all that is stored."""
    return picture(generator, PLACE, Reading(SOME))


@cache
def calls(generator, question):
    """Arguments of the transformer's calls in one run."""
    seen = []

    def note(module, args, kwargs):
        seen.append(generator.adapter.bind(module, args, kwargs))

    hook = generator.pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    generator.picture(question, 0)
    hook.remove()
    return seen


def answers(generator, setting, arguments):
    """The generation rows of each call of one run."""
    transformer = generator.pipe.transformer
    with stored(transformer, generator.adapter, setting):
        return [transformer(**each)[0][:, :256] for each in arguments]


def same_call(generator, setting):
    """The dense generation rows of a first call, and those of calls with the very same arguments until all is read."""
    dense, *later = answers(generator, setting, [calls(generator, PAIR)[2]] * min(STEPS, setting.at[-1] + 2))
    return dense, later


def test_reference_rows_at_every_step_are_the_dense_picture(generator):
    for question in (PLACE, PAIR):
        dense = generator.picture(question, 0)
        assert np.array_equal(picture(generator, question, Reading(EVERY)), dense)
    assert not np.array_equal(picture(generator, PAIR, Reading((0,))), dense)
    assert np.array_equal(generator.picture(PAIR, 0), dense)


@pytest.mark.parametrize(
    "setting",
    [
        Reading((0,)),
        Reading((0,), "tile", 1.0),
        Reading((0,), "layer", 1.0, cell=2),
        Reading(EVERY, full="rolling"),
        Reading((0, 2), full="kept"),
        Reading((0, 2, 3), "tile", 1.0, 8, 4, full="rolling", part=0.5),
    ],
    ids=lambda setting: setting.name,
)
def test_what_was_stored_reads_like_rows_when_nothing_has_changed(generator, setting):
    dense, later = same_call(generator, setting)
    for rows in later:
        assert torch.allclose(rows, dense, rtol=1e-3, atol=1e-4)


def test_old_rows_do_not_read_like_new_ones_when_less_is_read(generator):
    dense, later = same_call(generator, Reading((0,), "layer", 0.25))
    assert (later[0] - dense).abs().max() > 1e-2


@pytest.mark.parametrize("per", ["run", "layer", "tile"])
def test_a_later_step_with_reference_rows_ranks_anew(generator, per):
    old, new = calls(generator, PLACE)[:: STEPS - 1]
    *_, again = answers(generator, Reading((0, 2), per, 0.125, cell=4), [old, old, new, new])
    _, alone = answers(generator, Reading((0,), per, 0.125, cell=4), [new, new])
    assert torch.equal(again, alone)


def test_rows_by_turns_become_those_of_the_new_step(generator):
    """What is stored of a layer follows once those before it have: after so many rounds it is the new call's own."""
    old, new = calls(generator, PLACE)[:: STEPS - 1]
    dense = answers(generator, Reading((0,)), [new])[0]
    rounds = 2 * len(generator.adapter.sites(generator.pipe.transformer))
    turns = Reading(tuple(range(rounds + 1)), full="rolling", part=0.5)
    first, *_, last = answers(generator, turns, [old] + [new] * rounds)[1:]
    assert torch.allclose(last, dense, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(first, dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("per", "share", "cell"),
    [("run", 1.0, 0), ("layer", 1.0, 4), ("tile", 1.0, 4), ("run", 0.125, 1), ("layer", 0.125, 1), ("tile", 0.125, 1)],
)
def test_all_tokens_and_means_of_one_token_are_everything(generator, per, share, cell):
    found = picture(generator, PLACE, Reading(SOME, per, share, 2, cell))
    assert np.allclose(found, everything(generator), rtol=0, atol=1e-5)


def test_means_bring_the_picture_nearer(trained):
    all_read = everything(trained)
    without, *with_means = (
        np.square(picture(trained, PLACE, Reading(SOME, "tile", 1 / 16, 4, n)) - all_read).mean() for n in (0, 2, 4)
    )
    assert max(with_means) < without / 2


@cache
def toy_adapter():
    return adapter_for(toy_pipeline().transformer)


def ranked(per, share, cell=0):
    """A run with 4 x 4 generation tokens, two text rows and two references of 2 x 4, whose mass is known."""
    run = StoredRun(toy_adapter(), Reading((0,), per, share, 2, cell))
    run.layout = TokenLayout(32, 2, (0, 16), (Reference(16, 8, (2, 4)), Reference(24, 8, (2, 4))))
    tiles = torch.full((4, 16), 0.01)
    tiles[torch.arange(4), torch.tensor([3, 7, 11, 15])] = 1.0
    tiles[:, 5] = 0.5
    run.mass = {0: tiles, 1: torch.eye(16)[12:13].expand(4, -1) * 10}
    if per != "tile":
        run.mass = {layer: mass.sum(0, keepdim=True) for layer, mass in run.mass.items()}
    return run


def test_each_tile_reads_its_own_and_text_its_layers():
    read = ranked("tile", 1 / 8)._chosen(0)
    assert read.shape == (18, 16)
    assert read.sum(1).tolist() == [2] * 18
    assert all(row[5] for row in read)
    best = [int(row.clone().index_fill_(0, torch.tensor([5]), False).nonzero()[0]) for row in read[2:]]
    assert best == [3, 3, 7, 7, 3, 3, 7, 7, 11, 11, 15, 15, 11, 11, 15, 15]


def test_one_ranking_is_the_layers_or_the_runs():
    assert ranked("layer", 1 / 16)._chosen(0).nonzero()[:, 1].tolist() == [5] * 18
    assert ranked("layer", 1 / 16)._chosen(1).nonzero()[:, 1].tolist() == [12] * 18
    assert ranked("run", 1 / 16)._chosen(0).nonzero()[:, 1].tolist() == [12] * 18


def test_a_mean_counts_as_many_as_are_not_read():
    run = ranked("layer", 1 / 8, cell=2)
    run.mass[0][0, 4] = 9.0  # beside token 5, in the first reference's first cell
    bias = run._bias(0, run._means())
    assert bias.shape == (18, 18 + 16 + 4)
    assert bias[:, :18].eq(0).all()
    assert bias[0, 18:34].eq(0).nonzero().flatten().tolist() == [4, 5]
    assert bias[:, 34:].exp().round().tolist() == [[2, 4, 4, 4]] * 18
    everything = ranked("layer", 1.0, cell=2)
    assert everything._bias(0, everything._means())[:, 34:].eq(-math.inf).all()


def test_cells_are_squares_of_each_reference():
    assert _cells([(2, 4), (3, 3)], 2).tolist() == [0, 0, 1, 1] * 2 + [2, 2, 3, 2, 2, 3, 4, 4, 5]


def test_quarters_by_turns_are_all_rows_and_the_kept_are_the_best():
    run = ranked("layer", 1 / 8)
    steps = tuple(range(5))
    run.reading = Reading(steps, full="rolling")
    rows = []
    for run.step in steps:
        rows.append(run._rows())
    assert rows[0] is None
    assert torch.cat(rows[1:]).sort().values.tolist() == list(range(16))
    run.reading = Reading(steps, full="kept", part=0.125)
    assert run._rows().tolist() == [5, 12]


@pytest.mark.parametrize(
    ("question", "setting"),
    [
        (PAIR, Reading((0,))),
        (PLACE, Reading(SOME)),
        (PAIR, Reading(SOME, full="rolling")),
        (PLACE, Reading(EVERY, full="rolling", part=0.5)),
    ],
)
def test_work_is_that_of_the_operations(generator, question, setting):
    _, executed = caches._executed(generator, lambda: picture(generator, question, setting))
    references = 256 * len(question.example.references)
    assert executed == pytest.approx(work(generator.shape, setting, LENGTH, 256, references, STEPS).total, rel=1e-3)


def test_rankings_and_means_are_charged():
    shape = adapter_for(model := named_model("kontext")).shape(model)
    ratio = [
        reading_work.flop_ratio(shape, setting, 4, 12)
        for setting in (
            Reading(SOME),
            Reading(SOME, "tile", 1.0),
            Reading(SOME, "tile", 1 / 8),
            Reading(SOME, "tile", 1 / 8, cell=4),
            Reading(SOME, "tile", 1 / 8, cell=2),
        )
    ]
    assert ratio[1] < ratio[0] < ratio[4] < ratio[3] < ratio[2]
    dense, cached = 579, 127  # TFLOP a step
    assert reading_work.flop_ratio(shape, Reading((0,)), 4, 12) == pytest.approx(
        12 * dense / (dense + 11 * cached), rel=5e-3
    )


def test_settings_are_named_apart_and_compared_at_length():
    named = [(setting.name, setting.share) for setting in reading.READINGS]
    assert len(set(named)) == len(named)
    assert {setting for pair in reading.COMPARED for setting in pair} <= set(reading.FINALISTS)
    lengthy, short = reading.cases(12), reading.cases(5)
    assert {case.asked(subject) for case in lengthy for subject in range(3)} == {
        "place", "pair", "swap", "local", "global",
    }  # fmt: skip
    assert {case.method for case in lengthy if case.most is None} == {s.name for s in reading.FINALISTS} | {"dense"}
    assert {case.method for case in short} < {case.method for case in lengthy}
    assert "all at 0 4 8" not in {case.method for case in short}


def test_a_first_look_is_at_few_subjects(tmp_path, generator):
    made = []

    def answer(generator, question, seed):
        made.append((question, seed))
        return Run(np.zeros((128, 128, 3)), 0.0, 1.0)

    study = [cases.Case("all", 1.0, answer, ("swap", "local")), cases.Case("first", 1.0, answer, most=(2, 1))]
    cases.pictures(study).measure(tmp_path / "rows.csv", {"dense": generator}, 3, 2)
    asked = [(question.task, question.subject, seed) for question, seed in made]
    assert [each for each in asked if each[0] == "place"] == [("place", 0, 0), ("place", 1, 0)]
    assert [each for each in asked if each[0] != "place"] == [
        (("swap", "local")[subject % 2], subject, seed) for subject in range(3) for seed in range(2)
    ]


@pytest.fixture(scope="module")
def work_rows(tmp_path_factory):
    """The file of what each setting costs at published sizes."""
    file = tmp_path_factory.mktemp("work") / "reading_work.csv"
    published = SimpleNamespace(steps=readings.STEPS, forget=lambda: None)
    reading_work.STUDY.measure(file, {"dense": published}, 1, 1)
    return file


def planted(folder, work_rows, value):
    """Rows of two subjects and a seed in which each setting has the PSNR that `value` gives it."""
    rows = Rows(folder / "reading.csv", (*cases.KEYS, *cases.VALUES), keys=cases.KEYS, digits=DIGITS)
    for case in reading.cases(readings.STEPS):
        for subject in range(2):
            key = {"model": "dense", "weights": "abc", "steps": readings.STEPS, "task": case.asked(subject)}
            key |= {"subject": subject, "seed": 0, "method": case.method, "keep": case.keep}
            if not rows.has(key):
                rows.add([{**key, **dict.fromkeys(cases.VALUES, float(value(case)) + subject)}])
    shutil.copy(work_rows, folder)


def test_tables_are_of_the_settings_that_they_name(tmp_path, work_rows):
    planted(tmp_path, work_rows, lambda case: 30 + 8 * case.keep + ("means" in case.method))
    lines = {name: make(tmp_path).splitlines() for name, make in readings.TABLES.items()}
    assert {len(each.split("|")) for line in lines.values() for each in line} == {10, 12}
    (tile,) = [line for line in lines["reading"] if line.startswith("| tile 4x4 + means 4x4 at 0 6 |")]
    assert [cell.strip() for cell in tile.split("|")][2:6] == [
        "12.5 %", "1.79 / 1.75 / 1.79", "3.39 / 3.29 / 3.39", "32.5 ± 0.5",
    ]  # fmt: skip
    (tile,) = [line for line in lines["reading_all"] if line.startswith("| tile 4x4 + means 4x4 at 0 4 8, 12.5 % |")]
    assert tile.count("-6.0 [-6.0, -6.0]") == 5
    (means,) = [line for line in lines["reading_compared"] if "| tile 4x4 at 0 1 4 8, 12.5 % |" in line]
    assert means.count("+1.0 [+1.0, +1.0]") == 6
    (layer,) = [line for line in lines["reading_granularity"] if line.startswith("| each layer |")]
    assert layer.split("|")[2:5] == [" 32.5 / 32.5 ", " 33.5 / 33.5 ", " 33.5 / 33.5 "]


def test_rows_are_of_one_study_and_a_mix_costs_as_much_as_the_one(tmp_path, work_rows):
    planted(tmp_path, work_rows, lambda case: 30)
    others = Rows(tmp_path / "reading.csv", (*cases.KEYS, *cases.VALUES), digits=DIGITS)
    second = {"model": "dense", "weights": "abc", "steps": 12, "task": "place", "subject": 1, "seed": 1}
    second |= {"method": "all at 0 1 4 8", "keep": 1.0, **dict.fromkeys(cases.VALUES, 90)}
    others.add([second, dict.fromkeys((*cases.KEYS, *cases.VALUES), "8")])  # the last of other weights, in 8 steps
    rows = readings.ReadingRows(tmp_path)
    assert rows.first("subject-driven", Reading((0, 1, 4, 8))) == 30.5
    for references in (1, 4):
        for setting in reading.AT_EQUAL_WORK:
            mix = rows.mix(setting, reading.ALL_READ, references)
            assert sum(mix.values()) == pytest.approx(1)
            cost = sum(weight / rows.ratio(each, references) for each, weight in mix.items())
            assert len(mix) == 1 or cost == pytest.approx(1 / rows.ratio(setting, references))
    never, second = Reading((0,)), Reading((0, 2, 4, 6, 8, 10))
    assert rows.mix(Reading((0, 2, 4), steps=6), reading.ALL_READ, 1) == {never: 1.0}
    assert rows.mix(second, reading.FEWER, 4) == {Reading(tuple(range(6)), steps=6): 1.0}
    with pytest.raises(ValueError, match="must hold rows of the study 'reading' with 12 steps, got"):
        readings.ReadingRows(tmp_path / "none")
