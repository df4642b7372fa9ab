"""The structs of ctypes are those of sra.h, by a C compiler's word."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

from sparse_ref_attn.kernels import abi
from sparse_ref_attn.kernels.places import source_directory

STRUCTS = {
    "sra_tensor": abi.Tensor,
    "sra_index": abi.Index,
    "sra_gather_attention_args": abi.GatherAttentionArgs,
    "sra_attention_lse_args": abi.AttentionLseArgs,
    "sra_attention_mass_args": abi.AttentionMassArgs,
    "sra_row_copy": abi.RowCopy,
    "sra_rows_args": abi.RowsArgs,
}
HEADER = source_directory() / "include" / "sra.h"


def test_every_field_lies_where_the_header_puts_it(tmp_path: Path) -> None:
    lines = []
    for name, struct in STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field, *_ in struct._fields_:
            place = f"offsetof({name}, {field}), sizeof((({name}*)0)->{field})"
            lines.append(f'printf("{name}.{field} %zu %zu\\n", {place});')
    source = tmp_path / "offsets.c"
    body = "\n".join(lines)
    source.write_text(f"#include <stddef.h>\n#include <stdio.h>\n#include <sra.h>\nint main(void) {{\n{body}\n}}\n")
    program = tmp_path / "offsets"
    flags = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", f"-I{HEADER.parent}"]
    subprocess.run(["gcc", *flags, str(source), "-o", str(program)], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    expected = []
    for name, struct in STRUCTS.items():
        expected.append(f"{name} {ctypes.sizeof(struct)}")
        for field, *_ in struct._fields_:
            at = getattr(struct, field)
            expected.append(f"{name}.{field} {at.offset} {at.size}")
    assert said == expected


def test_nothing_of_the_header_is_missing() -> None:
    text = HEADER.read_text()
    assert set(re.findall(r"^SRA_API [\w ]+?\*?(\w+)\(", text, re.MULTILINE)) == set(abi.FUNCTIONS)
    assert set(re.findall(r"typedef struct (\w+)", text)) == set(STRUCTS)
    assert re.search(r"#define SRA_VERSION (\d+)", text)[1] == str(abi.VERSION)
    assert re.search(r"#define SRA_MAX_AXES (\d+)", text)[1] == str(abi.MAX_AXES)
    codes = dict(re.findall(r"SRA_(\w+) = (-\d+)", text)) | {"OK": "0"}
    assert codes == {name: str(value) for name, value in vars(abi.Code).items() if name.isupper()}
