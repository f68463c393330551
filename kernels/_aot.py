"""Ahead-of-time compilation of a ``Launch`` for a chip that need not be there, with the resources it takes.

Resources are what ``cuobjdump --dump-resource-usage`` (carried by Triton) reads off the compiled kernel. A
kernel that keeps anything in local memory (``stack`` or ``local`` above 0) has spilt registers.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._launch import Launch

__all__ = ["Resources", "compile_kernel", "compile_launch"]

_POINTER = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Resources:
    """Registers, bytes of stack and of local memory per thread, bytes of shared memory per program,
    seconds."""

    registers: int
    stack: int
    local: int
    shared: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary, for the budget file."""
        return asdict(self)


def compile_kernel(launch: Launch, arch: int) -> Any:
    """Triton's compiled kernel of ``launch`` for compute capability ``arch`` (80, 90, 100); ``asm["cubin"]`` is its
    machine code. Triton's own cache (``TRITON_CACHE_DIR``) serves what it holds.

    Arguments are specialised as Triton's launcher does: pointers are taken as 16-byte aligned, integers
    that 16 divides are marked so, integers equal to 1 are constants, ``None`` is a constant.
    """
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    values = iter(launch.args)
    for position, param in enumerate(kernel.params):
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constants[param.name] = launch.constexprs.get(param.name, param.default)
            continue
        value = next(values)
        if value is None:
            signature[param.name] = "constexpr"
            constants[param.name] = None
        elif isinstance(value, torch.Tensor):
            signature[param.name] = _POINTER[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            if value == 1 and not param.do_not_specialize:
                signature[param.name] = "constexpr"
                constants[param.name] = 1
                continue
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32"
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "maxnreg": launch.max_registers,
        "enable_fp_fusion": True,
    }
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compiles ``launch`` as `compile_kernel` does and reads its resources.

    Raises:
        RuntimeError: the compiled kernel names no resources.
    """
    start = sum(os.times()[:4])  # processor time, ptxas included: a busy machine does not change it
    compiled = compile_kernel(launch, arch)
    seconds = sum(os.times()[:4]) - start
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        report = subprocess.run(
            [str(tool), "--dump-resource-usage", str(binary)], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump names no resources for {launch.kernel.__name__}: {report}")
    registers, stack, _, local = (int(number) for number in found.groups())
    return Resources(registers, stack, local, int(compiled.metadata.shared), round(seconds, 2))
