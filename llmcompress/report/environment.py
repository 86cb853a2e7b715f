"""The machine that a run happened on, as far as its results may depend on it, and how much memory the process took."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llmcompress import __version__
from llmcompress.report import Environment

LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "compressed-tensors",
    "datasets",
    "gptqmodel",
    "huggingface_hub",
    "lm-eval",
    "numba",
    "numpy",
    "optimum",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)
"""Distributions whose version can change a number in the report."""


def describe() -> Environment:
    """Versions, processor, threads and accelerator; nothing that says whose machine it is."""
    import torch

    return Environment(
        llmcompress=__version__,
        python=platform.python_version(),
        libraries={name: found for name in LIBRARIES if (found := installed(name))},
        platform=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        num_threads=torch.get_num_threads(),
        accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far.

    Linux keeps it as VmHWM; getrusage there starts from the parent's figure, so it is second choice (macOS: bytes).
    """
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), flags=re.M) if status.is_file() else None
    if found:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory_bytes() -> int:
    """Resident memory of this process now; where the system does not tell, its peak."""
    status = Path("/proc/self/status")
    found = re.search(r"^VmRSS:\s+(\d+) kB", status.read_text(), flags=re.M) if status.is_file() else None
    return int(found[1]) * 1024 if found else peak_memory_bytes()


def _processor() -> str:
    """The processor's own name where the system tells it, with the number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), flags=re.M) if cpuinfo.is_file() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
