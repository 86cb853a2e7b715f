"""The tokenizer of a checkpoint, and the small files that travel with the weights unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.console import quiet
from llmcompress.errors import third_party

NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".gguf", ".md", ".png", ".jpg")
REWRITTEN = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", "quantize_config.json")


def load_tokenizer(source: Checkpoint | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint or of a folder, as transformers loads it; nothing is fetched.

    trust_remote_code: of a folder; a checkpoint has its own.

    Raises: LLMCompressError when the folder has none that transformers can load.
    """
    from transformers import AutoTokenizer

    folder, name = (source, str(source)) if isinstance(source, Path) else (source.folder, source.name)
    trust = trust_remote_code if isinstance(source, Path) else source.trust_remote_code
    hint = "calibration and evaluation need tokenizer files beside config.json; --method rtn does not"
    with third_party(f"{name}: its tokenizer cannot be loaded", hint), quiet("transformers"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)


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
