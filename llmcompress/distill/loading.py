"""Load the two ends of a distillation, quantized or not.

    plain weights                        transformers, float32 on a CPU
    quantized by llmcompress             our own dequantized weights: the numbers that its codes stand for
    quantized by another (NF4, GPTQ …)   transformers with that format's package

Only eager attention returns its probabilities; where they are needed the model is switched to it, and that is said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.console import quiet
from llmcompress.distill.kinds import Kind, auto_class
from llmcompress.errors import LLMCompressError
from llmcompress.models.device import best
from llmcompress.report import FILE, FOLDER

MADE_ANEW = ("pooler", "position_ids")
"""Parts of an encoder that may be missing from its files: they are not used here."""


def load(checkpoint: Checkpoint, kind: Kind, attentions: bool) -> tuple[nn.Module, list[str]]:
    """The model in eval mode on the best device, and what there is to say about how it was loaded.

    Raises: LLMCompressError when it cannot be loaded, lacks weights, or has no attention that returns probabilities.
    """
    notes: list[str] = []
    model = _quantized(checkpoint, kind, notes) if is_quantized(checkpoint) else _plain(checkpoint, kind)
    if attentions:
        notes += with_probabilities(model, checkpoint.name)
    return model.to(best()).eval(), notes


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether config.json says that the weights are quantized."""
    return bool(checkpoint.config.get("quantization_config"))


def is_ours(folder: Path) -> bool:
    """Whether llmcompress wrote the folder, so that its codes can be read by us."""
    return (folder / FOLDER / FILE).is_file()


def with_probabilities(model: nn.Module, name: str) -> list[str]:
    """Switch a model to an attention that returns its probabilities; what was switched, to be said.

    Raises: LLMCompressError when the model has none.
    """
    config: Any = model.config
    before = getattr(config, "_attn_implementation", None)
    if before == "eager":
        return []
    try:
        model.set_attn_implementation("eager")  # type: ignore[operator]
    except (ValueError, AttributeError, NotImplementedError) as error:
        raise LLMCompressError(
            f"{name}: its attention ({before}) returns no probabilities and cannot be switched to eager ({error})",
            "leave out the attention losses",
        ) from error
    return [f"{name}: attention switched from {before} to eager, since {before} returns no probabilities"]


def _plain(checkpoint: Checkpoint, kind: Kind) -> nn.Module:
    try:
        with quiet("transformers"):
            model, info = auto_class(kind).from_pretrained(
                checkpoint.folder,
                dtype=compute_dtype(checkpoint),
                local_files_only=True,
                trust_remote_code=checkpoint.trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError) as error:
        raise LLMCompressError(f"{checkpoint.name}: transformers cannot load it ({_first_line(error)})") from error
    missing = [str(name) for name in info["missing_keys"] if not any(part in str(name) for part in MADE_ANEW)]
    missing += [str(name) for name in info["mismatched_keys"]]
    if missing:
        raise LLMCompressError(
            f"{checkpoint.name}: {len(missing)} weights are missing or of another shape, {sorted(missing)[0]} first",
            "config.json and weights do not belong together",
        )
    return model  # type: ignore[no-any-return]


def _quantized(checkpoint: Checkpoint, kind: Kind, notes: list[str]) -> nn.Module:
    from llmcompress.compress.dequantized import load_dequantized

    method = checkpoint.config["quantization_config"].get("quant_method")
    if kind == "causal" and is_ours(checkpoint.folder):
        notes.append(f"{checkpoint.name}: quantized ({method}); run with our own dequantized weights")
        return load_dequantized(checkpoint.folder, torch.float32)
    notes.append(f"{checkpoint.name}: quantized ({method}); run by transformers with that format's own package")
    return _plain(checkpoint, kind)


def dense(checkpoint: Checkpoint, kind: Kind) -> nn.Module | None:
    """A model whose weights are all plain, to be cut from, of a checkpoint that another tool quantized; None where the
    checkpoint as it is loaded elsewhere is plain already.

    Raises: LLMCompressError when transformers cannot undo that quantization.
    """
    if not is_quantized(checkpoint) or (kind == "causal" and is_ours(checkpoint.folder)):
        return None
    model: Any = _plain(checkpoint, kind)
    try:
        with quiet("transformers"):
            plain: nn.Module = model.dequantize()
    except (ValueError, NotImplementedError, AttributeError, RuntimeError) as error:
        raise LLMCompressError(
            f"{checkpoint.name}: cannot be cut, since transformers cannot undo its quantization ({_first_line(error)})",
            "give a student of its own (--student), or cut the original",
        ) from error
    return plain.to(best()).float().eval()


def compute_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """float32 on a CPU, where half precision is slow; elsewhere what config.json says."""
    stored = getattr(torch, str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")), None)
    return stored if best().type != "cpu" and isinstance(stored, torch.dtype) else torch.float32


def from_config(checkpoint_or_file: Path, kind: Kind, trust_remote_code: bool) -> nn.Module:
    """A model with random weights, of the config in a folder or a config.json.

    Raises: LLMCompressError when transformers cannot make one.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint_or_file, trust_remote_code=trust_remote_code)
        model: nn.Module = auto_class(kind).from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError) as error:
        raise LLMCompressError(
            f"{checkpoint_or_file}: not a config that transformers can build ({_first_line(error)})"
        ) from error
    return model.float().to(best())


def skeleton_of(checkpoint: Checkpoint, kind: Kind) -> nn.Module:
    """The checkpoint's model without its weights: what class it is of costs no memory."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
    with init_empty_weights():
        model: nn.Module = auto_class(kind).from_config(config, trust_remote_code=checkpoint.trust_remote_code)
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
