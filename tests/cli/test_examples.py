"""The examples run as a reader would run them, with fewer epochs."""

import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_own_data(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "own_data.py"), "--out", str(tmp_path / "run"), "--epochs", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics["tasks"]) == {"tumour", "log_size"}
    predictions = (tmp_path / "run" / "predictions.csv").read_text().splitlines()
    assert predictions[0] == "bag,tumour_probability_1,tumour_predicted,log_size,refer,reason"
    assert len(predictions) == 6
