import random
from pathlib import Path

import numpy as np
import torch

from umda_fast.runtime.random_state import random_state, rank_seed, set_random_state


def test_random_states_return(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    state = random_state()
    first = draw()
    torch.save(state, tmp_path / "state.pt")
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == first


def test_every_process_and_every_step_of_a_resume_has_a_seed_of_its_own() -> None:
    seeds = {rank_seed(seed, rank, step) for seed in (0, 1) for rank in (1, 2) for step in (0, 7)}
    assert len(seeds) == 8
    assert rank_seed(0, 1, 7) == rank_seed(0, 1, 7)
