"""The pictures of the README and of the documentation, made by the small model that ships.

    python -m benchmarks.front_page    # docs/images/demo.png, kept.png, compare.png

What the captions say is of these very runs: tokens, work, and PSNR; no times.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from sparse_ref_attn.cli import main
from sparse_ref_attn.eval.panels import Panel, panels
from sparse_ref_attn.overlay.canvas import down
from sparse_ref_attn.pictures import open_image

from .results import RESULTS

__all__ = ["compared", "make"]

FOLDER = RESULTS.parent.parent / "docs/images"
SEED = "4"
COLUMNS = 4


def make(folder: Path = FOLDER) -> list[Path]:
    """Run the demo and the comparison of `SEED`; the files that were written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        for command in ("demo", "compare"):
            _run(command, "--seed", SEED, "--out", f"{name}/{command}")
        _run("demo", "--seed", SEED, "--preset", "recast", "--out", f"{name}/dropped")
        made = {
            "demo": open_image(f"{name}/demo/row.png"),
            "kept": open_image(f"{name}/dropped/kept.png"),
            "compare": compared(Path(name) / "compare"),
        }
        for stem, picture in made.items():
            picture.save(folder / f"{stem}.png", optimize=True)
    return [folder / f"{stem}.png" for stem in made]


def compared(folder: Path) -> Any:
    """Every picture of a comparison with its tokens a step and its PSNR against the dense one."""
    found = json.loads((folder / "compare.json").read_text(encoding="utf-8"))

    def panel(name: str, *lines: str) -> Panel:
        return Panel(name, open_image(folder / "pictures" / f"{name}.png"), lines)

    shown = [panel("reference", "what the model is shown"), panel("answer", "what is right")]
    for row in found["rows"]:
        tokens, likeness = f"{row['tokens_a_step']:,.0f} tokens a step", "all tokens in every step"
        if row["method"] in found.get("rivals", {"runs": ()})["runs"]:
            tokens, own = found["rivals"]["runs"][row["method"]]["setting"], row["PSNR (dB)"]
            likeness = "equal to dense" if own is None else f"PSNR to dense {own:.1f} dB"
        elif row["method"] != "dense":
            kinds = found["runs"][row["method"]]["run"]["by_step"]["kind"]
            if "cached" in kinds:
                tokens = f"run in {len(kinds) - kinds.count('cached')} of {len(kinds)} steps, else read"
            likeness = f"PSNR to dense {row['PSNR (dB)']:.1f} dB"
        shown.append(panel(row["method"], tokens, likeness))
    return down([panels(shown[i : i + COLUMNS]) for i in range(0, len(shown), COLUMNS)], 0)


def _run(*arguments: str) -> None:
    if code := main(list(arguments)):
        raise RuntimeError(f"sra {' '.join(arguments)} must end with 0, got {code}")


if __name__ == "__main__":
    for path in make():
        print(path)
