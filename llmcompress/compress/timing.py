"""Where the time of a quantization goes, and how much of the machine it uses.

    with ledger.of("forward"):              a phase is charged its own time: what runs inside it as another phase is
        ... with ledger.of("solving"): ...  taken off, so that phases add up to the whole

Beside the seconds stand the operations that the work needs at least, whatever was done: 2 N K T for a linear's forward,
T K^2 for a Hessian's triangle, K^3 / 3 for a factor, N K^2 for the codes (N out_features, K in_features, T tokens; a
multiplication and an addition are two). Over the seconds they are the achieved rate; the ideal one is that of a large
matrix product, timed here.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmcompress.report import Profile

PROBE_SIZE, PROBES = 1024, 5


class Ledger:
    """Seconds and least floating-point operations, by phase."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._flops: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Charge what happens inside to `phase`."""
        self._charge()
        self._open.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now

    def needs(self, phase: str, flops: float) -> None:
        """`phase` does work that takes `flops` operations at least."""
        self._flops[phase] += flops

    def work(self, form: str, activations: str, reason: str | None, num_processes: int) -> Profile:
        """The part of the report that says all this."""
        return Profile(
            schedule="recomputed" if form == "recomputed" else "staged",
            activations="disk" if activations == "disk" else "memory",
            reason=reason,
            num_processes=num_processes,
            seconds=dict(self._seconds),
            flops=dict(self._flops),
            matmul_flops_per_s=matmul_rate(),
        )


def matmul_rate() -> float:
    """Operations a second of a float32 matrix product here, the best of a few short ones, with the threads in use."""
    left, right = torch.randn(PROBE_SIZE, PROBE_SIZE), torch.randn(PROBE_SIZE, PROBE_SIZE)
    best = float("inf")
    for _ in range(PROBES):
        began = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - began)
    return 2.0 * PROBE_SIZE**3 / best
