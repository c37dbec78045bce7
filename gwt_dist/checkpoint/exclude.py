"""What a save leaves out: patterns of names, and frozen weights."""

from __future__ import annotations

from collections.abc import Iterable

from gwt_dist.checkpoint.dtypes import name_of
from gwt_dist.checkpoint.format import CheckpointError, Excluded
from gwt_dist.checkpoint.holdings import Run
from gwt_dist.targets import checked_pattern, matches

ALL_FROZEN = "all-frozen"


def excluded(run: Run, exclude: str | Iterable[str]) -> dict[str, Excluded]:
    """The tensors of a run that `exclude` leaves out, by name.

    Raises:
        CheckpointError: For a pattern that matches nothing or a tensor that is trained, and for what is no pattern.
    """
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    trained = run.traits().keys()
    tensors, parameters = {}, {}
    for local in run.weights.model:
        for fragment in local.fragments:
            tensors[fragment.fqn] = Excluded(fragment.shape, name_of(local.buffer.dtype))
            parameters[fragment.fqn] = not local.common
    found: dict[str, Excluded] = {}
    for pattern in patterns:
        if pattern == ALL_FROZEN:
            names = [name for name, is_parameter in parameters.items() if is_parameter and name not in trained]
            _check_frozen(names, run.weights.requires_grad)
        else:
            names = [name for name in tensors if matches(checked_pattern(pattern, "exclude", "name"), name)]
            _check_untrained(pattern, names, trained)
        if not names:
            raise CheckpointError(
                f"exclude={pattern!r} matches no {'frozen parameter' if pattern == ALL_FROZEN else 'tensor'} of the "
                f"model, so nothing would be left out. Names that can match: {shown(tensors.keys() - trained)}"
            )
        found |= {name: tensors[name] for name in names}
    return found


def _check_untrained(pattern: str, names: Iterable[str], trained: Iterable[str]) -> None:
    stepped = [name for name in names if name in trained]
    if stepped:
        raise CheckpointError(
            f"exclude={pattern!r} matches {shown(stepped)}, which the optimizer steps: what it has learned would be "
            f"lost. Name the frozen ones alone, or say exclude={ALL_FROZEN!r}"
        )


def _check_frozen(names: Iterable[str], requires_grad: Iterable[str]) -> None:
    """Another optimizer may step what this one does not."""
    alive = [name for name in names if name in requires_grad]
    if alive:
        raise CheckpointError(
            f"exclude={ALL_FROZEN!r}: {shown(alive)} is in no group of this optimizer and requires a gradient, so it "
            f"may be another optimizer's. Call requires_grad_(False) if it is frozen, or name what is to be left out"
        )


def shown(names: Iterable[str]) -> str:
    """Names in a message: the first four."""
    ordered = sorted(names)
    return (", ".join(ordered[:4]) or "none") + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")
