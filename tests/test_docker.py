"""What can be known of `docker/` without an engine: sources, steps, lines that start something."""

from __future__ import annotations

import fnmatch
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from documents import blocks
from gwt_dist.train.config import find_file, parse_arguments

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Name and rest of each instruction, lines joined."""
    lines = [x for x in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not x.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines()) if name]


def pip_steps(text: str) -> list[str]:
    """What the `pip install` lines of a script install, and how; extras apart."""
    found = re.findall(r"(?:\$\(PIP\)|pip install .*?-c constraints\.txt) ([^&\n]+)", text)
    return [re.sub(r"\[.*\]", "[]", step).strip() for step in found]


def test_sources_of_copy_exist_and_are_sent_to_the_engine() -> None:
    sources = [s for name, rest in instructions() if name == "COPY" for s in shlex.split(rest)[1:-1]]
    assert {"constraints.txt", "gwt_dist", "launch", "configs"} <= set(sources)
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in sent, f"{source} is not in .dockerignore"
    kept = {line[1:] for line in sent if line.startswith("!")}
    assert kept == set(sources), "what is sent and not copied"
    assert not any(fnmatch.fnmatch(".venv", name) for name in kept)


def test_steps_are_those_of_the_makefile() -> None:
    runs = "\n".join(rest for name, rest in instructions() if name == "RUN")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    here, there = pip_steps(runs), pip_steps(makefile)
    # For tests and for studies alone, as the extras that the image leaves out.
    left_out = [step for step in there if "--no-deps" in step]
    assert [("torchtitan" in step, "galore-torch" in step) for step in left_out] == [(False, True), (True, False)]
    there = [step for step in there if step not in left_out]
    assert here == there == ["torch", "setuptools wheel ninja", "--no-build-isolation -e '.[]'"]
    extras = [set(re.findall(r"'\.\[(.*)\]'", text)[0].split(",")) for text in (runs, makefile)]
    assert extras[0] == extras[1] - {"dev", "docs", "lightning"}
    assert runs.count("pip install") == runs.count("-c constraints.txt") == runs.count("${PIP_ARGS}")


def test_image_runs_as_a_user_and_can_be_for_cpu_or_cuda() -> None:
    steps = instructions()
    assert [rest for name, rest in steps if name == "USER"] == ["1000:1000"]
    stages = [rest.split(" AS ")[-1] for name, rest in steps if name == "FROM"]
    assert stages == ["cpu", "cuda", "${DEVICE}"]
    assert ("ARG", "DEVICE=cpu") in steps
    assert all(":" in rest.split(" AS ")[0] for name, rest in steps if name == "FROM" and "$" not in rest)


def services() -> dict[str, Any]:
    content = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))
    assert isinstance(content["services"], dict)
    return content["services"]


def test_compose_has_two_nodes_that_differ_in_their_number() -> None:
    nodes = services()
    assert sorted(nodes) == ["node0", "node1"]
    for number, (name, node) in enumerate(sorted(nodes.items())):
        environment = node["environment"]
        assert node["hostname"] == name
        assert environment["NODE_RANK"] == str(number)
        assert environment["NNODES"] == str(len(nodes))
        assert environment["MASTER_ADDR"] in nodes
        assert node["shm_size"] == "1gb"
        build = node["build"]
        assert (ROOT / "docker" / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE
        assert set(build["args"]) <= {rest.split("=")[0] for name, rest in instructions() if name == "ARG"}


@pytest.mark.parametrize("name", ["node0", "node1"])
def test_compose_starts_a_launcher_with_options_that_exist(name: str) -> None:
    script, *arguments = services()[name]["command"]
    content = (ROOT / script).read_text(encoding="utf-8")
    config, _ = parse_arguments(arguments)
    assert find_file(config.deepspeed_config).resolve().is_relative_to(ROOT / "configs")
    volume = services()[name]["volumes"][0].split(":")[1]
    workdir = next(rest for instruction, rest in instructions() if instruction == "WORKDIR")
    assert f"{workdir}/{config.output}".startswith(f"{volume}/")
    made = "\n".join(rest for instruction, rest in instructions() if instruction == "RUN")
    assert volume in made, "an engine would make the folder for root"
    for variable in services()[name]["environment"]:
        assert f"{variable}=${{{variable}:-" in content or variable == "GLOO_SOCKET_IFNAME"


def test_the_commands_of_the_page_start_what_the_image_has() -> None:
    commands = next(b for b in blocks("docker/README.md") if b.language == "bash").commands()
    (build,), (run,), (compose,) = (
        [c for c in commands if c.split()[1] == kind] for kind in ("build", "run", "compose")
    )
    assert (ROOT / build.split("-f ")[1].split()[0]) == DOCKERFILE
    assert (ROOT / compose.split("-f ")[1].split()[0]).is_file()
    tag = build.split("-t ")[1].split()[0]
    script, *arguments = run.split(f"{tag} ")[1].split()
    copied = {s for name, rest in instructions() if name == "COPY" for s in shlex.split(rest)[1:-1]}
    assert script.split("/")[0] in copied and (ROOT / script).is_file()
    config, _ = parse_arguments(arguments)
    assert find_file(config.deepspeed_config).resolve().is_relative_to(ROOT / "configs")
