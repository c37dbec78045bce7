"""Kernels of convolutions as rows of output channels: the loss of a small network beside AdamW's, at rates of a grid.

    python benchmarks/convolutions.py --rows adamw,orthogonal-1 --rates 0.03 --noise 1.2

A picture is one of 20 smooth patterns at a random place, another at two fifths of its strength, and noise; the label is
the first pattern. Every step has fresh pictures, and so has the test. The first and the last layer are as the others of
the same kind. Prints the mean of the seeds and the standard deviation of one of them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gwt_dist import GWTAdamW

ROWS: dict[str, dict[str, object]] = {
    "adamw": {"level": 0, "recipe": "energy"},
    "energy-1": {"level": 1, "recipe": "energy"},
    "energy-2": {"level": 2, "recipe": "energy"},
    "foam-1": {"level": 1, "recipe": "foam"},
    "orthogonal-0": {"level": 0, "recipe": "orthogonal", "least_level": 0},
    "orthogonal-1": {"level": 1, "recipe": "orthogonal"},
    "orthogonal-2": {"level": 2, "recipe": "orthogonal"},
}
CLASSES, SIDE, PATTERN = 20, 20, 12
STEPS, BATCH, TEST = 250, 48, 1000


def pictures(seed: int, noise: float) -> Callable[[int], tuple[Tensor, Tensor]]:
    """A function that draws so many pictures [N, 3, 20, 20] and labels [N]."""
    patterns = torch.randn(CLASSES, 3, 6, 6, generator=torch.Generator().manual_seed(1000))
    patterns = nn.functional.interpolate(patterns, size=(PATTERN, PATTERN), mode="bilinear")
    generator = torch.Generator().manual_seed(seed)

    def draw(number: int) -> tuple[Tensor, Tensor]:
        labels, others = (torch.randint(CLASSES, (number,), generator=generator) for _ in range(2))
        x = torch.randn(number, 3, SIDE, SIDE, generator=generator) * noise
        for which, strength in ((labels, 1.3), (others, 0.5)):
            places = torch.randint(0, SIDE - PATTERN + 1, (number, 2), generator=generator)
            for i, (top, left) in enumerate(places.tolist()):
                x[i, :, top : top + PATTERN, left : left + PATTERN] += patterns[which[i]] * strength
        return x, labels

    return draw


def network() -> nn.Sequential:
    """Four convolutions of 3 x 3, 32 and 64 channels."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def loss_of(row: str, rate: float, seed: int, noise: float) -> float:
    """The loss on fresh pictures, in nats, after training; one cycle of the rate."""
    torch.manual_seed(seed)
    model, draw = network(), pictures(seed, noise)
    kernels = [layer.weight for layer in model if isinstance(layer, nn.Conv2d)]
    known = {id(kernel) for kernel in kernels}
    rest = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": kernels, **ROWS[row]}, {"params": rest, "level": 0}]
    optimizer = GWTAdamW(groups, lr=rate, recipe="energy", weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=STEPS, pct_start=0.1, cycle_momentum=False)
    for _ in range(STEPS):
        x, labels = draw(BATCH)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        cycle.step()
    model.eval()
    x, labels = pictures(999, noise)(TEST)
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x), labels))


def main() -> None:
    """Print a table of losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="names with commas")
    parser.add_argument("--rates", default="0.001,0.003,0.01,0.03,0.1")
    parser.add_argument("--noise", type=float, default=1.2)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    logging.disable()  # of rates above AdamW's, which is what is looked for
    print("| | " + " | ".join(args.rates.split(",")) + " |")
    for row in args.rows.split(","):
        cells = []
        for rate in map(float, args.rates.split(",")):
            losses = torch.tensor([loss_of(row, rate, seed, args.noise) for seed in range(args.seeds)])
            cells.append(f"{losses.mean():.4f} ± {losses.std():.4f}")
        print(f"| {row} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
