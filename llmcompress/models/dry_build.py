"""What transformers would make of a quantized checkpoint, found without its weights: a dry build on the meta device.

    config.json + quantization_config ──> transformers' model, on meta ──> its own quantizer for the layout
                                                                            ├─> modules that it replaces
                                                                            └─> `_init_weights`, which from_pretrained
                                                                                runs over every module

Rules about layouts say what a loader accepts; which of a model's linears it replaces, and whether the model's class
survives that, is decided by code: bitsandbytes' integration takes `type(module) is nn.Linear` and no subclass, and some
classes initialize `module.o_proj.weight`, which a packed linear has not. So that code is run. Takes no memory to speak
of, and a second or so.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import dtype_name, torch_dtype
from llmcompress.compress.scheme import EXPERT
from llmcompress.console import quiet
from llmcompress.models import meta
from llmcompress.models.blocks import is_transposed
from llmcompress.models.experts import is_fused

NEEDS = {"compressed-tensors": "compressed_tensors", "bitsandbytes": "bitsandbytes", "gptq": "optimum"}
"""quant_method -> the package without which transformers' quantizer cannot be made."""


@dataclass(frozen=True, slots=True)
class DryBuild:
    """model: class that was built. packed: linears whose codes are stored, by their paths in that class.

    replaced: linears that the quantizer replaced; None where it replaces none by design (made dense while loading).
    missing: parameters without a tensor. failures: module path -> what goes wrong in it on loading.
    """

    model: str
    packed: frozenset[str]
    replaced: frozenset[str] | None
    missing: frozenset[str]
    failures: Mapping[str, str]

    @property
    def not_replaced(self) -> list[str]:
        """Linears whose codes nothing reads."""
        return [] if self.replaced is None else sorted(self.packed - self.replaced)

    def problem(self) -> str | None:
        """Why the checkpoint does not load so, in one line; None where it does."""
        if self.failures:
            path, failure = next(iter(self.failures.items()))
            where = f" ({path}: {failure})" if path else f" ({failure})"
            return f"transformers' {self.model} fails while it is loaded with packed linears{where}"
        if self.not_replaced:
            return (
                f"transformers does not replace {_first_of(self.not_replaced)} of {self.model}: nothing reads its codes"
            )
        surplus = sorted((self.replaced or frozenset()) - self.packed)
        if surplus:
            return f"transformers takes {_first_of(surplus)} of {self.model} for packed, and it is stored as it was"
        if self.missing:
            return f"no tensor for {_first_of(sorted(self.missing))} of {self.model}"
        return None


