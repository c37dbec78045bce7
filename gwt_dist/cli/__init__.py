"""The command ``gwt-dist``: one module a command, put together in ``app.py``."""

from __future__ import annotations

import sys
from typing import NoReturn

__all__ = ["start"]


def start() -> NoReturn:
    """Run ``gwt-dist`` with the arguments of this process and leave with its exit code."""
    try:
        from gwt_dist.cli.app import main
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f'error: the command gwt-dist needs {error.name}, which is not installed: pip install "gwt_dist[cli]"')
    sys.exit(main())
