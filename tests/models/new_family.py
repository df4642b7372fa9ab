"""What a user does with a model, done with one of a new family: a program for a copy of the package that has it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as module
from PIL import Image

import sparse_ref_attn as sra
from sparse_ref_attn.cli import main
from sparse_ref_attn.eval.examples import Example
from sparse_ref_attn.eval.models import EvalModel
from sparse_ref_attn.training.batches import training_of
from sparse_ref_attn.training.folder import FolderBatches
from sparse_ref_attn.training.loop import TrainConfig, train
from sparse_ref_attn.training.lora import add_lora, save_lora
from tests import tiny_models
from tests.pictures import generator, picture

GRID = sra.SparseRef("grid", 0.25)
AREA = 64**2  # of its pictures, which it makes a million pixels large


def call(pipe: Any, seed: int = 0) -> np.ndarray:
    given = {"prompt": "a cup", "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
    return pipe(image=picture(64, 64, seed), generator=generator(seed), **given).images


def patched(pipe: Any) -> None:
    dense = call(pipe)
    with sra.patched(pipe, sra.SparseRef("grid", 1.0)):
        assert np.array_equal(call(pipe), dense)
    for execute, kind in ((sra.Tokens(), "sparse"), (sra.Cache(refresh=sra.Every(2)), "cached")):
        with sra.patched(pipe, sra.SparseRef("mass", 0.25, execute)) as handle:
            assert type(handle._generations.adapter).__module__ == "sparse_ref_attn.models.fresh"
            assert not np.array_equal(call(pipe), dense)
        assert (handle.record.steps[-1].kind, handle.record.steps[-1].kept) == (kind, 16), handle.summary()
    assert np.array_equal(call(pipe), dense)


def estimated() -> None:
    assert main(["estimate", "--model", "fresh-model", "--references", "1"]) == 0
    assert main(["estimate", "--model", "fresh-model", "--references", "2"]) == 2


def batched(pipe: Any) -> None:
    given = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
    result = sra.batch(
        pipe, ["a cup", "a blue cup"], [[picture(64, 64, 0)], [picture(64, 32, 1)]], config=GRID,
        generators=[generator(0), generator(1)], **given,
    )  # fmt: skip
    assert (result.joined, result.alone) == (2, 0)
    with sra.patched(pipe, GRID):
        assert np.allclose(result.images[0], call(pipe)[0], atol=1e-3)
    try:
        sra.batch(pipe, ["a cup"], [[]], config=GRID)
    except sra.ConfigError as error:
        assert "LongCatImageEditPipeline needs a reference for every item" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a call without a reference must be refused")


def evaluated(pipe: Any) -> None:
    """The tests' processor cannot be saved: the pipeline stands in for what diffusers would load."""
    diffusers.DiffusionPipeline.from_pretrained = lambda *arguments, **settings: pipe
    model = EvalModel("new", "meituan-longcat/LongCat-Image-Edit", steps=2, device="cpu", more={"guidance_scale": 1.0})
    pictures = [picture(64, 64, 0), picture(64, 64, 1)]
    example = Example("0", "edit", tuple(pictures), "a cup")  # two references of a model of one: side by side
    assert isinstance(model.generate(example, 0), Image.Image)


def trained(pipe: Any, folder: Path) -> None:
    data = folder / "data"
    data.mkdir()
    picture(64, 64, 0).save(data / "a.png")
    (data / "metadata.jsonl").write_text(json.dumps({"reference": "a.png", "target": "a.png", "prompt": "the same"}))
    batches = FolderBatches(str(data), 2, side=64, text_tokens=32)
    batches.check(pipe)
    add_lora(pipe.transformer, 2, training_of(pipe).lora)
    before = {name: p.detach().clone() for name, p in pipe.transformer.named_parameters() if p.requires_grad}
    drop = sra.patch_for_training(pipe.transformer, sra.RandomDrop((0.25, 0.5)))
    config = TrainConfig(steps=2, muon_lr=None, precision="no", warmup=0)
    after = train(pipe, batches, config, folder / "run", drop=drop)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    path = save_lora(pipe, folder / "lora", after, None)
    fresh = tiny_models.longcat(diffusers.LongCatImageEditPipeline)().transformer
    fresh.load_lora_adapter(path.parent, weight_name=path.name, adapter_name="default")
    loaded = {name: p for name, p in fresh.named_parameters() if "lora" in name}
    assert loaded.keys() == after.keys()
    assert all(torch.equal(loaded[name].float(), after[name].float()) for name in after)


if __name__ == "__main__":
    folder, published = Path(sys.argv[1]), module.calculate_dimensions
    assert folder in Path(sra.__path__[0]).parents, "the copy of the package must be the one that is imported"
    module.calculate_dimensions = lambda area, ratio: published(min(area, AREA), ratio)
    model = tiny_models.longcat(diffusers.LongCatImageEditPipeline)()
    patched(model)
    estimated()
    batched(model)
    evaluated(model)
    trained(model, folder)
    print("done")
