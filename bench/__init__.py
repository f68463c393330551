"""Benchmarks, installed as ``umda_fast.bench`` and run from a checkout as ``python -m bench.<name>``."""

import importlib.util
from pathlib import Path

import umda_fast

# From a checkout that nobody installed, with libraries built elsewhere: kernels/ lies beside the package.
if importlib.util.find_spec("umda_fast.kernels") is None:
    umda_fast.__path__.append(str(Path(__file__).resolve().parents[1]))
