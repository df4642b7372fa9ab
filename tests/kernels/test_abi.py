"""The structs of ctypes are those of sra.h, by a C compiler's word."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from sparse_ref_attn.kernels import abi, cpu_abi
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
CPU_STRUCTS = {"sra_cpu_attend_tiles_args": cpu_abi.AttendTilesArgs}
HEADER = source_directory() / "include" / "sra.h"
CPU_HEADER = source_directory() / "cpu" / "sra_cpu.h"


@pytest.mark.parametrize(("header", "structs"), [(HEADER, STRUCTS), (CPU_HEADER, CPU_STRUCTS)], ids=["cuda", "cpu"])
def test_every_field_lies_where_the_header_puts_it(
    header: Path, structs: dict[str, type[ctypes.Structure]], tmp_path: Path
) -> None:
    lines = []
    for name, struct in structs.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field, *_ in struct._fields_:
            place = f"offsetof({name}, {field}), sizeof((({name}*)0)->{field})"
            lines.append(f'printf("{name}.{field} %zu %zu\\n", {place});')
    source = tmp_path / "offsets.c"
    body = "\n".join(lines)
    source.write_text(
        f"#include <stddef.h>\n#include <stdio.h>\n#include <{header.name}>\nint main(void) {{\n{body}\n}}\n"
    )
    program = tmp_path / "offsets"
    flags = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", f"-I{header.parent}"]
    subprocess.run(["gcc", *flags, str(source), "-o", str(program)], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    expected = []
    for name, struct in structs.items():
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


def test_nothing_of_the_header_of_the_cpu_is_missing() -> None:
    text = CPU_HEADER.read_text()
    assert set(re.findall(r"^SRA_API [\w ]+?\*?(\w+)\(", text, re.MULTILINE)) == set(cpu_abi.FUNCTIONS)
    assert set(re.findall(r"typedef struct (\w+)", text)) == set(CPU_STRUCTS)
    assert re.search(r"#define SRA_CPU_VERSION (\d+)", text)[1] == str(cpu_abi.VERSION)
    targets = re.search(r"enum \{ (SRA_BASELINE.*?) \}", text)[1]
    assert targets == ", ".join(f"SRA_{name.upper()} = {n}" for n, name in enumerate(cpu_abi.TARGETS))
