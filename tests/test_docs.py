"""What the front page and docs/ say is so: their code runs, their tables are made from the rows, their links exist."""

from __future__ import annotations

import ast
import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
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
from sparse_ref_attn.selection.learned import SHIPPED
from sparse_ref_attn.toy.pipeline import toy_pipeline
from sparse_ref_attn.types import Reference, TokenLayout
from tests.pictures import picture
from tests.pipelines import CASES
from tests.tiny_models import sharpen
from tests.training.batches import Batch, build, lora

ROOT = Path(__file__).resolve().parent.parent
DOCS = tuple(sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "ninja_build.md",
    "csrc/README.md",
    "csrc/emulator/README.md",
    "benchmarks/README.md",
    "benchmarks/RESULTS.md",
    "sparse_ref_attn/assets/toy/README.md",
    *DOCS,
    "integrations/comfyui/README.md",
)


published = cache(named_model)  # whose work is asked alone


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


def test_the_pages_batch_runs(capsys: pytest.CaptureFixture) -> None:
    (code,) = blocks("docs/batches.md")
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
    """As it stands, on a tiny pipeline saved under the model's name; a card is not needed here."""
    monkeypatch.chdir(tmp_path)
    pipe = tiny_kontext()
    small = type(pipe)
    pipe.__class__ = small.__mro__[1]
    pipe.save_pretrained("black-forest-labs/FLUX.1-Kontext-dev")
    monkeypatch.setattr(small.__mro__[1], "__call__", small.__call__)
    picture(48, 32).save("photo.jpg")
    real, choices, undo = blocks("README.md")
    names: dict[str, Any] = {}
    exec(real.replace('pipe.to("cuda")', "pipe.to(torch.float32)"), names)
    assert names["image"].size == (32, 32)
    assert (tmp_path / "out.png").stat().st_size > 100
    assert "cached" in capsys.readouterr().out
    exec(choices, names)
    names["photo"] = picture(48, 32)
    exec(undo, names)
    assert names["handle"].record.steps[0].kind == "profile"


def test_the_choices_run_and_replace_each_other() -> None:
    names = {"pipe": tiny_kontext(), "photo": picture(48, 32), "sra": sra}
    for block in blocks("docs/choosing.md"):
        exec(block, names)
    handle = sra.patch(names["pipe"], sra.SparseRef("grid", 0.5))
    names["pipe"](prompt="a cup", image=names["photo"])
    assert handle.record.steps[-1].kept == 48
    handle.remove()


def test_the_shorter_pages_code_runs(capsys: pytest.CaptureFixture) -> None:
    """Memory, step caches, other codebases and the ops."""
    for page, count in (("docs/memory.md", 1), ("docs/step-caches.md", 1), ("docs/other-codebases.md", 5)):
        codes = blocks(page)
        assert len(codes) == count
        for code in codes:
            exec(code, {"pipe": tiny_kontext(), "sra": sra})
    assert "FLOP ratio" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["README.md", *DOCS])
def test_every_block_of_python_compiles(page: str) -> None:
    for source in blocks(page):
        compile(source, page, "exec")


def test_the_pages_fine_tuning_runs() -> None:
    patched, function = (
        next(block for block in blocks("docs/training.md") if word in block)
        for word in ("patch_for_training", "drop_ref")
    )
    model, batch = lora(build("kontext")), Batch("kontext")
    names = {"sra": sra, "transformer": model, "accelerator": Accelerator(cpu=True), "training_step": batch.loss}
    exec(patched, names)
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert 0 < names["handle"].kept[0].kept <= sum(batch.sizes)
    names |= {"generator": torch.Generator(), "reference": torch.randn(2, 64, 3), "reference_ids": torch.zeros(64, 3)}
    exec(function, names)
    assert names["reference"].shape[1] == len(names["reference_ids"]) < 64


def test_the_pages_learned_selector_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(SHIPPED, "selector.safetensors")
    pipe = toy_pipeline()
    exec(next(block for block in blocks("docs/training.md") if "Learned" in block), {"pipe": pipe, "sra": sra})


def test_the_pages_reference_cache_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipe, photo = CASES["klein_kv"].build(), picture(64, 96)
    call = {"prompt": "a cup", "image": [photo], "height": 64, "width": 64, "max_sequence_length": 48}
    call |= {"text_encoder_out_layers": (1, 2, 3), "num_inference_steps": 2}
    names = {"pipe": pipe, "sra": sra, "call": call}
    for block in blocks("docs/reference-cache.md"):
        if 'execute="cache"' in block:
            exec(block, names)
            pipe(**call)
    assert names["handle"].record.steps[0].kind == "cached"


def test_the_pages_reading_per_tile_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipe, call = CASES["klein"].build(), {"prompt": "a cup", "image": [picture(64, 96)], "height": 64, "width": 64}
    call |= {"max_sequence_length": 48, "text_encoder_out_layers": (1, 2, 3), "num_inference_steps": 3}
    names = {"pipe": pipe, "sra": sra, "call": call}
    exec(next(block for block in blocks("docs/reference-cache.md") if 'per="tile"' in block), names)
    assert names["handle"].record.steps[1].means > 0
    assert (tmp_path / "tile.png").stat().st_size > 1000


