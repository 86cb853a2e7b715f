"""An adapter's folder as a model to be measured: its base, held as it was in training, with the adapter on it.

    OUT/adapter_config.json, report ──> base (full precision, NF4 while it is loaded, or its own NF4 codes) ─┐
    OUT/adapter_model.safetensors ───────────────────────────────────────────────────────────PEFT────────────┴─> model

Of an adapter that llmcompress trained the report names the base, and that checkpoint must still have the identity of
the training; of any other, adapter_config.json names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmcompress.checkpoint.files import read_json
from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError
from llmcompress.report import Finetune

CONFIG = "adapter_config.json"
BASES = {"full": "in full precision", "nf4": "as NF4, by bitsandbytes", "stored nf4": "in its own NF4 codes"}


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter and no model of its own."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint that an adapter was trained on, by its name.

    Raises: LLMCompressError where it is not there or not named.
    """
    trained = _trained(folder)
    name = trained.base if trained else _named(folder)
    return Checkpoint.open(name, revision=_revision(folder, trained), trust_remote_code=trust_remote_code)


def load(folder: Path, trust_remote_code: bool = False) -> tuple[Any, str]:
    """Base and adapter as PEFT computes them, in eval mode, and how the base is held.

    Raises: LLMCompressError as `base_of`, for a base that is another one by now, and an adapter that does not fit it.
    """
    from llmcompress.finetune.merge_target import plan_merge
    from llmcompress.finetune.retention import trained_model
    from llmcompress.finetune.settings import AdapterRef

    base, trained = base_of(folder, trust_remote_code), _trained(folder)
    if trained and base.identity() != trained.base_identity:
        raise LLMCompressError(
            f"{folder}: {base.name} is no longer the checkpoint that this adapter was trained on (its sha256 differs)",
            "put that checkpoint back, or train the adapter again",
        )
    plan = plan_merge(base, [AdapterRef(path=str(folder))], "auto", None)
    model = trained_model(plan)
    model.config.use_cache = True
    held = plan.target.plan
    how = BASES["stored nf4" if held.stored else "nf4" if held.nf4 else "full"]
    return model, f"the adapter by PEFT on its base, which is held {how}"


def _trained(folder: Path) -> Finetune | None:
    from llmcompress.finetune.merge_target import trained_on

    return trained_on(folder)


def _revision(folder: Path, trained: Finetune | None) -> str | None:
    from llmcompress.report import RunReport

    source = RunReport.load(folder).source if trained else None
    return source.revision if source and trained and source.name == trained.base else None


def _named(folder: Path) -> str:
    name = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise LLMCompressError(f"{folder / CONFIG}: names no base (base_model_name_or_path)")
    return name
