"""README and docs/: every fenced block is run, or says which test runs it; texts of errors and links are true.

A page is run top to bottom in a folder of its own: Python in one namespace, the commands of ``gwt-dist``, and a block
of ``text`` behind either is what it prints. ``make`` is asked what it would do. All else is in `ELSEWHERE`, with its
test.
"""

from __future__ import annotations

import ast
import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from documents import PAGES, ROOT, Block, all_blocks, anchors, blocks
from gwt_dist.cli.app import main
from pretrain_cases import finish, free_port, started

SWITCHING = "docs/switching.md"
# By page: a command, or the language of all its blocks, and the test that runs it.
LAUNCHERS = "test_docs.py::test_the_recipe_starts_as_written"
HOSTS = "test_two_hosts.py::test_torchrun", "test_two_hosts.py::test_mpirun", "test_two_hosts.py::test_deepspeed"
EXAMPLE = "torchrun --standalone --nproc-per-node 2 examples/"
ELSEWHERE = {
    "README.md": {
        "python": "test_readme.py::test_its_python_runs",
        "deepspeed --num_accelerators 2 launch/pretrain.py": LAUNCHERS,
        "torchrun --standalone --nproc-per-node 2 launch/pretrain.py": LAUNCHERS,
        "python launch/pretrain.py": LAUNCHERS,
    },
    "launch/README.md": {
        "run=": LAUNCHERS,
        "NPROC_PER_NODE=2 launch/torchrun.sh": (
            "test_two_hosts.py::test_host_that_is_cut_off_ends_the_run_which_goes_on_later"
        ),
        "NPROC_PER_NODE=2 launch/deepspeed.sh": LAUNCHERS,
        "NPROC=2 launch/mpirun.sh": LAUNCHERS,
        "python launch/pretrain.py": "test_pretrain.py::test_one_plain_process_with_zero3_and_bpe_saves_on_sigterm",
        "NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh": HOSTS[0],
        "HOSTFILE=hosts launch/deepspeed.sh": HOSTS[2],
        "HOSTFILE=hosts INTERFACE=eth0 launch/mpirun.sh": HOSTS[1],
        "sbatch --nodes 2 launch/slurm.sbatch": "test_launchers.py::test_slurm_starts_one_torchrun_a_node",
    },
    SWITCHING: {"python example": "test_docs.py::test_code_of_the_switching_page_is_that_of_the_examples"},
    "docs/trainers.md": {
        "python": "test_trainers.py::test_code_of_the_page",
        "python trl": "test_trainers.py::test_code_of_the_page_with_trl",
        "python axolotl": "test_trainers.py::test_plugin_for_axolotl",
        "yaml": "test_trainers.py::test_plugin_for_axolotl",
        "python llamafactory": "test_trainers.py::test_script_for_llama_factory",
        "json": "test_trainers.py::test_json_for_llama_factory",
    },
    "examples/README.md": {
        EXAMPLE + "transformers_trainer.py --engine deepspeed": "test_examples.py::test_trainer_deepspeed",
        EXAMPLE + "transformers_trainer.py --engine fsdp2": "test_examples.py::test_trainer_fsdp2",
        EXAMPLE + "accelerate_loop.py --engine fsdp2": "test_examples.py::test_accelerate_fsdp2",
        "accelerate launch": "test_examples.py::test_accelerate_launched_by_the_file",
        EXAMPLE + "lightning_module.py --strategy fsdp2": "test_examples.py::test_lightning_fsdp2",
        EXAMPLE + "torchtitan_container.py": "test_examples.py::test_torchtitan",
        EXAMPLE + "own_loop.py --optimizer galore": "test_examples.py::test_own_loop",
        EXAMPLE + "own_loop.py --optimizer adalomo": "test_examples.py::test_own_loop",
        EXAMPLE + "working_memory.py": "test_examples.py::test_working_memory",
        EXAMPLE + "side_network.py --side sherl": "test_side_network.py::test_memory_and_traffic_of_side_networks",
        EXAMPLE + "side_network.py --side losa --engine zero3": "test_side_network.py::test_side_networks_under_zero3",
    },
    "configs/README.md": {"accelerate launch": "test_examples.py::test_accelerate_launched_by_the_file"},
    "docs/compare.md": {
        "gwt-dist compare smoke": "test_study.py::test_the_command",
        "yaml": "test_study.py::test_study_of_the_page",
    },
    "docs/kernels.md": {
        "python": "test_gpu_benchmark.py::test_the_capture_in_the_documents_is_that_of_the_benchmark",
    },
    "docs/quality.md": {"gwt-dist compare": "test_study.py::test_rows_of_the_quality_page_are_in_the_study"},
    "docs/report.md": {"gwt-dist report": "test_report.py::test_the_commands_of_the_documentation_work"},
    "docs/resume.md": {
        "python launch/pretrain.py ... --resume latest": (
            "test_resume.py::test_torchrun_starts_a_killed_run_again_and_it_goes_on"
        ),
        "python launch/pretrain.py ... --resume runs/a --output runs/b": (
            "test_resume.py::test_streamed_run_goes_on_in_another_folder_with_the_same_curve"
        ),
        "python launch/pretrain.py ... --resume runs/a/checkpoints/": (
            "test_resume.py::test_damage_is_named_and_the_checkpoint_before_goes_on"
        ),
        "torchrun --standalone --nproc-per-node 2 --max-restarts 3 launch/pretrain.py": (
            "test_resume.py::test_torchrun_starts_a_killed_run_again_and_it_goes_on"
        ),
    },
    "docs/sharded_parity.md": {
        "python3 -m venv": "test_docs.py::test_installed_is_what_is_pinned",
        "python benchmarks/sharded_parity.py": "test_parity.py::test_it_tells_the_same_optimizer_from_another",
    },
    "docker/README.md": {
        "docker build": "test_docker.py::test_steps_are_those_of_the_makefile",
        "docker run": "test_docker.py::test_the_commands_of_the_page_start_what_the_image_has",
        "docker compose": "test_docker.py::test_compose_starts_a_launcher_with_options_that_exist",
    },
}
# Blocks of text that no command prints, by their first line.
TEXTS = {
    "from gwt_dist.integrations.transformers import portable": "test_trainers.py::test_code_of_the_page",
    "backward ─► reduce-scatter": "a drawing",
    "gwt_dist/": "test_the_tree_of_the_contributors_is_there",
    "output/checkpoints/": "test_a_page_runs",
}
# What a page takes as given.
MODEL_AND_OPTIMIZER = """
import torch, gwt_dist
from gwt_dist import GWTAdamW, param_groups
from tiny import tiny_llama
model = tiny_llama()
optimizer = GWTAdamW(param_groups(model, level=2), lr=1e-3)
schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
tokens = torch.arange(32)[None]
model(input_ids=tokens, labels=tokens).loss.backward()
optimizer.step()
model.config.save_pretrained(".")
"""
EMBEDDINGS_FROZEN = MODEL_AND_OPTIMIZER.replace("()\n", "()\nmodel.get_input_embeddings().requires_grad_(False)\n", 1)
GIVEN = {"docs/checkpoints.md": EMBEDDINGS_FROZEN, "docs/faq.md": MODEL_AND_OPTIMIZER}


