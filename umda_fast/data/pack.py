"""The name under which packing was first published; `umda_fast.data` has it."""

from umda_fast.data import PackResult, pack_slides

__all__ = ["PackResult", "pack_slides"]
