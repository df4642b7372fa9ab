"""The backends: one dense kernel of PyTorch after a gather, packed FlashAttention, FlexAttention, Triton, CUDA C++."""
