"""The page of one run or of several: what they are, curves, bars, and all their settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from gwt_dist.report.figures import colour, drawings, held
from gwt_dist.report.pages import human, render
from gwt_dist.report.run import Run, finite, flat, last

NOTHING = "–"
_OF_THE_FOLDER = ("train.output", "train.resume")  # different in any two runs

_PAGE = """
{% block policy %}; script-src 'unsafe-inline'; img-src data: blob:{% endblock %}
{% block style %}
 body { max-width: 76rem; }
 .wide { overflow-x: auto; }
 td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; min-width: 6rem; vertical-align: top; }
 td:first-child { min-width: 9rem; }
 .curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0 2rem; }
 figure { margin: 1rem 0 0; min-width: 0; } figcaption { line-height: 1.3; } figcaption span { opacity: .75; }
 .runs { position: sticky; top: 0; z-index: 2; background: Canvas; padding: .5rem 0; margin-top: 1.5rem; }
 .notes { border-left: 3px solid #ccbb44; padding-left: .8rem; }
 .xtick text, .ytick text, .g-xtitle text, .g-ytitle text { fill: CanvasText !important; }
 details { margin-top: 1rem; } summary { cursor: pointer; }
 h1 { border-top: 4px solid #4477aa; padding-top: .8rem; overflow-wrap: anywhere; }
 h2, th, summary { color: #4477aa; color: light-dark(#2f5d8c, #88bbee); }
 #headline { list-style: none; margin: 0 0 1.5rem; padding: 0; }
 #headline li { border-left: .35rem solid; padding: .1rem 0 .1rem .8rem; margin: .6rem 0; }
 #headline b { display: block; font-size: clamp(1.25rem, 5.5vw, 1.9rem); line-height: 1.25; color: CanvasText; }
 #headline span { color: CanvasText; opacity: .75; overflow-wrap: anywhere; }
 #overview tr:nth-child(even) { background: #4477aa14; }
{% endblock %}
{% block body %}
{% if headline %}<ul id="headline">{% for name, colour, text in headline %}
<li style="border-color:{{ colour }}">
{% if names | length > 1 %}<span>{{ name }}</span>{% endif %}<b>{{ text }}</b></li>
{% endfor %}</ul>{% endif %}
{% if notes %}<div class="notes">
{% for name, text in notes %}<p>{{ name }}: {{ text }}.</p>{% endfor %}</div>{% endif %}
<div class="wide"><table id="overview"><tr><th></th>{% for name, _ in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for label, cells in overview %}<tr><td>{{ label }}</td>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<noscript><p>The curves need JavaScript; the tables do not.</p></noscript>
<p class="legend runs">{% for name, colour in names %}<label>
<input type="checkbox" checked data-run="{{ loop.index0 }}">
<i style="background:{{ colour }}"></i>{{ name }}</label>{% endfor %}
{% if resumed %}<span>dotted upright: resumed</span>{% endif %}</p>
<div class="curves">{% for drawing in drawings %}{{ figure(drawing) }}{% endfor %}</div>
{% if memory %}<details><summary>Bytes of every rank</summary><div class="wide"><table id="ranks">
<tr>{% for name in memory[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in memory[1:] %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div></details>{% endif %}
{% if differing is not none %}<h2>Settings that differ</h2>
{% if differing %}{{ table("differing", differing) }}{% else %}<p>None.</p>{% endif %}{% endif %}
<h2>Versions</h2>
{{ table("versions", versions) }}
<details><summary>All settings</summary>{{ table("settings", settings) }}</details>
<script type="application/json" id="figures">{{ figures }}</script>
<script>{{ plotly }}</script>
<script>{{ script }}</script>
{% endblock %}
{% macro table(id, rows) %}<div class="wide"><table id="{{ id }}">
<tr><th></th>{% for name, _ in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for label, cells in rows %}<tr><td>{{ label }}</td>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endmacro %}
{% macro figure(drawing) %}<figure>
<figcaption><b>{{ drawing.title }}</b><br><span>{{ drawing.note }}</span></figcaption>
<div id="{{ drawing.id }}" class="{{ 'bars' if drawing.legend else 'curve' }}"></div>
{% if drawing.legend %}<p class="legend">{% for name, colour in drawing.legend %}<span>
<i style="background:{{ colour }}"></i>{{ name }}</span>{% endfor %}</p>{% endif %}</figure>
{% endmacro %}
"""

# Curves share their x axis: what is zoomed in one is zoomed in all.
_SCRIPT = """
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const config = {displayModeBar: false, responsive: true};
const curves = [];
let following = false;
for (const [id, figure] of Object.entries(figures)) {
  const place = document.getElementById(id);
  if (matchMedia("(pointer: coarse)").matches) figure.layout.dragmode = false;  // a finger scrolls
  Plotly.newPlot(place, figure.data, figure.layout, config);
  if (place.classList.contains("curve")) curves.push(place);
}
for (const place of curves) place.on("plotly_relayout", change => {
  const x = Object.fromEntries(Object.entries(change).filter(([key]) => key.startsWith("xaxis.")));
  if (following || !Object.keys(x).length) return;
  following = true;
  Promise.all(curves.filter(other => other !== place).map(other => Plotly.relayout(other, x)))
    .finally(() => { following = false; });
});
for (const box of document.querySelectorAll("input[data-run]")) box.addEventListener("change", () => {
  for (const place of curves) {
    const its = place.data.flatMap((trace, i) => trace.meta.run === Number(box.dataset.run) ? [i] : []);
    if (its.length) Plotly.restyle(place, {visible: box.checked}, its);
    const marks = (place.layout.shapes || []).flatMap((mark, i) => mark.name === box.dataset.run ? [i] : []);
    if (marks.length) Plotly.relayout(place, Object.fromEntries(marks.map(i => [`shapes[${i}].visible`, box.checked])));
  }
});
"""


def page(runs: Sequence[Run]) -> str:
    """A page that needs nothing beside itself."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    drawn = drawings(runs)
    content = json.dumps({one.id: one.figure.to_plotly_json() for one in drawn}, allow_nan=False)
    every = [run.settings for run in runs]
    versions = [dict(flat(run.record.get("versions") or {})) for run in runs]
    differing = [(key, cells) for key, cells in _beside(every) if len(set(cells)) > 1 and key not in _OF_THE_FOLDER]
    return render(
        _PAGE,
        title=f"{'Run' if len(runs) == 1 else 'Runs'} {', '.join(run.name for run in runs)}",
        names=[(run.name, colour(number)) for number, run in enumerate(runs)],
        headline=[(run.name, colour(number), text) for number, run in enumerate(runs) if (text := _headline(run))],
        resumed=any(run.resumed for run in runs),
        notes=[(run.name, text) for run in runs for text in run.lacking],
        overview=_overview(runs),
        differing=differing if len(runs) > 1 else None,
        drawings=drawn,
        memory=_memory(runs),
        versions=_beside(versions),
        settings=_beside(every),
        # No text inside a script element may look like the end of it.
        figures=Markup(content.replace("<", "\\u003c")),
        plotly=Markup(get_plotlyjs()),
        script=Markup(_SCRIPT),
    )


def _beside(columns: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    keys = dict.fromkeys(key for column in columns for key in column)
    return [(key, [column.get(key, NOTHING) for column in columns]) for key in keys]


def _overview(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    columns = [dict(_told(run)) for run in runs]
    return [row for row in _beside(columns) if any(cell != NOTHING for cell in row[1])]


def _headline(run: Run) -> str:
    """What the run is about: how much state, and how good."""
    ours, adamw = run.moments
    bits = last(run.validation, "bits_per_byte")
    told = []
    if adamw:
        share = ours / adamw
        told.append(f"{share:{'.2f' if share >= 0.01 else '.1g'}} of AdamW's state")
    if bits:
        told.append(f"{bits[1]:.2f} bits a byte")
    return ", ".join(told)


def _told(run: Run) -> Iterator[tuple[str, str]]:
    def param(key: str) -> str:
        return resolved.get(f"optimizer.{key}", settings.get(f"deepspeed.optimizer.params.{key}", NOTHING))

    def of_last(lines: Sequence[Mapping[str, Any]], key: str) -> str:
        found = last(lines, key)
        return f"{found[1]:.4f}" if found else NOTHING

    settings = run.settings
    # As resolved where the record has it: what the JSON leaves out has its default there.
    resolved = dict(flat(run.record.get("identity")))
    step = run.training[-1]["step"]
    yield "steps", f"{step:,} of {settings.get('train.steps', NOTHING)}"
    yield "tokens", f"{step * run.tokens_per_step:,}"
    yield "optimizer", settings.get("deepspeed.optimizer.type", NOTHING)
    yield "recipe", param("recipe")
    yield "level", param("level")
    yield "learning rate", param("lr")
    yield "... of the rest", param("rest.lr")
    yield "ZeRO stage", settings.get("deepspeed.zero_optimization.stage", NOTHING)
    yield "ranks", str(run.record.get("ranks", len(run.ranks) or NOTHING))
    yield "resumed after step (dotted)", ", ".join(f"{step:,}" for step in run.resumed) or NOTHING
    yield "device", str(run.record.get("device", NOTHING))
    yield "training loss, last", of_last(run.training, "loss")
    yield "validation loss, last", of_last(run.validation, "validation_loss")
    yield "bits per byte, last", of_last(run.validation, "bits_per_byte")
    speeds = [speed for speed in (finite(line.get("tokens_per_second")) for line in run.training) if speed is not None]
    yield "tokens a second, median", f"{median(speeds):,.0f}" if speeds else NOTHING
    if run.ranks:
        ours, adamw = run.moments
        yield "moments, all ranks", human(ours)
        yield "... of AdamW's", f"{ours / adamw:.4f}" if adamw else NOTHING
        yield "a rank holds, at most", human(max(held(rank) for rank in run.ranks))


def _memory(runs: Sequence[Run]) -> list[list[str]]:
    from gwt_dist.report.figures import PARTS

    rows = [["", *(name for name, _, _ in PARTS), "all of it", "with AdamW"]]
    for run in runs:
        for rank in run.ranks:
            parts = [f"{rank[key]:,}" for _, key, _ in PARTS]
            total = [f"{held(rank):,}", f"{held(rank, adamw=True):,}"]
            rows.append([f"{run.name}, rank {rank['rank']}", *parts, *total])
    return rows if len(rows) > 1 else []
