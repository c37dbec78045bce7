"""The model card of an export and its tokenizer: how the model was trained, as checkpoint and run folder say it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

from gwt_dist.checkpoint.format import WEIGHT, Entry, Index
from gwt_dist.memory.state import ADAMW, GroupSpec
from gwt_dist.report.run import RECORD, Run, flat, last, read_runs
from gwt_dist.train.checkpoints import FOLDER
from gwt_dist.train.tokens import ByteTokenizer, bpe_size, save_tokenizer

CARD, TOKENIZER = "README.md", "tokenizer.json"
_ADAMW_BYTES = 8  # two fp32 moments a weight
_TAG = re.compile(r"[a-z0-9][a-z0-9_-]*")  # nothing that YAML would read as more than a word

_LOAD = """
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")  # the folder of this card
"""
_WITH_BYTES = """
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")  # the folder of this card
prompt = torch.tensor([list("import ".encode())])
ids = model.generate(prompt, max_new_tokens=40, eos_token_id={eos})[0].tolist()
print(bytes(i for i in ids if i < 256).decode(errors="replace"))
"""
_WITH_TOKENIZER = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")  # the folder of this card
tokenizer = AutoTokenizer.from_pretrained(".")
prompt = tokenizer("import ", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(prompt, max_new_tokens=40, eos_token_id=tokenizer.eos_token_id)[0]))
"""


def describe(folder: Path, index: Index, checkpoint: Path, name: str) -> list[str]:
    """Write the card of an export, `README.md`, and the tokenizer if the run had one that transformers can load.

    All that the card says is from the index, and of a checkpoint in a run folder of the recipe from that; what neither
    says is left out. Nothing is fetched.

    Args:
        folder: The export, with its config.json.
        index: Of the checkpoint.
        checkpoint: The checkpoint's folder.
        name: The title.

    Returns:
        What could not be had, a line each.
    """
    place, run, lacking = checkpoint.resolve().parent.parent, None, []
    if checkpoint.resolve().parent.name == FOLDER and (place / RECORD).is_file():
        try:
            (run,) = read_runs([place])
        except ValueError as error:
            lacking.append(f"the card is without the records of the run: {error}")
    extra = index.extra if isinstance(index.extra, Mapping) else {}
    identity = extra.get("identity")
    said = dict(flat(identity)) if isinstance(identity, Mapping) else {}
    spec = said.get("tokenizer", "")
    tokens, usage = "", _LOAD
    if spec == ByteTokenizer.name:
        tokens = f"plain bytes of UTF-8, {ByteTokenizer.eos} ends a document; there are no files of a tokenizer"
        usage = _WITH_BYTES.format(eos=ByteTokenizer.eos)
    elif spec:
        try:
            save_tokenizer(folder, spec, int(said.get("model.vocab_size", 0)), _trained(spec, place, said))
            tokens, usage = f"{spec}, in this folder", _WITH_TOKENIZER
        except ValueError as error:
            lacking.append(f"the export is without its tokenizer: {error}")
            tokens = f"{spec}, not in this folder"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / CARD).write_text(_card(name, config, index, run, said, tokens, usage), encoding="utf-8")
    return lacking


def _trained(spec: str, place: Path, said: Mapping[str, str]) -> str | None:
    """The JSON of a BPE that the run trained; None for any other tokenizer."""
    if bpe_size(spec) is None:
        return None
    try:
        text = (place / TOKENIZER).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer {spec!r} was trained by the run, and {place / TOKENIZER}: {error}") from None
    if hashlib.sha256(text.encode()).hexdigest() != said.get("tokenizer.sha256"):
        raise ValueError(f"{place / TOKENIZER} is not the tokenizer that the model was trained with")
    return text


def _card(
    name: str, config: Mapping[str, Any], index: Index, run: Run | None, said: dict[str, str], tokens: str, usage: str
) -> str:
    stepped = [entry for entry in index.tensors.values() if entry.step is not None]
    tags = ["gwt_dist", str(config.get("model_type", ""))]
    facts = dict(_facts(index, run, said, stepped))
    if tokens:
        facts["tokenizer"] = tokens
    parts = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in tags if _TAG.fullmatch(tag)),
        "---",
        f"\n# {_plain(name)}\n",
        f"A {config['architectures'][0]}, trained with gwt_dist. `gwt-dist export` wrote this card from the records.\n",
        f"```python{usage}```\n",
        "## Training\n",
        *_table(("", ""), facts.items()),
    ]
    if stepped:
        heads = ("recipe", "level", "tensors", "weights", "bytes of state", "of AdamW's", "learning rate")
        parts += ["", *_table(heads, _groups(index, stepped))]
    return "\n".join(parts) + "\n"


