"""A study of two rows that takes a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SHAPES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 258,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
ROWS = [
    {"name": "energy", "optimizer": "gwt", "lr": [0.01, 0.02]},
    {"name": "adamw", "optimizer": "adamw", "lr": [0.004]},
]


def settings_in(folder: Path) -> dict[str, Any]:
    """What its file says; text and model are written into `folder`."""
    words = random.Random(0).choices(("one", "two", "three", "four", "five"), k=12_000)
    for i in range(12):  # documents: some of them validate
        (folder / f"{i}.txt").write_text(" ".join(words[1000 * i : 1000 * (i + 1)]))
    (folder / "model.json").write_text(json.dumps(SHAPES))
    return {
        "model": str(folder / "model.json"),
        "corpus": str(folder / "*.txt"),
        "sequence_length": 16,
        "micro_batch": 2,
        "eval_tokens": 128,
        "seeds": [0, 1],
        "extend": 0,
        "batches": [{"tokens": 64, "steps": 8}],
        "rows": ROWS,
    }
