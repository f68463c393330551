"""Triton kernels, installed as ``umda_fast.kernels``. Its modules import triton, so import them on first
use."""
