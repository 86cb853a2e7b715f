"""What calibration text takes in memory, and which way of streaming fits into the bound. Free of torch, for `plan`.

    staged, in memory      hidden states between layers, and what all batches hold where they wait
    recomputed, in memory  hidden states between layers, and one batch under way
    recomputed, on disk    one batch under way; hidden states in a file

Units: bytes; T tokens, H hidden size, W the widest input of a linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmcompress.errors import LLMCompressError

FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Footprint:
    """How the text is streamed: `form`, `activations`, why not the first choice, and what it takes."""

    form: Literal["staged", "recomputed"]
    activations: Literal["memory", "disk"]
    reason: str | None
    memory_bytes: int
    disk_bytes: int


def footprint(
    num_tokens: int, batch_tokens: int, hidden: int, widest: int, bound_bytes: int, beside: bool = False,
    mixture: bool = False,
) -> Footprint:  # fmt: skip
    """The fastest way whose activations stay within `bound_bytes`; one batch under way is taken whatever it needs.

    num_tokens: of this process. A batch that waits at the widest linear holds its hidden state before and after
    attention, and that linear's input. beside: the original model's batches wait too, which has to fit. mixture: where
    batches run up to a linear anew, what a layer's experts are given is held beside the hidden states.

    Raises: LLMCompressError where `beside` does not fit.
    """
    between = num_tokens * hidden * FLOAT_BYTES * (2 if mixture else 1)
    waiting = num_tokens * (2 * hidden + widest) * FLOAT_BYTES * (2 if beside else 1)
    under_way = batch_tokens * (3 * hidden + 3 * widest) * FLOAT_BYTES
    if waiting <= bound_bytes:
        return Footprint("staged", "memory", None, waiting + under_way, 0)
    if beside:
        raise LLMCompressError(
            f"asymmetric_calibration: activations of both models take {_mib(waiting)} MiB, over activation_memory_mb "
            f"{bound_bytes >> 20}",
            "raise it, lower num_samples, or set asymmetric_calibration to false",
        )
    reason = f"batches that wait together would hold {_mib(waiting)} MiB, over activation_memory_mb"
    if between <= bound_bytes:
        return Footprint("recomputed", "memory", reason, between + under_way, 0)
    reason += f"; hidden states alone are {_mib(between)} MiB"
    return Footprint("recomputed", "disk", reason, under_way, between)


def _mib(num_bytes: int) -> int:
    return -(-num_bytes // (1 << 20))
