"""Which package "flash" would take, and what is said of one that cannot be taken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.ops import _support
from sparse_ref_attn.ops._support import ORDER, Call, flash_packages, reasons
from sparse_ref_attn.ops.attention_mass.backends import ORDER as MASS_ORDER
from sparse_ref_attn.ops.gather_attention.flash_packages import BACKWARD, FORWARD
from sparse_ref_attn.ops.pack_rows.library import ORDER as ROWS_ORDER

from .problems import make

CALL = Call(torch.device("cpu"), torch.bfloat16, 64)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that Python imports from; what is found there is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    _support._flash_module.cache_clear()
    yield tmp_path
    for written in tmp_path.glob("*.py"):
        sys.modules.pop(written.stem, None)
    _support._flash_module.cache_clear()


def test_every_package_can_be_called() -> None:
    assert list(flash_packages(CALL)) == list(FORWARD)
    assert set(FORWARD) - set(BACKWARD) == {"fa3_fwd_interface"}
    assert "has no backward" in flash_packages(CALL, backward=True)["fa3_fwd_interface"]
    assert "has no backward" not in flash_packages(CALL)["fa3_fwd_interface"]


def test_forward_only_package_takes_bfloat16_alone() -> None:
    half = flash_packages(CALL._replace(dtype=torch.float16))
    assert "needs bfloat16, got torch.float16" in half["fa3_fwd_interface"]
    assert not any("bfloat16" in why for why in half["flash_attn_interface"])


@pytest.mark.parametrize(
    ("name", "source", "told"),
    [
        ("flash_attn", "raise ImportError('undefined symbol: _ZN3c10\\nmore')", "cannot be imported: undefined symbol"),
        ("flash_attn", "", "must have a flash_attn_varlen_func that returns the lse"),
        ("flash_attn_interface", "def flash_attn_varlen_func(q, k, v): ...", "that returns the lse"),
        (
            "flash_attn",
            "__version__ = '2.6.3'\ndef flash_attn_varlen_func(q, return_attn_probs=False): ...",
            "must be 2.7 or later, got 2.6.3",
        ),
    ],
)
def test_a_package_that_will_not_do_is_explained(name: str, source: str, told: str, packages: Path) -> None:
    if _support.find_spec(name) is not None:
        pytest.skip(f"the real {name} is installed")
    (packages / f"{name}.py").write_text(source)
    (why,) = [line for line in flash_packages(CALL)[name] if "NVIDIA" not in line]
    assert told in why


def test_limits_of_flash() -> None:
    assert any("multiple of 8 and at most 256, got 264" in why for why in reasons("flash", CALL._replace(channels=264)))
    wide = CALL._replace(channels=256)
    assert not any("head dim" in why for why in reasons("flash", wide))
    assert any("at most 248, got 256" in why for why in reasons("flash", wide._replace(gradients=True)))
    assert any("multiple of 16 bytes" in why for why in reasons("flash", CALL._replace(aligned=False)))
    with pytest.raises(ConfigError, match="flash: needs a CUDA device, got cpu"):
        make(((2,),), ((3,),), None).to(torch.bfloat16).run("flash")


def test_auto_takes_no_kernel_of_ours_that_no_card_has_run() -> None:
    """A row with "triton" is written by hand once `pytest -m gpu` has passed on such a card."""
    for order in (ORDER, MASS_ORDER, ROWS_ORDER):
        assert not {"triton", "flash", "flex"} & {name for row in order.values() for name in row}
