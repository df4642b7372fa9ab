"""No file grows long: sources of the library and of the benchmarks under 300 lines, tests under 400."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"sparse_ref_attn": 300, "benchmarks": 300, "tests": 400}


def too_long(folder: Path, limit: int) -> dict[str, int]:
    """Lines of each Python file that has `limit` or more."""
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in sorted(folder.rglob("*.py"))}
    assert lines
    return {str(path.relative_to(folder)): count for path, count in lines.items() if count >= limit}


@pytest.mark.parametrize("folder", LIMITS)
def test_files_are_short(folder: str) -> None:
    assert too_long(ROOT / folder, LIMITS[folder]) == {}


def test_a_long_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name, count in (("short.py", 299), ("inner/long.py", 300)):
        (tmp_path / name).write_text("x = 1\n" * count)
    assert too_long(tmp_path, 300) == {"inner/long.py": 300}
