"""What is raised about checkpoints."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that is damaged, does not fit, or could not be written; the message names the file or tensor."""
