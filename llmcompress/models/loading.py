"""Models into memory: the one place that asks transformers for one, the device they go to, the dtype they run in.

    load_model      a folder's weights, as transformers and the layout's own package read them
    random_model    a config alone, random weights
    meta.build      a config alone, no weights (meta.py fills them a block at a time)

A third party's exception on the way is one line that names the folder, whatever its kind. A model whose files lack a
weight is refused: transformers would go on with random numbers in its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.console import quiet
from llmcompress.errors import LLMCompressError, third_party
from llmcompress.models.config import stored_dtype
from llmcompress.models.tasks import CAUSAL, Task

if TYPE_CHECKING:
    import torch
    from torch import nn


def best_device() -> torch.device:
    """cuda where there is one, else cpu."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(config: Any) -> torch.dtype:
    """What a checkpoint is run in: float32 on a CPU, where half precision is slow; elsewhere what its config names.

    config: config.json as a dictionary, or transformers' object.
    """
    import torch

    stored = stored_dtype(config)
    return stored if stored is not None and best_device().type != "cpu" else torch.float32


def read_config(folder: Path, trust_remote_code: bool, name: str | None = None) -> Any:
    """transformers' config of a folder or a config.json. name: what an error calls it; None: its path.

    Raises: LLMCompressError for a config that transformers does not know or refuses.
    """
    from transformers import AutoConfig

    with third_party(f"{name or folder}: not a config that transformers can read"), quiet("transformers"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load_model(
    folder: Path,
    task: Task = CAUSAL,
    *,
    trust_remote_code: bool = False,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    quantization: Any = None,
) -> Any:
    """The model in `folder` in eval mode, as transformers reads it.

    name: what an error calls it; None: its path. dtype: None stands for that of `compute_dtype`; device: None for the
    best one. quantization: transformers' config of a quantization that is done while loading.

    Raises: LLMCompressError when it cannot be loaded, or its files lack a weight or hold one of another shape.
    """
    name = name or str(folder)
    config = read_config(folder, trust_remote_code, name)
    with third_party(f"{name}: transformers cannot load it"), quiet("transformers", "bitsandbytes"):
        model, info = task.transformers_class(config).from_pretrained(
            folder,
            dtype=dtype or compute_dtype(config),
            device_map={"": device or best_device()},
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **({} if quantization is None else {"quantization_config": quantization}),
        )
    lacking = [str(key) for key in info["missing_keys"] if not any(part in str(key) for part in task.may_lack)]
    lacking = sorted([*lacking, *(str(key) for key in info["mismatched_keys"])])
    if lacking:
        raise LLMCompressError(
            f"{name}: {len(lacking)} weights are missing or of another shape, {lacking[0]} first",
            "config.json and weights do not belong together",
        )
    return model.eval()


def random_model(config: Path, task: Task, trust_remote_code: bool) -> nn.Module:
    """A float32 model with random weights (torch's own generator), of a folder's config or a config.json.

    Raises: LLMCompressError when transformers cannot build one.
    """
    built = read_config(config, trust_remote_code)
    with third_party(f"{config}: not a {task.label} that transformers can build"), quiet("transformers"):
        model: nn.Module = task.from_config(built, trust_remote_code=trust_remote_code)
    return model.float().to(best_device())
