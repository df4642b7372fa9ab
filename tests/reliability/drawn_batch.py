"""The items of a random batch, run together and alone."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np

import sparse_ref_attn as sra
from tests.pictures import generator
from tests.pipeline_arguments import PROMPTS, Request
from tests.pipelines import Case, small_pictures

SIZES = ((96, 64), (64, 64), (64, 96), (128, 64), (64, 128), (96, 96))
FLUX_SIZES = ((48, 32), (32, 32), (32, 48), (64, 16), (16, 64))


class BatchItems:
    """One to four items of random references, and the arguments of their calls."""

    def __init__(self, draw: Random, case: Case, pipe: Any) -> None:
        self.case, self.steps = case, draw.choice((1, 2, 3))
        many = max(case.references) > 1 and not case.name.endswith("inpaint")
        cfg = case.cfg and draw.random() < 0.4
        self.counts, self.images, self.each, self.prompts = [], [], [], []
        for i in range(draw.randint(1, 4)):
            count = draw.choice((0, *case.references) if case.text_to_image else case.references)
            sizes = tuple(draw.choice(sizes_of(case)) for _ in range(3))
            request = Request(count if many else min(count, 1), 1, case.side, cfg, sizes, False, i)
            arguments = case.arguments(pipe, request)
            image = arguments.pop("image", None)
            self.images.append([] if image is None else image if isinstance(image, list) else [image])
            self.prompts.append(None if "prompt_embeds" in arguments else PROMPTS[i])
            arguments.pop("prompt", None)
            if draw.random() < 0.2:
                arguments["num_inference_steps"] = draw.choice((1, 2, 4))
            if draw.random() < 0.15:
                arguments["num_images_per_prompt"] = 2
            self.counts.append(count)
            self.each.append(arguments)
        side = {"height": case.side, "width": case.side}
        self.common = {"num_inference_steps": self.steps, "output_type": "np", **side}

    def __repr__(self) -> str:
        sizes = [[getattr(image, "size", None) for image in images] for images in self.images]
        own = [{k: v for k, v in each.items() if k.startswith("num_")} for each in self.each]
        return f"{len(self.images)} items of {sizes}, {self.steps} steps, {own}"

    def together(self, pipe: Any, config: sra.SparseRef | None) -> sra.BatchResult:
        generators = [generator(i) for i in range(len(self.images))]
        with small_pictures():
            return sra.batch(
                pipe, self.prompts, self.images, config=config, generators=generators, each=self.each, **self.common
            )

    def alone(self, pipe: Any, config: sra.SparseRef, i: int) -> tuple[np.ndarray, Any]:
        images = self.images[i]
        image = {} if not images else {"image": images[0] if len(images) == 1 else images}
        with sra.patched(pipe, config) as handle, small_pictures():
            made = pipe(prompt=self.prompts[i], generator=generator(i), **{**self.common, **self.each[i], **image})
            return made.images, handle.record if images else None


def sizes_of(case: Case) -> tuple[tuple[int, int], ...]:
    return FLUX_SIZES if case.side == 32 else SIZES
