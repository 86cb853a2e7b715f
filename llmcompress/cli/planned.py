"""A plan as a person reads it, and the short measurement that its time rests on."""

from __future__ import annotations

import time
from collections import Counter

from llmcompress.compress.planning import QuantizePlan
from llmcompress.console import duration, megabytes

PROBE_SIZE = 512


def matmul_rate() -> float:
    """Operations a second of a float32 matrix product with numpy here: some hundredths of a second."""
    import numpy as np

    left = np.ones((PROBE_SIZE, PROBE_SIZE), np.float32)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - began)
    return 2.0 * PROBE_SIZE**3 / best


def planned(model: str, plan: QuantizePlan) -> str:
    """The lines that `llmcompress plan` prints."""
    share = plan.after_bytes / plan.before_bytes
    grids = Counter(one.scheme.label() for one in plan.linears)
    lines = [
        model,
        f"  model    {plan.parameters:,} parameters, {plan.layers} decoder layers",
        f"  size     {megabytes(plan.after_bytes)} from {megabytes(plan.before_bytes)} ({share:.3f} of it); "
        f"{plan.bits_per_weight:.3f} bits per quantized weight",
        "  linears  " + ", ".join(f"{count} to {label}" for label, count in grids.items()),
    ]
    for reason, count in Counter(plan.skipped.values()).items():
        names = [name for name, why in plan.skipped.items() if why == reason]
        lines.append(f"  skipped  {count} {reason}: {', '.join(names[:3])}{' …' if count > 3 else ''}")
    lines.append(f"  memory   {megabytes(plan.peak_memory_bytes)} at most")
    if plan.streaming and plan.streaming.reason:
        streaming = plan.streaming
        lines.append(f"           {streaming.form}, activations in {streaming.activations}: {streaming.reason}")
    lines.append(f"  disk     {megabytes(plan.disk_bytes)} while it runs")
    lines.append(f"  time     some {duration(plan.seconds)} on this machine")
    return "\n".join(lines)
