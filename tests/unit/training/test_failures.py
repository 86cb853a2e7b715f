"""How training ends badly: every message names the value, the place of the last good checkpoint, and a way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmcompress.training.failures import is_out_of_memory, not_finite, out_of_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("memory"), False),
    ],
)
def test_memory_that_ran_out_is_told_from_other_errors(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_loss_that_is_not_finite_names_step_rate_and_checkpoint() -> None:
    error = not_finite("the loss", 7, 2e-4, Path("run/checkpoint-6"))
    assert error.message == (
        "the loss is not finite after step 7 (learning rate 0.0002); the last good checkpoint is of step 6"
    )
    assert "lower --learning-rate (to 5e-05, say)" in str(error.hint) and error.checkpoint == Path("run/checkpoint-6")
    assert not_finite("the loss", 0, 1e-3, None).message.endswith("none was kept")


@pytest.mark.parametrize(("batch_size", "way"), [(8, "use --batch-size 4 with twice"), (1, "use --seq-len 256")])
def test_memory_that_ran_out_says_what_to_make_smaller(batch_size: int, way: str) -> None:
    error = out_of_memory(RuntimeError("first line\nsecond"), batch_size, 512, None)
    assert error.message == f"out of memory with batch_size {batch_size} and seq_len 512 (first line)"
    assert way in str(error.hint) and "--gradient-checkpointing" in str(error.hint)
