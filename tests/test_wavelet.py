"""The transforms against PyWavelets, for each of its discrete wavelets."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch

from gwt_dist.wavelet import filter_bank, transform, unit_sum, wavedec, waverec

# PyWavelets, as the oracle, warns when filters are longer than the row, which is what these tests are after.
pytestmark = pytest.mark.filterwarnings("ignore:Level value of .* is too high:UserWarning")


@pytest.mark.parametrize("wavelet", pywt.wavelist(kind="discrete"))
def test_wavedec_and_waverec_equal_pywavelets(wavelet: str) -> None:
    bank, level = filter_bank(wavelet), 3
    x = np.random.default_rng(0).standard_normal((2, 40))
    found = wavedec(torch.from_numpy(x), bank, level)
    expected = pywt.wavedec(x, wavelet, mode="periodization", level=level, axis=-1)
    assert [c.shape for c in found] == [c.shape for c in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert np.abs(mine.numpy() - theirs).max() < 1e-12 * max(1, np.abs(theirs).max())
    back = waverec(found, bank).numpy()
    expected_back = pywt.waverec(expected, wavelet, mode="periodization", axis=-1)
    assert np.abs(back - expected_back).max() < 1e-10


@pytest.mark.parametrize("level", [1, 2, 5])
@pytest.mark.parametrize("columns", [1, 31, 32, 33])
def test_the_closed_form_is_the_filter_bank_of_haar(level: int, columns: int) -> None:
    """The closed form never computes a detail; the filter bank does, on the same rows."""
    from gwt_dist.wavelet import FilterBankTransform

    haar, general = transform("haar", level), FilterBankTransform(filter_bank("haar"), level)
    torch.manual_seed(0)
    rows = torch.randn(3, columns, dtype=torch.float64)
    unit, _ = haar.unit(columns)
    per_row = -(-columns // unit)
    x_NU = torch.nn.functional.pad(rows, (0, per_row * unit - columns)).view(3 * per_row, unit)
    last = columns - (per_row - 1) * unit
    counts = torch.tensor(([unit] * (per_row - 1) + [last]) * 3, dtype=torch.float64)
    m, size = torch.randn(3 * per_row).double(), torch.rand(3 * per_row).double() + 0.1
    near = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(haar.approximation(x_NU), general.approximation(rows), **near)
    torch.testing.assert_close(haar.energy(x_NU, counts), general.energy(rows, counts), **near)
    mine = haar.synthesis(x_NU, m, size, 0.3).view(3, -1)[:, :columns]
    torch.testing.assert_close(mine, general.synthesis(rows, m, size, 0.3), **near)


def test_unit_sum_does_not_depend_on_padding_or_on_its_neighbours() -> None:
    torch.manual_seed(0)
    x_NU = torch.randn(1000, 13)
    whole = unit_sum(x_NU)
    padded = torch.nn.functional.pad(x_NU, (0, 51))
    assert torch.equal(unit_sum(padded), whole)
    assert torch.equal(torch.stack([unit_sum(row[None])[0] for row in x_NU]), whole)


@pytest.mark.parametrize("level", [-1, 17, 1.5, "2", True, None])
def test_a_level_out_of_range_is_refused(level: object) -> None:
    with pytest.raises(ValueError, match=r"level=.* must be a whole number from 0 \(AdamW\) to 16"):
        transform("haar", level)  # type: ignore[arg-type]


@pytest.mark.parametrize("wavelet", ["har", "gaus1", "", "cmor1.5-1.0"])
def test_an_unknown_wavelet_is_refused(wavelet: str) -> None:
    with pytest.raises(ValueError, match="is not a discrete wavelet of PyWavelets"):
        transform(wavelet, 2)
