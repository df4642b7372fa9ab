"""The procedural task: deterministic, exact, and split by identity."""

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.toy import words
from sparse_ref_attn.toy.backgrounds import pattern
from sparse_ref_attn.toy.scenes import TOKEN, recolour, scene
from sparse_ref_attn.toy.sprites import SUBJECTS, held_out, load_sprites
from sparse_ref_attn.toy.textures import PALETTE
from sparse_ref_attn.toy.words import LENGTH, OPEN_TASKS, OPERATIONS, TASKS, seeded, text_encoders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Discs of many colours with a stripe: subjects with an exact mask."""
    root = tmp_path_factory.mktemp("sprites")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :96] - 47.5
    for i in range(40):
        pixels = np.zeros((96, 96, 4), np.uint8)
        pixels[..., :3] = rng.integers(0, 256, 3)
        pixels[30:50, :, :3] = rng.integers(0, 256, 3)
        pixels[:, 20:50, :3] = rng.integers(0, 256, 3)
        pixels[..., 3] = 255 * (x**2 + y**2 < 46**2)
        Image.fromarray(pixels).save(root / f"{i:04x}.png")
    return str(root)


def seen(at, seed, **more):
    return scene(at, (0, seed), **more)


def test_split_is_by_name_disjoint_and_complete(folder):
    train, held = (load_sprites(folder, split).names for split in ("train", "held-out"))
    assert not set(train) & set(held)
    assert len(train) + len(held) == 40
    assert all(held_out(name) for name in held)


@pytest.mark.parametrize("task", [*TASKS, *OPEN_TASKS])
def test_a_seed_gives_one_pair(folder, task):
    sprites = load_sprites(folder, "train")
    first, again, other = (seen(sprites, seed, task=task) for seed in (1, 1, 2))
    assert first.prompt == again.prompt
    assert np.array_equal(first.target, again.target)
    assert all(map(np.array_equal, first.references, again.references))
    assert not np.array_equal(first.target, other.target)


@pytest.mark.parametrize("grid", [8, 16])
@pytest.mark.parametrize("task", ["place", "pair", "open", "open-pair"])
def test_a_placed_subject_is_the_references(folder, task, grid):
    """Where a subject is opaque, its pixels in the answer are those of its reference, moved as the prompt says."""
    sprites = load_sprites(folder, "held-out")
    for seed in range(8):
        pair = seen(sprites, seed, task=task, grid=grid, split="held-out")
        said = pair.prompt.split()
        assert len(pair.references) == len(pair.places) == (2 if task in ("pair", "open-pair") else 1)
        for i, ((x, y, size), reference, alpha) in enumerate(
            zip(pair.places, pair.references, pair.masks, strict=True), 1
        ):
            moves = [w.removeprefix(f"{i}:") for w in said if w.startswith(f"{i}:")][2:]
            dx, dy = (int(m.strip("abcdefghijklmnopqrstuvwxyz")) * (-1 if m[0] in "lu" else 1) for m in moves)
            old = np.s_[(y - dy) * TOKEN : (y - dy + size) * TOKEN, (x - dx) * TOKEN : (x - dx + size) * TOKEN]
            new = np.s_[y * TOKEN : (y + size) * TOKEN, x * TOKEN : (x + size) * TOKEN]
            opaque = alpha[old] == 1
            assert opaque.sum() > 0.3 * opaque.size
            assert np.array_equal(pair.target[new][opaque], reference[old][opaque])


def test_open_scenery_is_in_the_answer_and_not_in_the_prompt(folder):
    """The prompts say where the subject goes, as those of "place" do, and "open" in place of a pattern."""
    sprites = load_sprites(folder, "held-out")
    for task, asked in OPEN_TASKS.items():
        for seed in range(8):
            pair, closed = (seen(sprites, seed, task=name, split="held-out") for name in (task, asked))
            assert pair.task == task
            assert pair.prompt.split() == [*closed.prompt.split()[: 1 + 4 * len(pair.references)], "open"]
            assert pair.places == closed.places
            clear = pair.target[pair.mask == 0]
            named = np.isclose(clear[:, None], PALETTE, atol=1e-5).all(-1)
            assert named.any(-1).mean() > 0.75
            assert named.any(0).sum() == 2


def test_the_examples_of_old_are_what_they_were():
    """Rows that were measured before scenery could be left open stay valid."""
    sprites = load_sprites(SUBJECTS, "held-out")
    for task, prompt, places in (
        ("place", "place 1:x3 1:y1 1:left5 1:up3 fade teal to-brown", ((3, 1, 8),)),
        (
            "pair",
            "pair 1:x1 1:y3 1:left8 1:down0 2:x10 2:y10 2:right8 2:down9 fade slate to-orange",
            ((1, 3, 6), (10, 10, 6)),
        ),
        ("swap", "swap columns blue to-slate", ((8, 4, 8),)),
        ("local", "local rotated", ((8, 4, 8),)),
        (None, "global dark", ((7, 3, 8),)),
    ):
        pair = scene(sprites, (7, 3), task=task, split="held-out")
        assert (pair.prompt, pair.places) == (prompt, places)


def test_the_codes_of_old_words_are_what_they_were():
    """Without the word that came last the encoders give the same, bit for bit."""
    codes = words._codes()
    old = {word: code for word, code in codes.items() if word != "open"}
    assert list(codes) == [*old, "open"]
    ids = torch.arange(len(old) + 3)[None]
    with seeded(0):
        before = words._clip(old), words._t5(old)
    with seeded(0):
        after = words._clip(codes), words._t5(codes)
    assert torch.equal(before[1](ids)[0], after[1](ids)[0])
    for start in range(3, len(old), 12):
        some = ids[:, start : start + 12]
        assert torch.equal(before[0](some).pooler_output, after[0](some).pooler_output)
    assert all(codes["open"] @ code == 0 for code in old.values())


def test_a_swap_keeps_the_subject_and_changes_the_rest(folder):
    pair = seen(load_sprites(folder, "held-out"), 3, task="swap", split="held-out")
    opaque, clear = pair.masks[0] == 1, pair.masks[0] == 0
    assert np.array_equal(pair.target[opaque], pair.references[0][opaque])
    named = pattern(*(word.removeprefix("to-") for word in pair.prompt.split()[1:]), side=128)
    assert np.array_equal(pair.target[clear], named[clear])


def test_recolouring_is_local_or_global(folder):
    sprites = load_sprites(folder, "held-out")
    local, whole = (seen(sprites, 5, task=task, split="held-out") for task in ("local", "global"))
    clear = local.masks[0] == 0
    assert np.array_equal(local.target[clear], local.references[0][clear])
    assert np.array_equal(whole.target, recolour(whole.references[0], whole.prompt.split()[1]))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_recolouring_stays_in_range(operation):
    picture = np.random.default_rng(0).random((4, 4, 3), np.float32)
    assert 0 <= recolour(picture, operation).min() <= recolour(picture, operation).max() <= 1


def test_every_prompt_is_in_the_vocabulary_and_fits(folder):
    sprites = load_sprites(folder, "train")
    tokenizer = text_encoders()["tokenizer"]
    for seed in range(200):
        ids = tokenizer(seen(sprites, seed, grid=8, task=None if seed % 4 else "open-pair").prompt).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= LENGTH


def test_the_encoders_do_not_mind_the_order_of_words():
    parts = text_encoders()
    ids = parts["tokenizer"](["place 1:x3 red to-blue", "to-blue red 1:x3 place"], return_tensors="pt").input_ids
    pooled = parts["text_encoder"](ids).pooler_output
    words = parts["text_encoder_2"](ids)[0]
    assert (pooled[0] - pooled[1]).abs().max() < 1e-5
    assert (words[0, :4] - words[1, :4].flip(0)).abs().max() < 1e-5
    assert (pooled[0] - parts["text_encoder"](ids[:1] + 1).pooler_output).abs().max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"grid": 7}, "grid must be 8 or 16"), ({"task": "erase"}, "task must be one of 'place'")],
)
def test_bad_arguments(folder, arguments, said):
    with pytest.raises(ConfigError, match=said):
        seen(load_sprites(folder, "train"), 0, **arguments)


def test_bad_folders(tmp_path):
    with pytest.raises(ConfigError, match=r"must exist, got .*nowhere"):
        load_sprites(str(tmp_path / "nowhere"), "train")
    with pytest.raises(ConfigError, match="got none for train"):
        load_sprites(str(tmp_path), "train")
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(ConfigError, match=r"format that Pillow reads, got .*a\.png"):
        load_sprites(str(tmp_path), "held-out" if held_out("a") else "train")
    with pytest.raises(ConfigError, match="split must be"):
        load_sprites(str(tmp_path), "all")
