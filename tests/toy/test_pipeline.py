"""The small pipeline: real classes, an autoencoder that keeps subjects, and latents whose tokens share information."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.toy.pipeline import WEIGHTS, knows_open_scenery, toy_pipeline
from sparse_ref_attn.toy.scenes import TOKEN, scene
from sparse_ref_attn.toy.sprites import SUBJECTS, load_sprites
from sparse_ref_attn.toy.textures import KINDS, random_texture
from sparse_ref_attn.training import batches as module
from sparse_ref_attn.training.batches import Batch, ToyBatches, encode


@pytest.fixture(scope="module")
def pipe():
    pipe = toy_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def subjects():
    return load_sprites(SUBJECTS, "held-out")


def pixels(pictures):
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) * 2 - 1


def test_the_held_out_subjects_ship(subjects):
    assert len(subjects) >= 64
    with pytest.raises(ConfigError, match="got none for train"):
        load_sprites(SUBJECTS, "train")


def test_classes_are_diffusers_own(pipe):
    assert {name: type(part).__name__ for name, part in pipe.components.items() if part is not None} == {
        "scheduler": "FlowMatchEulerDiscreteScheduler", "vae": "AutoencoderTiny", "text_encoder": "CLIPTextModel",
        "tokenizer": type(pipe.tokenizer).__name__, "text_encoder_2": "T5EncoderModel",
        "tokenizer_2": type(pipe.tokenizer_2).__name__, "transformer": "FluxTransformer2DModel",
    }  # fmt: skip


def test_the_autoencoder_keeps_held_out_subjects(pipe, subjects):
    pairs = [scene(subjects, (1, i), task="place", split="held-out") for i in range(24)]
    x = pixels([pair.target for pair in pairs])
    with torch.no_grad():
        y = pipe.vae.decode(pipe.vae.encode(x).latents).sample.clamp(-1, 1)
    error = ((x - y) / 2).square().mean(1)
    mask = torch.from_numpy(np.stack([pair.mask for pair in pairs]))
    subject = (error * mask).sum((1, 2)) / mask.sum((1, 2))
    assert -10 * error.mean((1, 2)).log10().mean() > 30
    assert -10 * subject.log10().mean() > 27


def test_the_autoencoder_keeps_open_scenery(pipe):
    """Of every kind, as well as it keeps subjects, or it could not be told whether it was drawn."""
    textures = [random_texture(np.random.default_rng((1, i)), 128) for i in range(32)]
    x = pixels([texture.picture(128) for texture in textures])
    with torch.no_grad():
        y = pipe.vae.decode(pipe.vae.encode(x).latents).sample.clamp(-1, 1)
    kept = -10 * ((x - y) / 2).square().mean((1, 2, 3)).log10()
    assert {texture.kind for texture in textures} == set(KINDS)
    for kind in KINDS:
        assert np.mean([float(k) for k, t in zip(kept, textures, strict=True) if t.kind == kind]) > 27


def test_neighbouring_tokens_share_information(pipe):
    """One token's pixels change the latents of its neighbours: this is no pixel shuffle."""
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    other = x.clone()
    other[..., 3 * TOKEN : 4 * TOKEN, 3 * TOKEN : 4 * TOKEN] *= -1
    with torch.no_grad():
        moved = (pipe.vae.encode(x).latents - pipe.vae.encode(other).latents).abs().amax(1)
    tokens = torch.nn.functional.max_pool2d(moved, 2)[0]
    assert (tokens[2:5, 2:5] > 1e-3).all()
    assert tokens[7].max() < 1e-3  # four tokens away


def test_latents_have_mean_0_and_deviation_1(pipe, subjects):
    pairs = [scene(subjects, (2, i), split="held-out", task="swap") for i in range(16)]
    references = pixels([pair.references[0] for pair in pairs])
    batch = encode(pipe, pixels([pair.target for pair in pairs]), references, [pair.prompt for pair in pairs], 16)
    assert batch.target.shape == batch.references.shape == (16, 256, 64)
    assert abs(batch.target.mean()) < 0.25
    assert 0.8 < batch.target.std() < 1.3