def elsewhere(page: str, what: str) -> str | None:
    """The test that runs a command or the blocks of a language; the longest beginning that is listed."""
    found = [start for start in ELSEWHERE.get(page, {}) if what == start or what.startswith(start)]
    return ELSEWHERE[page][max(found, key=len)] if found else None


def program(command: str) -> str:
    """Its first word that sets no variable; of `pip install` that and `python -m pip` are one."""
    return next((word for word in command.split() if not re.match(r"[A-Z_]+=", word)), command)


def way(block: Block, command: str | None = None) -> str | None:
    """How a block, or one of its commands, is run; None if nothing runs it."""
    if block.language == "text":
        named = [told for start, told in TEXTS.items() if block.text.startswith(start)]
        return named[0] if named else "output" if follows_code(block) else None
    if command is None:
        return elsewhere(block.page, block.language) or ("here" if block.language in ("python", "json") else None)
    return elsewhere(block.page, command) or ("here" if program(command) in ("gwt-dist", "make", "pip") else None)


def commands_here(block: Block) -> list[str]:
    """The commands of ``gwt-dist`` that `test_a_page_runs` runs."""
    if block.language != "bash":
        return []
    return [c for c in block.commands() if program(c) == "gwt-dist" and way(block, c) == "here"]


def follows_code(block: Block) -> bool:
    page = blocks(block.page)
    place = page.index(block)
    return place > 0 and page[place - 1].language in ("bash", "python")


