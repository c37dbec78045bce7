"""What the ranks of the export tests run: a small LLaMA under an engine, its checkpoint, and its logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import gwt_dist
from gwt_dist import GWTAdamW, param_groups
from zero_cases import settings


def llama(tied: bool = False, **changes: Any) -> Any:
    """Widths that two ranks and units of 4 do not divide; the same weights on all ranks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 30,
        "intermediate_size": 45,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "vocab_size": 37,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "use_cache": False,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes | changes))


def tokens() -> Tensor:
    return torch.arange(24).view(2, 12) * 5 % 37


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits.clone()


def save_case(folder: str, kind: str, tied: bool) -> dict[str, Any]:
    """Two steps and a checkpoint: the logits of the live model, and its fp32 weights where there are masters."""
    model: Any = llama(tied)
    if kind == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = GWTAdamW(param_groups(model, level=2, recipe="energy"), lr=1e-2)
    engine = model
    if kind != "fsdp2":
        engine = gwt_dist.initialize(model=model, optimizer=optimizer, config=settings(2, kind == "zero2 bf16"))[0]
    for _ in range(2):
        loss = engine(input_ids=tokens(), labels=tokens()).loss
        if kind == "fsdp2":
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            engine.backward(loss)
            engine.step()
    gwt_dist.save(folder, engine, optimizer, step=2, extra={"model_config": model.config.to_dict()}, keep=1)
    masters: dict[str, Tensor] = {}
    if kind != "fsdp2":
        from deepspeed.utils import safe_get_full_fp32_param

        masters = {name: safe_get_full_fp32_param(p).clone() for name, p in model.named_parameters()}
    result = {"logits": logits(engine), "masters": masters}
    if kind != "fsdp2":
        engine.destroy()
    return result


def loaded_case(folder: str) -> tuple[Tensor, str]:
    """The logits of what was exported, computed as those of the live model were, and its dtype."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(Path(folder))
    assert dist.is_initialized()
    return logits(model), str(model.dtype)
