"""The arguments of ``sra build-kernels``."""

from __future__ import annotations

from ..parsing import Commands, later

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "build-kernels",
        help="compile the C++ kernels of the CPU, and those of CUDA for the cards of this machine",
        description="Compiles csrc into the user's cache, where every later process finds it: the kernels of the CPU "
        "with a C++ compiler, those of CUDA with nvcc and ninja, whichever are there. Nothing else ever compiles them "
        "on use. ninja_build.md says what each error means.",
    )
    parser.add_argument(
        "--archs",
        metavar="LIST",
        help='such as "80;90a"; default SRA_CUDA_ARCHS, else the cards found, else 80;90a;100a',
    )
    parser.set_defaults(run=later("building", "build"))
