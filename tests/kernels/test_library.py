"""What is loaded, what is in the way, and what each code becomes in Python."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparse_ref_attn import doctor
from sparse_ref_attn.errors import BuildError, ConfigError, KernelError, LayoutError, VersionError
from sparse_ref_attn.functional import gather_attention, pack_rows
from sparse_ref_attn.kernels import abi, library, places
from sparse_ref_attn.kernels.library import Library
from sparse_ref_attn.ops.shared import cuda_launch

from . import stand_in


@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(library, "cached_library", lambda: tmp_path / "cache" / places.LIBRARY)
    monkeypatch.setattr(library, "bundled_library", lambda: tmp_path / "package" / places.LIBRARY)
    library.library.forget()
    yield
    library.library.forget()


def give(path: Path, text: str = stand_in.TEXT) -> Path:
    """A library at `path`, compiled by g++, with the stand-in's functions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.parent / "source.cpp"
    plain = re.sub(r"__global__.*", "", text)
    plain = re.sub(r"  nothing<<<(.|\n)*?return cudaGetLastError\(\);", "  return 0;", plain)
    source.write_text(plain + '\nextern "C" const char* const sra_build = "80 90a, g++ in a test";\n')
    command = ["g++", "-shared", "-fPIC", f"-I{places.source_directory() / 'include'}", str(source), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


def why_not() -> str:
    with pytest.raises(ConfigError) as error:
        pack_rows(torch.zeros(1, 4, 8), torch.tensor([1]), backend="cuda")
    return str(error.value)


def test_not_built(nothing_built: None) -> None:
    assert "cuda: the library of CUDA C++ kernels must be built first, got none; `sra build-kernels`" in why_not()
    report = doctor.report()
    assert re.search(r"cuda +no: the library of CUDA C\+\+ kernels must be built first", report)


def test_the_users_own_build_comes_before_the_installed_one(nothing_built: None, tmp_path: Path) -> None:
    bundled = give(tmp_path / "package" / places.LIBRARY)
    assert library.library().path == bundled
    library.library.forget()
    mine = give(tmp_path / "cache" / places.LIBRARY)
    assert library.library().path == mine
    assert library.library().archs == ("80", "90a")


def test_no_device(nothing_built: None, tmp_path: Path) -> None:
    give(tmp_path / "cache" / places.LIBRARY)
    assert "cuda: needs a CUDA device, got cpu" in why_not()


def test_another_version(nothing_built: None, tmp_path: Path) -> None:
    give(tmp_path / "cache" / places.LIBRARY, stand_in.TEXT.replace("return SRA_VERSION", "return SRA_VERSION + 1"))
    with pytest.raises(VersionError, match=r"must have version 1 of sra\.h, got 2; `sra build-kernels`"):
        library.library()
    assert "must have version 1 of sra.h, got 2" in why_not()


def test_not_a_library(nothing_built: None, tmp_path: Path) -> None:
    path = tmp_path / "cache" / places.LIBRARY
    path.parent.mkdir()
    path.write_text("this is text")
    assert "must be a library of these kernels, got" in why_not()
    assert "`sra build-kernels` builds it" in why_not()


def test_a_function_is_missing(nothing_built: None, tmp_path: Path) -> None:
    give(tmp_path / "cache" / places.LIBRARY, stand_in.TEXT.replace("sra_unpack_rows", "another_name"))
    with pytest.raises(BuildError, match=r"must be a library of these kernels, got .*sra_unpack_rows"):
        library.library()


def test_a_card_that_it_was_not_built_for(nothing_built: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(tmp_path / "cache" / places.LIBRARY)
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    (why,) = cuda_launch.against(card)
    assert "needs kernels compiled for compute capability 12.0, got sm_80, sm_90a" in why
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert cuda_launch.against(card) == []


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (abi.Code.NULL_POINTER, LayoutError),
        (abi.Code.BAD_SIZE, LayoutError),
        (abi.Code.BAD_STRIDE, LayoutError),
        (abi.Code.MISALIGNED, LayoutError),
        (abi.Code.UNSUPPORTED, ConfigError),
    ],
)
def test_a_refusal_becomes_an_error_with_its_words(code: int, error: type[Exception], tmp_path: Path) -> None:
    loaded = Library(give(tmp_path / "l.so"))
    with pytest.raises(error, match=r"^sra_gather_attention: x must hold, got y$"):
        loaded.call("sra_gather_attention", abi.GatherAttentionArgs(dtype=code), 0)


def test_a_failure_of_the_device_becomes_an_error(tmp_path: Path) -> None:
    loaded = Library(give(tmp_path / "l.so"))
    with pytest.raises(KernelError, match=r"^sra_attention_mass must run on the device, got CUDA error 209: words of"):
        loaded.call("sra_attention_mass", abi.AttentionMassArgs(dtype=209), 0)
    loaded.call("sra_attention_lse", abi.AttentionLseArgs(dtype=0), 0)


def test_a_launch_without_a_driver_is_an_error_and_no_crash(small: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a driver here")
    with pytest.raises(KernelError, match=r"sra_pack_rows must run on the device, got CUDA error \d+"):
        Library(small).call("sra_pack_rows", abi.RowsArgs(), 0)


def test_what_it_cannot_do_is_said_in_words(nothing_built: None) -> None:
    q = torch.zeros(4, 2, 32, dtype=torch.float32)
    with pytest.raises(ConfigError) as error:
        gather_attention(q, q, q, backend="cuda")
    assert "needs float16 or bfloat16, got torch.float32" in str(error.value)
    assert "needs a head dim of 64 or 128, got 32" in str(error.value)
    x = torch.zeros(4, 2, 65, dtype=torch.bfloat16)[..., :64]
    with pytest.raises(ConfigError, match=r"needs every row to start at a multiple of 16 bytes"):
        gather_attention(x, x, x, backend="cuda")


def test_a_library_that_is_not_there_is_looked_for_once(nothing_built: None, tmp_path: Path) -> None:
    """Every call of "auto" asks for it; until somebody has built it, the answer stays."""
    for _ in range(2):
        with pytest.raises(BuildError, match="must be built first"):
            library.library()
        mine = give(tmp_path / "cache" / places.LIBRARY)
    library.library.forget()
    assert library.library().path == mine
