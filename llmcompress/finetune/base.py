"""The frozen base that an adapter is trained on: full precision, or NF4 with the compute of bitsandbytes.

    checkpoint in full precision ──base: full──> as it is
                                 ──base: nf4───> quantized while it is loaded (QLoRA, Dettmers et al. 2023)
    NF4 checkpoint of ours       ───────────────> its own codes, plain or calibrated

A linear that the NF4 kernels cannot run stays in full precision, and the report says which and why. On processors with
AVX512-BF16 bitsandbytes swaps its weights for a bfloat16 kernel as soon as a layer is evaluated, from which there is no
way back to training and which rounds; it is held to the exact path here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.compress.scheme import Scheme, preset
from llmcompress.distributed import sharded
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.formats.base import FORMATS
from llmcompress.models import meta as skeleton
from llmcompress.models.blocks import decoder_layers, is_transposed, linears
from llmcompress.models.loading import best_device, load_model

NF4_METHOD = "bitsandbytes"


@dataclass(frozen=True)
class BasePlan:
    """Which linears of a base are NF4. `kept`: linear -> why it stays in full precision, where the base is NF4."""

    nf4: bool
    stored: bool = False
    scheme: Scheme | None = None
    linears: tuple[str, ...] = ()
    kept: dict[str, str] = field(default_factory=dict)


def plan_base(source: Checkpoint, asked: str, adapter: str, double_quant: bool) -> BasePlan:
    """Decide how the base is loaded, from config and headers alone.

    asked: auto, full or nf4. Raises: LLMCompressError for a base that is quantized otherwise than NF4, or asked for in
    full precision while it is NF4.
    """
    method = (source.config.get("quantization_config") or {}).get("quant_method")
    if method not in (None, NF4_METHOD):
        raise LLMCompressError(
            f"{source.name}: is quantized already (quant_method {method!r}), and an adapter is trained on full "
            "precision or NF4 weights",
            "fine-tune the checkpoint that it was made from, then `merge ADAPTER --then quantize`",
        )
    if method == NF4_METHOD:
        if asked == "full":
            raise LLMCompressError(f"{source.name}: is NF4, not full precision", "drop base: full")
        skipped = source.config["quantization_config"].get("llm_int8_skip_modules") or []
        kept = dict.fromkeys((name for name in skipped if "lm_head" not in name), "not quantized in this checkpoint")
        return BasePlan(True, True, None, (), kept)
    if not (asked == "nf4" or (asked == "auto" and adapter == "qlora")):
        return BasePlan(False)
    return nf4_plan(source, double_quant)


def nf4_plan(source: Checkpoint, double_quant: bool) -> BasePlan:
    """Which linears of a full-precision checkpoint become NF4: those of the decoder layers that the kernels can run."""
    scheme = preset("NF4-DQ" if double_quant else "NF4")
    format, model = FORMATS.get(NF4_METHOD), skeleton.build(source)
    layers = decoder_layers(model)
    quantized, kept = [], {}
    for index, layer in enumerate(layers.layers):
        for local, module in linears(layer).items():
            name = f"{layers.name(index)}.{local}"
            rows, columns = module._parameters["weight"].shape  # type: ignore[union-attr]
            if is_transposed(module):
                rows, columns = columns, rows
            reason = format.refuses(scheme, rows, columns)
            if reason is None and is_transposed(module):
                reason = "its weight is stored transposed (Conv1D), in which blocks of 64 run across outputs"
            if reason:
                kept[name] = reason
            else:
                quantized.append(name)
    if not quantized:
        raise LLMCompressError(
            f"{source.name}: no linear can be held as NF4 ({next(iter(kept.values()))})", "use --adapter lora"
        )
    return BasePlan(True, False, scheme, tuple(quantized), kept)


def load_base(source: Checkpoint, plan: BasePlan, precision: str = "auto") -> nn.Module:
    """The base on the best device, every parameter frozen; on the CPU where it is to be sharded over processes.

    precision: as in TrainingSettings; full-precision weights stay in their own dtype on an accelerator.

    Raises: LLMCompressError when transformers cannot load it.
    """
    device = torch.device("cpu") if sharded() else own_device()
    dtype = compute_dtype(precision)
    quantization = None
    if plan.nf4 and not plan.stored:
        from transformers import BitsAndBytesConfig

        assert plan.scheme is not None
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=plan.scheme.grid.double_quant,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=[*plan.kept, *_heads(source)],
        )
    model = load_model(
        source.folder, trust_remote_code=source.trust_remote_code, name=source.name, dtype=dtype, device=device,
        quantization=quantization,
    )  # fmt: skip
    model.config.use_cache = False
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model  # type: ignore[no-any-return]


def own_device() -> torch.device:
    """The best device; with several processes on several accelerators, the one of this process."""
    device = best_device()
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0"))) if device.type == "cuda" else device


def compute_dtype(precision: str) -> torch.dtype:
    """What the frozen weights are held in: float32 on a CPU, bfloat16 on an accelerator, unless it is asked for."""
    if precision == "auto":
        return torch.float32 if best_device().type == "cpu" else torch.bfloat16
    return torch.float32 if precision == "float32" else torch.bfloat16


def targets(model: nn.Module, patterns: list[str]) -> list[str]:
    """Paths of the linears that get an adapter: those of the decoder layers that a pattern matches, in model order.

    `all-linear` stands for all of them; a pattern without wildcards also matches as the last part of a path.

    Raises: LLMCompressError, one for each pattern that matches none.
    """
    layers = decoder_layers(model)
    names = [f"{layers.name(index)}.{local}" for index, layer in enumerate(layers.layers) for local in linears(layer)]
    chosen: set[str] = set()
    problems = []
    for pattern in patterns:
        matched = {
            name
            for name in names
            if pattern == "all-linear" or fnmatchcase(name, pattern) or name.rpartition(".")[2] == pattern
        }
        if not matched:
            kinds = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            problems.append(
                LLMCompressError(f"target_modules: {pattern!r} matches no linear", f"there are {kinds}; or all-linear")
            )
        chosen |= matched
    raise_all(problems)
    return [name for name in names if name in chosen]


def _heads(source: Checkpoint) -> list[str]:
    """Linears outside the decoder layers, which are never quantized."""
    model = skeleton.build(source)
    path = decoder_layers(model).path
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(f"{path}.")]