def test_the_pages_ratios_of_the_reference_cache_are_those_of_estimate() -> None:
    page = (ROOT / "docs/reference-cache.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (\d) references? \| ([\d.]+)x \| ([\d.]+)x \| ([\d.]+)x \|$", page, re.MULTILINE)
    assert [line[0] for line in lines] == ["1", "2", "4"]
    model = published("klein-9b-kv")
    for count, *ratios in lines:
        for execute, ratio in zip(("tokens", "cache", "both"), ratios, strict=True):
            config = sra.SparseRef("edges", 0.25, execute)
            e = sra.estimate(model, references=[(1024, 1024)] * int(count), steps=4, config=config)
            assert f"{e.flop_ratio:.2f}" == ratio


def test_the_pages_ratios_of_stored_references_are_those_of_estimate() -> None:
    page = (ROOT / "docs/reference-cache.md").read_text(encoding="utf-8")
    lines = re.findall(
        r"^\| ([\w.\- ]+), (\d) references? \| ([\d.]+)x \| ([\d.]+)x \| ([\d.]+) GiB \|$", page, re.MULTILINE
    )
    assert len(lines) == 4
    names = {"FLUX.1 Kontext": "kontext", "FLUX.2 dev": "flux2-dev", "Qwen-Image-Edit": "qwen-image-edit"}
    for name, count, quarters, once, held in lines:
        for refresh, ratio in ((None, quarters), (sra.Never(), once)):
            config = sra.SparseRef("grid", 1.0, execute=sra.Cache(refresh=refresh))
            e = sra.estimate(published(names[name]), references=[(1024, 1024)] * int(count), steps=28, config=config)
            assert f"{e.flop_ratio:.2f}" == ratio
            assert f"{e.memory.dense_reference_kv / 2**30:.1f}" == held


def test_the_pages_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (source,) = (block for block in blocks("docs/few-steps.md") if "in_flight" in block)
    names: dict[str, Any] = {"pipe": tiny_kontext(), "photo": picture(48, 32), "sra": sra}
    sharpen(names["pipe"].transformer, 2)  # a model that looks everywhere alike would keep every token
    first, rest = source.split("ranking = ")
    exec(first, names)
    assert [step.kind for step in names["handle"].record.steps] == ["in_flight", "sparse", "sparse"]
    exec("ranking = " + rest, names)
    names["pipe"](prompt="a cup", image=names["photo"])


def test_the_pages_few_steps_are_what_estimate_says() -> None:
    text = (ROOT / "docs/few-steps.md").read_text(encoding="utf-8").split("<!-- few steps -->")[1]
    rows = [[float(cell) for cell in re.findall(r"\| (\d\.\d\d) ", line + " ")] for line in text.splitlines()[3:7]]
    known = sra.SparseRef("grid", sra.ReCAST().budget)
    for row, config in zip(rows, (sra.ReCAST(), sra.ReCAST(profile="in_flight"), known, known), strict=True):
        for references, ratio in zip((1, 4), row, strict=True):
            sizes = [(1024, 1024)] * references
            e = sra.estimate(published("klein-9b"), references=sizes, steps=4, config=config)
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


def test_every_supported_selector_and_budget_is_on_its_page() -> None:
    text = (ROOT / "docs/choosing.md").read_text(encoding="utf-8")
    selectors = [n for n in sra.selection.__all__ if isinstance(getattr(sra.selection, n), type)]
    names = [n for n in selectors if issubclass(getattr(sra.selection, n), Selector) and n != "Selector"]
    budgets = ["Constant", "Polynomial", "Linear", "Cosine", "Descending", "TopP", "Pieces", "piecewise"]
    missing = [name for name in [*names, *budgets, "Downscale", "ToMe"] if name not in text]
    assert not missing


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    public = [getattr(sra, name) for name in sra.__all__ if not isinstance(getattr(sra, name), (str, ModuleType))]
    missing = {f"{each.__module__}.{each.__qualname__}" for each in public} - set(listed)
    assert not missing  # by its home: a module may have the same name


def literals() -> list[str]:
    """Every string of the package as it is told, what is filled in as "{}"."""
    found = []
    for path in (ROOT / "sparse_ref_attn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def in_order(parts: list[str], text: str) -> bool:
    """Whether `text` has the parts one after the other, whatever stands between them."""
    at = 0
    for part in parts:
        start = text.find(part, at)
        if start < 0:
            return False
        at = start + len(part)
    return True


def test_every_message_of_the_troubleshooting_page_is_told_somewhere() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(messages) > 30
    told = literals()
    for message in messages:
        parts = [part.strip() for part in message.split("…")]
        assert any(in_order(parts, each) for each in told), message


def test_the_readme_is_short_and_ends_in_pages_that_the_site_has() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    missing = [page for page in DOCS if page.removeprefix("docs/") not in nav]
    assert not missing
