"""How training ends badly, with what to do about it."""

from __future__ import annotations

from pathlib import Path

from llmcompress.errors import LLMCompressError

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


class TrainingFailedError(LLMCompressError):
    """Training that cannot go on; `checkpoint` is the folder of the last good one, if there is any."""

    def __init__(self, message: str, hint: str, checkpoint: Path | None = None) -> None:
        super().__init__(message, hint)
        self.checkpoint = checkpoint


def not_finite(what: str, step: int, learning_rate: float, checkpoint: Path | None) -> TrainingFailedError:
    """The error for a loss or weight that is NaN or infinite after `step` optimizer steps."""
    kept = (
        f"the last good checkpoint is of step {checkpoint.name.rpartition('-')[2]}" if checkpoint else "none was kept"
    )
    return TrainingFailedError(
        f"{what} is not finite after step {step} (learning rate {learning_rate:g}); {kept}",
        f"lower --learning-rate (to {learning_rate / 4:g}, say), warm up longer (training.warmup_frac), or look for "
        "damaged rows with --show-examples",
        checkpoint,
    )


def out_of_memory(error: BaseException, batch_size: int, seq_len: int, checkpoint: Path | None) -> TrainingFailedError:
    """The error for a batch that does not fit into memory."""
    smaller = f"--batch-size {max(1, batch_size // 2)} with twice the --accumulation"
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return TrainingFailedError(
        f"out of memory with batch_size {batch_size} and seq_len {seq_len} ({first})",
        f"{f'use {smaller}' if batch_size > 1 else f'use --seq-len {seq_len // 2}'}, --gradient-checkpointing, or "
        "--adapter qlora",
        checkpoint,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or of the machine says that memory ran out."""
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in OUT_OF_MEMORY)
