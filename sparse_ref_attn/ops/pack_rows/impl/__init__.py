"""The backends beside the definition: Triton, CUDA C++."""
