"""The tools are found or missed in words, and architectures are what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_ref_attn.errors import BuildError
from sparse_ref_attn.kernels import toolchain
from sparse_ref_attn.kernels.toolchain import (
    DEFAULT_ARCHS,
    Toolchain,
    arch_for,
    find_nvcc,
    find_toolchain,
    parse_archs,
    serves,
)

OLD = Toolchain("nvcc", "12.4.131", "ninja", frozenset({"75", "80", "86", "90", "90a"}))


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_default_archs_are_those_that_nvcc_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SRA_CUDA_ARCHS", raising=False)
    assert OLD.archs() == ("80+PTX", "90a")


def test_the_variable_says_which_archs_and_an_argument_overrules_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRA_CUDA_ARCHS", "90a; 86,86")
    assert OLD.archs() == ("90a", "86")
    assert OLD.archs(["80"]) == ("80",)


def test_an_arch_that_nvcc_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRA_CUDA_ARCHS", "80;100a")
    with pytest.raises(BuildError, match=r"nvcc 12\.4\.131 must know .* got 100a; it knows 75;80;86;90;90a"):
        OLD.archs()


def test_an_nvcc_without_any_default_arch() -> None:
    with pytest.raises(BuildError, match=r"must know one of the architectures 80\+PTX;90a;100a, got nvcc 10"):
        Toolchain("nvcc", "10.0.1", "ninja", frozenset({"70"})).archs()


@pytest.mark.parametrize("text", ["sm_80", "8.0", "native", "90a+PTX", "90aa"])
def test_a_list_that_cannot_be_read(text: str) -> None:
    with pytest.raises(BuildError, match=r"must be digits and perhaps a letter"):
        parse_archs(text)


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "80"), ((8, 9), "80"), ((9, 0), "90a"), ((10, 0), "100a"), ((12, 0), "120")]
)
def test_what_is_built_for_a_card_serves_it(capability: tuple[int, int], arch: str) -> None:
    assert arch_for(capability) == arch
    assert serves(arch, capability)


def test_code_of_one_card_alone_serves_no_other() -> None:
    assert not serves("90a", (9, 1))
    assert not serves("100a", (10, 3))
    assert not serves("80", (9, 0))
    assert not serves("89", (8, 6))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 3), (12, 0), (12, 1)])
def test_every_card_is_served_by_what_is_built_by_default(capability: tuple[int, int]) -> None:
    assert any(serves(arch, capability) for arch in DEFAULT_ARCHS)


def test_ptx_serves_no_older_card() -> None:
    assert not serves("80+PTX", (7, 5))


def test_cuda_home_comes_before_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = program(tmp_path / "path" / "nvcc", "true")
    mine = program(tmp_path / "home" / "bin" / "nvcc", "true")
    monkeypatch.setenv("PATH", str(other.parent))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert find_nvcc() == str(mine)
    monkeypatch.delenv("CUDA_HOME")
    assert find_nvcc() == str(other)


def test_a_machine_without_nvcc_or_ninja(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    with pytest.raises(BuildError, match=r"nvcc must be on PATH, under CUDA_HOME/bin .* got none"):
        find_toolchain()
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: str(program(tmp_path / "nvcc", "true")))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"ninja must be on PATH .*: pip install ninja"):
        find_toolchain()


def test_an_nvcc_that_does_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    program(tmp_path / "bin" / "nvcc", "echo no licence >&2; exit 3")
    with pytest.raises(BuildError, match=r"nvcc --version must succeed, got no licence"):
        find_toolchain()
    program(tmp_path / "bin" / "nvcc", "echo something else")
    with pytest.raises(BuildError, match=r"--version must name its version, got none"):
        find_toolchain()


def test_ninja_of_the_package_serves_where_none_is_on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("ninja")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    program(tmp_path / "bin" / "nvcc", 'echo "V13.0.88 compute_80 compute_90"')
    monkeypatch.setenv("PATH", "/bin" if not Path("/bin/ninja").exists() else str(tmp_path))
    found = find_toolchain()
    assert Path(found.ninja).name == "ninja"
    assert found.version == "13.0.88"
    assert found.knows == {"80", "90", "90a"}