@pytest.mark.parametrize("block", all_blocks(), ids=str)
def test_every_block_is_run(block: Block) -> None:
    if block.language == "bash":
        assert block.commands()
        missing = [command for command in block.commands() if way(block, command) is None]
        assert missing == [], f"{block}: no test runs these; list them in ELSEWHERE with their test"
    else:
        assert way(block), f"{block}: nothing runs a block of {block.language!r} on this page"


def test_tests_that_run_something_exist_and_what_they_run_too() -> None:
    for page, listed in ELSEWHERE.items():
        said = [text for b in blocks(page) for text in ([b.language] if b.language != "bash" else b.commands())]
        for start, test in listed.items():
            assert any(text.startswith(start) for text in said), f"{page} has no {start!r} any more"
            file, _, name = test.partition("::")
            functions = [
                node.name
                for node in ast.walk(ast.parse((ROOT / "tests" / file).read_text()))
                if isinstance(node, ast.FunctionDef)
            ]
            assert name in functions, f"{test} of {page} is not there"


RUN_HERE = [page for page in PAGES if any(way(b) == "here" or commands_here(b) for b in blocks(page))]


@pytest.mark.parametrize("page", RUN_HERE)
def test_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv("COLUMNS", "120")
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(GIVEN.get(page, ""), names)
    printed = ""
    for block in blocks(page):
        if block.language == "python" and way(block) == "here":
            # Lines before it are left blank, so that a traceback has the numbers of the page.
            capsys.readouterr()
            exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)
            printed, _ = capsys.readouterr()
        elif block.language == "bash":
            for command in commands_here(block):
                capsys.readouterr()
                code = main(shlex.split(command)[1:])
                printed, errors = capsys.readouterr()
                assert code == 0, f"{block}: {command} leaves with {code}\n{errors}"
                for option in ("--html", "--output"):
                    assert option not in command or Path(command.split(option)[1].split()[0]).exists()
        elif way(block) == "output":
            assert [x.rstrip() for x in printed.splitlines()] == [x.rstrip() for x in block.text.splitlines()], block
        elif block.text.startswith("output/checkpoints/"):
            told = re.findall(r"^ +([\w.-]+)", block.text, re.M)
            pattern = [re.sub(r"\d+", "N", name) for name in told]
            there = sorted(re.sub(r"\d+", "N", path.name) for path in Path("output").rglob("*/*"))
            assert set(there) == set(pattern), block


def test_code_of_the_switching_page_is_that_of_the_examples() -> None:
    def plain(code: str) -> str:
        return "\n" + "\n".join(line.strip() for line in code.strip().splitlines()) + "\n"

    text = (ROOT / SWITCHING).read_text()
    seen = 0
    for block in blocks(SWITCHING):
        if block.language == "python example":
            section = text[: text.index(block.text)].split("\n## ")[-1]
            scripts = re.findall(r"\(\.\./(examples/\w+\.py)\)", section)
            assert any(plain(block.text) in plain((ROOT / script).read_text()) for script in scripts), (
                f"{block} is in no script of its section: {scripts}"
            )
            seen += 1
    assert seen == 7


def test_the_tree_of_the_contributors_is_there() -> None:
    (tree,) = [block for block in blocks("CONTRIBUTING.md") if block.text.startswith("gwt_dist/")]
    package, rest = tree.text.split("\nlaunch/")
    said = re.findall(r"(?:^|  )([\w/]+(?:\.py|/))(?=  )", package, re.M)
    assert len(said) > 15
    assert [name for name in said if not (ROOT / "gwt_dist" / name).exists()] == []
    there = {p.name + "/" if p.is_dir() else p.name for p in (ROOT / "gwt_dist").iterdir() if p.suffix != ".typed"}
    assert there - set(said) == {"__init__.py", "__main__.py"} | ({"__pycache__/"} & there)
    assert all((ROOT / name).is_dir() for name in re.findall(r"(?:^|  )(\w+/)(?=  )", "launch/" + rest, re.M))


