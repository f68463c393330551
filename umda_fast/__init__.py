"""umda_fast: unified multitask, multiview deep learning on bags of instances."""

__version__ = "0.1.0"
