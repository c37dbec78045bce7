"""The drawings of a report, by plotly: curves with a line a run, and bars."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from gwt_dist.report.pages import COLOURS, human
from gwt_dist.report.run import Run, finite
from gwt_dist.train.metrics import PHASES

# Of runs: what is next to each other differs most.
RUN_COLOURS = tuple(COLOURS[i] for i in (0, 4, 2, 3, 5, 1, 6))
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SMOOTHED = 40  # logged values from which on a curve has a smooth one over it
# (name, its bytes, those of AdamW in its place)
PARTS = (
    ("weights", "weights", "weights"),
    ("gradients", "gradients", "gradients"),
    ("masters", "masters", "masters"),
    ("moments, groups with a level", "wavelet_moments", "wavelet_adamw"),
    ("moments, groups at level 0", "plain_moments", "plain_adamw"),
    ("steps, limiter norms", "scalars", ""),
)


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure under its title. `legend` has a name and a colour for each part of bars; curves have none of their own:
    their x axis is that of the other curves, and their lines are of runs.
    """

    id: str
    title: str
    note: str
    figure: go.Figure
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class _Line:
    """What is drawn of each run: values by key from its lines."""

    key: str
    name: str = ""
    validation: bool = False
    mode: str = "lines"
    faint: bool = False
    smooth: bool = False  # noisy: from one step to the next


# id, title, note, label of the y axis, its scale, lines
_CURVES: tuple[tuple[str, str, str, str, str, tuple[_Line, ...]], ...] = (
    (
        "loss",
        "Loss",
        "Of the training batch; points: validation.",
        "nats a token",
        "free",
        (
            _Line("loss", "training", smooth=True),
            _Line("validation_loss", "validation", validation=True, mode="markers"),
        ),
    ),
    (
        "bits_per_byte",
        "Bits per byte",
        "Of the validation text, comparable between tokenizers.",
        "bits a byte",
        "free",
        (_Line("bits_per_byte", validation=True, mode="lines+markers"),),
    ),
    ("lr", "Learning rate", "As given to the optimizer.", "learning rate", "zero", (_Line("lr"),)),
    (
        "gradient_norm",
        "Gradient norm",
        "Of all weights, before clipping.",
        "norm",
        "log",
        (_Line("gradient_norm", smooth=True),),
    ),
    (
        "limited_norm",
        "Norm that the limiter remembers",
        "Of the update of a tensor: mean over tensors; faint: the largest.",
        "norm",
        "log",
        (_Line("limited_norm_mean", "mean"), _Line("limited_norm_max", "largest", faint=True)),
    ),
    (
        "limited_share",
        "Tensors held back",
        "Share of the tensors with a limiter whose update it shortened in the step.",
        "share",
        "zero",
        (_Line("limited_share", smooth=True),),
    ),
    (
        "tokens_per_second",
        "Speed",
        "Of each logged step, of all ranks together.",
        "tokens a second",
        "zero",
        (_Line("tokens_per_second", smooth=True),),
    ),
)


def drawings(runs: Sequence[Run]) -> list[Drawing]:
    """All that the runs have numbers for, in the order of the page."""
    by_tokens = len({run.tokens_per_step for run in runs}) > 1

    def x(run: Run, line: dict[str, Any]) -> int:
        return int(line["step"]) * (run.tokens_per_step if by_tokens else 1)

    label = "tokens" if by_tokens else "step"
    end = max(x(run, run.training[-1]) for run in runs)
    found = []
    for id_, title, note, unit, scale, lines in _CURVES:
        figure = _curves(runs, lines, x)
        if figure.data:
            figure.update_layout(**_layout(300), shapes=_marks(runs, by_tokens))
            figure.update_xaxes(title_text=label, range=[0, 1.02 * end], **_AXIS)
            figure.update_yaxes(title_text=unit, automargin=True, **_SCALES[scale], **_AXIS)
            smoothed = any(trace.meta["key"].endswith(_SMOOTH) for trace in figure.data)
            note += " Pale: as logged, with a running mean over it." if smoothed else ""
            found.append(Drawing(id_, title, note, figure))
    found += [drawing for drawing in (_time(runs), _memory(runs)) if drawing.figure.data]
    return found


