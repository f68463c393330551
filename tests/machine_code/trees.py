"""The compiled kernels of a tree of this repository, whatever its state: run in a process of its own, in that tree.

    python trees.py OUT ARCHITECTURES PATTERN [--cuda]

writes ``OUT/index.json`` and a cubin for every Triton kernel of every case of that tree's
``tests/kernels/aot_cases.py`` whose name matches PATTERN, and names the CUDA library that its gate 4 builds. It relies
on few things of the tree: that table (`CASES`), `compile_launch` calling ``triton.compile``, and
``tests.cuda_host._nvcc.build``.
"""

# Not a module of its tree: it imports those of another one, and is read by older versions of them.
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock


def _from(tree: Path) -> None:
    """Makes ``umda_fast`` and ``tests`` those of the tree, installed or not."""
    sys.path.insert(0, str(tree))
    import umda_fast

    assert Path(umda_fast.__file__).is_relative_to(tree), umda_fast.__file__
    folder = tree / "kernels"
    spec = importlib.util.spec_from_file_location(
        "umda_fast.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["umda_fast.kernels"] = umda_fast.kernels = module
    spec.loader.exec_module(module)


def main() -> None:
    """See the head of the file."""
    out, architectures, pattern = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    tree = Path.cwd().resolve()
    _from(tree)
    from tests.kernels import aot_cases
    from umda_fast.kernels import _aot

    compiled = []
    real = _aot.triton.compile

    def keep(*args: Any, **options: Any) -> Any:
        compiled.append(real(*args, **options))
        return compiled[-1]

    index = []
    with mock.patch.object(_aot.triton, "compile", keep):
        for case, launches in aot_cases.CASES.items():
            for launch in launches():
                name = launch.kernel.__name__
                if not re.search(pattern, f"{case}: {name}"):
                    continue
                for architecture in map(int, architectures.split(",")):
                    _aot.compile_launch(launch, architecture)
                    file = out / f"{len(index)}.cubin"
                    file.write_bytes(compiled[-1].asm["cubin"])
                    index.append(
                        {
                            "case": case,
                            "kernel": name,
                            "architecture": architecture,
                            "file": file.name,
                            "shared": int(compiled[-1].metadata.shared),
                            "threads": 32 * launch.num_warps,
                        }
                    )
                print(f"{case}: {name}", file=sys.stderr, flush=True)
    library = None
    if "--cuda" in sys.argv:
        from tests.cuda_host import _nvcc

        library = str(_nvcc.build().library)
    (out / "index.json").write_text(json.dumps({"kernels": index, "library": library}))


if __name__ == "__main__":
    main()
