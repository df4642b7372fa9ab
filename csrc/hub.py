"""Lays a wheel of this package out as a kernel of the Hugging Face hub, one variant for each backend.

    pip wheel --no-deps --wheel-dir dist .
    python csrc/hub.py dist/sparse_ref_attn-*.whl hub

The variants name no version of torch, since the libraries know none.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import zipfile
from pathlib import Path

PACKAGE = "sparse_ref_attn"
BACKENDS = ("cpu", "cuda")


def lay_out(wheel: Path, target: Path) -> list[Path]:
    """Write build/torch-BACKEND under `target`, which must not be there yet; the folders of the variants."""
    name, version, *_ = wheel.name.split("-")
    if name != PACKAGE or not zipfile.is_zipfile(wheel):
        raise SystemExit(f"WHEEL must be a wheel of {PACKAGE}, got {wheel}")
    with zipfile.ZipFile(wheel) as archive:
        files = {
            member.removeprefix(f"{PACKAGE}/"): archive.read(member)
            for member in archive.namelist()
            if member.startswith(f"{PACKAGE}/") and not member.endswith("/")
        }
    contents = hashlib.sha256(wheel.read_bytes()).hexdigest()[:12]
    digest = {path: base64.b64encode(hashlib.sha256(data).digest()).decode() for path, data in sorted(files.items())}
    variants = []
    for backend in BACKENDS:
        variant = target / "build" / f"torch-{backend}"
        variant.mkdir(parents=True)
        for path, data in files.items():
            (variant / path).parent.mkdir(parents=True, exist_ok=True)
            (variant / path).write_bytes(data)
        metadata = {
            "name": PACKAGE.replace("_", "-"),
            "id": f"_{PACKAGE}_{backend}_{contents}",
            "version": int(version.partition(".")[0]),
            "license": "apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digest},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        variants.append(variant)
    return variants


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    print(*lay_out(given.wheel, given.target), sep="\n")
