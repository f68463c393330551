"""Build umda_fast: the Python package always, and two optional native libraries.

``umda_fast/_C.abi3.so``
    CPU kernels. ``csrc/cpu/*.cpp`` are compiled once per instruction set (see ``INSTRUCTION_SETS``) and
    chosen at run time; ``csrc/cpu/*_binding.cpp`` and ``csrc/*.cpp`` are compiled once and are the only files
    that include torch. They use nothing but LibTorch's stable ABI, so one library serves every torch from
    2.11 on and, as it includes no Python header at all, every CPython.
``umda_fast/_C_cuda.so``
    CUDA kernels, ``csrc/cuda/*.cu`` with ``csrc/cuda/*_binding.cpp``; built when nvcc is found and torch has CUDA.

A failed build does not fail the installation (unless asked to): the compiler's message is printed and
``umda_fast.ops`` serves the PyTorch reference. pip shows such a message with ``-v`` only, so it also stays in the
package (``_C.failed.txt``, which ``umda-fast info`` shows), and a wheel without any library is tagged ``py3-none-any``.
torch has to be installed already, hence ``pip install --no-build-isolation -e .``

Environment:
    UMDA_FAST_EXTENSION  auto (default) | 0: pure Python | 1: a failed build is an error
    UMDA_FAST_CUDA       auto (default: if nvcc is found and torch has CUDA, without which the library is of no
                         use) | 0 | 1: built with any torch (for another machine), a failed build is an error
    UMDA_FAST_SANITIZE   e.g. "address,undefined": an instrumented build of the CPU library
    CXX, NVCC, MAX_JOBS  compiler, CUDA compiler, parallel compilations
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
LIBRARIES = {"umda_fast._C": "_C.abi3.so", "umda_fast._C_cuda": "_C_cuda.so"}

# The oldest torch whose stable ABI is used: 2.11, as torch/headeronly/version.h spells it.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
COMMON_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", TORCH_TARGET]

# One object file per kernel source and instruction set; csrc/isa.cpp checks by cpuid what a set assumes.
X86_INSTRUCTION_SETS = {
    "baseline": ["-march=x86-64-v2"],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
INSTRUCTION_SETS = X86_INSTRUCTION_SETS if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": []}

CUDA_ARCHITECTURES = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_80,code=compute_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_100,code=sm_100",
    "-gencode=arch=compute_120,code=sm_120",
    "-gencode=arch=compute_120,code=compute_120",
]


def setting(name: str) -> str:
    """Value of an on/off/auto environment variable."""
    value = os.environ.get(name, "auto").strip().lower()
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1, got {value!r}")
    return value


def say(message: str) -> None:
    """Print a message that is hard to overlook among the output of a build."""
    bar = "=" * 88
    print(f"\n{bar}\numda_fast: {message}\n{bar}\n", file=sys.stderr, flush=True)


def failure_file(library: Path) -> Path:
    """Beside ``library``: why it was not built. ``umda_fast/ops/_library.py`` reads it."""
    return library.with_name(f"{library.name.partition('.')[0]}.failed.txt")


def standalone(readme: str) -> str:
    """README.md for a page outside the repository: a link to a file of the repository becomes the file's name."""

    def name(link: re.Match[str]) -> str:
        text, target = link.groups()
        if re.match(r"https?:|#", target):
            return link[0]
        file = target.partition("#")[0]
        return text if file in text else f"{text} ({file} in the repository)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", name, readme)


def find_torch() -> Path | None:
    """Directory of the installed torch; it is not imported, which would cost seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    return root if (root / "include/torch/csrc/stable/library.h").is_file() else None


def torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build, from its version file."""
    torch = find_torch()
    version = (torch / "version.py").read_text() if torch is not None else ""
    return re.search(r"^cuda\b[^=]*= *['\"]", version, re.MULTILINE) is not None


def find_nvcc() -> Path | None:
    """nvcc from $NVCC, PATH, CUDA_HOME or the package index's ``nvidia-cuda-nvcc``."""
    candidates = [os.environ.get("NVCC"), shutil.which("nvcc")]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates.append(f"{home}/bin/nvcc" if home else None)
    for entry in sys.path:
        candidates += [str(p) for p in sorted(Path(entry or ".").glob("nvidia/*/bin/nvcc"))]
    return next((Path(c) for c in candidates if c and Path(c).is_file()), None)