def commands_of(name: str) -> list[tuple[str, str]]:
    return sorted(
        {(b.page, c) for b in all_blocks() if b.language == "bash" for c in b.commands() if name in c.split()}
    )


@pytest.mark.parametrize("command", sorted({command for _, command in commands_of("make")}))
def test_make_knows_what_to_do(command: str) -> None:
    words = shlex.split(command)
    makefile = (ROOT / "Makefile").read_text()
    for variable in (word.split("=")[0] for word in words if "=" in word):
        assert re.search(rf"^{variable} \?=", makefile, re.M), f"no variable {variable}"
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr


def test_installed_is_what_is_pinned() -> None:
    """No test reaches a network, so what `pip install` gets is read: extras that there are, and pins."""
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    extras = set(options["options.extras_require"])
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    seen = 0
    for page, command in commands_of("pip"):
        for chosen in re.findall(r"\[([\w,]+)\]", command):
            assert set(chosen.split(",")) <= extras, f"{page}: {command}"
            seen += 1
        words = shlex.split(command.split("pip install")[1])
        plain = {re.split(r"[=<>\[]", w)[0] for w in words if w[0] not in "-.'\"" and w != "constraints.txt"}
        assert {name.lower() for name in plain} - {"gwt_dist"} <= pins, f"{page}: {command}"
    assert seen >= 2


@pytest.mark.matrix
@pytest.mark.parametrize("page", ["README.md", "launch/README.md"])
def test_the_recipe_starts_as_written(page: str, tmp_path: Path, inputs: Path, torch_extensions_dir: Path) -> None:
    """The commands for one machine, as they stand, with a step or two of a little text for a run, on a free port."""
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = [c for b in blocks(page) if b.language == "bash" for c in b.commands() if way(b, c) == LAUNCHERS]
    given = [c for c in commands if c.startswith("run=")]
    small = f"--corpus {inputs / 'text'} --sequence_length 32 --eval_tokens 64 --warmup_steps 0 --save_every 0"
    runs = [c for c in commands if c not in given]
    assert len(runs) == {"README.md": 3, "launch/README.md": 2}[page]
    for number, command in enumerate(runs, 1):
        output = "" if "--output" in command or page == "README.md" else f"--output runs/{number}"
        port = free_port()
        start = re.sub(r"^deepspeed ", f"deepspeed --master_port {port} ", command)
        lines = [f"cd {shlex.quote(str(tmp_path))}; export MASTER_PORT={port}", *given]
        script = "\n".join([*lines, f"{start} {small} --steps {number} {output}"])
        with started(["bash", "-euc", script]) as process:
            code, printed = finish(process)
        assert code == 0, f"{command}\n{printed}"
    assert len(list(tmp_path.glob("runs/*/summary.json"))) == {"README.md": 2, "launch/README.md": 2}[page]
    shutil.rmtree(tmp_path / "runs")


def literals() -> str:
    """All text in the package, pieces of one string joined, without what is filled in."""
    found = []
    for path in (ROOT / "gwt_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_errors_have_the_texts_of_the_sources() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 10
    text = literals()
    assert [row for row in rows if row not in text] == []


def broken_links(page: str, text: str) -> list[str]:
    """Links of a page to a file, or an anchor, that is not there."""
    found = []
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)", text):
        name, _, anchor = link.partition("#")
        file = (ROOT / page).parent.joinpath(name) if name else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file.resolve().relative_to(ROOT).as_posix())):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert broken_links(page, (ROOT / page).read_text(encoding="utf-8")) == []


def test_anchors_are_those_of_github() -> None:
    assert "plan-what-each-rank-will-hold" in anchors("docs/plan.md")
    assert "why-not-galore-apollo-or-8-bit-adam" in anchors("docs/faq.md")
    assert broken_links("docs/faq.md", "[a](plan.md#what-fits) [b](plan.md#what-fits-not) [c](no.md) [d](#lora)") == [
        "plan.md#what-fits-not",
        "no.md",
    ]
