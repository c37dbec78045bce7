"""The example of side networks: the steps of one process, nothing of the backbone trained, memory and traffic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gwt_dist
from gwt_dist import GWTAdamW, param_groups
from gwt_dist.checkpoint.export import export_model
from ranks import run_ranks
from side_network_cases import cost_case, example, steps_case


def check(results: list[list[dict]], limit: float) -> None:
    for result in (result for both in results for result in both):
        assert result["error"] < limit
        assert result["stepped"]
        assert (result["gradients"], result["moved"]) == ([], [])
        assert result["frozen"] == 4 * 9 + 3


@pytest.mark.matrix
@pytest.mark.support("FSDP2", "a side network beside a frozen backbone that runs without a graph")
def test_side_networks_under_fsdp2(forks) -> None:
    check(run_ranks(steps_case, 2, "fsdp2", forks=forks), 1e-10)


@pytest.mark.matrix
@pytest.mark.support("DeepSpeed", "a side network beside a frozen backbone that runs without a graph, ZeRO-3")
@pytest.mark.usefixtures("torch_extensions_dir")
def test_side_networks_under_zero3(forks) -> None:
    check(run_ranks(steps_case, 2, "zero3", forks=forks), 1e-5)


@pytest.mark.matrix
def test_memory_and_traffic_of_side_networks(forks) -> None:
    """Half of full fine-tuning's bytes at most; FSDP2 gathers once what LoRA needs twice."""
    for rows in run_ranks(cost_case, 2, forks=forks):
        full, lora = rows["full"], rows["lora"]
        assert full["passes"] == pytest.approx(3, abs=0.1)
        assert lora["passes"] == pytest.approx(2 + 3 * lora["trained"] / full["trained"], abs=0.1)
        for kind, layers in (("sherl", 1), ("losa", 0)):
            side = rows[kind]
            # All of it once, layers that gradients go through twice, and what is trained three times.
            expected = 1 + layers / 8 + 3 * side["trained"] / full["trained"]
            assert side["passes"] == pytest.approx(expected, abs=0.02)
            assert side["beside"] < full["beside"] / 2
            assert side["after"] < side["before"] - 1


def test_side_network_of_an_exported_backbone_in_one_process(tmp_path: Path, capsys) -> None:
    """No traffic; both side networks learn beside what `gwt-dist export` wrote."""
    side = example()
    model = side.tiny_llama()
    optimizer = GWTAdamW(param_groups(model), lr=1e-3)
    extra = {"model_config": model.config.to_dict()}
    gwt_dist.save(tmp_path / "checkpoints", model, optimizer, step=0, extra=extra)
    folder = export_model(tmp_path / "checkpoints", tmp_path / "exported")
    rows = side.main("sherl", None, str(folder))
    network, _, rows["losa"] = side.run("losa", None, side.pretrained(str(folder)))
    for kind in ("sherl", "losa"):
        assert rows[kind].passes == 0
        assert rows[kind].after < rows[kind].before - 0.1
    assert capsys.readouterr().out.count("\n") == 5
    # Mixed over tokens, a token still sees none behind it.
    ids = side.Text().sequences[:2]
    other = ids.clone()
    other[:, 20:] = 7
    a, b = (network(input_ids=x, labels=x).logits for x in (ids, other))
    assert torch.equal(a[:, :20], b[:, :20])
    assert not torch.equal(a[:, 20:], b[:, 20:])