def find_cxx() -> str | None:
    """The C++ compiler: $CXX, else the first of the usual names."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((name for name in names if shutil.which(shlex.split(name)[0])), None)


@dataclass
class Step:
    """One compiler call: ``command`` makes ``output`` out of ``inputs``."""

    output: Path
    inputs: list[Path]
    command: list[str]
    depfile: Path | None = None


@dataclass
class Plan:
    """Compilations, independent of each other, and the link that joins them."""

    compile: list[Step] = field(default_factory=list)
    link: Step | None = None


def object_step(compiler: list[str], source: Path, target: Path) -> Step:
    depfile = target.with_suffix(".d")
    command = [*compiler, "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(target)]
    return Step(target, [source], command, depfile)


def cpu_plan(output: Path, objects: Path, torch: Path) -> Plan:
    """Steps that make the CPU library."""
    cxx = find_cxx()
    if cxx is None:
        raise CompileError("no C++ compiler found (tried $CXX, g++, c++, clang++)")
    include = [f"-I{CSRC}", "-isystem", str(torch / "include")]
    # No contraction: one rounding or two is written in the kernels, not left to the compiler.
    optimise = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    sanitize = os.environ.get("UMDA_FAST_SANITIZE", "")
    linker = []
    if sanitize:
        linker = [f"-fsanitize={sanitize}"]
        optimise = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-ffp-contract=off"]
        optimise += linker
    compiler = [*shlex.split(cxx), *COMMON_FLAGS, *optimise]
    # GCC's own intrinsics headers set these off (its bug 105593).
    quiet = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    bindings = sorted([*CSRC.glob("*.cpp"), *(CSRC / "cpu").glob("*_binding.cpp")])
    kernels = sorted(p for p in (CSRC / "cpu").glob("*.cpp") if p not in bindings)
    plan = Plan()
    for source in bindings:
        plan.compile.append(object_step([*compiler, *include], source, objects / f"{source.stem}.o"))
    # Baseline first: should two objects define the same inline function after all (tests/csrc checks that
    # they do not), the linker keeps the first.
    for isa, flags in INSTRUCTION_SETS.items():
        for source in kernels:
            names = [f"-DUMDA_ISA={isa}", f"-DUMDA_ISA_{isa.upper()}=1", f"-I{CSRC}"]
            command = [*compiler, *quiet, *flags, *names]
            plan.compile.append(object_step(command, source, objects / isa / f"{source.stem}.o"))
    inputs = [step.output for step in plan.compile]
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = [*shlex.split(cxx), "-shared", *linker, "-o", str(output), *map(str, inputs), *libraries]
    plan.link = Step(output, inputs, command)
    return plan


def cuda_sources() -> tuple[list[Path], list[Path]]:
    """Kernels (``.cu``, no torch header) and bindings (``_binding.cpp``, torch) of the CUDA library."""
    return sorted((CSRC / "cuda").glob("*.cu")), sorted((CSRC / "cuda").glob("*_binding.cpp"))


def cuda_plan(output: Path, objects: Path, torch: Path) -> Plan:
    """Steps that make the CUDA library. A CPU-only torch will do: its headers declare what is needed."""
    nvcc, cxx = find_nvcc(), find_cxx()
    if nvcc is None or cxx is None:
        raise CompileError("the CUDA library needs nvcc (package nvidia-cuda-nvcc) and a C++ compiler")
    host = ["-fPIC", "-fvisibility=hidden"]
    kernel_compiler = [str(nvcc), "-std=c++20", "-O3", *CUDA_ARCHITECTURES, "-Werror=all-warnings"]
    kernel_compiler += [f"-I{CSRC}", f"-Xcompiler={','.join(host)}", "-ccbin", shlex.split(cxx)[0]]
    binding_compiler = [*shlex.split(cxx), *COMMON_FLAGS, "-O2", "-DUSE_CUDA", f"-I{CSRC}"]
    # No CUDA header in bindings: only nvcc knows where those are.
    binding_compiler += ["-isystem", str(torch / "include")]
    kernels, bindings = cuda_sources()
    plan = Plan()
    for compiler, sources in ((kernel_compiler, kernels), (binding_compiler, bindings)):
        for source in sources:
            plan.compile.append(object_step(compiler, source, objects / f"{source.name}.o"))
    inputs = [step.output for step in plan.compile]
    command = [str(nvcc), "-shared", "-cudart", "static", "-ccbin", shlex.split(cxx)[0], "-o", str(output)]
    # Where the packages of CUDA 13.0 put the runtime, and their nvcc does not look.
    command.append(f"-L{nvcc.resolve().parent.parent / 'lib'}")
    # A CPU build of torch has what is used in libtorch_cpu.so only; many toolchains would then drop libtorch.so,
    # through which a CUDA build brings in the symbols that only it has.
    command += [*map(str, inputs), f"-L{torch / 'lib'}", "-Xlinker", "--no-as-needed"]
    command += ["-ltorch", "-ltorch_cpu", "-lc10"]
    plan.link = Step(output, inputs, command)
    return plan


def call(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise CompileError(f"{shlex.join(command)}\n{result.stdout}{result.stderr}")
    if result.stdout or result.stderr:
        print(result.stdout + result.stderr, file=sys.stderr, flush=True)


def find_ninja() -> str | None:
    beside = Path(sys.executable).with_name("ninja")
    return str(beside) if beside.is_file() else shutil.which("ninja")


def run_with_ninja(ninja: str, plan: Plan, directory: Path) -> None:
    """Rebuild what is out of date: ninja follows headers (depfiles) and changed command lines."""

    def escape(text: str) -> str:
        return text.replace("$", "$$")

    def path(p: Path) -> str:
        return escape(str(p)).replace(" ", "$ ").replace(":", "$:")

    lines = [f"builddir = {path(directory)}"]
    lines += ["rule compile", "  command = $call", "  depfile = $dep", "  deps = gcc"]
    lines += ["rule link", "  command = $call"]
    assert plan.link is not None
    for rule, steps in (("compile", plan.compile), ("link", [plan.link])):
        for step in steps:
            lines.append(f"build {path(step.output)}: {rule} {' '.join(map(path, step.inputs))}")
            lines.append(f"  call = {escape(shlex.join(step.command))}")
            if step.depfile is not None:
                lines.append(f"  dep = {escape(str(step.depfile))}")
    file = directory / "build.ninja"
    file.write_text("\n".join(lines) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    call([ninja, "-f", str(file), *jobs])


def run(plan: Plan, directory: Path) -> None:
    # The longest first, so that no processor waits for the last one; the link keeps its own order.
    plan.compile.sort(key=lambda step: -step.inputs[0].stat().st_size)
    for step in plan.compile:
        step.output.parent.mkdir(parents=True, exist_ok=True)
    assert plan.link is not None
    plan.link.output.parent.mkdir(parents=True, exist_ok=True)
    ninja = find_ninja()
    if ninja is not None:
        run_with_ninja(ninja, plan, directory)
        return
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        for _ in pool.map(lambda step: call(step.command), plan.compile):
            pass
    call(plan.link.command)


class BuildNative(build_ext):
    """Compiles the two libraries by the plans above; setuptools only decides where they go."""

    def get_ext_filename(self, fullname: str) -> str:
        # Called with and without the package's name in front.
        package, _, module = fullname.rpartition(".")
        return str(Path(*package.split("."), LIBRARIES[f"umda_fast.{module}"]))

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        objects = Path(self.build_temp).resolve() / ext.name
        objects.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            if torch is None:
                raise CompileError(
                    "torch >= 2.11 is not installed in the environment of the build; install it, then "
                    "pip install --no-build-isolation -e ."
                )
            plan = (cuda_plan if ext.name.endswith("_cuda") else cpu_plan)(output, objects, torch)
            run(plan, objects)
            failure_file(output).unlink(missing_ok=True)
        except CompileError as error:
            # A library of an earlier build would be served in place of the sources as they now are.
            (ROOT / "umda_fast" / LIBRARIES[ext.name]).unlink(missing_ok=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            failure_file(output).write_text(f"{error}\n")
            say(f"{ext.name} was NOT built; the PyTorch reference serves its operations.\n{error}")
            raise


class AbiWheel(bdist_wheel):
    """One wheel per platform: the libraries do not depend on the version of Python. Without any library it is one
    for every platform, which its name then says."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, plat = super().get_tag()
        if self.root_is_pure:
            return python, abi, plat
        built = Path(self.get_finalized_command("build").build_lib) / "umda_fast"
        if not any((built / library).is_file() for library in LIBRARIES.values()):
            say("this wheel holds NO native library: the PyTorch reference will serve every operation.")
            return "py3", "none", "any"
        return "py3", "none", plat


