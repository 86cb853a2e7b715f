"""A model without its weights: transformers' own modules on the meta device, filled a layer at a time.

Buffers (rotary frequencies, causal masks) are small and computed by the model's own constructor, so they are real;
parameters are placeholders until `fill` reads them. Nothing here knows an architecture: names come from the model,
and each must have its tensor in the checkpoint. Fused experts of a mixture are taken apart at once (`experts.py`), so
that every matrix is a linear's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError, third_party
from llmcompress.models import experts
from llmcompress.models.config import is_tied, text_config
from llmcompress.models.loading import read_config
from llmcompress.models.tasks import CAUSAL, Task

FLOATS = ("F64", "F32", "F16", "BF16")


def build(
    checkpoint: Checkpoint, quantized: bool = False, task: Task = CAUSAL, split_experts: bool = True
) -> nn.Module:
    """The checkpoint's model with every parameter on the meta device, in eval mode.

    A checkpoint that says it is quantized is refused, unless `quantized`: then the dense model it came from is built.
    split_experts: a mixture's experts as linears of their own, not fused as transformers has them.

    Raises: LLMCompressError when transformers has no such model of this task, or refuses the config, and for experts
    that cannot be taken apart.
    """
    from accelerate import init_empty_weights

    if "quantization_config" in checkpoint.config and not quantized:
        method = (checkpoint.config["quantization_config"] or {}).get("quant_method")
        raise LLMCompressError(
            f"{checkpoint.name}: is quantized already (quant_method {method!r} in config.json)",
            "start from the full-precision checkpoint",
        )
    trust = checkpoint.trust_remote_code
    config = read_config(checkpoint.folder, trust, checkpoint.name)
    if task is CAUSAL:
        require_decoder(checkpoint.name, config)
    text_config(config).use_cache = False
    if quantized and hasattr(config, "quantization_config"):
        del config.quantization_config
    hint = "decoder-only checkpoints that AutoModelForCausalLM loads can be quantized" if task is CAUSAL else None
    with (
        third_party(f"{checkpoint.name}: not a {task.label} that transformers can build", hint),
        init_empty_weights(include_buffers=False),
    ):
        model = task.from_config(config, dtype=torch.float32, trust_remote_code=trust)
    if split_experts:
        experts.split(model)
    return model.eval()  # type: ignore[no-any-return]


def require_decoder(name: str, config: Any) -> None:
    """Raise unless a config is of a decoder-only language model, alone or in a wrapper. name: of the checkpoint.

    Raises: LLMCompressError for an encoder-decoder and for an encoder, each by a line of its own.
    """
    declared = ", ".join(map(str, config.architectures or ())) or config.model_type
    text = text_config(config)
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise LLMCompressError(
            f"{name}: {declared} is an encoder-decoder, whose decoder reads two inputs; decoder-only models are "
            "supported",
            "give a checkpoint that continues text, such as a Llama or a Qwen",
        )
    if _encodes(text) and not getattr(text, "is_decoder", False):
        raise LLMCompressError(
            f"{name}: {declared} is an encoder, which reads a text in both directions and writes none; decoder-only "
            "models are supported",
            "`llmcompress distill` makes encoders smaller",
        )


def _encodes(config: Any) -> bool:
    """Whether transformers has a masked language model for such a config, so that without `is_decoder` it is one."""
    from transformers import AutoModelForMaskedLM

    return type(config) in AutoModelForMaskedLM._model_mapping


def tensor_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter name in the model -> tensor name in the checkpoint, for every parameter that is stored.

    A tied parameter has no tensor of its own. Raises: LLMCompressError for a parameter without a tensor, for a shape
    that differs, and for a checkpoint that transformers would convert while loading, by name.
    """
    names: dict[str, str] = {}
    missing: list[str] = []
    sources = stored_names(model, checkpoint.stored)
    tied = tied_parameters(model) - sources.keys()
    alone = {name for name, _ in model.named_parameters()}  # one name of parameters that share a tensor
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensor = sources.get(name)
        if tensor is None:
            missing += [name] if name in alone else []
            continue
        stored = checkpoint.stored[tensor]
        if stored.shape != tuple(parameter.shape):
            raise LLMCompressError(
                f"{stored.path}: tensor {tensor} is {list(stored.shape)}, the config makes {name} "
                f"{list(parameter.shape)}",
                "config.json and weights do not belong together",
            )
        if stored.dtype not in FLOATS:
            raise LLMCompressError(
                f"{stored.path}: tensor {tensor} has dtype {stored.dtype}; weights must be one of {', '.join(FLOATS)}",
                "start from the original full-precision checkpoint",
            )
        names[name] = tensor
    missing = [name for name in missing if name not in tied]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise LLMCompressError(
            f"{checkpoint.name}: no tensor for {shown}",
            "the weights are incomplete, or transformers renames them while loading, which is not supported",
        )
    return names


def stored_names(model: nn.Module, stored: Collection[str]) -> dict[str, str]:
    """Parameter name in the model -> the name in `stored` that transformers would load into it.

    Some checkpoints keep older names (GPT-NeoX's embed_out), leave out the model's base prefix or add it. The rules are
    transformers' own; those that compute a tensor out of several are left out, so such a parameter has no name here.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    expected, prefix = model.state_dict(), getattr(model, "base_model_prefix", None) or None
    renamed = {rename_source_key(name, renamings, [], prefix, expected)[0]: name for name in stored}
    return renamed | {name: name for name in stored if name in expected}


def tied_parameters(model: nn.Module) -> set[str]:
    """Names that share their tensor with another, by the model's own declaration."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if head is not None and is_tied(getattr(model, "config", None)):
        tied |= {f"{name}.weight" for name, module in model.named_modules() if module is head}
    return tied


def tie(model: nn.Module, lacking: Collection[str]) -> None:
    """Let parameters share tensors as from_pretrained would: only where one has none of its own, or an equal one.

    A config may say that the output is tied while the files hold a head that differs; it then has a weight of its own.
    lacking: parameters that no tensor was read for.
    """
    model.tie_weights(missing_keys=set(lacking), recompute_mapping=False)  # type: ignore[operator]


def fill(
    module: nn.Module, prefix: str, names: dict[str, str], read: Callable[[str], torch.Tensor], device: torch.device,
    dtype: torch.dtype = torch.float32, leave: Collection[str] = (),
) -> None:  # fmt: skip
    """Give every parameter below `module` (at path `prefix`) its values, in `dtype` on `device`, but those in `leave`.

    read: a tensor of the checkpoint by its name there. leave: paths below `module`.
    """
    for local, _ in list(module.named_parameters()):
        full = f"{prefix}.{local}" if prefix else local
        if full in names and local not in leave:
            set_parameter(module, local, read(names[full]).to(device, dtype))


def empty(module: nn.Module) -> None:
    """Turn every parameter below `module` into a placeholder again, freeing its memory."""
    for local, parameter in list(module.named_parameters()):
        set_parameter(module, local, torch.empty_like(parameter, device="meta"))


def set_parameter(module: nn.Module, local: str, value: torch.Tensor) -> None:
    """Put `value` at the parameter path `local` below `module`."""
    path, _, leaf = local.rpartition(".")
    owner = module.get_submodule(path) if path else module
    owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
