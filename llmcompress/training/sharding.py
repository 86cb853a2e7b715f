"""One model sharded over several processes: fully sharded data parallelism, as PyTorch and accelerate bring it.

Plain data parallelism keeps the model in every process. FSDP (Zhao et al. 2023, version 1) cuts it:

    decoder layer, frozen  ──flattened──> one vector ──cut──> a piece per process; whole only while the layer computes
    lora_A, lora_B         ──flattened──> vectors of their own, for a vector is either trained or it is not

A vector has one dtype. NF4 codes are bytes, and among frozen weights in bfloat16 they travel as if they were bfloat16:
the same bits under another name (QLoRA with FSDP, as PEFT documents it). Nothing may ever cast such a vector, so FSDP's
own mixed precision stays off; it would round rotary frequencies and gradients to bfloat16, too. What computes in
bfloat16 is autocast, as in one process. The scales of NF4 are no parameters and stay whole in every process.

Each process reads the base on the CPU before it is cut, so an accelerator never holds more than its pieces and one
layer, and the machine's memory holds the base once per process. Checkpoints are of whole tensors, gathered by the first
process. After training no process has the whole model, so the adapter is put on a base that is read anew.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmcompress.errors import LLMCompressError, raise_all

REQUIRED = {"FSDP_VERSION": "1", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_USE_ORIG_PARAMS": "false"}
"""What the shipped configuration says and the code relies on, as accelerate puts it into the environment."""


CONFIG = Path(__file__).with_name("fsdp.yaml")
SCHEDULE = "scheduler.pt"


def require_configuration() -> None:
    """Raise unless FSDP is set up as it must be for an adapter.

    Raises: LLMCompressError, one for each value that differs.
    """
    hint = f"launch with --config_file {CONFIG}, or change it in yours"
    raise_all(
        [
            LLMCompressError(f"FSDP: {name.lower()} is {value}, an adapter needs {needed}", hint)
            for name, needed in REQUIRED.items()
            if (value := os.environ.get(name, "not set")).lower() != needed.lower()
        ]
    )


def require_adapter(adapter: str, dora: bool, init: str) -> None:
    """Raise for what would read pieces of weights as if they were whole.

    Raises: LLMCompressError, one for each.
    """
    wrong = {
        "adapter adalora": (adapter == "adalora", "it ranks triplets by gradients of whole factors", "--adapter lora"),
        "dora": (dora, "it takes norms of whole weights, outside the layers that gather them", "no --dora"),
        f"init {init}": (init != "default", "first factors are taken from the whole base", "init: default"),
    }
    hint = "use {}, or data parallelism (accelerate launch --multi_gpu)"
    problems = [
        LLMCompressError(f"{what}: not under FSDP: {why}", hint.format(way))
        for what, (asked, why, way) in wrong.items()
        if asked
    ]
    raise_all(problems)


def shard(trainer: Any) -> None:
    """Let a Trainer that was just made shard its model, nothing being cast on the way.

    accelerate knows FSDP on accelerators alone; told to use it on CPUs, it would quietly copy the model into every
    process. The same code runs on both, so on CPUs it is told here.
    """
    from accelerate import DistributedType, PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    if state.device.type == "cpu":
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        for each in (PartialState(), state):  # what the one says is copied into the other now and then
            each.distributed_type = DistributedType.FSDP
            each.device = torch.device("cpu")  # without the index, which parameters on a CPU do not have
        trainer.is_fsdp_enabled = True
    state.fsdp_plugin.mixed_precision_policy = None


def bytes_held(model: nn.Module) -> int:
    """Bytes of parameters that this process holds. What FSDP has freed counts nothing, though its shape is kept."""
    storages = [value.untyped_storage() for value in model.parameters()]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def gather_trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters, whole and on the CPU; every process takes part. Nothing frozen is gathered."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    whole = {}
    for name, unit in model.named_modules():
        if not isinstance(unit, FullyShardedDataParallel):
            continue
        if any(value.requires_grad for value in unit.module.parameters(recurse=False)):
            with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
                for local, value in unit.named_parameters():
                    whole[f"{name}.{local}".replace("_fsdp_wrapped_module.", "")] = value.detach().cpu().clone()
    return whole


def save_optimizer(trainer: Any, folder: Path) -> None:
    """Whole optimizer state and the schedule, as Trainer reads them; without the frozen weights it would add."""
    from accelerate.utils import save_fsdp_optimizer

    plugin = trainer.accelerator.state.fsdp_plugin
    save_fsdp_optimizer(plugin, trainer.accelerator, trainer.optimizer, trainer.model, str(folder))
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULE)


def view_codes_as(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give the NF4 codes of `model` the name of `dtype`, bit for bit, and bring their scales to `device`.

    Codes are [bytes, 1] uint8, two to the byte; afterwards [bytes / itemsize, 1] `dtype`, as all else that is frozen.

    Raises: LLMCompressError for bytes that do not fill whole elements, and for a parameter of another dtype.
    """
    for name, module in model.named_modules():
        state, weight = getattr(module, "quant_state", None), getattr(module, "weight", None)
        if state is None or weight is None:
            continue
        codes = weight.data.contiguous().view(torch.uint8).reshape(-1)
        if codes.numel() % dtype.itemsize:
            raise LLMCompressError(f"FSDP: {name} has {codes.numel()} bytes of NF4 codes, which are no whole {dtype}")
        weight.data = codes.view(dtype).reshape(-1, 1)
        weight.quant_storage = module.quant_storage = dtype
        state.to(device)
    other = next(((name, value.dtype) for name, value in model.named_parameters() if value.dtype != dtype), None)
    if other:
        raise LLMCompressError(f"FSDP: {other[0]} is {other[1]} in a base of {dtype}, and a vector has one dtype")
