"""How much of an iteration the optimizer's step is: 131,072 tokens, bf16 autocast over fp32 weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import nn

from gpu_parts.contenders import adamw, muon, ours
from gpu_parts.llama import Llama, Sizes
from gpu_parts.setting import NO_TIME, Row, Setting, attempt

LENGTH, TOKENS, AT_ONCE = 256, 131_072, 32_768
MODELS = {"LLaMA-60M": Sizes(512, 1376, 8, 8), "LLaMA-350M": Sizes(1024, 2736, 24, 16)}
TINY = {"two layers": Sizes(16, 43, 2, 2, vocabulary=97)}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "AdamW fused": adamw,
    "orthogonal-1": ours("orthogonal", 1),
    "energy-2": ours("energy", 2),
    "torch.optim.Muon": muon,
}
ITERATIONS = 4  # timed, after two


def rows(setting: Setting) -> Iterator[Row]:
    """Each optimizer on each model."""
    for name, sizes in (TINY if setting.smoke else MODELS).items():
        for optimizer, make in OPTIMIZERS.items():
            case: Row = {"case": name, "optimizer": optimizer}
            if setting.left() < (0 if setting.smoke else 10):
                yield case | {"note": NO_TIME}
                continue
            yield attempt(case, lambda s=sizes, m=make: iterated(setting, s, m))
            setting.free()


def iterated(setting: Setting, sizes: Sizes, make: Callable[[list[nn.Parameter]], Any]) -> Row:
    """Medians over some iterations."""
    length, tokens, at_once = (8, 64, 32) if setting.smoke else (LENGTH, TOKENS, AT_ONCE)
    torch.manual_seed(0)
    with setting.device:
        model = Llama(sizes, length)
    optimizer = make(list(model.parameters()))
    batches = torch.randint(sizes.vocabulary, (tokens // at_once, at_once // length, length + 1), device=setting.device)

    def backward() -> None:
        for batch in batches:
            with torch.autocast(setting.device.type, torch.bfloat16):
                loss = model(batch)
            (loss / len(batches)).backward()

    def iteration() -> None:
        model.zero_grad(set_to_none=True)
        backward()
        optimizer.step()

    for _ in range(2):
        iteration()
    whole, steps = [], []
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2 if setting.smoke else ITERATIONS):
        whole.append(setting.timed(iteration)[0])
    for _ in range(3):
        backward()  # what a step finds in the caches
        steps.append(setting.timed(optimizer.step)[0])
    ms, step = median(whole), median(steps)
    return {
        "iteration ms": ms,
        "step ms": step,
        "share of the iteration": step / ms,
        "tokens/s": tokens / ms * 1e3,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if setting.on_gpu else None,
    }
