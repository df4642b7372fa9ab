"""The backends: plain PyTorch in chunks, Triton, CUDA C++."""
