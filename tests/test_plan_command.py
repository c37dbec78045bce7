"""`gwt-dist plan`: its table, JSON and page, what fits, and mistakes told in one line."""

from __future__ import annotations

import html.parser
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from gwt_dist.cli import plan_show
from gwt_dist.cli.app import main
from gwt_dist.memory.fit import size
from gwt_dist.memory.setup import ENGINES as NAMES
from gwt_dist.report.pages import human

BIN = Path(sys.executable).parent
INT8 = "--state-dtype int8"
SHAPES = {
    "hidden_size": 64,
    "intermediate_size": 171,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
}


def build() -> nn.Module:
    """A model of the user's own."""
    model = nn.ModuleDict({"attn": nn.Linear(30, 20), "head": nn.Linear(20, 10, bias=False)})
    model["head"].weight.requires_grad_(False)
    return model


def test_a_function_of_the_users_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    content = told(
        [f"{__name__}:build", "--target", "attn", "--engine", "single", "--level", "3", "--recipe", "energy"], capsys
    )
    assert content["model"] == {"name": f"{__name__}:build", "weights": 820, "tensors": 3, "frozen": 200}
    # 20 rows of 4 coefficients and a bias of 20; a step and a norm for each of the two.
    assert content["state"]["max"] == 8 * (80 + 20) + 2 * 8


