"""`gwt-dist report`: the numbers of the page, runs over each other, what is lacking, and a browser that opens it."""

from __future__ import annotations

import html
import json
import math
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest

from browser import Document, shown
from gwt_dist.cli.app import main
from gwt_dist.report.run import NUMBERS, RANK_BYTES
from gwt_dist.train.metrics import FORMAT, PHASES

HOSTILE = "<b>x</b>&lt;<script>document.title='ran'</script>"
CURVES = ["loss", "bits_per_byte", "lr", "gradient_norm", "limited_norm", "limited_share", "tokens_per_second"]


def make(folder: Path, steps: int = 20, **changes: Any) -> Path:
    """A run folder as the recipe leaves it, with numbers that are all different."""
    folder.mkdir(parents=True)
    record = {
        "format": FORMAT,
        "ranks": 2,
        "device": "cpu",
        "train": {"steps": steps, "output": str(folder), "model": "tiny"},
        "deepspeed": {"optimizer": {"type": "GWTAdamW", "params": {"level": 2, "lr": 0.005}}},
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
    }
    (folder / "run.json").write_text(json.dumps(record | changes))
    lines: list[dict[str, Any]] = []
    for step in range(2, steps + 1, 2):
        keys = ("lr", "gradient_norm", "tokens_per_second", "limited_norm_mean", "limited_norm_max", "limited_share")
        values = {key: (i + 1) / step for i, key in enumerate(keys)}
        seconds = {"data": 0.25, "forward": 1.0, "optimizer": 0.5}
        lines.append({"step": step, "loss": 5 - step / 7, "tokens": 100 * step, **values, "seconds": seconds})
        if step % 10 == 0:
            validation = {"validation_loss": 5 - step / 9, "bits_per_byte": 7 - step / 9}
            lines.append({"step": step, **validation, "seconds": {"evaluation": 2.0}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ranks = [{key: 1000 * (i + 1) + rank for i, key in enumerate(RANK_BYTES)} | {"rank": rank} for rank in range(2)]
    summary = {"steps": steps, "ranks": ranks, "seconds_after_last_line": {"checkpoint": 0.75}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def report(output: Path, *runs: Path) -> str:
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    return output.read_text(encoding="utf-8")


def figures(page: str) -> dict[str, dict[str, Any]]:
    """The drawings in a page, as plotly gets them."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found and "<" not in found[1]  # no text in it can end the script element
    return json.loads(found[1])


def drawn(page: str) -> dict[tuple[int, str], tuple[list[float], list[float]]]:
    """By the number of the run and the key of its lines: x and y."""
    traces = [trace for figure in figures(page).values() for trace in figure["data"] if "meta" in trace]
    found = {(trace["meta"]["run"], trace["meta"]["key"]): (trace["x"], trace["y"]) for trace in traces}
    assert len(found) == len(traces)
    return found


def logged(run: Path, key: str) -> tuple[list[int], list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    pairs = [(line["step"], line[key]) for line in lines if key in line]
    return [step for step, _ in pairs], [value for _, value in pairs]


def table(page: str, name: str) -> dict[str, list[str]]:
    """Rows of the table with that id, by their first cell."""
    rows = re.findall(r"<tr>(.*?)</tr>", page.split(f'<table id="{name}"')[1].split("</table>")[0], re.DOTALL)
    cells = [[html.unescape(cell) for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", row, re.DOTALL)] for row in rows]
    return {row[0]: row[1:] for row in cells}


def test_the_numbers_are_those_of_a_real_run(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = whole_run
    page = report(tmp_path / "page.html", run)
    assert list(figures(page)) == [*CURVES, "time", "memory"]
    found = drawn(page)
    for key in set(NUMBERS) - {"tokens"}:
        assert found[0, key] == logged(run, key), key
    summary = json.loads((run / "summary.json").read_text())
    cells = table(page, "ranks")
    for rank in summary["ranks"]:
        row = cells[f"{run.name}, rank {rank['rank']}"]
        names = ("weights", "gradients", "masters", "wavelet_moments", "plain_moments", "scalars")
        held = [rank[key] for key in names]
        adamw = sum(held[:3]) + rank["wavelet_adamw"] + rank["plain_adamw"]
        assert row == [f"{number:,}" for number in (*held, sum(held), adamw)]
    overview = table(page, "overview")
    assert overview["steps"] == ["12 of 12"] and overview["optimizer"] == ["GWTAdamW"]
    assert overview["bits per byte, last"] == [f"{logged(run, 'bits_per_byte')[1][-1]:.4f}"]
    moments, adamw = (sum(r[f"wavelet_{k}"] + r[f"plain_{k}"] for r in summary["ranks"]) for k in ("moments", "adamw"))
    assert overview["... of AdamW's"] == [f"{moments / adamw:.4f}"]
    assert set(table(page, "versions")) == {"", "python", "torch", "deepspeed", "transformers", "gwt_dist"}
    assert table(page, "settings")["deepspeed.zero_optimization.stage"] == ["2"]


def test_time_is_that_of_all_lines_and_of_the_last_checkpoint(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    bars = {trace["name"]: trace for trace in figures(report(tmp_path / "page.html", run))["time"]["data"]}
    seconds = {"data": 2.5, "forward": 10.0, "optimizer": 5.0, "evaluation": 4.0, "checkpoint": 0.75}
    assert list(bars) == [phase for phase in PHASES if phase in seconds]
    for phase, bar in bars.items():
        assert bar["customdata"] == [[seconds[phase], 22.25]]
        assert bar["x"] == [pytest.approx(100 * seconds[phase] / 22.25)]


def test_memory_is_that_of_the_fullest_rank_beside_adamws(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    page = report(tmp_path / "page.html", run)
    memory = figures(page)["memory"]["data"]
    assert all(bar["y"] == ["run", "run with AdamW"] for bar in memory)
    # In the order of RANK_BYTES: 1000 of the rank itself, 2000 of weights, ... and the number of the rank on top.
    ours = {"moments, groups with a level": 5001, "moments, groups at level 0": 7001, "steps, limiter norms": 9001}
    adamw = {"moments, groups with a level": 6001, "moments, groups at level 0": 8001, "steps, limiter norms": 0}
    alike = {"weights": 2001, "gradients": 3001, "masters": 4001}
    assert len(memory) == 6
    for bar in memory:
        name = html.unescape(bar["name"])
        assert bar["x"] == [pytest.approx(part[name] / 2**20) for part in (alike | ours, alike | adamw)]
    assert "2 ranks, 29.3 KiB each." in page


def test_runs_are_laid_over_each_other(tmp_path: Path) -> None:
    runs = [make(tmp_path / name, steps) for name, steps in (("a", 20), ("b", 30))]
    page = report(tmp_path / "page.html", *runs)
    found = drawn(page)
    for number, run in enumerate(runs):
        for key in set(NUMBERS) - {"tokens"}:
            assert found[number, key] == logged(run, key)
    for id_ in CURVES:
        colours = {(t["meta"]["run"], t["line"]["color"]) for t in figures(page)[id_]["data"]}
        assert len(colours) == 2 == len({colour for _, colour in colours})
        assert figures(page)[id_]["layout"]["xaxis"]["range"] == [0, pytest.approx(30.6)]
    assert table(page, "differing") == {"": ["a", "b"], "train.steps": ["20", "30"]}


def test_runs_of_different_batches_are_drawn_over_tokens(tmp_path: Path) -> None:
    runs = [make(tmp_path / "a"), make(tmp_path / "b", resumed=[5])]
    file = runs[1] / "metrics.jsonl"
    file.write_text(re.sub(r'"tokens": (\d+)', lambda m: f'"tokens": {3 * int(m[1])}', file.read_text()))
    page = report(tmp_path / "page.html", *runs)
    found = drawn(page)
    for number, tokens in ((0, 100), (1, 300)):
        for key in ("loss", "bits_per_byte"):
            assert found[number, key][0] == [tokens * step for step in logged(runs[number], key)[0]]
    layouts = [figures(page)[id_]["layout"] for id_ in CURVES]
    assert all(layout["xaxis"]["title"]["text"] == "tokens" for layout in layouts)
    assert all([mark["x0"] for mark in layout["shapes"]] == [1500] for layout in layouts)


def test_runs_of_one_name_are_told_apart_and_one_run_is_not_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make(tmp_path / parent / "run") for parent in ("x", "y")]
    assert table(report(tmp_path / "page.html", *runs), "overview")[""] == [str(run) for run in runs]
    twice = [str(runs[0]), str(runs[0] / "." / ".." / "run")]
    assert main(["report", *twice, "--output", str(tmp_path / "other.html")]) == 2
    assert "named twice" in capsys.readouterr().err


def test_what_cannot_be_drawn_is_a_hole_and_what_no_run_has_is_left_out(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[1]["gradient_norm"] = math.inf
    for line in lines:
        for key in ("limited_norm_mean", "limited_norm_max", "limited_share", "lr"):
            if "loss" in line:
                line[key] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(tmp_path / "page.html", run)
    assert list(figures(page)) == [c for c in CURVES if c not in ("limited_norm", "limited_share", "lr")] + [
        "time",
        "memory",
    ]
    assert drawn(page)[0, "gradient_norm"][1] == [1.0, None, *(2 / step for step in range(6, 21, 2))]


def test_ranks_are_folded_and_their_spread_is_told(tmp_path: Path) -> None:
    runs = [make(tmp_path / name) for name in "ab"]
    summary = json.loads((runs[0] / "summary.json").read_text())
    one = summary["ranks"][0]
    summary["ranks"] = [one | {"rank": i, "weights": 1024 * (5 + (i * 7) % 16)} for i in range(16)]
    (runs[0] / "summary.json").write_text(json.dumps(summary))
    page = report(tmp_path / "page.html", *runs)
    weights = next(bar for bar in figures(page)["memory"]["data"] if bar["name"] == "weights")
    assert weights["y"] == ["a", "a with AdamW", "b", "b with AdamW"]
    assert weights["x"][:2] == [20 / 1024] * 2  # of rank 9, and not the 5 of rank 0
    others = sum(one[key] for key in ("gradients", "masters", "wavelet_moments", "plain_moments", "scalars"))
    least, most = (f"{(others + 1024 * kib) / 1024:.3g} KiB" for kib in (5, 20))
    assert f"a: 16 ranks, {least} to {most}, rank 9 most. b: 2 ranks" in page
    assert len(table(page, "ranks")) == 19


def headlines(page: str) -> list[str]:
    found = page.split('<ul id="headline">')[1].split("</ul>")[0]
    return [html.unescape(text) for text in re.findall(r"<b>(.*?)</b>", found)]


def test_the_headline_is_of_each_runs_own_numbers(tmp_path: Path) -> None:
    runs = [make(tmp_path / name, steps) for name, steps in (("a", 20), ("b", 30), ("c", 8))]
    summary = json.loads((runs[1] / "summary.json").read_text())
    for rank in summary["ranks"]:
        rank.update(wavelet_moments=2, wavelet_adamw=2000, plain_moments=1, plain_adamw=1000)
    (runs[1] / "summary.json").write_text(json.dumps(summary))
    # 2 * 12001 bytes of 2 * 14001, and 7 minus a ninth of the steps; the run of 8 steps had no validation.
    assert headlines(report(tmp_path / "page.html", *runs)) == [
        "0.86 of AdamW's state, 4.78 bits a byte",
        "0.001 of AdamW's state, 3.67 bits a byte",
        "0.86 of AdamW's state",
    ]
    (runs[0] / "summary.json").unlink()
    assert headlines(report(tmp_path / "one.html", runs[0])) == ["4.78 bits a byte"]


def test_recipe_and_rates_are_as_resolved(tmp_path: Path) -> None:
    identity = {"optimizer.recipe": "foam", "optimizer.rest": {"lr": 0.25}, "optimizer.lr": 0.005}
    runs = [make(tmp_path / "a", identity=identity), make(tmp_path / "b")]
    overview = table(report(tmp_path / "page.html", *runs), "overview")
    rows = {
        "recipe": ["foam", "–"],
        "level": ["2", "2"],
        "learning rate": ["0.005"] * 2,
        "... of the rest": ["0.25", "–"],
    }
    assert {key: overview[key] for key in rows} == rows


def test_long_curves_have_a_running_mean_over_them(tmp_path: Path) -> None:
    run = make(tmp_path / "run", 200)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    noisy = [line for line in lines if "loss" in line]
    for number, line in enumerate(noisy):
        line["loss"] = float(number % 2) + (100 if number == 50 else 0)
    noisy[20]["loss"] = math.nan
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(tmp_path / "page.html", run)
    found = drawn(page)
    steps, values = found[0, "loss, smooth"]
    assert steps == found[0, "loss"][0] == logged(run, "loss")[0] and len(values) == 100
    # 100 lines: the mean of 5, of 1 and 3 at the beginning, of the last 4 and 3 at the end, and of 4 beside what is no
    # number.
    assert values[:3] == [0, pytest.approx(1 / 3), pytest.approx(2 / 5)]
    assert values[-3:] == [pytest.approx(part) for part in (3 / 5, 2 / 4, 2 / 3)]
    assert values[20] is None and values[19] == pytest.approx(3 / 4)
    assert values[48:53] == [pytest.approx((100 + own) / 5) for own in (2, 3, 2, 3, 2)]
    assert values[47] == pytest.approx(3 / 5) and values[53] == pytest.approx(3 / 5)
    raw, over, *_ = figures(page)["loss"]["data"]
    assert raw["opacity"] == 0.3 and over["line"]["color"] == raw["line"]["color"]
    assert "running mean" in page and (0, "lr, smooth") not in found and (0, "validation_loss, smooth") not in found


def test_where_a_run_was_resumed_is_marked(tmp_path: Path) -> None:
    runs = [make(tmp_path / "listed", resumed=[0, 7, 13]), make(tmp_path / "told"), make(tmp_path / "whole")]
    for run, starts in ((runs[1], (2, 12)), (runs[2], (2,))):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            if "loss" in line and line["step"] in starts:
                line["seconds"]["first step"] = 1.0
        if run == runs[1]:  # resumed after step 18, and validated before the next line of training
            assert lines[-2].keys() >= {"loss"} and "validation_loss" in lines[-1]
            lines.pop(-2)
            lines[-1]["seconds"]["first step"] = 1.0
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(tmp_path / "page.html", *runs)
    for id_ in CURVES:
        marks = figures(page)[id_]["layout"]["shapes"]
        assert all(mark["x0"] == mark["x1"] for mark in marks)
        assert [(mark["name"], mark["x0"]) for mark in marks] == [("0", 7), ("0", 13), ("1", 10), ("1", 18)]
    assert table(page, "overview")["resumed after step (dotted)"] == ["7, 13", "10, 18", "–"]
    assert "dotted upright: resumed" in page
    page = report(tmp_path / "other.html", runs[2])
    assert "dotted upright" not in page and "resumed after step (dotted)" not in table(page, "overview")


# ---- what is not there, or not what it should be


def test_a_run_that_goes_on_is_shown_and_what_lacks_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "run")
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 22, "lo')
    page = report(tmp_path / "page.html", run)
    told = capsys.readouterr().err
    for text in ("the last line of metrics.jsonl is cut off", "no summary.json: the run goes on, or was stopped"):
        assert text in page and text in told
    assert drawn(page)[0, "loss"] == (list(range(2, 21, 2)), [5 - step / 7 for step in range(2, 21, 2)])
    assert "memory" not in figures(page)


def test_a_run_before_times_were_logged_is_shown(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    for key in ("format", "ranks", "device"):
        del record[key]
    (run / "run.json").write_text(json.dumps(record))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    old = [{k: v for k, v in line.items() if k != "seconds" and not k.startswith("limited")} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    summary = json.loads((run / "summary.json").read_text())
    del summary["seconds_after_last_line"]
    (run / "summary.json").write_text(json.dumps(summary))
    page = report(tmp_path / "page.html", run)
    assert "no times and no limiter norms" in page
    assert list(figures(page)) == ["loss", "bits_per_byte", "lr", "gradient_norm", "tokens_per_second", "memory"]


def test_a_summary_of_an_earlier_end_is_told(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 22, "loss": 1.5, "tokens": 2200}\n')
    assert "summary.json is of step 20, and the run went on to 22" in report(tmp_path / "page.html", run)


LINE = '{"step": 22, "loss": 1.5, "tokens": 2200}\n'


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", None, "is no run folder: it has no run.json"),
        ("run.json", "{", "run.json is not JSON"),
        ("run.json", "[1]", "run.json holds list, not an object"),
        ("run.json", '{"a": ' * 100_000, "run.json is not JSON"),
        ("run.json", json.dumps({"format": FORMAT + 1}), f"has format {FORMAT + 1}, and this gwt_dist knows {FORMAT}"),
        ("run.json", '{"format": "x"}', "has format 'x'"),
        ("run.json", '{"resumed": [1, "x"]}', "resumed is [1, 'x'], and not a list of steps"),
        ("metrics.jsonl", None, "holds no step yet"),
        ("metrics.jsonl", "", "holds no step yet"),
        ("metrics.jsonl", '{"step": 1, "lo', "holds no step yet"),
        ("metrics.jsonl", "{\n" + LINE, "line 1 is not JSON: the file is damaged"),
        ("metrics.jsonl", LINE + "{\n", "line 2 is not JSON: the file is damaged"),
        ("metrics.jsonl", LINE + LINE.replace("22,", "21,"), "line 2 has no step after 21"),
        ("metrics.jsonl", "[]\n", "line 1 has no step"),
        ("metrics.jsonl", LINE.replace("22,", '"22",'), "line 1 has no step"),
        ("metrics.jsonl", LINE.replace("1.5", '"<b>"'), "loss is '<b>', which is no number"),
        ("metrics.jsonl", LINE.replace("2200", "1.5"), "step 22 has tokens 1.5"),
        ("metrics.jsonl", LINE.replace("2200}", '2200, "seconds": {"sleep": 1}}'), "and not numbers by phase"),
        ("summary.json", "{}", "steps is None"),
        ("summary.json", '{"steps": 20}', "has no bytes of ranks"),
        ("summary.json", '{"steps": 20, "ranks": [{"rank": 0}]}', "weights of a rank is missing"),
    ],
)
def test_damage_is_one_line_and_no_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: str | None, message: str
) -> None:
    run, page = make(tmp_path / "run"), tmp_path / "page.html"
    (run / file).unlink()
    if content is not None:
        (run / file).write_text(content)
    assert main(["report", str(run), "--output", str(page)]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1, told
    assert not page.exists()


def test_no_folder_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (tmp_path / "nowhere", tmp_path):
        assert main(["report", str(place), "--output", str(tmp_path / "page.html")]) == 2
    told = capsys.readouterr().err
    assert "nowhere is no folder" in told and "is no run folder: it has no run.json" in told


@pytest.mark.parametrize("command", ["report", "plan"])
def test_a_page_is_not_overwritten_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    arguments = ["plan", "tiny", "--html"] if command == "plan" else ["report", str(make(tmp_path / "r")), "--output"]
    page = tmp_path / "page.html"
    page.write_text("mine")
    assert main([*arguments, str(page)]) == 2
    assert page.read_text() == "mine"
    assert main([*arguments, str(tmp_path)]) == 2
    assert main([*arguments, str(tmp_path / "no" / "page.html")]) == 2
    told = capsys.readouterr().err
    for message in ("is there already and would be overwritten", "is a folder; name a file", "cannot be written: No"):
        assert message in told
    assert main([*arguments, str(page), "--force"]) == 0
    assert page.read_text().startswith("<!doctype html>")
    assert not list(tmp_path.glob("*.new"))


def test_the_commands_of_the_documentation_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "report.md").read_text()
    commands = re.findall(r"^gwt-dist (report .*)$", text, re.MULTILINE)
    make(tmp_path / "runs" / "tiny")
    make(tmp_path / "runs" / "adamw")
    monkeypatch.chdir(tmp_path)
    assert [main(shlex.split(command)) for command in commands] == [0] * 3
    assert sorted(path.name for path in tmp_path.glob("*.html")) == ["compared.html", "report.html"]


# ---- the page itself, and a browser that opens it


def test_it_reaches_for_nothing_and_holds_no_tags_of_others(tmp_path: Path) -> None:
    versions = {HOSTILE: HOSTILE}
    run = make(tmp_path / "x" / HOSTILE.replace("/", "-"), versions=versions, device=HOSTILE)
    started = time.process_time()
    text = report(tmp_path / "page.html", run)
    assert time.process_time() - started < 10
    page = Document(text)
    assert page.outside == [] and figures(text)
    assert "connect-src" not in text.split("<title>")[0] and "default-src 'none'" in text.split("<title>")[0]
    assert len(page.find("script")) == 3 and not [e for e in page.find("b") if e.text == "x"]
    assert table(text, "versions")[HOSTILE] == [HOSTILE]


PROBE = """<script>
const told = {}, place = id => document.getElementById(id);
Plotly.relayout("loss", {"xaxis.range": [4, 8]}).then(() => {
  document.querySelector("input[data-run='0']").click();
  setTimeout(() => {
    told.range = place("bits_per_byte").layout.xaxis.range;
    told.visible = place("loss").data.map(t => [t.meta.run, t.visible !== false]);
    place("probe").textContent = JSON.stringify(told);
  }, 200);
});
</script><p id="probe"></p><img src="http://127.0.0.1:9/x.png">"""


def test_a_browser_draws_it(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    real, folder = whole_run[0], tmp_path / "runs" / HOSTILE.replace("/", "-")
    make(folder)
    page = tmp_path / "page.html"
    text = report(page, real, folder)
    seen = shown(page, tmp_path)
    assert seen.console == []
    assert seen.outside == []
    names = [real.name, folder.name]
    assert seen.texts("title")[0] == f"Runs {', '.join(names)}"
    assert [e.text.strip() for e in seen.find("label", within="runs")] == names
    labels = {"loss": "nats a token", "lr": "learning rate", "limited_share": "share", "gradient_norm": "norm"}
    for id_, figure in figures(text).items():
        paths = [e.attributes["d"] for e in seen.find("path", "js-line", id_)]
        points = seen.find("path", "point", id_)
        lines = [trace for trace in figure["data"] if "lines" in trace.get("mode", "")]
        assert len(paths) == len(lines) and all(re.match(r"M[\d.]+,[\d.]+[LHV]", path) for path in paths), id_
        marked = sum(len(t["x"]) for t in figure["data"] if "markers" in t.get("mode", ""))
        if id_ in CURVES:
            assert len(points) == marked
        assert labels.get(id_, "") in " ".join(seen.texts("text", within=id_))
    # The loss of the real run falls, so its curve does: pixels count from the top.
    real_loss = seen.find("path", "js-line", "loss")[0].attributes["d"]
    heights = [float(pair.split(",")[1]) for pair in re.findall(r"[\d.]+,[\d.]+", real_loss)]
    assert heights[-1] > heights[0] + 20
    # Each bar is as long as its number: "M left,top V bottom H right V top Z".
    bars = [e.attributes["d"] for e in seen.find("path", within="memory") if "point" in e.within]
    lengths = [float(b) - float(a) for a, b in re.findall(r"M([\d.]+),[\d.]+V[\d.]+H([\d.]+)V", " ".join(bars))]
    values = [x for trace in figures(text)["memory"]["data"] for x in trace["x"]]
    assert len(lengths) == len(values) == 4 * 6
    assert lengths == pytest.approx([x * max(lengths) / max(values) for x in values], abs=1)
    # Names stay text, wherever plotly writes them.
    ticks = seen.texts("text", within="ytick")
    assert sum(tick.startswith("<b>x<-b>&l") for tick in ticks) == 1 + 2, ticks


def test_zoom_and_boxes_work_and_the_browser_lets_nothing_out(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    text = report(page, make(tmp_path / "a"), make(tmp_path / "b"))
    page.write_text(text.replace("</body>", PROBE + "</body>"))
    seen = shown(page, tmp_path)
    (refused,) = seen.console
    assert "Loading the image 'http://127.0.0.1:9/x.png' violates" in refused
    told = json.loads(seen.texts("p")[-1])
    assert told["range"] == [4, 8]
    assert told["visible"] == [[0, False], [0, False], [1, True], [1, True]]
    assert not seen.find("button", "modebar-btn")


def test_a_browser_draws_the_plan(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    assert main(["plan", "tiny", "--engine", "zero2", "--world", "3", "--html", str(page)]) == 0
    # The page's policy refuses a script.
    page.write_text(page.read_text().replace("</head>", "<script>document.title = 'ran'</script></head>"))
    seen = shown(page, tmp_path)
    (refused,) = seen.console
    assert "inline script" in refused and "violates" in refused
    assert "tiny: 1,870,272 weights" in seen.texts("title")[0] and len(seen.find("svg")) == 2
    widths = [float(e.attributes["width"]) for e in seen.find("rect")]
    assert len(widths) > 10 and max(widths) > 100
    assert "GWTAdamW" in seen.texts("text") and "AdamW" in seen.texts("text")
