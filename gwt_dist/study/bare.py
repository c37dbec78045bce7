"""A class in a package that is not imported as a whole."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any


def class_in(package: str, module: str, name: str) -> Any:
    """`name` from `module` of `package`, without what the package's `__init__` imports.

    galore_torch and apollo_torch import bitsandbytes there, which none of the classes that a study takes needs and
    which not every machine has. The package is loaded under another name, so that an import of the whole of it
    elsewhere finds what it expects.

    Args:
        package: A package at the top of the path.
        module: A module right in it.
        name: What it defines.

    Raises:
        ImportError: There is no such package or module, or no such name in it: another version than that which was
            tried.
    """
    alias = f"_without_init_{package}"
    if alias not in sys.modules:
        found = importlib.util.find_spec(package)
        if found is None or found.submodule_search_locations is None:
            raise ModuleNotFoundError(f"No package named {package!r}", name=package)
        bare = types.ModuleType(alias)
        bare.__path__ = list(found.submodule_search_locations)
        sys.modules[alias] = bare
    try:
        return getattr(importlib.import_module(f"{alias}.{module}"), name)
    except AttributeError:
        raise ImportError(f"{package}.{module} has no {name!r}: another version of {package} has moved it") from None
