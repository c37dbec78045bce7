"""What the examples share: a LLaMA of 0.1 million weights and random text of few letters, which 20 steps can learn."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

STEPS, BATCH, LENGTH, VOCABULARY = 20, 4, 32, 64


def tiny_llama(layers: int = 2) -> LlamaForCausalLM:
    """The same weights on every rank; 61 columns in the MLP, so that rows end within a unit."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=61,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            use_cache=False,
        )
    )


class Text(Dataset[dict[str, torch.Tensor]]):
    """Sequences in which each letter says which three may follow; `factor` and `shift` are the rule."""

    def __init__(self, size: int = 4 * STEPS * BATCH, factor: int = 5, shift: int = 0) -> None:
        generator = torch.Generator().manual_seed(1)
        letters = [torch.randint(VOCABULARY, (size,), generator=generator)]
        for _ in range(LENGTH - 1):
            one_of_three = torch.randint(3, (size,), generator=generator)
            letters.append((letters[-1] * factor + shift + one_of_three) % VOCABULARY)
        self.sequences = torch.stack(letters, dim=1)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.sequences[index], "labels": self.sequences[index]}


def spread_on_cpus(plugin: object = None) -> None:
    """For a try-out without GPUs, where Accelerate counts one process, splits no data and never turns FSDP2 on.

    Call it once Accelerate's state is there; with GPUs it does nothing and none of it is needed.
    """
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    if torch.cuda.is_available():
        return
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        state |= {"num_processes": dist.get_world_size(), "process_index": dist.get_rank()}
        if plugin is not None:
            state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
