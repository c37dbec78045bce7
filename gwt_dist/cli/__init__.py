"""The command ``gwt-dist``: one module a command, put together in ``app.py``."""

from __future__ import annotations

import sys
from typing import NoReturn

__all__ = ["start"]

# What the commands import beyond torch and PyWavelets, and the extra that brings it (setup.cfg). A command whose extra
# is not installed says so; the others and the help work without it.
EXTRAS = {
    **dict.fromkeys(("typer", "rich", "jinja2", "plotly"), "cli"),
    **dict.fromkeys(("yaml", "numpy", "tqdm", "transformers", "tokenizers", "datasets", "safetensors"), "hf"),
    "tensorboard": "hf",
    "deepspeed": "deepspeed",
}


def start() -> NoReturn:
    """Run ``gwt-dist`` with the arguments of this process and leave with its exit code."""
    try:
        from gwt_dist.cli.app import main

        sys.exit(main())
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        command = " ".join(("gwt-dist", *sys.argv[1:2]))
        extras = ",".join(sorted({"cli", EXTRAS[package]}))
        print(
            f"error: {command} needs the package {package}, which is not installed: "
            f'pip install -c constraints.txt -e ".[{extras}]"',
            file=sys.stderr,
        )
        sys.exit(2)
