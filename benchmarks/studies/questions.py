"""What the model is asked: held-out subjects, each with as many prompts as a study needs, and the right answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from sparse_ref_attn.eval.examples import Example, Examples, of_scene
from sparse_ref_attn.toy.backgrounds import random_pattern
from sparse_ref_attn.toy.scenes import TOKEN, Scene, scene
from sparse_ref_attn.toy.sprites import SUBJECTS, load_sprites
from sparse_ref_attn.toy.words import offset_words

__all__ = ["Question", "held_out"]

SEED = 20260623  # of the scenes
STRIDE = 37  # between subjects, so that the first few are not alike in name


@dataclass(frozen=True)
class Question:
    """One held-out subject (two for "pair") and what is asked of it.

    Parameters
    ----------
    task : str
        One of ``sparse_ref_attn.toy.words.TASKS`` or ``OPEN_TASKS``.
    subject : int
        0 first; below the number of held-out subjects no two are of the same one.
    prompt : int
        0 is the scene's own; further ones ("place" alone) send the same reference elsewhere, on another pattern.
    """

    task: str
    subject: int
    prompt: int = 0

    @property
    def scene(self) -> Scene:
        """How it was drawn."""
        return _scene(self)

    @property
    def example(self) -> Example:
        """The references, the prompt and the answer, which is not rounded."""
        return _example(self)


def held_out(task: str) -> Examples:
    """The questions of a task as a data set, one a subject."""
    names = load_sprites(SUBJECTS, "held-out").names
    keys = [(f"{task}/{subject}/0", task) for subject in range(len(names))]
    return Examples(
        {"questions": task, "seed": SEED}, keys, lambda index: Question(task, index).example,
        targets=True, masks=True, reference_masks=True,
    )  # fmt: skip


@lru_cache(maxsize=512)
def _scene(question: Question) -> Scene:
    sprites = load_sprites(SUBJECTS, "held-out")
    first = question.subject * STRIDE % len(sprites)
    rows = (first, (first + len(sprites) // 2) % len(sprites))[: 2 if question.task.endswith("pair") else 1]
    own = scene(sprites, (SEED, question.subject), task=question.task, subjects=rows, split="held-out")
    return own if question.prompt == 0 else _asked_again(own, question)


@lru_cache(maxsize=512)
def _example(question: Question) -> Example:
    own = question.scene
    boxes = tuple((TOKEN * x, TOKEN * y, TOKEN * (x + size), TOKEN * (y + size)) for x, y, size in own.places)
    name = f"{question.task}/{question.subject}/{question.prompt}"
    return replace(of_scene(name, question.task, own), target=np.clip(own.target, 0, 1), boxes=boxes)


def _asked_again(own: Scene, question: Question) -> Scene:
    if question.task != "place":
        raise ValueError(f"further prompts are made for 'place' alone, got {question.task!r}")
    rng = np.random.default_rng((SEED, question.subject, question.prompt))
    side = own.target.shape[0]
    ((x, y, size),) = own.places
    dx, dy = _offset(own.prompt)
    left, top = (int(v) for v in rng.integers(0, side // TOKEN - size + 1, 2))
    target, named = random_pattern(rng, side)
    figure = load_sprites(SUBJECTS, "held-out").pixels[size * TOKEN][own.subjects[0]].astype(np.float32) / 255
    window = np.s_[top * TOKEN : (top + size) * TOKEN, left * TOKEN : (left + size) * TOKEN]
    target, mask = target.copy(), np.zeros((side, side), np.float32)
    target[window] = target[window] * (1 - figure[..., 3:]) + figure[..., :3]
    mask[window] = figure[..., 3]
    words = ["place", f"1:x{left}", f"1:y{top}", *offset_words(1, left - (x - dx), top - (y - dy)), *named]
    return replace(own, prompt=" ".join(words), target=target, mask=mask, places=((left, top, size),))


def _offset(prompt: str) -> tuple[int, int]:
    """Tokens to the right and down that the prompt moves the first subject."""
    across, down = [word.removeprefix("1:") for word in prompt.split() if word.startswith("1:")][2:]
    return (
        int(across.lstrip("leftrigh")) * (-1 if across.startswith("left") else 1),
        int(down.lstrip("updown")) * (-1 if down.startswith("up") else 1),
    )
