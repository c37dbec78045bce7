"""A plan in the terminal and as a page."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from gwt_dist.memory.report import OURS
from gwt_dist.report.pages import COLOURS, human, render

NAMES = {
    "single": "one process",
    "ddp": "DDP",
    "zro": "DDP + ZeroRedundancyOptimizer",
    "oss": "DDP + fairscale OSS",
    "fsdp1": "FSDP1",
    "fsdp2": "FSDP2",
    "fairscale": "fairscale FullyShardedDataParallel",
    **{f"zero{stage}": f"ZeRO-{stage}" for stage in range(4)},
}
NOT_STATE = ("weights", "gradients", "masters", "gradients of the masters")  # rows that AdamW has alike
_WEIGHTS = (("model", "of the whole model"), ("matrices", "of the matrices that match a target"))
ACTIVATIONS = "kept for the backward pass", "at most", "the worst rank with them"
COLUMNS = (("worst rank", "worst_rank"), ("least", "min"), ("median", "median"), ("most", "max"))


def title(content: dict[str, Any]) -> str:
    """One line: what is planned."""
    model, setup = content["model"], content["setup"]
    name = NAMES[setup["engine"]]
    replicas, shards = setup["mesh"]
    if replicas > 1 and shards > 1:
        name = f"{'HSDP' if setup['engine'] == 'fsdp2' else name}, {replicas} replicas of {shards}"
    ranks = f"{setup['world_size']:,} rank{'s' if setup['world_size'] > 1 else ''}"
    return f"{model['name']}: {model['weights']:,} weights, {name}, {ranks}"


def levels(content: dict[str, Any]) -> str:
    """Which level has how many elements, and the recipes."""
    parts = [f"level {x['level']}: {x['tensors']:,} tensors, {x['elements']:,} elements" for x in content["levels"]]
    frozen = content["model"]["frozen"]
    setup = content["setup"]
    rest = (setup["rest"] or {}).get("recipe") or setup["recipe"]
    other = f', rest "{rest}"' if rest != setup["recipe"] else ""
    return "; ".join([*parts, *([f"frozen: {frozen:,} elements"] if frozen else [])]) + (
        f'; recipe "{setup["recipe"]}"{other}, wavelet {setup["wavelet"]}'
    )


def rows(content: dict[str, Any]) -> list[tuple[str, ...]]:
    """Name and bytes of each row of the table."""
    found = []
    for row in content["rows"]:
        name = f"{row['name']}, {row['dtype']}" + (" (host)" if row["host"] else "")
        found.append((name, *(human(row[key]) for _, key in COLUMNS)))
    total = "all of it on the device" if content["host"]["max"] else "all of it"
    found.append((total, *(human(content["device"][key]) for _, key in COLUMNS)))
    if content["host"]["max"]:
        found.append(("all of it on the host", *(human(content["host"][key]) for _, key in COLUMNS)))
    adamw = sum(value for _, value in beside_adamw(content))
    name = f"{'both' if content['host']['max'] else 'all of it'}, with AdamW in fp32"
    return [*found, (name, human(adamw), *[""] * (len(COLUMNS) - 1))]


def activations(content: dict[str, Any]) -> tuple[str, list[tuple[str, ...]]]:
    """What was counted of activations: a title, and a row for each thing that may be done about them."""
    found = content.get("activations")
    if found is None:
        return "", []
    title = f"activations of a rank, {found['sequences']} x {found['tokens']} tokens, {found['dtype']}"
    return title, [(one["name"], *(human(one[key]) for key in ("kept", "most", "device"))) for one in found["measures"]]


def a_weight(content: dict[str, Any]) -> str:
    """Bytes of state for each trained weight: of the whole model, and of the matrices that match a target."""
    found = content["state_a_weight"]
    parts = [f"{found[key]:.4f} {what}" for key, what in _WEIGHTS if found[key] is not None]
    return ", ".join(parts) + "; AdamW 8"


def details(content: dict[str, Any]) -> list[tuple[str, str]]:
    """What is not bytes that a rank holds."""
    checkpoint, setup = content["checkpoint"], content["setup"]
    found = [
        (
            "cut units, kept by another rank too",
            f"{human(content['cut']['max'])} at most on a rank; {content['exchange_elements']:,} elements are "
            f"exchanged in a step",
        ),
        ("state, bytes a weight", a_weight(content)),
        ("checkpoint", f"{human(checkpoint['whole'])} in all, {human(checkpoint['rank']['max'])} at most by one rank"),
    ]
    for part in content["communication"]:
        found.append((f"a rank sends: {part['name']}", f"{human(part['bytes'])} a step, {part['what']}"))
    found.append(("a step", f"{setup['tokens']:,} tokens, by --sequence, --micro-batch and --accumulation"))
    others = "" if "activations" in content else "activations (--activations bf16 counts them), "
    found.append(("not counted", others + content["not_counted"]))
    return found


def show(content: dict[str, Any]) -> None:
    """Print it."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if "fit" in content:
        fit = content["fit"]
        table = Table(title=f"the worst rank in {human(fit['limit'])}", title_justify="left")
        for name in ("level", "ranks", "on its device", "fits"):
            table.add_column(name, justify="right")
        for one in fit["tried"]:
            cells = (one["level"], f"{one['world_size']:,}", human(one["device"]), "yes" if one["fits"] else "no")
            table.add_row(*map(str, cells))
        console.print(table)
        if "model" not in content:
            console.print("nothing that was tried fits: shard more of it, offload, or use more ranks")
            return
    console.print(title(content), markup=False, highlight=False)
    console.print(levels(content), markup=False, highlight=False)
    table = Table(title=f"bytes of a rank (worst: rank {content['worst_rank']})", title_justify="left")
    table.add_column("")
    for name, _ in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows(content):
        table.add_row(*row)
    console.print(table)
    its_title, its_rows = activations(content)
    if its_rows:
        table = Table(title=its_title, title_justify="left")
        for name in ("", *ACTIVATIONS):
            table.add_column(name, justify="right" if name else "left")
        for row in its_rows:
            table.add_row(*row)
        console.print(table)
    table = Table(title="optimizer state beside others, divided evenly (AdamW's in fp32)", title_justify="left")
    for name in ("", "whole model", "a weight", "worst rank", "formula"):
        table.add_column(name, justify="left" if name in ("", "formula") else "right")
    trained = content["model"]["weights"] - content["model"]["frozen"]
    for other in content["beside"]:
        each = f"{other['whole'] / trained:.2f}" if trained else "-"
        table.add_row(other["name"], human(other["whole"]), each, human(other["rank"]), other["formula"])
    console.print(table)
    grid = Table.grid(padding=(0, 2))
    for detail in details(content):
        grid.add_row(*detail)
    console.print(grid)


