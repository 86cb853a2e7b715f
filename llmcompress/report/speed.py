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
    stored_dtype: str | None = Field(default=None, description="of its weights on disk, where they are plain")
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

    @property
    def differing(self) -> list[str]:
        """How the baseline was run, as far as it is not how the compressed model was: one entry each."""
        rows = {row.model: row for row in self.rows}
        base, ours = rows["baseline"], rows["compressed"]
        pairs = ("dtype", base.dtype, ours.dtype), ("device", base.device, ours.device)
        return [f"{what}: base {left}, compressed {right}" for what, left, right in pairs if left != right]
