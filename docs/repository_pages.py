"""Brings the repository's own pages into the site, so that one text and one link serve both.

The README is the site's first page. Pages that lie outside ``docs/`` stand under ``repository/``; every link between
them, written for the repository, is turned into the site's. A link to something that the site has no page for (a
folder, a CSV) becomes its path in code.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
HOME = "README.md"
PAGES = (
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/RESULTS.md",
    "benchmarks/results/eval/summary.md",
    "csrc/README.md",
    "csrc/emulator/README.md",
    "ninja_build.md",
    "sparse_ref_attn/assets/toy/README.md",
)
EXAMPLES = ("examples/plain_dit.py", "examples/other_dit.py", "examples/train_kontext_lora.py")
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)\s#]*)(#[^)\s]*)?(?=\))")


def on_files(files: Any, config: Any) -> Any:
    """Add the README, the pages outside ``docs/``, the examples as code, and every picture that they show."""
    added = {HOME: _page(HOME)} | {page: _page(page) for page in PAGES}
    for page, text in list(added.items()):
        for target, _ in LINK.findall(text):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            if path.endswith(".png") and not path.startswith("docs/"):
                files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
    for example in EXAMPLES:
        added[example] = f"# {example}\n\n```python\n{_page(example)}```\n"
    for page, text in added.items():
        files.append(File.generated(config, _place(page), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn the repository's links of a page into the site's."""
    here = page.file.src_uri

    def turned(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(_source(here)), target))
        if not files.get_file_from_path(_place(path)):
            return f"{label} (`{path}`)"
        return f"[{label}]({posixpath.relpath(_place(path), posixpath.dirname(here) or '.')}{anchor})"

    return re.sub(r"\[([^\]\[]*)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)", turned, markdown)


def _page(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def _place(path: str) -> str:
    """Where a path of the repository lies in the site."""
    if path == HOME:
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}.md" if path in EXAMPLES else f"repository/{path}"


def _source(uri: str) -> str:
    """The path in the repository of a page of the site."""
    if uri == "index.md":
        return HOME
    if uri.startswith("repository/"):
        return uri.removeprefix("repository/")
    return f"docs/{uri}"
