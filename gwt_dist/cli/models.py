"""The model that a command is told of: a configuration, a name, or a function of the user's that builds it."""

from __future__ import annotations

import importlib
import json
import os
import sys
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gwt_dist import shipped
from gwt_dist.memory.configs import KNOWN, of_config
from gwt_dist.memory.model import ModelSpec, of_module

if TYPE_CHECKING:
    from torch import nn

# What `gwt-dist train` can train, and what is there for plans alone.
FOLDERS = "configs/models", "configs/shapes"


def read_model(name: str) -> ModelSpec:
    """The shapes of a model.

    Args:
        name: A ``config.json`` of transformers or the folder with one, a name in ``configs/models`` or
            ``configs/shapes``, the name of a model on the Hugging Face hub whose configuration is cached already
            (nothing is downloaded), or ``package.module:function`` that returns an `nn.Module`.

    Raises:
        ValueError: If there is no such thing, or it does not say the shapes.
    """
    if ":" in name and not Path(name).exists():
        return of_module(build_model(name), name)
    path = _configuration(name)
    config = _read(path)
    where = str(path) if Path(name).exists() else name  # a name is known by itself
    found = of_config(config, where)
    return of_module(_by_transformers(path, config), where) if found is None else found


def build_model(name: str, within: AbstractContextManager[Any] | None = None) -> nn.Module:
    """The module that ``package.module:function`` returns; the working directory is searched.

    It is built `within` a context, None for the meta device. Raises `ValueError` if it cannot be found or returns
    something else.
    """
    import torch
    from torch import nn

    where, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(where), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name!r} is no package.module:function that can be imported: {error}") from error
    with within or torch.device("meta"):
        built = function()
    if not isinstance(built, nn.Module):
        raise ValueError(f"{name!r} returned {type(built).__name__}, and must return an nn.Module")
    return built


def meta_model(name: str, within: AbstractContextManager[Any] | None = None) -> nn.Module:
    """The module itself of anything that `read_model` takes; by transformers, so slower.

    It is built `within` a context, None for the meta device, in torch's default dtype.
    """
    if ":" in name and not Path(name).exists():
        return build_model(name, within)
    path = _configuration(name)
    return _by_transformers(path, _read(path), within)


def _configuration(name: str) -> Path:
    places = (Path(name), Path(name, "config.json"), *(Path(folder, f"{name}.json") for folder in FOLDERS))
    for candidate in places:
        if (found := shipped.find(candidate)) is not None:
            return found
    if Path(name).is_dir():
        raise ValueError(f"{name} is a folder without a config.json; name one that has it, or the file itself")
    if "/" in name or "." not in name:
        cached = _cached(name)
        if cached is not None:
            return cached
    known = ", ".join(name for folder in FOLDERS for name in shipped.names(folder, ".json"))
    raise ValueError(
        f"no model {name!r}: neither a configuration file, nor a folder with a config.json, nor one of "
        f"{known}, nor a model in the cache of the Hugging Face hub (nothing is "
        f"downloaded). package.module:function builds one of your own"
    )


def _cached(name: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text ({error}); name the config.json of a model") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, not an object")
    return config


def _by_transformers(
    path: Path, config: dict[str, Any], within: AbstractContextManager[Any] | None = None
) -> nn.Module:
    """The module that transformers builds for a configuration."""
    kind = config.get("model_type", "llama")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(
            f"{path} is a configuration of model_type {kind!r}, and to build it needs transformers: pip install "
            f"'gwt_dist[hf]', or give package.module:function. Shapes alone are known without, of {', '.join(KNOWN)}"
        ) from error
    try:
        settings = transformers.AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})
        # Of what is no causal language model the configuration says the class.
        named = [getattr(transformers, str(name), None) for name in config.get("architectures") or ()]
        causal = partial(transformers.AutoModelForCausalLM.from_config, dtype=torch.get_default_dtype())
        builder: Any = next((its for its in named if its is not None), causal)
        with within or torch.device("meta"):
            model: nn.Module = builder(settings)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"transformers cannot build {path}: {' '.join(str(error).split())}") from error
    return model