_PAGE = """
{% block style %}
 svg { width: 100%; height: auto; display: block; } svg text { font-size: 13px; fill: currentColor; }
{% endblock %}
{% block body %}
<p>{{ levels }}</p>
<h2>The worst rank ({{ worst_rank }}), beside AdamW</h2>
<svg viewBox="0 0 900 {{ 40 * bars|length }}" role="img" aria-label="bytes of the worst rank">
{%- for bar in bars %}{% set y = 40 * loop.index0 %}
<text x="0" y="{{ y + 22 }}">{{ bar.name }}</text>
{%- for part in bar.parts %}
<rect x="{{ part.x }}" y="{{ y + 4 }}" width="{{ part.width }}" height="28" fill="{{ part.colour }}">
<title>{{ part.name }}: {{ part.text }}</title></rect>
{%- endfor %}
<text x="{{ bar.end + 6 }}" y="{{ y + 22 }}">{{ bar.text }}</text>
{%- endfor %}
</svg>
<p class="legend">{% for name, colour in legend %}<span><i style="background:{{ colour }}"></i>{{ name }}</span>
{% endfor %}</p>
<table><tr><th>bytes of a rank</th>{% for name, _ in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% if activations %}<h2>{{ activations_title }}</h2>
<table><tr><th></th>{% for name in activations_columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in activations %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endif %}
<h2>Optimizer state beside others, by formula</h2>
<svg viewBox="0 0 900 {{ 32 * beside|length }}" role="img" aria-label="optimizer state">
{%- for other in beside %}{% set y = 32 * loop.index0 %}
<text x="0" y="{{ y + 19 }}">{{ other.name }}</text>
<rect x="190" y="{{ y + 4 }}" width="{{ other.width }}" height="20" fill="{{ other.colour }}"/>
<text x="{{ 196 + other.width }}" y="{{ y + 19 }}">{{ other.text }}</text>
{%- endfor %}
</svg>
<p>The worst rank's part if each were divided evenly. GaLore and APOLLO need whole matrices, so engines that shard do
not divide them in this way.</p>
<h2>Further</h2>
<table>{% for name, text in details %}<tr><td>{{ name }}</td><td class="text">{{ text }}</td></tr>
{% endfor %}</table>
{% endblock %}
"""
_WIDTH, _LETTER = 760, 8  # of names and bars together, which leaves room for a number, and of a letter at most


