"""Triton kernels, installed as ``umda_fast.kernels``; a module here imports triton, so it is imported on first use."""
