"""The tokenizer of a checkpoint, and the small files that travel with the weights unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError

NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".gguf", ".md", ".png", ".jpg")
REWRITTEN = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", "quantize_config.json")


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer, as transformers loads it.

    Raises: LLMCompressError when the folder has none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LLMCompressError(
            f"{checkpoint.name}: its tokenizer cannot be loaded ({first[:200]})",
            "calibration and evaluation need tokenizer files beside config.json; --method rtn does not",
        ) from error


def side_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that are copied as they are: tokenizer, chat template, generation config, code."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(NOT_COPIED)
        and path.name not in REWRITTEN
    )
