"""Pipelines with the rivals, `ToMe` and `Downscale`, against the model run by hand on a really shrunk photo."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.models.qwen import frequencies
from tests.pictures import generator, picture
from tests.pipelines import CASES, Case, each_case

RIVALS = (sra.Downscale(), sra.Downscale(source="latents"), sra.ToMe())
GENERATION = 64  # tokens of every case's output


def config(rival: Any, budget: Any = 0.25) -> sra.SparseRef:
    return sra.SparseRef(select=rival, budget=budget)


def in_turn(case: Case) -> Any:
    """One rival for a case; neighbours, which are of one family, have different ones."""
    return RIVALS[list(CASES).index(case.name) % len(RIVALS)]


def first_call(case: Case, pipe: Any, **kwargs: Any) -> tuple[dict[str, Any], Tensor, np.ndarray]:
    """What the pipeline gave to its first transformer call, the generation rows that came back, and the images."""
    calls: list[Any] = []

    def note(module: torch.nn.Module, args: tuple, given: dict[str, Any]) -> None:
        calls.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()})

    def answer(module: torch.nn.Module, args: tuple, output: Any) -> None:
        calls.append(output[0][:, :GENERATION].clone())

    # Before the patch's own hooks what the pipeline gives, after them what it gets.
    hooks = [
        pipe.transformer.register_forward_pre_hook(note, with_kwargs=True, prepend=True),
        pipe.transformer.register_forward_hook(answer),
    ]
    try:
        images = case.call(pipe, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls[0], calls[1], images


# -- whole pipelines -------------------------------------------------------------------------------------------------


@each_case(lambda case: case.name != "qwen_edit_inpaint")  # which samples what its VAE encodes
def test_every_pipeline_runs_on_a_quarter_and_is_restored(case):
    pipe = case.build()
    call = {"references": max(case.references), "batch": max(case.batch), "cfg": case.cfg, "steps": 2}
    torch.manual_seed(5)
    dense = case.call(pipe, **call)
    random = torch.get_rng_state()
    assert random.equal(torch.manual_seed(5).get_state())  # the pipelines draw from their own generator
    again = in_turn(case)
    for rival in RIVALS:
        with sra.patched(pipe, config(rival)) as handle:
            images = case.call(pipe, **call)
            sizes = handle.record.layout.sizes
            quarter = sum(sizes) // 4  # grids are even, so a quarter is a grid
            assert [step.kept for step in handle.record.steps] == [quarter] * 2
            kinds = ["sparse", "cached" if case.name == "klein_kv" else "sparse"]
            assert [step.kind for step in handle.record.steps] == kinds
            rows = handle.summary("dict")["references"]
            assert [row["tokens"] for row in rows] == list(sizes)
            assert np.isfinite(images).all()
            assert np.abs(images - dense).max() > 1e-3
            assert torch.get_rng_state().equal(random)
            if rival is again:
                assert np.array_equal(case.call(pipe, **call), images)
    assert np.array_equal(case.call(pipe, **call), dense)


@each_case()
def test_a_whole_budget_is_the_dense_run(case):
    pipe = case.build()
    with sra.patched(pipe, config(in_turn(case), 1.0)):
        assert np.array_equal(case.call(pipe, steps=2), case.dense(steps=2))


def shrunk_by_pillow(image: PIL.Image.Image, height: int, width: int) -> Tensor:
    """The photo at another size, in float channels (Pillow's bicubic filter is antialiased), (1, 3, H, W)."""
    channels = np.moveaxis(np.asarray(image, dtype=np.float32) / 127.5 - 1, -1, 0)
    small = [np.asarray(PIL.Image.fromarray(c).resize((width, height), PIL.Image.Resampling.BICUBIC)) for c in channels]
    return torch.from_numpy(np.stack(small)).clamp(-1, 1)[None]


def places(frame: int, grid: tuple[int, int], small: tuple[int, int]) -> Tensor:
    """(frame, y, x) of the smaller grid's tokens in the units of the original one."""
    rows = [
        (frame, (i + 0.5) * grid[0] / small[0] - 0.5, (j + 0.5) * grid[1] / small[1] - 0.5)
        for i in range(small[0])
        for j in range(small[1])
    ]
    return torch.tensor(rows)


@torch.no_grad()
@pytest.mark.parametrize(("budget", "small"), [(0.25, (4, 6)), (0.4, (5, 7))])
def test_kontext_equals_the_model_on_a_really_shrunk_photo(budget, small):
    case = CASES["kontext"]
    pipe = case.build()
    call = {"batch": 2, "images_per_prompt": 2}
    given, dense, _ = first_call(case, pipe, **call)
    assert given["hidden_states"].shape[:2] == (4, GENERATION + 8 * 12)
    with sra.patched(pipe, config(sra.Downscale(), budget)) as handle:
        _, got, _ = first_call(case, pipe, **call)
        assert handle.record.steps[0].kept == small[0] * small[1]

    pixels = torch.cat([shrunk_by_pillow(picture(48, 32, seed), small[0] * 4, small[1] * 4) for seed in (0, 1)])
    z = pipe.vae.encode(pixels).latent_dist.mode()
    z = (z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    tokens = z.reshape(2, 4, small[0], 2, small[1], 2).permute(0, 2, 4, 1, 3, 5).reshape(2, -1, 16).repeat(2, 1, 1)
    ids = places(1, (8, 12), small)
    out = pipe.transformer(
        **given
        | {
            "hidden_states": torch.cat([given["hidden_states"][:, :GENERATION], tokens], 1),
            "img_ids": torch.cat([given["img_ids"][:GENERATION], ids]),
        }
    )[0][:, :GENERATION]
    torch.testing.assert_close(got, out, rtol=1e-4, atol=2e-5)
    assert (got - dense).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize(("budget", "smalls"), [(0.25, ((4, 6), (4, 4))), (0.4, ((5, 7), (5, 5)))])
def test_klein_equals_the_model_on_really_shrunk_photos(budget, smalls):
    case = CASES["klein"]
    pipe = case.build()
    call = {"batch": 2, "references": 2}
    given, dense, _ = first_call(case, pipe, **call)
    with sra.patched(pipe, config(sra.Downscale(), budget)):
        _, got, _ = first_call(case, pipe, **call)

    rows, ids = [given["hidden_states"][:, :GENERATION]], [given["img_ids"][:, :GENERATION].float()]
    for i, (small, (width, height)) in enumerate(zip(smalls, case.sizes, strict=False)):
        z = pipe.vae.encode(shrunk_by_pillow(picture(width, height, i), small[0] * 8, small[1] * 8)).latent_dist.mode()
        z = z.reshape(1, 4, small[0], 2, small[1], 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 16, *small)
        norm = pipe.vae.bn
        z = (z - norm.running_mean.view(1, -1, 1, 1)) / (norm.running_var.view(1, -1, 1, 1) + norm.eps).sqrt()
        rows.append(z.flatten(2).mT.repeat(2, 1, 1))
        frame = places(10 * (i + 1), (height // 8, width // 8), small)
        ids.append(torch.nn.functional.pad(frame, (0, 1)).expand(2, -1, -1))
    out = pipe.transformer(**given | {"hidden_states": torch.cat(rows, 1), "img_ids": torch.cat(ids, 1)})
    torch.testing.assert_close(got, out[0][:, :GENERATION], rtol=1e-4, atol=2e-5)
    assert (got - dense).abs().max() > 0.01


def rotations(positions: Tensor, dims: tuple[int, ...]) -> Tensor:
    """exp(i p theta^(-2k/d)) of (K, 3) positions in float64: RoPE over three axes, independent of diffusers."""
    parts = []
    for p, d in zip(positions.double().T, dims, strict=True):
        angles = p[:, None] * 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        parts.append(torch.complex(angles.cos(), angles.sin()))
    return torch.cat(parts, 1).to(torch.complex64)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "budget"), [("qwen_edit", 0.4), ("qwen_edit_plus", 0.25), ("qwen_edit_plus_2511", 0.4)]
)
def test_qwen_equals_the_model_on_really_shrunk_photos(name, budget):
    case = CASES[name]
    pipe = case.build()
    count = max(case.references[:2])
    smalls = {0.25: ((4, 6), (4, 4)), 0.4: ((5, 7), (5, 5))}[budget][:count]
    given, dense, _ = first_call(case, pipe, references=count)
    with sra.patched(pipe, config(sra.Downscale(), budget)):
        _, got, _ = first_call(case, pipe, references=count)

    generation = given["img_shapes"][0][0]
    rows = [given["hidden_states"][:, :GENERATION]]
    side = torch.arange(8)
    where, furthest = [torch.nn.functional.pad(torch.cartesian_prod(side, side) - 4.0, (1, 0))], 4
    for i, (small, (width, height)) in enumerate(zip(smalls, case.sizes, strict=False)):
        x = shrunk_by_pillow(picture(width, height, i), small[0] * 8, small[1] * 8)
        z = pipe.vae.encode(x[:, :, None]).latent_dist.mode()
        rows.append(z.reshape(1, 4, small[0], 2, small[1], 2).permute(0, 2, 4, 1, 3, 5).reshape(1, -1, 16))
        grid = (height // 8, width // 8)
        centre = torch.tensor([0, grid[0] - grid[0] // 2, grid[1] - grid[1] // 2])
        where.append(places(i + 1, grid, small) - centre)
        furthest = max(furthest, grid[0] // 2, grid[1] // 2)
    dims = pipe.transformer.pos_embed.axes_dim
    text = furthest + torch.arange(given["encoder_hidden_states"].shape[1])
    rope = rotations(torch.cat(where), dims), rotations(text[:, None].expand(-1, 3), dims)
    hook = pipe.transformer.pos_embed.register_forward_hook(lambda module, args, output: rope)
    shapes = [[generation, *((1, *small) for small in smalls)]]
    out = pipe.transformer(**given | {"hidden_states": torch.cat(rows, 1), "img_shapes": shapes})
    hook.remove()
    torch.testing.assert_close(got, out[0][:, :GENERATION], rtol=1e-4, atol=5e-5)
    assert (got - dense).abs().max() > 0.005


@pytest.mark.parametrize("scale_rope", [True, False])
@pytest.mark.parametrize("theta", [10000, 300])
def test_qwen_positions_at_whole_cells_are_the_models_own(scale_rope, theta):
    embed = QwenEmbedRope(theta, [8, 12, 12], scale_rope)
    shapes = [(1, 4, 4), (1, 5, 8), (1, 7, 3)]
    own, _ = embed([shapes], device=torch.device("cpu"), max_txt_seq_len=2)
    at = 16
    for i, (_, height, width) in enumerate(shapes[1:], start=1):
        cells = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
        assert torch.equal(frequencies(embed, i, (1, height, width), cells), own[at : at + height * width])
        at += height * width


# -- the run around them ---------------------------------------------------------------------------------------------


def test_the_small_encoding_is_no_reference_of_the_next_run():
    case = CASES["kontext"]
    pipe = case.build()
    with sra.patched(pipe, config(sra.Downscale())) as handle:
        case.call(pipe)
        # The latents have the grid of the picture before, which the small picture's pixels would fit as well.
        with pytest.raises(sra.PixelsUnavailableError, match='use Downscale\\(source="latents"\\)'):
            case.call(pipe, latents=True)
        images = case.call(pipe)
        assert [tuple(p.shape) for p in handle.record.pixels] == [(1, 3, 32, 48)]
    with sra.patched(pipe, config(sra.Downscale())):
        assert np.array_equal(case.call(pipe), images)
    with sra.patched(pipe, config(sra.Downscale("latents"))) as handle:
        case.call(pipe, latents=True)
        assert handle.record.steps[-1].kept == 24


def test_each_sample_has_its_own_picture_when_each_has_its_own_generator():
    """With a list of generators the pipeline encodes the batch one by one; the last picture stood for all."""
    case = CASES["kontext"]
    pipe = case.build()
    with sra.patched(pipe, config(sra.Downscale())) as handle:
        case.call(pipe, batch=2, generator=[generator(1), generator(2)])
        (pixels,) = handle.record.pixels
    expected = torch.cat([shrunk_by_pillow(picture(48, 32, seed), 32, 48) for seed in (0, 1)])
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def test_half_precision_stays_half():
    case = CASES["kontext"]
    pipe = case.build().to(torch.bfloat16)
    for rival in RIVALS:
        with sra.patched(pipe, config(rival)) as handle:
            given, out, images = first_call(case, pipe)
            assert given["hidden_states"].dtype == out.dtype == torch.bfloat16
            assert handle.record.steps[0].kept == 24
            assert np.isfinite(images).all()


def test_a_varying_budget_makes_the_reference_anew():
    case = CASES["klein"]
    pipe = case.build()
    for rival, kept in ((sra.Downscale(), [24, 35, 48, 96]), (sra.ToMe(), [24, 38, 48, 96])):
        with sra.patched(pipe, config(rival, sra.Pieces((0.25, 0.4, 0.5, 1.0), (0.3, 0.6, 0.9)))) as handle:
            case.call(pipe, steps=4)
            assert [step.kept for step in handle.record.steps] == kept
            assert [step.kind for step in handle.record.steps] == ["sparse"] * 3 + ["dense"]


def test_a_cache_holds_the_largest_of_all_steps():
    case = CASES["klein_kv"]
    pipe = case.build()
    dense = case.call(pipe)
    budgets = ((sra.Linear(0.25, 0.5), 48), (sra.Linear(0.25, 1.0), 96), (sra.Descending(1.0, 0.25), 96))
    for budget, kept in budgets:
        with sra.patched(pipe, config(sra.ToMe(), budget)) as handle:
            images = case.call(pipe)
            assert [step.kept for step in handle.record.steps] == [kept] * 3
        assert np.array_equal(images, dense) == (kept == 96)


class TinyDiT(torch.nn.Module):
    """One attention layer over tokens and sinusoids of their (frame, y, x)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.place = torch.nn.Linear(6, 24), torch.nn.Linear(3, 6)

    def forward(self, x: Tensor, ids: Tensor, timestep: Tensor) -> Tensor:
        q, k, v = self.qkv(x + self.place(ids).sin()).view(*x.shape[:2], 3, 1, 8).transpose(1, 3).unbind(2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).flatten(1, 2)


@torch.no_grad()
def test_a_transformer_that_is_not_from_diffusers():
    model = TinyDiT()
    grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(6.0))
    ids = torch.cat([torch.nn.functional.pad(grid, (1, 0)), torch.nn.functional.pad(grid, (1, 0), value=1)])
    x = torch.randn(2, 48, 6, generator=generator())

    def find(kwargs: dict[str, Any]) -> Any:
        return (0, 24), (sra.Reference(24, 24, (4, 6)),)

    adapter = sra.PlainAdapter(tokens="x", rows={"ids": 0}, find=find, positions="ids")
    handle = sra.patch(model, config(sra.Downscale("latents")), adapter=adapter)
    handle.begin(steps=1)
    got = model(x, ids, torch.tensor(1.0))
    assert got.shape == (2, 48, 8)
    handle.remove()
    tokens = x[:, 24:].reshape(2, 2, 2, 3, 2, 6).mean((2, 4)).reshape(2, 6, 6)
    moved = torch.cat([ids[:24], places(1, (4, 6), (2, 3))])
    torch.testing.assert_close(got[:, :24], model(torch.cat([x[:, :24], tokens], 1), moved, None)[:, :24])

    blind = sra.PlainAdapter(tokens="x", rows={"ids": 0}, find=find)
    for rival, error in ((sra.ToMe(), sra.IncompatibleError), (sra.Downscale(), sra.PixelsUnavailableError)):
        handle = sra.patch(model, config(rival), adapter=blind)
        handle.begin(steps=1)
        with pytest.raises(error):
            model(x, ids, torch.tensor(1.0))
        handle.remove()


# -- refusals --------------------------------------------------------------------------------------------------------


def test_settings_and_pictures_are_refused_in_words(tmp_path):
    with pytest.raises(sra.ConfigError, match='source must be "pixels" or "latents"'):
        sra.Downscale("photo")
    with pytest.raises(sra.ConfigError, match="does not travel to JSON, got ToMe"):
        config(sra.ToMe()).to_json()
    case = CASES["kontext"]
    pipe = case.build()
    with sra.patched(pipe, config(sra.ToMe())) as handle:
        case.call(pipe)
        with pytest.raises(sra.LayoutError, match="rival changed tokens"):
            handle.save_overlay(tmp_path / "kept.png")
        handle.save_budget_strip(tmp_path / "strip.png")
        assert PIL.Image.open(tmp_path / "strip.png").size[0] > 100
        with pytest.raises(sra.SparseRefError, match="with a rival"):
            handle.ranking  # noqa: B018
    with (
        sra.patched(pipe.transformer, config(sra.Downscale())),
        pytest.raises(sra.PixelsUnavailableError, match="a bare transformer is patched"),
    ):
        case.call(pipe)
