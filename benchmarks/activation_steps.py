"""What each measure about activations costs in time: forward and backward passes of a LLaMA, paired in one run.

    python benchmarks/activation_steps.py --layers 4 --width 512 --tokens 1024

On a GPU where there is one, else on the CPU with as many threads as torch has.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gwt_dist.activations.measure import MEASURES, Held, changed, held


def main() -> None:
    """Print a table of bytes and of medians of ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="Blocks.")
    parser.add_argument("--width", type=int, default=512, help="Of a token.")
    parser.add_argument("--tokens", type=int, default=1024, help="Of a sequence, of which there is one.")
    parser.add_argument("--words", type=int, default=4096, help="Of the vocabulary.")
    parser.add_argument("--rounds", type=int, default=9, help="Each runs all measures once.")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=options.words,
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
    )
    model = LlamaForCausalLM(config).to(device, torch.bfloat16).train()
    ids = torch.randint(options.words, (1, options.tokens), device=device)

    def loss(its: torch.nn.Module) -> torch.Tensor:
        found: torch.Tensor = its(input_ids=ids, labels=ids, use_cache=False).loss
        return found

    bytes_of: dict[str, Held] = {}
    seconds: dict[str, list[float]] = {name: [] for name in MEASURES}
    for number in range(options.rounds + 1):
        for name, (recomputed, in_8_bits) in MEASURES.items():
            if not number:  # warms up, and counts
                bytes_of[name] = held(model, loss, recomputed=recomputed, in_8_bits=in_8_bits)
                continue
            with changed(model, recomputed=recomputed, in_8_bits=in_8_bits):
                _wait(device)
                start = time.perf_counter()
                loss(model).backward()
                _wait(device)
                seconds[name].append(time.perf_counter() - start)
            model.zero_grad()
    first = seconds["as they are"]
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}; {options}\n")
    print("| activations | kept, MB | at most, MB | ms | of as they are |\n| --- | ---: | ---: | ---: | ---: |")
    for name, times in seconds.items():
        ratio = median(a / b for a, b in zip(times, first, strict=True))
        kept, most = (nbytes / 1e6 for nbytes in bytes_of[name])
        print(f"| {name} | {kept:.1f} | {most:.1f} | {1e3 * median(times):.1f} | {ratio:.2f} |")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
