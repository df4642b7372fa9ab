"""The task's vocabulary, and text encoders that read it: real CLIP and T5 classes whose weights follow a rule.

A prompt is a row of words from a closed vocabulary, such as ``place 1:x3 1:y4 1:right2 1:up1 rows red to-blue``. Each
word says everything about itself (which reference, which axis, how far), so that their order does not matter. Numbers
are coded as sines and cosines and colours as red, green, blue: near things have near codes.

The T5 encoder hands each word's code to the transformer; the CLIP encoder's pooled output is the sum of the codes.
Nothing in them is learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "COLOURS",
    "GRID",
    "LENGTH",
    "OPEN_TASKS",
    "OPERATIONS",
    "PATTERNS",
    "TASKS",
    "WIDTH",
    "offset_words",
    "text_encoders",
    "unknown",
]

LENGTH = 16  # text tokens of a prompt
WIDTH = 96  # of the text embeddings
GRID = 16  # tokens along a side of the largest canvas

TASKS = ("place", "pair", "swap", "local", "global")
OPEN_TASKS = {"open": "place", "open-pair": "pair"}
"""Tasks that leave the scenery open, with the word that begins their prompts; "open" stands where a pattern would."""

PATTERNS = ("solid", "rows", "columns", "dots", "fade")
OPERATIONS = ("inverted", "grey", "rotated", "swapped", "dark")
COLOURS = {
    "red": (220, 50, 47), "blue": (38, 139, 210), "green": (133, 190, 20), "yellow": (250, 190, 30),
    "pink": (211, 54, 130), "teal": (42, 180, 170), "violet": (108, 80, 196), "white": (245, 245, 245),
    "black": (30, 30, 30), "orange": (240, 130, 40), "brown": (150, 110, 80), "slate": (140, 150, 160),
}  # fmt: skip

_SPECIAL = ("<pad>", "<eos>", "<unk>")
_FREQUENCIES = (1.0, 0.398, 0.158, 0.063)


def offset_words(reference: int, dx: int, dy: int) -> list[str]:
    """How far a subject moves, in tokens: ``["1:right2", "1:up1"]``; 0 is ``right0`` and ``down0``."""
    x = f"right{dx}" if dx >= 0 else f"left{-dx}"
    y = f"down{dy}" if dy >= 0 else f"up{-dy}"
    return [f"{reference}:{x}", f"{reference}:{y}"]


def _codes() -> dict[str, Tensor]:
    """Each word's code of WIDTH numbers and norm 2, in the order of the vocabulary."""
    codes: dict[str, Tensor] = {}
    start = 0

    def put(word: str, values: list[float], at: int) -> None:
        code = torch.zeros(WIDTH)
        code[at : at + len(values)] = torch.tensor(values)
        codes[word] = 2 * code / code.norm()

    for words in (TASKS, PATTERNS, OPERATIONS):
        for i, word in enumerate(words):
            put(word, [1.0], start + i)
        start += len(words)
    for prefix in ("", "to-"):
        for name, rgb in COLOURS.items():
            values = [c / 127.5 - 1 for c in rgb]
            put(prefix + name, [*values, (3 - sum(v * v for v in values)) ** 0.5], start)
        start += 4
    for reference in (1, 2):
        for axis in range(2):
            for place in range(GRID):
                put(f"{reference}:{'xy'[axis]}{place}", _waves(place), start)
            start += 8
            for offset in range(-GRID, GRID + 1):
                steps = (offset, 0) if axis == 0 else (0, offset)
                put(offset_words(reference, *steps)[axis], _waves(offset), start)
            start += 8
    put("open", [1.0], start)  # last, so that the codes and numbers of all other words are what they always were
    return codes


def _waves(number: int) -> list[float]:
    angles = torch.tensor(_FREQUENCIES) * number
    return [*angles.cos().tolist(), *angles.sin().tolist()]


def unknown(prompt: str) -> list[str]:
    """Words of a prompt that the small model does not know.

    Examples
    --------
    >>> unknown("place 1:x3 on a beach")
    ['on', 'a', 'beach']
    """
    known = _codes()
    return [word for word in prompt.split() if word not in known]


def text_encoders() -> dict[str, Any]:
    """Tokenizers and text encoders of the small pipeline, by the names of ``FluxKontextPipeline``'s components.

    Returns
    -------
    dict
        ``tokenizer``, ``text_encoder`` (CLIP), ``tokenizer_2``, ``text_encoder_2`` (T5). float32, on the CPU.

    Examples
    --------
    >>> parts = text_encoders()
    >>> parts["tokenizer_2"]("place red to-blue").input_ids
    [3, 18, 31, 1]
    """
    codes = _codes()
    tokenizers = [_tokenizer(codes) for _ in range(2)]
    with seeded(0):
        clip, t5 = _clip(codes), _t5(codes)
    return {
        "tokenizer": tokenizers[0], "text_encoder": clip, "tokenizer_2": tokenizers[1], "text_encoder_2": t5,
    }  # fmt: skip


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the CPU's global random stream starts at `seed`; afterwards it is what it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _tokenizer(codes: dict[str, Tensor]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate((*_SPECIAL, *codes))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=LENGTH
    )


def _table(codes: dict[str, Tensor]) -> Tensor:
    return torch.cat([torch.zeros(len(_SPECIAL), WIDTH), torch.stack(list(codes.values()))])


def _clip(codes: dict[str, Tensor]) -> Any:
    """One layer that attends to all words alike: the pooled output, at <eos>, is the normalised sum of the codes."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(_SPECIAL) + len(codes), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1,
            num_attention_heads=4, max_position_embeddings=LENGTH, projection_dim=WIDTH, pad_token_id=0,
            bos_token_id=1, eos_token_id=1,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
            if name.endswith(("v_proj.weight", "out_proj.weight")):
                parameter.copy_(torch.eye(WIDTH))
            if name.endswith("token_embedding.weight"):
                parameter.copy_(_table(codes))
    return model.eval().requires_grad_(False)


def _t5(codes: dict[str, Tensor]) -> Any:
    """One layer that adds nothing: each word's embedding is its code and a random vector of its own, normalised."""
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(
        T5Config(
            vocab_size=len(_SPECIAL) + len(codes), d_model=WIDTH, d_kv=24, d_ff=WIDTH, num_layers=1, num_heads=4,
            relative_attention_num_buckets=4, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    own = torch.randn(len(_SPECIAL) + len(codes), WIDTH, generator=torch.Generator().manual_seed(0)) * WIDTH**-0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".o.weight", ".wo.weight")):
                parameter.zero_()
        model.shared.weight.copy_(_table(codes) + own)
    return model.eval().requires_grad_(False)
