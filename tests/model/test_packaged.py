"""A model compiled ahead of time by AOTInductor, and loaded where its Python code is not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim

from tests.model.conftest import MORE
from tests.served import Predict, bags
from umda_fast.model import UMDA, TaskSpec, UMDAConfig, ViewSpec
from umda_fast.model.config import BEFORE_2
from umda_fast.ops import _library
from umda_fast.parity.rule import assert_close

LOAD = """
import sys
import torch
import umda_fast.ops
assert "umda_fast.model" not in sys.modules
package, batches, out = sys.argv[1:]
model = torch._inductor.aoti_load_package(package)
torch.save([model(*batch) for batch in torch.load(batches)], out)
"""


@pytest.mark.skipif(_library.cpp_status is not None, reason=str(_library.cpp_status))
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
@pytest.mark.parametrize("options", [BEFORE_2, {"layer_scale": 0.5, **MORE}], ids=["before version 2", "more"])
def test_a_model_compiled_ahead_of_time(options: dict[str, Any], tmp_path: Path) -> None:
    """Another process, which imports the operations only, gets what the model gives, for bags of any sizes."""
    tasks = (TaskSpec("grade", "multiclass", 3), TaskSpec("response", "binary"))
    views = (ViewSpec("a", 6), ViewSpec("b", 4))
    small = {"width": 16, "heads": 2, "layers": 1, "graph_layers": 1, "graph_k": 3}
    model = Predict(UMDA(UMDAConfig(views, tasks, **{**small, **options}))).eval()
    batches = [bags(5, 9, 7), bags(3, 1, 30, 8, 2), bags(1, 40)]
    n, offsets = Dim("n", min=2), Dim("offsets", min=3)
    sizes = ({"a": {0: n}, "b": {0: n}}, {0: offsets}, {0: n})
    files = [tmp_path / name for name in ("model.pt2", "batches.pt", "out.pt")]
    with torch.no_grad():
        program = torch.export.export(model, batches[0], dynamic_shapes=sizes)
        quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}
        torch._inductor.aoti_compile_and_package(program, package_path=str(files[0]), inductor_configs=quick)
        composed = [model(*batch) for batch in batches]
        model.double()
        exact = [model({k: v.double() for k, v in x.items()}, ptr, mask) for x, ptr, mask in batches]
    torch.save(batches, files[1])
    result = subprocess.run([sys.executable, "-c", LOAD, *map(str, files)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for ours, (right, attention), (same, like) in zip(torch.load(files[2]), exact, composed, strict=True):
        assert_close("attention", ours[1], attention, like)
        for task in right:
            assert_close(task, ours[0][task], right[task], same[task])
