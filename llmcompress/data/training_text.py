"""The rows that a model was trained on, as a calibration set: what it is meant for is what it is quantized on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmcompress.data.calibration import CalibrationSet, digest, shuffled
from llmcompress.data.examples import load_examples
from llmcompress.data.packing import pad
from llmcompress.data.settings import DataSettings
from llmcompress.report import Calibration
from llmcompress.seed import derive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_SAMPLES = 128
NAME = "training data"
"""What the report calls such a calibration set."""


def training_calibration(
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    num_samples: int | None = None,
    seq_len: int | None = None,
) -> CalibrationSet:
    """Training examples (never held-out ones) drawn by `seed`, one to a row, padded to the longest of them.

    num_samples: rows at most (default 128); seq_len: longer ones are cut there.

    Raises: LLMCompressError as `load_examples`.
    """
    import torch

    rows = load_examples(data.model_copy(update={"packing": False}), tokenizer, seed)
    order = shuffled(len(rows.train), derive(seed, "calibration"))[: num_samples or NUM_SAMPLES]
    chosen = [rows.train[index].ids for index in order]
    longest = max(map(len, chosen))
    padding = next(int(one) for one in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if one is not None)
    tokens, mask = pad(chosen, min(longest, seq_len or longest), padding)
    tokens_NS, mask_NS = torch.tensor(tokens), torch.tensor(mask)
    provenance = Calibration(
        name=NAME,
        source=rows.summary.source,
        num_samples=tokens_NS.shape[0],
        seq_len=tokens_NS.shape[1],
        num_tokens=int(mask_NS.sum()),
        chat_template=rows.summary.chat_template,
        seed=seed,
        sha256=digest(tokens_NS, mask_NS),
    )
    return CalibrationSet(tokens_NS, mask_NS, provenance)
