"""Versions, the card and its driver."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from statistics import median

import torch

import gwt_dist
from gpu_parts.setting import Row, Setting

PACKAGES = (
    *("torch", "triton", "PyWavelets", "numpy", "pytest", "hypothesis", "transformers"),
    *("deepspeed", "torchao", "galore-torch"),
)


def rows(setting: Setting) -> Iterator[Row]:
    """What a reader has to know of the machine; an error if the GPU that was asked for is not there."""
    yield {"case": "gwt_dist", "value": gwt_dist.__version__}
    for package in PACKAGES:
        yield {"case": package, "value": version(package)}
    yield {"case": "Python", "value": f"{platform.python_version()}, {platform.system()} {platform.release()}"}
    yield {"case": "CPU cores", "value": str(os.cpu_count())}
    yield from _gpu(setting)
    yield {"case": "copy", "value": f"{copy_bandwidth(setting) / 1e9:.1f} GB/s, read and written"}


def _gpu(setting: Setting) -> Iterator[Row]:
    if not setting.on_gpu:
        yield {"case": "GPU", "value": f"not used: the device is {setting.device}"}
        return
    if not torch.cuda.is_available():
        yield {"case": "GPU", "error": "torch finds none. --device cpu --smoke runs all parts at tiny shapes"}
        return
    properties = torch.cuda.get_device_properties(setting.device)
    capability = f"{properties.major}.{properties.minor}"
    memory = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
    yield {"case": "GPU", "value": f"{properties.name}, capability {capability}, {memory}"}
    yield {"case": "CUDA", "value": f"{torch.version.cuda}, driver {driver()}"}


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def driver() -> str:
    """Version of the GPU's driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown (no nvidia-smi)"
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    return " ".join(answer.stdout.split()) or "unknown"


def copy_bandwidth(setting: Setting) -> float:
    """Bytes a second that `Tensor.copy_` reads and writes on 1 GiB, in a smoke on 1 MiB."""
    source = torch.ones(1 << (18 if setting.smoke else 28), device=setting.device)
    target = torch.empty_like(source)
    times = [setting.timed(lambda: target.copy_(source))[0] for _ in range(13)]
    return 2e3 * 4 * source.numel() / median(times[2:])