def colour(number: int) -> str:
    """Of the run of that number."""
    return RUN_COLOURS[number % len(RUN_COLOURS)]


def plain(text: str, most: int = 60) -> str:
    """Text for plotly, which takes some tags of HTML as such; shortened in the middle."""
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[-(most // 2 - 1) :]}"
    return html.escape(text)


_AXIS = {"gridcolor": "#8883", "zeroline": False, "linecolor": "#888", "ticks": "outside", "tickcolor": "#888"}

_SMOOTH = ", smooth"  # after the key of a line
_TICKS = [float(f"{digit}e{power}") for power in range(-12, 13) for digit in (1, 2, 5)]
_SCALES: dict[str, dict[str, Any]] = {
    "free": {},
    "zero": {"rangemode": "tozero"},
    "log": {"type": "log", "tickvals": _TICKS, "ticktext": [f"{tick:g}" for tick in _TICKS]},
}


def _layout(height: int) -> dict[str, Any]:
    return {
        "template": "none",
        "height": height,
        "margin": {"l": 62, "r": 12, "t": 26, "b": 46},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, 'Liberation Sans', sans-serif", "size": 12},
        "showlegend": False,
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": "#fff", "font": {"color": "#222"}},
    }


def _curves(runs: Sequence[Run], lines: Sequence[_Line], x: Callable[[Run, dict[str, Any]], int]) -> go.Figure:
    figure = go.Figure()
    for number, run in enumerate(runs):
        for line in lines:
            rows = [row for row in (run.validation if line.validation else run.training) if line.key in row]
            values = [finite(row[line.key]) for row in rows]
            if all(value is None for value in values):
                continue
            name = " ".join(part for part in (plain(run.name), line.name) if part)
            look = {"color": colour(number), "dash": DASHES[number // len(RUN_COLOURS) % len(DASHES)]}
            reach = len(values) // SMOOTHED if line.smooth else 0
            steps = [x(run, row) for row in rows]
            figure.add_scatter(
                x=steps,
                y=values,
                name=name,
                meta={"run": number, "key": line.key},
                mode=line.mode if len(rows) > 1 else "markers",
                opacity=0.3 if reach else 0.45 if line.faint else 1,
                line={**look, "width": 1 if reach else 1.8},
                marker={"size": 7},
            )
            if reach:
                means = smooth(values, reach)
                figure.add_scatter(
                    x=[steps[i] for i in means],
                    y=list(means.values()),
                    name=f"{name} mean of {2 * reach + 1}",
                    meta={"run": number, "key": line.key + _SMOOTH},
                    mode="lines",
                    line={**look, "width": 2.2},
                )
    return figure


def smooth(values: Sequence[float | None], reach: int) -> dict[int, float | None]:
    """By number of a value, its mean with `reach` neighbours on either side. None is left out, and stays.

    In the steep beginning it is of as many before as after, so that the slope stays one; at the end, where a run is
    judged, of those that are there, and not of the last value alone. Of a wide reach a tenth of it lies between two.
    """
    found: dict[int, float | None] = {}
    for i in (*range(0, len(values) - 1, max(1, reach // 10)), len(values) - 1):
        side = min(reach, i)
        near = [value for value in values[i - side : i + side + 1] if value is not None]
        found[i] = None if values[i] is None else sum(near) / len(near)
    return found


def _marks(runs: Sequence[Run], by_tokens: bool) -> list[dict[str, Any]]:
    """A vertical line where a run was resumed; its name is the number of the run."""
    marks = []
    for number, run in enumerate(runs):
        for step in run.resumed:
            at = step * (run.tokens_per_step if by_tokens else 1)
            line = {"color": colour(number), "width": 1, "dash": "dot"}
            ends = {"x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper"}
            marks.append({"type": "line", "name": str(number), "line": line, **ends})
    return marks


def _time(runs: Sequence[Run]) -> Drawing:
    """Shares of the time of the loop, a bar a run."""
    figure = go.Figure()
    timed = [(run, run.seconds()) for run in runs]
    timed = [(run, seconds) for run, seconds in timed if seconds]
    for number, phase in enumerate(PHASES):
        parts = [(seconds.get(phase, 0.0), sum(seconds.values())) for _, seconds in timed]
        if any(part for part, _ in parts):
            figure.add_bar(
                y=[plain(run.name, 24) for run, _ in timed],
                x=[100 * part / total for part, total in parts],
                customdata=[[part, total] for part, total in parts],
                name=phase,
                orientation="h",
                marker={"color": _PHASE_COLOURS[number]},
                hovertemplate=phase + ": %{x:.1f} %, %{customdata[0]:.2f} of %{customdata[1]:.2f} s<extra></extra>",
            )
    _stack(figure, len(timed), "% of the time")
    note = "Of the whole training loop. Engine: what DeepSpeed's step does around the optimizer's."
    return Drawing("time", "Where the time goes", note, figure, _legend(figure))


_PHASE_COLOURS = ("#bbbbbb", "#ccbb44", "#4477aa", "#66ccee", "#ee6677", "#aa3377", "#228833", "#99cc66", "#888888")


def _memory(runs: Sequence[Run]) -> Drawing:
    """Bytes of the fullest rank of each run, above what it would hold with AdamW."""
    figure = go.Figure()
    bars: list[tuple[str, dict[str, int], int]] = []  # label, bytes, which key of PARTS
    spread = []
    for run in runs:
        if run.ranks:
            in_order = sorted(run.ranks, key=held)
            least, most = in_order[0], in_order[-1]
            bars.append((plain(run.name, 24), most, 1))
            if any(most[ours] != most.get(adamw, 0) for _, ours, adamw in PARTS[:5]):
                bars.append((f"{plain(run.name, 24)} with AdamW", most, 2))
            if len(run.ranks) > 1:
                low, high = human(held(least)), human(held(most))
                told = f"{high} each" if low == high else f"{low} to {high}, rank {most['rank']} most"
                told = f"{len(run.ranks)} ranks, {told}"
                spread.append(f"{run.name}: {told}." if len(runs) > 1 else f"{told}.")
    for number, part in enumerate(PARTS):
        values = [rank.get(str(part[key]), 0) for _, rank, key in bars]
        if any(values):
            figure.add_bar(
                y=[label for label, _, _ in bars],
                x=[value / 2**20 for value in values],
                customdata=[human(value) for value in values],
                name=plain(part[0]),
                orientation="h",
                marker={"color": COLOURS[number]},
                hovertemplate=f"{plain(part[0])}: %{{customdata}}<extra></extra>",
            )
    _stack(figure, len(bars), "MiB")
    note = (
        "Of the fullest rank, counted on the live tensors at the end of the run; AdamW's two fp32 moments by formula. "
        "Without activations."
    )
    return Drawing("memory", "Memory of a rank", " ".join((note, *spread)), figure, _legend(figure))


def held(rank: dict[str, int], adamw: bool = False) -> int:
    """All that is counted of a rank, or that would be with AdamW."""
    return sum(rank.get(part[2 if adamw else 1], 0) for part in PARTS)


def _stack(figure: go.Figure, bars: int, label: str) -> None:
    layout = _layout(80 + 30 * bars)
    layout |= {"barmode": "stack", "hovermode": "closest", "bargap": 0.25}
    layout["margin"] |= {"l": 8}
    figure.update_layout(**layout)
    figure.update_xaxes(title_text=label, **_AXIS)
    figure.update_yaxes(autorange="reversed", automargin=True, ticks="", type="category")


def _legend(figure: go.Figure) -> tuple[tuple[str, str], ...]:
    return tuple((html.unescape(trace.name), trace.marker.color) for trace in figure.data)
