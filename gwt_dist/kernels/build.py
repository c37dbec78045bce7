"""Compiles the C++ kernels on first use, into the folder where torch keeps extensions.

Ranks that start together wait for the first of them. The lock is the operating system's, so a rank that is killed while
it compiles leaves none behind; the library is moved into place when it is whole, under a name that says what it was
built from and for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import io
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
_BASE = ("-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
_BY_CAPABILITY = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "DEFAULT": (),
}


class BuildError(RuntimeError):
    """The compiled kernels could not be built; the message ends with the compiler's last lines."""


def capability() -> str:
    """The instruction set that torch uses on this machine (``ATEN_CPU_CAPABILITY`` lowers it), and so do we."""
    found: str = torch.backends.cpu.get_cpu_capability()
    return found if found in _BY_CAPABILITY else "DEFAULT"


def folder() -> Path:
    """Where the libraries lie: ``TORCH_EXTENSIONS_DIR`` or torch's own default."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()) / "gwt_dist"


def load(source: str, *defines: str) -> ModuleType:
    """The module built from ``<source>.cpp`` with these flags for this machine, compiled if it never was.

    Raises `BuildError` if it cannot be compiled.
    """
    name, flags, library = library_of(source, *defines)
    if not library.exists():
        with _lock(library.with_suffix(".lock")):
            if not library.exists():
                _compile(name, source, flags, library)
    return _import(name, library)


def library_of(source: str, *defines: str) -> tuple[str, tuple[str, ...], Path]:
    """Name and flags of the module that `load` would import, and its library, which may not be there yet."""
    flags = (*_BASE, *_BY_CAPABILITY[capability()], *(f"-DCPU_CAPABILITY{x}{capability()}" for x in ("=", "_")))
    digest = hashlib.sha256()
    for path in (SOURCES / f"{source}.cpp", *sorted(SOURCES.rglob("*.h"))):
        digest.update(path.read_bytes())
    made_from = (torch.__version__, importlib.util.MAGIC_NUMBER.hex(), *flags, *defines)
    digest.update("\n".join(made_from).encode())
    name = f"gwt_dist_{source}_{capability().lower()}_{digest.hexdigest()[:16]}"
    return name, (*flags, *defines), folder() / f"{name}.so"


def _compile(name: str, source: str, flags: tuple[str, ...], library: Path) -> None:
    from torch.utils import cpp_extension

    output = io.StringIO()
    logger.warning(
        "gwt_dist compiles a kernel for this machine (%s.cpp), which takes up to a minute, once: it is kept in %s",
        source,
        library.parent,
    )
    with tempfile.TemporaryDirectory(dir=library.parent) as workshop:
        try:
            with contextlib.redirect_stdout(output):
                cpp_extension.load(
                    name,
                    [str(SOURCES / f"{source}.cpp")],
                    extra_cflags=list(flags),
                    build_directory=workshop,
                )
        except (RuntimeError, OSError, ImportError) as error:
            last = "\n".join(f"{output.getvalue()}\n{error}".strip().splitlines()[-15:])
            raise BuildError(
                f"the C++ kernel {source}.cpp of gwt_dist could not be compiled; steps would run several times "
                f"slower without it. Its compiler's last lines:\n{last}"
            ) from error
        os.replace(Path(workshop) / f"{name}.so", library)


def _import(name: str, library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None, library
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