def _facts(index: Index, run: Run | None, said: dict[str, str], stepped: list[Entry]) -> Iterator[tuple[str, str]]:
    """What is known of the training, as label and text."""
    settings = run.settings if run else {}
    record = run.record if run else {}
    step = index.step
    if kind := said.get("optimizer.type"):
        yield "optimizer", kind
    if {"train.warmup_steps", "train.min_lr_ratio", "train.steps"} <= settings.keys():
        yield (
            "schedule",
            f"linear warm-up over {settings['train.warmup_steps']} steps, cosine to {settings['train.min_lr_ratio']} "
            f"of the top at step {settings['train.steps']}",
        )
    elif schedule := index.scheduler or index.engine_schedule:
        yield "schedule", schedule.kind
    yield "steps", f"{step:,}" + (f" of {int(settings['train.steps']):,}" if "train.steps" in settings else "")
    if run:
        yield "tokens", f"{step * run.tokens_per_step:,}"
    if {"train_batch_size", "sequence_length"} <= said.keys():
        yield "batch", f"{said['train_batch_size']} sequences of {said['sequence_length']} tokens"
    if source := settings.get("corpus.source"):
        yield "text", Path(source).name if Path(source).is_absolute() else source
    if precision := said.get("precision"):
        yield "precision of the weights", precision
    yield "ranks", str(index.world_size)
    if stage := settings.get("deepspeed.zero_optimization.stage"):
        yield "engine", f"DeepSpeed, ZeRO stage {stage}"
    elif index.engine is not None:
        yield "engine", "DeepSpeed"
    if isinstance(record.get("device"), str):
        yield "device", record["device"]
    if stepped:
        held, adamw = _state(stepped), _adamw(stepped)
        yield "optimizer state", f"{held:,} bytes, {held / adamw:.4f} of the {adamw:,} of AdamW's two fp32 moments"
    for label, lines, key in (
        ("training loss", run.training if run else [], "loss"),
        ("validation loss", run.validation if run else [], "validation_loss"),
        ("bits per byte, validation", run.validation if run else [], "bits_per_byte"),
    ):
        if found := last([line for line in lines if line["step"] <= step], key):
            yield label, f"{found[1]:.4f}" + (f" at step {found[0]:,}" if found[0] != step else "")
    if index.versions:
        yield "versions", ", ".join(f"{package} {version}" for package, version in index.versions.items())


def _groups(index: Index, stepped: list[Entry]) -> Iterator[tuple[str, ...]]:
    """A row for all tensors of one recipe, level and learning rate; the rate is the top of a schedule."""
    rows: dict[tuple[str, int, Any], list[Entry]] = {}
    for entry in stepped:
        group = index.groups[entry.group] if entry.group is not None else {}
        rate = group.get("initial_lr", group.get("lr"))
        recipe = entry.recipe
        with suppress(ValueError):  # a recipe that is not known here
            recipe = recipe if GroupSpec.of({"level": 0, **group}, ()).takes(entry.shape) else ADAMW
        rows.setdefault((recipe, entry.level, rate), []).append(entry)
    for (recipe, level, rate), entries in rows.items():
        weights, held = sum(prod(entry.shape) for entry in entries), _state(entries)
        numbers = f"{len(entries):,}", f"{weights:,}", f"{held:,}", f"{held / _adamw(entries):.4f}"
        yield recipe, str(level), *numbers, "" if rate is None else f"{rate:g}"


def _state(entries: list[Entry]) -> int:
    """Bytes of the state of these tensors, without what there is one number of a tensor."""
    return sum(part.bytes for entry in entries for kind, part in entry.parts.items() if kind != WEIGHT)


def _adamw(entries: list[Entry]) -> int:
    return max(1, _ADAMW_BYTES * sum(prod(entry.shape) for entry in entries))


def _table(heads: tuple[str, ...], rows: Any) -> Iterator[str]:
    for row in (heads, ("---",) * len(heads), *rows):
        yield f"| {' | '.join(_plain(cell) for cell in row)} |"


def _plain(text: str) -> str:
    """Text that stays in its line and its cell and is no HTML: names and settings may hold anything."""
    kept = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\|<>\[\]`*])", r"\\\1", kept) if kept != "---" else kept
