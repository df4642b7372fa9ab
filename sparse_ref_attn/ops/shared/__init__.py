"""What the ops share: how a backend is chosen, what kernels need of tensors, and the steps of Triton kernels."""
