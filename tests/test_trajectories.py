"""The bits of the recipes are those that the tree had before a recipe was a declaration; see `trajectories`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import trajectories
from gwt_dist.kernels import choice

RECORDED = Path(__file__).parent / "data" / "trajectories.npz"
ITERATION = "gwt_dist.formulas.orthogonal.newton_schulz"


@pytest.mark.parametrize("kernel", ["", "eager"])
@pytest.mark.parametrize("recipe", trajectories.RECIPES)
def test_weights_moments_and_norms_have_the_recorded_bits(
    recipe: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Levels 0 to 3 in fp32, bf16 and fp64: compiled where that is taken, and in torch's operations."""
    monkeypatch.setenv(choice.VARIABLE, kernel)
    recorded = np.load(RECORDED)
    compared = 0
    for its, level, name in trajectories.cases():
        if its != recipe:
            continue
        found = trajectories.trajectory(recipe, level, trajectories.DTYPES[name], ITERATION)
        keys = {key.rpartition("/")[2] for key in recorded.files if key.startswith(f"{recipe}/{level}/{name}/")}
        assert keys == found.keys()
        for key, tensor in found.items():
            np.testing.assert_array_equal(trajectories.bits(tensor), recorded[f"{recipe}/{level}/{name}/{key}"], key)
            compared += 1
    assert compared >= 4 * 3 * 15