@pytest.mark.parametrize("count", [1, 2])
def test_batches_are_what_the_pipeline_makes(pipe, subjects, count):
    """The tokens, ids and prompts that training sees are those of the pipeline's own call."""
    pair = scene(subjects, (3, 0), task="place" if count == 1 else "pair", split="held-out")
    reference = Image.fromarray(np.uint8(np.concatenate(pair.references, 1) * 255 + 0.5))
    seen = {}

    def look(module, arguments, kwargs):
        seen.update(kwargs)

    hook = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    pipe(
        prompt=pair.prompt, image=reference, height=128, width=128, max_area=128 * 128, _auto_resize=False,
        max_sequence_length=16, num_inference_steps=1, output_type="latent",
    )  # fmt: skip
    hook.remove()
    rounded = pixels([np.asarray(reference, np.float32) / 255])
    batch = encode(pipe, pixels([pair.target]), rounded, [pair.prompt], 16)
    assert torch.equal(seen["img_ids"], batch.arguments["img_ids"])
    assert (seen["hidden_states"][:, 256:] - batch.references).abs().max() < 1e-5
    assert torch.equal(seen["encoder_hidden_states"], batch.arguments["encoder_hidden_states"])
    assert torch.equal(seen["pooled_projections"], batch.arguments["pooled_projections"])
    assert batch.references.shape[1] == 256 * count


def test_toy_batches_repeat_and_differ_by_process(pipe, tmp_path):
    for path in load_sprites(SUBJECTS, "held-out").names[:6]:
        Image.open(f"{SUBJECTS}/{path}.webp").save(tmp_path / f"{_trained_name(path)}.png")
    batches = ToyBatches(str(tmp_path), 2, grid=8)
    one, again, other = (batches(pipe, step, process, 2) for step, process in ((4, 0), (4, 0), (4, 1)))
    assert torch.equal(one.target, again.target)
    assert not torch.equal(one.target, other.target)
    assert one.target.shape[1] == 64
    assert one.weight.min() >= 1
    assert one.weight.max() == 3
    assert (one.subjects == 0).any(-1).any()


def test_toy_batches_leave_scenery_open(pipe, tmp_path):
    """Of the subjects that are placed, and of no others; without a share nothing is drawn differently."""
    for name in load_sprites(SUBJECTS, "held-out").names[:6]:
        Image.open(f"{SUBJECTS}/{name}.webp").save(tmp_path / f"{_trained_name(name)}.png")
    shares = (0.0, 0.5, 1.0)
    prompts = {share: _prompts(pipe, ToyBatches(str(tmp_path), 8, grid=8, open_scenery=share)) for share in shares}
    assert prompts[0.0] == _prompts(pipe, ToyBatches(str(tmp_path), 8, grid=8))
    counts = []
    for share in shares:
        placed = [prompt for prompt in prompts[share] if prompt.split()[0] in ("place", "pair")]
        left_open = [prompt for prompt in prompts[share] if "open" in prompt.split()]
        assert set(left_open) <= set(placed)
        counts.append(len(left_open) / len(placed))
    assert counts[0] == 0
    assert 0.25 < counts[1] < 0.75
    assert counts[2] == 1
    assert {prompt.split()[0] for prompt in prompts[1.0]} > {"place", "pair"}
    with pytest.raises(ConfigError, match=r"open_scenery must lie in \[0, 1\], got 2"):
        ToyBatches(str(tmp_path), 8, open_scenery=2)


def _prompts(pipe, batches, steps=12):
    """What is asked for; nothing is encoded."""
    seen, nothing = [], Batch(torch.zeros(1), torch.zeros(1), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "encode", lambda pipe, targets, references, prompts, *a: seen.extend(prompts) or nothing)
        for step in range(steps):
            batches(pipe, step, 0, 1)
    return seen


def test_weights_say_whether_they_know_open_scenery(tmp_path):
    assert not knows_open_scenery(str(tmp_path))
    for said, known in (({}, False), ({"open_scenery": 0.0}, False), ({"open_scenery": 0.75}, True)):
        (tmp_path / "sparse_ref_attn.json").write_text(json.dumps(said))
        assert knows_open_scenery(str(tmp_path)) is known


def _trained_name(name):
    """A name that the split gives to training."""
    from sparse_ref_attn.toy.sprites import held_out

    return next(f"{name}-{i}" for i in range(100) if not held_out(f"{name}-{i}"))


def test_what_ships_is_trained_and_none_is_not(pipe):
    fresh = toy_pipeline(None).transformer.state_dict()
    assert all(p.dtype == torch.float32 for p in pipe.transformer.parameters())
    assert not fresh["proj_out.weight"].any()  # every block begins as the identity
    assert pipe.transformer.state_dict()["proj_out.weight"].any()
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 20e6


def test_a_folder_without_a_transformer(tmp_path):
    with pytest.raises(ConfigError, match=r"must hold config\.json"):
        toy_pipeline(str(tmp_path))
