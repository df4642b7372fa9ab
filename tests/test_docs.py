"""What the front page says is so: its code runs, its table is made from the rows, its links exist."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import sparse_ref_attn as sra
from benchmarks import tables
from sparse_ref_attn.adapters import Adapter
from sparse_ref_attn.adapters.pipeline_facts import PipelineFacts
from sparse_ref_attn.adapters.position_ids import references_from_ids
from sparse_ref_attn.adapters.published_size import PublishedSize
from sparse_ref_attn.adapters.row_arguments import take_rows
from sparse_ref_attn.hooks.diffusers import attention_sites
from sparse_ref_attn.models import named_model
from sparse_ref_attn.selection import References, Selector
from sparse_ref_attn.selection.cells import area_pool
from sparse_ref_attn.types import Reference, TokenLayout
from tests.pictures import picture
from tests.pipelines import CASES
from tests.training.batches import Batch, build, lora

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "ninja_build.md",
    "csrc/README.md",
    "csrc/emulator/README.md",
    "benchmarks/README.md",
    "docs/configurations.md",
    "docs/run.md",
)


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def tiny_kontext() -> Any:
    """A tiny Kontext pipeline that takes the README's call as it stands."""
    pipe = CASES["kontext"].build()
    call = type(pipe).__call__

    class Small(type(pipe)):
        def __call__(self, **kwargs: Any) -> Any:
            return call(self, **{"height": 32, "width": 32, "max_area": 32 * 32, "_auto_resize": False,
                                 "num_inference_steps": 3, "max_sequence_length": 32} | kwargs)  # fmt: skip

    pipe.__class__ = Small
    return pipe


def test_the_readmes_batch_runs(capsys: pytest.CaptureFixture) -> None:
    (code,) = (block for block in blocks("README.md") if "sra.batch(" in block)
    pipe = CASES["klein"].build()
    call = type(pipe).__call__

    class Small(type(pipe)):
        def __call__(self, **kwargs: Any) -> Any:
            return call(self, **{"height": 64, "width": 64, "max_sequence_length": 48,
                                 "text_encoder_out_layers": (1, 2, 3)} | kwargs)  # fmt: skip

    pipe.__class__ = Small
    names = {"pipe": pipe, "cup": picture(64, 64), "bowl": picture(96, 64), "lamp": picture(64, 96), "sra": sra}
    exec(code, names)
    assert [image.size for image in names["done"].images] == [(64, 64)] * 3
    assert [len(handle.record.layout.references) for handle in names["done"].handles[:2]] == [1, 3]
    assert "transformer calls: 8 for several items at once" in capsys.readouterr().out


def test_the_readmes_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    first, choices, door = (
        next(block for block in blocks("README.md") if word in block)
        for word in ("sra.patch(pipe)", "sra.ReCAST()", "attention_mass")
    )
    names = {"pipe": tiny_kontext(), "photo": picture(48, 32), "sra": sra}
    exec(first, names)
    assert names["image"].size == (32, 32)
    assert "kept" in capsys.readouterr().out
    assert (tmp_path / "kept.png").stat().st_size > 1000
    exec(choices, names)
    exec(door, names)
    handle = sra.patch(names["pipe"], sra.SparseRef("grid", 0.5))  # the last choice was replaced, not stacked
    names["pipe"](prompt="a cup", image=names["photo"])
    assert handle.record.steps[-1].kept == 48
    handle.remove()


def test_the_readmes_fine_tuning_runs() -> None:
    patched, function = (
        next(block for block in blocks("README.md") if word in block) for word in ("patch_for_training", "drop_ref")
    )
    model, batch = lora(build("kontext")), Batch("kontext")
    names = {"sra": sra, "transformer": model, "accelerator": Accelerator(cpu=True), "training_step": batch.loss}
    exec(patched, names)
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert 0 < names["handle"].kept[0].kept <= sum(batch.sizes)
    names |= {"generator": torch.Generator(), "reference": torch.randn(2, 64, 3), "reference_ids": torch.zeros(64, 3)}
    exec(function, names)
    assert names["reference"].shape[1] == len(names["reference_ids"]) < 64


def test_the_readmes_reference_cache_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipe, photo = CASES["klein_kv"].build(), picture(64, 96)
    call = {"prompt": "a cup", "image": [photo], "height": 64, "width": 64, "max_sequence_length": 48}
    call |= {"text_encoder_out_layers": (1, 2, 3), "num_inference_steps": 2}
    names = {"pipe": pipe, "sra": sra, "call": call}
    for block in blocks("README.md"):
        if 'execute="cache"' in block:
            exec(block, names)
            pipe(**call)
    assert names["handle"].record.steps[0].kind == "cached"


def test_the_readmes_reading_per_tile_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipe, call = CASES["klein"].build(), {"prompt": "a cup", "image": [picture(64, 96)], "height": 64, "width": 64}
    call |= {"max_sequence_length": 48, "text_encoder_out_layers": (1, 2, 3), "num_inference_steps": 3}
    names = {"pipe": pipe, "sra": sra, "call": call}
    exec(next(block for block in blocks("README.md") if 'per="tile"' in block), names)
    assert names["handle"].record.steps[1].means > 0
    assert (tmp_path / "tile.png").stat().st_size > 1000


