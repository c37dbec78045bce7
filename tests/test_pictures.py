"""Pictures of recorded runs: their points are those of the lines, and of the table of the page that shows them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import loss_for_bytes  # noqa: E402

from gwt_dist.study.plan import Outcome  # noqa: E402
from gwt_dist.study.plots import against_state  # noqa: E402
from gwt_dist.study.table import Line  # noqa: E402

LINES = [json.loads(line) for line in (loss_for_bytes.FOLDER / "cpu.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("row", "loss", "spread", "size", "in_the_table"),
    [
        ("adamw", 1.5712, 0.0187, 8.00, "| AdamW, 0.004 | 1.571 |"),
        ("galore-2B", 1.6171, 0.0105, 2.26, "| GaLore, rank 24, what fits into 2 bytes | 1.617 |"),
        ("orthogonal-2-int8", 1.3704, 0.0018, 0.39, "| `orthogonal`, level 2, int8 | 1.370 |"),
        # Seeds of this one are recorded as those of the row at AdamW's settings.
        ("foam-2", 1.5528, 0.0055, 2.33, "| `foam`, level 2 | 1.553 |"),
    ],
)
def test_points_are_means_of_three_seeds(row: str, loss: float, spread: float, size: float, in_the_table: str) -> None:
    point = loss_for_bytes.point_of(LINES, row)
    assert point.loss == pytest.approx(loss, abs=5e-5)
    assert point.spread == pytest.approx(spread, abs=5e-5)
    assert point.size == pytest.approx(size, abs=5e-3)
    assert in_the_table in (ROOT / "docs" / "quality.md").read_text()


def test_a_row_with_two_seeds_is_no_point() -> None:
    two = [line for line in LINES if line["seed"] != 2]
    with pytest.raises(ValueError, match="row 'muon' has 2 runs at its best settings, and a point is the mean of 3"):
        loss_for_bytes.point_of(two, "muon")


def test_all_rows_of_the_picture_are_recorded(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    loss_for_bytes.draw(LINES, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text().count("<!-- ") > len(loss_for_bytes.NAMED)


def test_the_study_names_the_rows_of_its_front_and_the_reference() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    sizes = {"adamw": (8.0, 1.57), "small": (0.4, 1.37), "worse": (2.0, 1.6), "best": (1.0, 1.35), "none": (1.0, None)}
    # Another order for the matrices, which are not asked.
    lines = [Line(row, 64, Outcome(), "", loss=y, state=x, matrix_state=1 / x) for row, (x, y) in sizes.items()]
    against_state(axes, lines, ["red"] * len(lines), "adamw")
    assert [(text.get_text(), text.xy) for text in axes.texts] == [(n, sizes[n]) for n in ("small", "best", "adamw")]
    assert sorted(axes.get_legend_handles_labels()[1]) == ["adamw", "best", "small", "worse"]
