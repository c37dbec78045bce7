"""Random states of Python and torch, as bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import torch
from torch import Tensor


def capture() -> dict[str, Tensor]:
    """Of Python, torch on the CPU and, where it is used, torch on this rank's GPU; 1-D uint8 each."""
    version, numbers, gauss = random.getstate()
    python = json.dumps([version, list(numbers), gauss]).encode()
    states = {"python": torch.frombuffer(bytearray(python), dtype=torch.uint8), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def check(states: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` for states that `restore` could not put back; changes nothing."""
    try:
        version, numbers, gauss = json.loads(bytes(states["python"].numpy()))
        random.Random().setstate((version, tuple(numbers), gauss))
        torch.Generator().set_state(states["torch"])
        if "cuda" in states and torch.cuda.is_available():
            torch.Generator("cuda").set_state(states["cuda"])
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError, RuntimeError) as error:
        raise ValueError(f"the random states are not those of this version of Python or torch: {error!r}") from None


def restore(states: Mapping[str, Tensor]) -> None:
    """Put back what `capture` returned and `check` has seen."""
    version, numbers, gauss = json.loads(bytes(states["python"].numpy()))
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