def test_the_readmes_ratios_of_the_reference_cache_are_those_of_estimate() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (\d) references? \| ([\d.]+)x \| ([\d.]+)x \| ([\d.]+)x \|$", page, re.MULTILINE)
    assert [line[0] for line in lines] == ["1", "2", "4"]
    model = named_model("klein-9b-kv")
    for count, *ratios in lines:
        for execute, ratio in zip(("tokens", "cache", "both"), ratios, strict=True):
            config = sra.SparseRef("edges", 0.25, execute)
            e = sra.estimate(model, references=[(1024, 1024)] * int(count), steps=4, config=config)
            assert f"{e.flop_ratio:.2f}" == ratio


def test_the_readmes_ratios_of_stored_references_are_those_of_estimate() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(
        r"^\| ([\w.\- ]+), (\d) references? \| ([\d.]+)x \| ([\d.]+)x \| ([\d.]+) GiB \|$", page, re.MULTILINE
    )
    assert len(lines) == 4
    names = {"FLUX.1 Kontext": "kontext", "FLUX.2 dev": "flux2-dev", "Qwen-Image-Edit": "qwen-image-edit"}
    for name, count, quarters, once, held in lines:
        for refresh, ratio in ((None, quarters), (sra.Never(), once)):
            config = sra.SparseRef("grid", 1.0, execute=sra.Cache(refresh=refresh))
            e = sra.estimate(named_model(names[name]), references=[(1024, 1024)] * int(count), steps=28, config=config)
            assert f"{e.flop_ratio:.2f}" == ratio
            assert f"{e.memory.dense_reference_kv / 2**30:.1f}" == held


def test_the_readmes_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (source,) = (block for block in blocks("README.md") if "in_flight" in block)
    names: dict[str, Any] = {"pipe": tiny_kontext(), "photo": picture(48, 32), "sra": sra}
    first, rest = source.split("ranking = ")
    exec(first, names)
    assert [step.kind for step in names["handle"].record.steps] == ["in_flight", "sparse", "sparse"]
    exec("ranking = " + rest, names)
    names["pipe"](prompt="a cup", image=names["photo"])


def test_the_readmes_few_steps_are_what_estimate_says() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- few steps -->")[1]
    rows = [[float(cell) for cell in re.findall(r"\| (\d\.\d\d) ", line + " ")] for line in text.splitlines()[3:7]]
    known = sra.SparseRef("grid", sra.ReCAST().budget)
    for row, config in zip(rows, (sra.ReCAST(), sra.ReCAST(profile="in_flight"), known, known), strict=True):
        for references, ratio in zip((1, 4), row, strict=True):
            sizes = [(1024, 1024)] * references
            e = sra.estimate(named_model("klein-9b"), references=sizes, steps=4, config=config)
            assert round(e.flop_ratio, 2) == ratio


def test_the_contributing_pages_selector_works() -> None:
    source = next(block for block in blocks("CONTRIBUTING.md") if "class Brightness" in block)
    names: dict[str, Any] = {"dataclass": dataclass, "Selector": Selector, "area_pool": area_pool}
    exec(source, names)
    layout = TokenLayout(4, 0, (0, 0), (Reference(0, 4, (2, 2)),))
    photo = torch.zeros(1, 3, 8, 8)
    photo[..., 4:, :4] = 1.0
    references = References(layout, torch.zeros(1, 4, 8), pixels=[photo])
    assert names["Brightness"]().score(references)[0].argmax().item() == 2


def test_the_contributing_pages_adapter_is_one() -> None:
    source = next(block for block in blocks("CONTRIBUTING.md") if "class MyModelAdapter" in block)
    names: dict[str, Any] = {
        "Adapter": Adapter, "references_from_ids": references_from_ids, "take_rows": take_rows,
        "attention_sites": attention_sites, "PipelineFacts": PipelineFacts, "PublishedSize": PublishedSize,
    }  # fmt: skip
    exec(source.replace('"image", ...', '"image"'), names)
    adapter = names["MyModelAdapter"]()
    attention = SimpleNamespace(processor=object())
    model = SimpleNamespace(blocks=[SimpleNamespace(attn=attention)])
    assert [site.kind for site in adapter.sites(model)] == ["single"]
    assert (names["FAMILY"].pipelines[0].name, names["FAMILY"].published["my-model"].pipeline.several) == (
        "MyModelEditPipeline",
        False,
    )


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_made_from_the_rows(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("<!-- table:") >= 1
    assert tables.insert(text) == text, "run python -m benchmarks.tables --write"


def test_what_no_card_has_run_is_said_in_one_place() -> None:
    """Said in every file, it would be untrue in most of them on the day that a card runs the kernels."""
    words = re.compile(r"(not yet|none has|nothing of it has) (been )?(run|proved) on a card|no card has run th", re.I)
    folders = ("sparse_ref_attn", "csrc", "benchmarks", "docs")
    paths = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".cu", ".cuh", ".h", ".md")]
    paths += [ROOT / page for page in PAGES]
    said = {str(path.relative_to(ROOT)) for path in paths if words.search(path.read_text(encoding="utf-8"))}
    assert said == {"docs/configurations.md"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_every_supported_selector_and_budget_is_on_the_front_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    selectors = [n for n in sra.selection.__all__ if isinstance(getattr(sra.selection, n), type)]
    names = [n for n in selectors if issubclass(getattr(sra.selection, n), Selector) and n != "Selector"]
    budgets = ["Constant", "Polynomial", "Linear", "Cosine", "Descending", "TopP", "Pieces", "piecewise"]
    missing = [name for name in [*names, *budgets, "Downscale", "ToMe"] if name not in text]
    assert not missing