def dry_build(
    checkpoint: Checkpoint, declared: Mapping[str, Any], stems: Collection[str], kept: Collection[str]
) -> DryBuild | str:
    """What transformers makes of a checkpoint with `declared` as its quantization_config.

    stems: what the names of packed tensors begin with, in the checkpoint. kept: the tensors that are stored plainly.
    Experts of a mixture are left out: `experts.unread` says whether they are stacked while loading.

    Returns the reason in words where its quantizer cannot be had here (its package is not installed).

    Raises: LLMCompressError for a config that transformers does not know.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    method = str(declared.get("quant_method"))
    package = NEEDS.get(method)
    if package is None or find_spec(package) is None:
        return f"{package or f'a quantizer for {method}'} is not installed"
    model = meta.build(checkpoint, quantized=True, split_experts=False)
    before = dict(model.named_modules())
    linears = [name for name, module in before.items() if isinstance(module, nn.Linear) or is_transposed(module)]
    packed = frozenset(
        name.removesuffix(".weight")
        for name in meta.stored_names(model, [f"{stem}.weight" for stem in stems if not EXPERT.fullmatch(stem)])
    )
    sources = meta.stored_names(model, kept)
    fused = {f"{path}.{name}" for path, module in before.items() if is_fused(module) for name in module._parameters}
    needed = {name for name, _ in model.named_parameters()} - {f"{name}.weight" for name in packed} - fused
    missing = frozenset(needed - sources.keys() - meta.tied_parameters(model))
    with quiet("transformers", package), torch.device("meta"):
        own = _initialized(model)
        try:
            quantizer = AutoHfQuantizer.from_config(copy.deepcopy(dict(declared)), pre_quantized=True)
            quantizer.validate_environment(device_map={"": "cpu"})
            quantizer.preprocess_model(model, dtype=torch.bfloat16, device_map={"": "cpu"}, checkpoint_files=[])
        except Exception as error:  # noqa: BLE001 - whatever a quantizer raises
            return DryBuild(type(model).__name__, packed, None, missing, {"": _said(error)})
        failures = {path: said for path, said in _initialized(model).items() if path not in own}
    replaced = frozenset(name for name in linears if _packed(model.get_submodule(name), before[name]))
    dense = bool(declared.get("dequantize"))
    return DryBuild(type(model).__name__, packed, None if dense else replaced, missing, failures)


def dtype_clash(checkpoint: Checkpoint, packed: Collection[str]) -> str | None:
    """What goes wrong in the forward pass when every plain tensor keeps the dtype that it has in the files, or None.

    So bitsandbytes' checkpoints are loaded: `dtype` is not applied. Plain ones are cast as a whole, which is why a
    checkpoint of several dtypes may run and its NF4 not. packed: linears whose output has the dtype of their input.
    The pass is without numbers; a model that cannot run so in one dtype either tells nothing.
    """
    names = {checkpoint.dtype(name) for name in checkpoint.stored}
    if len(names & set(meta.FLOATS)) < 2:
        return None
    model = meta.build(checkpoint)
    for path in packed:
        module = model.get_submodule(path)
        module.forward = partial(_shaped, _out_features(module))
    strict = (nn.Linear, nn.LayerNorm, nn.modules.conv._ConvNd)
    for path, module in model.named_modules():
        if (isinstance(module, strict) or is_transposed(module)) and path not in packed:
            module.register_forward_pre_hook(partial(_need_dtype, path))
    sources = meta.stored_names(model, checkpoint.stored)
    tokens = torch.ones(1, 8, dtype=torch.long, device="meta")
    inputs = {"input_ids": tokens, "attention_mask": tokens}
    failures: list[str | None] = []
    for own in (False, True):
        for name, parameter in list(model.named_parameters()):
            dtype = torch_dtype(checkpoint.dtype(sources[name])) if own and name in sources else torch.bfloat16
            meta.set_parameter(model, name, torch.empty_like(parameter, dtype=dtype, device="meta"))
        model.tie_weights()  # type: ignore[operator]
        try:
            with quiet("transformers"), torch.no_grad():
                model.set_attn_implementation("eager")  # type: ignore[operator] # the others look at the mask's values
                model.to("meta")(**inputs, use_cache=False)
            failures.append(None)
        except Exception as error:  # noqa: BLE001 - a model's own code
            failures.append(_said(error))
    alike, mixed = failures
    return mixed if alike is None else None


def _out_features(module: nn.Module) -> int:
    """out_features of a linear."""
    return int(module.nf) if is_transposed(module) else int(module.out_features)  # type: ignore[arg-type]


def _need_dtype(path: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    """What torch asks where there are numbers: input and weight of one dtype."""
    weight = module._parameters["weight"]
    if weight is not None and args and args[0].dtype != weight.dtype:
        raise TypeError(f"{path} is {dtype_name(weight.dtype)} and reads {dtype_name(args[0].dtype)}")


def _shaped(out_features: int, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _packed(module: nn.Module, before: nn.Module) -> bool:
    """Whether a module is another one now, or holds codes in place of its weight."""
    return module is not before or getattr(module, "quantization_scheme", None) is not None


def _initialized(model: nn.Module) -> dict[str, str]:
    """Module path -> what the model's own `_init_weights` raises on it; empty where it goes through.

    Tensors are marked as loaded, as from_pretrained marks them, so that transformers' own initializers skip them.
    """
    failures = {}
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    with _no_random_state():
        for path, module in model.named_modules():
            try:
                model._init_weights(module)  # type: ignore[operator]
            except Exception as error:  # noqa: BLE001 - remote code as well
                failures[path] = _said(error)
    return failures


@contextmanager
def _no_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:160]}"


def _first_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
