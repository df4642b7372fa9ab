"""A plain adapter's arguments with a row for each token: checked, cut at the right rows, in whatever they come."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import sparse_ref_attn as sra
from sparse_ref_attn.adapters.row_arguments import RowArgument
from tests.pictures import generator

TEXT, GENERATION, REFERENCE = 5, 16, 24
ROWS = GENERATION + REFERENCE
WIDTH = 8


class Tables(NamedTuple):
    cos: Tensor
    sin: Tensor


class Rotary(nn.Module):
    """Joint attention whose rotary table comes as an argument, in one of the ways that people hand it over."""

    def __init__(self, text_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.text_first = nn.Linear(WIDTH, 3 * WIDTH), text_first

    def forward(self, x: Tensor, text: Tensor, rotary: Any, scale: Tensor | None = None) -> Tensor:
        """x (B, rows, WIDTH), text (B, TEXT, WIDTH), cos and sin over the joint sequence."""
        joint = torch.cat([text, x] if self.text_first else [x, text], 1)
        cos, sin = parts(rotary)
        assert cos.shape[-2] == joint.shape[1]
        q, k, v = self.qkv(joint).chunk(3, -1)
        q, k = (each * cos + each.roll(1, -1) * sin for each in (q, k))
        out = scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        out = out[:, text.shape[1] :] if self.text_first else out[:, : x.shape[1]]
        return out if scale is None else out * scale


def parts(rotary: Any) -> tuple[Tensor, Tensor]:
    if isinstance(rotary, dict):
        return rotary["cos"], rotary["sin"]
    if isinstance(rotary, Tensor):
        return (rotary.real, rotary.imag) if rotary.is_complex() else rotary.unbind(0)
    return rotary[0], rotary[1]


WAYS = {  # how the table comes, the axis of its rows
    "tuple": (lambda c, s: (c, s), 0),
    "list": (lambda c, s: [c, s], 0),
    "named tuple": (Tables, 0),
    "mapping": (lambda c, s: {"cos": c, "sin": s}, 0),
    "stacked": (lambda c, s: torch.stack([c, s]), 1),
    "complex": (torch.complex, 0),
    "with batch and head axes": (lambda c, s: (c[None], s[None]), -2),
}


def call(text_first: bool, way: str) -> tuple[dict[str, Any], int]:
    random = generator(1)
    x, text = (torch.randn(1, n, WIDTH, generator=random) for n in (ROWS, TEXT))
    angle = torch.randn(ROWS + TEXT, WIDTH, generator=random)
    table, axis = WAYS[way]
    return {"x": x, "text": text, "rotary": table(angle.cos(), angle.sin())}, axis


def find(kwargs: dict[str, Any]) -> Any:
    return (0, GENERATION), (sra.Reference(GENERATION, REFERENCE, (4, 6)),)


def by_hand(model: Rotary, given: dict[str, Any], kept: Tensor) -> Tensor:
    """The same model on the rows that are left."""
    rows = torch.cat([torch.arange(GENERATION), GENERATION + kept])
    joint = torch.cat([torch.arange(TEXT), TEXT + rows] if model.text_first else [rows, ROWS + torch.arange(TEXT)])
    tables = tuple(t.index_select(-2, joint) for t in parts(given["rotary"]))
    return model(given["x"][:, rows], given["text"], tables)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("named", ["text", TEXT])
def test_a_joint_table_is_cut_at_the_image_streams_rows(way: str, text_first: bool, named: Any) -> None:
    model = Rotary(text_first)
    given, axis = call(text_first, way)
    adapter = sra.PlainAdapter("x", find, {"rotary": (axis, named) if text_first else (axis, 0, named)}, text="text")
    with sra.patched(model, sra.SparseRef("grid", 0.5), adapter=adapter) as handle, torch.no_grad():
        handle.begin(1)
        out = model(**given)
        kept = handle.record.steps[0].selection.indices
    assert 0 < len(kept) < REFERENCE
    torch.testing.assert_close(out[:, :GENERATION], by_hand(model, given, kept)[:, :GENERATION])


@pytest.mark.parametrize("way", WAYS)
def test_a_table_of_other_rows_is_refused(way: str) -> None:
    """With text rows first and no word of them, the wrong rows would stay: silently, for the counts fit."""
    model = Rotary()
    given, axis = call(True, way)
    refusals = {axis: "must have the 40 rows of the image stream on axis", (axis, 3): "3 before and 0 after"}
    for rows, what in refusals.items():
        adapter = sra.PlainAdapter("x", find, {"rotary": rows}, text="text")
        with sra.patched(model, sra.SparseRef("grid", 0.5), adapter=adapter) as handle:
            handle.begin(1)
            with pytest.raises(sra.LayoutError, match=what):
                model(**given)


@pytest.mark.parametrize(
    ("value", "axis", "message"),
    [
        (torch.zeros(ROWS - 1, 4), 0, r"r must have the 40 rows .* got shape \(39, 4\)"),
        (torch.zeros(1, ROWS), 0, r"on axis 0, got shape \(1, 40\)"),
        (torch.zeros(ROWS), 1, r"on axis 1, got shape \(40,\)"),
        (torch.tensor(3.0), 0, r"on axis 0, got shape \(\)"),
        ((torch.zeros(ROWS), torch.zeros(2)), 0, r"got shape \(2,\)"),
        ([[torch.zeros(ROWS)], "no"], 0, "a tuple, list or mapping of such tensors, got str"),
        (lambda: None, 0, "got function"),
        (3, 0, "got int"),
    ],
)
def test_what_is_no_row_argument_is_refused_in_words(value: Any, axis: int, message: str) -> None:
    layout = sra.TokenLayout(ROWS, TEXT, *find({}))
    with pytest.raises(sra.LayoutError, match=message):
        RowArgument("r", axis).cut(value, layout, torch.arange(3))


def test_nothing_given_and_nested_tables() -> None:
    layout = sra.TokenLayout(ROWS, TEXT, *find({}))
    x, rows = torch.arange(ROWS), torch.tensor([0, 7, 39])
    argument = RowArgument("r", 0)
    assert argument.cut(None, layout, rows) is None
    got = argument.cut({"a": [x, None], "b": (x.bool(), x.half())}, layout, rows)
    assert got["a"][0].tolist() == [0, 7, 39]
    assert got["a"][1] is None
    assert got["b"][0].dtype == torch.bool
    assert got["b"][1].dtype == torch.float16


@pytest.mark.parametrize("given", ["0", (0, -1), (0, 1, 2, 3), (), True, (0, "image"), 1.0])
def test_a_setting_that_says_nothing_is_refused(given: Any) -> None:
    with pytest.raises(sra.ConfigError, match="rows must give the axis of an argument's rows"):
        sra.PlainAdapter("x", find, {"rotary": given})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": "y"}, r"must have the arguments y; that of .*Rotary has x, text, rotary, scale"),
        ({"text": "txt"}, "must have the arguments txt"),
        ({"rows": {"rotery": 0}}, "must have the arguments rotery"),
    ],
)
def test_a_name_that_the_forward_does_not_have_is_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    adapter = sra.PlainAdapter(**{"tokens": "x", "find": find} | arguments)
    with pytest.raises(sra.UnsupportedModelError, match=message):
        sra.patch(Rotary(), sra.SparseRef("grid", 0.5), adapter=adapter)


def test_changed_tokens_are_not_placed_by_a_table_with_other_rows() -> None:
    model = Rotary()
    given, _ = call(True, "tuple")
    adapter = sra.PlainAdapter("x", find, {"rotary": (0, "text")}, text="text", positions="rotary")
    with sra.patched(model, sra.SparseRef(sra.Downscale(source="latents"), 0.25), adapter=adapter) as handle:
        handle.begin(1)
        with pytest.raises(sra.IncompatibleError, match="no way to place changed tokens"):
            model(**given)


def test_position_ids_of_another_length_are_refused_in_a_published_model() -> None:
    from tests.pipelines import CASES

    case = CASES["kontext"]
    pipe = case.build()
    own = pipe.transformer.forward

    def longer(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "img_ids": torch.cat([kwargs["img_ids"], kwargs["img_ids"][-1:]])}

    hook = pipe.transformer.register_forward_pre_hook(longer, with_kwargs=True)
    with (
        sra.patched(pipe, sra.SparseRef("grid", 0.5)),
        pytest.raises(sra.LayoutError, match=r"must (have the same number of rows|lie one after another)"),
    ):
        case.call(pipe)
    hook.remove()
    assert pipe.transformer.forward == own