def extensions() -> list[Extension]:
    """The libraries to build here. Sources are listed for the sdist; the plans above compile them."""
    if setting("UMDA_FAST_EXTENSION") == "0":
        # A library of an earlier build in the tree would be found all the same.
        for library in LIBRARIES.values():
            (ROOT / "umda_fast" / library).unlink(missing_ok=True)
            failure_file(ROOT / "umda_fast" / library).unlink(missing_ok=True)
        say("UMDA_FAST_EXTENSION=0: pure Python, the PyTorch reference serves every operation on the CPU.")
        return []
    if platform.system() == "Windows":
        say("native kernels are built on Linux and macOS only; the PyTorch reference serves every operation.")
        return []
    sources = sorted(str(p) for p in [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")])
    found = [Extension("umda_fast._C", sources, optional=setting("UMDA_FAST_EXTENSION") != "1")]
    cuda = setting("UMDA_FAST_CUDA")
    kernels, bindings = cuda_sources()
    if kernels and (cuda == "1" or (cuda == "auto" and torch_has_cuda() and find_nvcc() is not None)):
        sources = [str(p) for p in [*kernels, *bindings]]
        found.append(Extension("umda_fast._C_cuda", sources, optional=cuda != "1"))
    return found


if __name__ == "__main__":
    os.chdir(ROOT)
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildNative, "bdist_wheel": AbiWheel},
        long_description=standalone((ROOT / "README.md").read_text(encoding="utf-8")),
        long_description_content_type="text/markdown",
    )