def told(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    """What the command prints as JSON."""
    assert main(["plan", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}


@pytest.mark.parametrize("engine", ["zero3", "fsdp1"])
def test_70b_on_4096_ranks_takes_less_than_two_seconds(tmp_path: Path, engine: str) -> None:
    """The whole process, and without torch, whose import alone takes most of that."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    command = [str(BIN / "gwt-dist"), "plan", str(tmp_path), "--engine", engine, "--world", "4096"]
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the processor, whatever else it has to do
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
        if seconds[-1] < 2:
            break
    assert "68,976,648,192 weights" in done.stdout
    assert min(seconds) < 2
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    imported = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment).stderr
    assert re.search(r"\| +gwt_dist.memory.fill$", imported, re.M)
    assert not re.search(r"\| +(torch|deepspeed|transformers|numpy)$", imported, re.M)


def test_the_smallest_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["60m", "--engine", "zero1", "--fit", "380MiB"]
    content = told([*base, "--world", "4"], capsys)
    assert content["setup"]["level"] == content["levels"][0]["level"]
    levels = [(t["level"], t["fits"]) for t in content["fit"]["tried"]]
    assert levels[-1][1] and not any(fits for _, fits in levels[:-1])
    assert content["levels"][0]["level"] == levels[-1][0] > 0
    assert content["device"]["max"] == content["fit"]["tried"][-1]["device"] <= 380 * 2**20
    content = told([*base, "--level", "1"], capsys)
    tried = [(t["world_size"], t["fits"]) for t in content["fit"]["tried"]]
    assert tried == [(1, False), (2, False), (4, False), (8, True)]
    assert content["setup"]["world_size"] == 8
    content = told(base, capsys)
    assert {t["level"] for t in content["fit"]["tried"]} == set(range(9))
    reserved = told([*base, "--world", "4", "--reserve", "5MiB"], capsys)
    assert reserved["fit"]["limit"] == 375 * 2**20
    content = told(["60m", "--engine", "ddp", "--fit", "1MB"], capsys, code=1)
    assert content["fits"] is False and len(content["fit"]["tried"]) == 9


def test_less_state_stands_beside_other_optimizers(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows with other options are what a plan with these options says, and only where that is less by a tenth."""

    def beside(*arguments: str) -> dict[str, int]:
        rows = told(["60m", "--engine", "single", *arguments], capsys)["beside"]
        assert [row["name"] for row in rows[-4:]] == ["AdamW", "8-bit Adam", "GaLore, rank 128", "APOLLO, rank 128"]
        return {row["formula"]: row["whole"] for row in rows[:-4]}

    planned = beside()
    assert list(planned) == ["exact", *(f"with {row}" for row in (INT8, "--level 3", f"--level 3 {INT8}"))]
    for row, whole in planned.items():
        assert whole == beside(*row.split()[1:])["exact"], row
    assert list(beside("--level", "5")) == ["exact", f"with {INT8}"]
    # All but its embeddings is next to nothing, whatever the level: level 3 alone is no tenth less.
    rows = beside("--recipe", "adalomo", "--rest", "recipe=energy")
    assert list(rows) == ["exact", f"with {INT8}", f"with --level 3 {INT8}"]
    assert list(beside("--recipe", "low-rank", "--rank", "128")) == ["exact"]  # no levels, no int8


@pytest.mark.parametrize("recipe", ["orthogonal", "adalomo"])  # one without a first moment
def test_all_of_it_with_adamw(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a rank would hold if this optimizer's state were AdamW's; 3 ranks hold a third of both moments each."""
    arguments = ["60m", "--engine", "zero2", "--world", "3", "--recipe", recipe]
    content = told(arguments, capsys)
    parts = dict(plan_show.beside_adamw(content))
    of_adamw = round(8 * content["model"]["weights"] / 3)
    assert parts["exp_avg"] + parts["exp_avg_sq"] == pytest.approx(of_adamw, abs=1000)
    others = content["device"]["worst_rank"] - content["state"]["worst_rank"]
    assert sum(parts.values()) == pytest.approx(others + of_adamw, abs=1000)
    assert plan_show.rows(content)[-1][:2] == ("all of it, with AdamW in fp32", human(sum(parts.values())))
    assert main(["plan", *arguments, "--html", str(tmp_path / "plan.html")]) == 0
    assert (tmp_path / "plan.html").read_text().count(human(sum(parts.values()))) == 2  # its bar and its row


def test_bytes_a_weight_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Whole models below a byte at 60M and below 0.6 at 1B, as docs/plan.md says."""
    page = Path("docs/plan.md").read_text(encoding="utf-8")
    lines = page[page.index("| bytes of state a weight") :].split("\n\n")[0].splitlines()[2:]
    table = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]
    muon = ["--recipe", "orthogonal", "--state-dtype", "int8"]
    rest = ["--rest", "recipe=energy", "--rest"]
    settings = [
        ["--level", "1", "--recipe", "orthogonal"],
        ["--level", "1", *muon],
        ["--level", "1", *muon, *rest, "level=1"],
        ["--level", "0", "--least-level", "0", *muon, *rest, "level=3"],
        ["--level", "2", *muon, *rest, "level=2"],
        ["--recipe", "energy", "--level", "3", "--state-dtype", "int8", "--rest", "level=3"],
    ]
    for row, arguments in zip(table[1:], settings, strict=True):
        found = [told([model, "--engine", "single", *arguments], capsys)["state_a_weight"] for model in ("60m", "1b")]
        assert row == [f"{its[what]:.2f}" for its in found for what in ("matrices", "model")]
    assert main(["plan", "60m", "--engine", "zero2", "--world", "8", *settings[2], "--rest", "scale=1.0"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert 'recipe "orthogonal", rest "energy", wavelet haar' in shown
    assert "0.8313 of the whole model, 0.5314 of the matrices" in shown and "exp_avg_sq, e4m4" in shown
    assert float(table[3][1]) < 1 and float(table[3][3]) < 0.6


def test_sizes() -> None:
    assert [size(x) for x in ("24GB", "24GiB", "1.5 kib", "7B", "2tb", "0")] == [
        24 * 10**9,
        24 * 2**30,
        1536,
        7,
        2 * 10**12,
        0,
    ]
    with pytest.raises(ValueError, match="'24' has no unit; write 24GB \\(10\\^9 bytes\\), 24GiB"):
        size("24")
    for wrong in ("", "24 potatoes", "-1GB", "GB"):
        with pytest.raises(ValueError, match="is no size"):
            size(wrong)


def test_a_deepspeed_json_says_it_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "zero.json"
    settings = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 5,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "GWTAdamW", "params": {"level": 4, "targets": ["mlp"], "recipe": "energy"}},
    }
    file.write_text(json.dumps(settings))
    content = told(["tiny", "--deepspeed-config", str(file), "--world", "3"], capsys)
    setup = content["setup"]
    assert [setup[key] for key in ("engine", "weights", "masters", "offload")] == ["zero2", "bf16", "fp32", "optimizer"]
    assert (setup["micro_batch"], setup["accumulation"], setup["tokens"]) == (3, 5, 3 * 5 * 3 * 2048)
    assert (content["levels"][0]["level"], content["norms"], setup["recipe"]) == (4, 0, "energy")
    hosted = sum(row["max"] for row in content["rows"] if row["host"])
    assert hosted == content["host"]["max"] > content["device"]["max"]
    assert told(["tiny", "--deepspeed-config", str(file), "--level", "1"], capsys)["levels"][0]["level"] == 1


def test_every_key_of_a_deepspeed_json_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rows(**params: Any) -> dict[str, int]:
        file, params = tmp_path / "zero.json", {"level": 2, "recipe": "energy"} | params
        zero = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
        file.write_text(json.dumps({**zero, "optimizer": {"type": "GWTAdamW", "params": params}}))
        content = told([f"{__name__}:build", "--target", "attn", "--deepspeed-config", str(file)], capsys)
        return {row["name"]: row["max"] for row in content["rows"] if row["name"].startswith("exp_avg")}

    # Rows of 30 elements at level 2, 8 coefficients each; a bias of 20.
    assert rows() == {"exp_avg": 4 * (20 * 8 + 20), "exp_avg_sq": 4 * (20 * 8 + 20)}
    assert rows(lr="auto", recipe="foam", betas=[0.9, 0.95]) == rows()
    assert rows(second_moment="none") == {"exp_avg": 4 * (20 * 8 + 20), "exp_avg_sq": 4 * 20}
    assert rows(recipe="orthogonal", nor=0.95) == {
        "exp_avg": 4 * (20 * 8 + 20),
        "exp_avg_sq": 4 * 20,
        "exp_avg_sq_row": 4 * 20,
    }
    assert (
        main(["plan", "tiny", "--deepspeed-config", str(tmp_path / "zero.json"), "--html", str(tmp_path / "p.html")])
        == 0
    )
    page = Page((tmp_path / "p.html").read_text())  # a bar of more parts than there are colours
    assert "exp_avg_sq_row, fp32" in page.cells and "exp_avg_sq_row, fp32" in capsys.readouterr().out
    for params, message in (({"levle": 2}, "did you mean 'level'"), ({"recipe": "foam", "nor": 0.5}, "nor=0.5")):
        with pytest.raises(AssertionError):
            rows(**params)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no model 'nothing'"),
        (["no.such.module:f"], "cannot be imported|can be imported"),
        (["tiny", "--engine", "zero9"], "engine 'zero9' must be one of .*fairscale, or hsdp"),
        (["tiny", "--world", "100001"], "100,001 ranks are more than 100,000"),
        (["tiny", "--engine", "hsdp", "--mesh", "1000x101"], "101,000 ranks are more than"),
        (["tiny", "--fit", "24"], "'24' has no unit; write 24GB"),
        (["tiny", "--fit", "24GB", "--reserve", "1.5"], "'1.5' has no unit; write 1.5GB"),
        (["configs"], "configs is a folder without a config.json"),
        (["tiny", "--target", "mpl"], "target 'mpl' matches no weight matrix"),
        (["tiny", "--level", "17"], "level=17"),
        (["tiny", "--wavelet", "haarr"], "wavelet='haarr'"),
        (["tiny", "--recipe", "pepper"], "recipe='pepper'"),
        (["tiny", "--engine", "hsdp"], "hsdp needs --mesh"),
        (["tiny", "--engine", "fsdp2", "--mesh", "8"], "must be REPLICASxSHARDS"),
        (["tiny", "--engine", "fsdp2", "--mesh", "2x2", "--world", "3"], "leave one out"),
        (["tiny", "--engine", "zero1", "--mesh", "2x2"], "zero1 has no mesh"),
        (["tiny", "--engine", "single", "--world", "2"], "single is one process"),
        (["tiny", "--engine", "ddp", "--offload", "optimizer"], "ddp cannot offload"),
        (["tiny", "--weights", "int4"], "dtype 'int4'"),
        (["tiny", "--engine", "fsdp1", "--no-use-orig-params"], "one flat parameter has one"),
        (["tiny", "--deepspeed-config", "configs/zero2.json", "--engine", "zero1"], "the file says it already"),
        (["tiny", "--deepspeed-config", "no.json"], "no.json"),
        (["tiny", "--fit", "much"], "is no size"),
        (["tiny", "--state-dtype", "int4"], "state_dtype='int4' in parameter group 0 must be one of"),
        (["tiny", "--state-dtype", "int8", "--weights", "fp64", "--engine", "ddp"], "weights are fp64"),
        (["tiny", "--rest", "level"], "must be KEY=VALUE"),
        (["tiny", "--rest", "targets=1"], "unknown key 'targets'. Known keys: lr"),
        (["tiny", "--engine", "fsdp2", "--rest", "stochastic_rounding=True"], "add --weights bf16"),
        (["tiny", "--rest", "levle=1"], "did you mean 'level'"),
        (["tiny", "--fit", "1GB", "--reserve", "2GB"], "leaves nothing"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told) and told.count("\n") == 1


class Page(html.parser.HTMLParser):
    """What a page draws and where it would reach out."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.cells: list[str] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [value or "" for name, value in attrs if name in ("src", "href", "data", "action")]
        self._cell = tag == "td"

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.cells.append(data)
            self._cell = False


def test_the_page_needs_nothing_beside_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "<script>alert(1)").mkdir()
    config = tmp_path / "<script>alert(1)" / "config.json"
    config.write_text(json.dumps(SHAPES))
    file = tmp_path / "plan.html"
    assert main(["plan", str(config), "--engine", "zero2", "--world", "3", "--html", str(file)]) == 0
    shown, text = capsys.readouterr().out, file.read_text()
    page = Page(text)
    assert page.outside == [] and "script" not in page.tags and not re.search("https?:", text) and "url(" not in text
    assert page.tags.count("svg") == 2 and page.tags.count("rect") > 10
    for cell in ("weights, bf16", "masters, fp32", "exp_avg, fp32", "not counted", "checkpoint"):
        assert cell in page.cells and cell in shown
    assert f"written: {file}" in shown.replace("\n", "")


def test_every_engine_has_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    for engine in NAMES:
        world = ["--world", "3"] if engine != "single" else []
        flags = ["--target", ".*"] if engine == "fairscale" else []
        code = main(["plan", "tiny", "--engine", engine, *world, *flags])
        output = capsys.readouterr()
        assert (code, "activations" in output.out) == ((2, False) if engine == "fairscale" else (0, True)), output.err
