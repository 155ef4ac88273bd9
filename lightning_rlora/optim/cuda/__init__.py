"""The step on an NVIDIA GPU: all pairs in one CUDA graph of Triton kernels and matrix products."""
