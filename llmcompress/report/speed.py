"""How fast both models ran."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmcompress.report.evaluate import Kernels
from llmcompress.report.part import Part


class Speed(Part):
    """How fast one of the two models ran, in a process of its own. Written by measure."""

    model: Literal["baseline", "compressed"]
    engine: str
    engine_note: str
    kernels: Kernels = "native"
    device: str
    dtype: str
    load_s: float = Field(description="from the start of loading to the first token computed")
    prefill_tokens_per_s: list[float] = Field(description="one figure a round")
    decode_tokens_per_s: list[float] = Field(description="one figure a round")
    memory_before_load_bytes: int = Field(description="of the process, libraries imported and nothing loaded")
    peak_memory_bytes: int = Field(description="highest memory of the process; on a GPU that of its allocator")


class Measurement(Part):
    """Both models' speed, their rounds taken in turn on one machine. Written by measure."""

    baseline: str = Field(description="identity of the baseline checkpoint")
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    num_threads: int
    hardware: str
    rows: list[Speed]
