"""Sources that compile in a second and have the interface of sra.h: what is built is then beside the point."""

from __future__ import annotations

import shutil
from pathlib import Path

from sparse_ref_attn.kernels.places import source_directory

#: Each function refuses with the code that stands in the first field of its arguments.
TEXT = """
#include "sra.h"
#define REFUSE(function, arguments) \\
  extern "C" int function(const arguments* args, void*) { return *reinterpret_cast<const int32_t*>(args); }
__global__ void nothing() {}
REFUSE(sra_gather_attention, sra_gather_attention_args)
REFUSE(sra_attention_lse, sra_attention_lse_args)
REFUSE(sra_attention_mass, sra_attention_mass_args)
extern "C" int sra_pack_rows(const sra_rows_args*, void* stream) {
  nothing<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>();
  return cudaGetLastError();
}
extern "C" int sra_unpack_rows(const sra_rows_args*, void*) { return 0; }
extern "C" int sra_version(void) { return SRA_VERSION; }
extern "C" const char* sra_error_string(int code) { return code > 0 ? "words of CUDA" : "words of the code"; }
extern "C" const char* sra_last_error(void) { return "x must hold, got y"; }
"""


def write(directory: Path, text: str = TEXT) -> Path:
    """A directory of sources like csrc."""
    shutil.copytree(source_directory() / "include", directory / "include")
    (directory / "stand_in.cu").write_text(text)
    return directory