def by_part(content: dict[str, Any]) -> list[tuple[str, int]]:
    """Bytes of the worst rank by part, on device and host together."""
    merged: dict[str, int] = {}  # a name has a row for each of its formats
    for row in content["rows"]:
        merged[row["name"]] = merged.get(row["name"], 0) + row["worst_rank"]
    return list(merged.items())


def beside_adamw(content: dict[str, Any]) -> list[tuple[str, int]]:
    """The same with AdamW's state in the place of this optimizer's."""
    adamw = next(other for other in content["beside"] if other["name"] == "AdamW")["rank"]
    kept = dict.fromkeys((name for name, _ in by_part(content)), 0) | {"exp_avg": adamw // 2, "exp_avg_sq": adamw // 2}
    return [*(kept | {name: value for name, value in by_part(content) if name in NOT_STATE}).items()]


def bars_of(content: dict[str, Any]) -> list[tuple[str, list[tuple[str, int]]]]:
    """Bytes of the worst rank by part: with this optimizer and with AdamW, for each way to have activations."""
    bars = [("GWTAdamW", by_part(content)), ("AdamW", beside_adamw(content))]
    if "activations" not in content:
        return bars
    by_name = {one["name"]: [("activations", one["most"])] for one in content["activations"]["measures"]}
    return [(f"{who}, {name}", its + most) for who, its in bars for name, most in by_name.items()]


def page(content: dict[str, Any]) -> str:
    """A page that needs nothing beside itself."""
    bars = bars_of(content)
    parts = dict.fromkeys(name for _, its in bars for name, _ in its)
    legend = dict(zip(parts, cycle(COLOURS), strict=False))
    its_title, its_rows = activations(content)
    most = max(other["rank"] for other in content["beside"]) or 1
    return render(
        _PAGE,
        title=title(content),
        levels=levels(content),
        worst_rank=content["worst_rank"],
        bars=_bars(bars, legend),
        activations_title=its_title,
        activations_columns=ACTIVATIONS,
        activations=its_rows,
        legend=legend.items(),
        columns=COLUMNS,
        rows=rows(content),
        beside=[
            {
                "name": other["name"],
                "width": round(500 * other["rank"] / most, 1),
                "text": human(other["rank"]),
                "colour": COLOURS[0] if other["name"].startswith(OURS) else COLOURS[-1],
            }
            for other in content["beside"]
        ],
        details=details(content),
    )


def _bars(bars: list[tuple[str, list[tuple[str, int]]]], legend: dict[str, str]) -> list[dict[str, Any]]:
    largest = max(1, *(sum(value for _, value in parts) for _, parts in bars))
    left = _LETTER * max(len(name) for name, _ in bars) + 4 * _LETTER
    found = []
    for name, parts in bars:
        rectangles, x = [], float(left)
        for part, value in parts:
            width = (_WIDTH - left) * value / largest
            its = {"name": part, "text": human(value), "x": round(x, 1), "width": round(width, 1)}
            rectangles.append({**its, "colour": legend[part]})
            x += width
        total = human(sum(value for _, value in parts))
        found.append({"name": name, "parts": rectangles, "end": round(x, 1), "text": total})
    return found
