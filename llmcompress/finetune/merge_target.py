"""What a merge is of: the weights that adapters are merged onto, and whether they fit.

    base of the training        MODEL          onto dequantized           onto original
    full precision              the same       (nothing was quantized)    its weights
    NF4, quantized on the fly   the same       its NF4 round trip         its weights
    an NF4 checkpoint           that one       what its codes stand for   (it has none)

Names and shapes of every update are held against the model before a byte is written, and all problems are told at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import torch_dtype
from llmcompress.checkpoint.source import load_tokenizer
from llmcompress.data.settings import DataSettings
from llmcompress.data.sources import is_file
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.finetune.adapter import Adapter
from llmcompress.finetune.base import BasePlan, nf4_plan, plan_base
from llmcompress.finetune.initialization import quantized_weight
from llmcompress.finetune.settings import AdapterRef
from llmcompress.finetune.update import Update, merged_weight
from llmcompress.formats.base import FORMATS
from llmcompress.formats.roundtrip import unpack_row
from llmcompress.models import meta as skeleton
from llmcompress.models.blocks import is_transposed
from llmcompress.report import Finetune, LinearRow, RunReport, is_ours

RESIZED = "{} tokens were added for it: give the checkpoint with its embedding resized"


@dataclass(frozen=True)
class Linear:
    """One linear of the model: the tensor of its weight in the checkpoint (or of its codes), and how it lies there."""

    name: str
    tensor: str
    shape: tuple[int, int]
    transposed: bool
    row: LinearRow | None = None


@dataclass(frozen=True)
class Target:
    """A checkpoint as something to merge onto.

    parameters: name -> tensor. tied: parameters without a tensor of their own. embedding: the input embedding's weight.
    """

    source: Checkpoint
    plan: BasePlan
    linears: dict[str, Linear]
    parameters: dict[str, str]
    tied: frozenset[str]
    embedding: str

    def dense(self, linear: Linear, dequantized: bool) -> torch.Tensor:
        """The weight [O, I], float32: of the file, or as it was in an NF4 base."""
        if linear.row is not None:
            return unpack_row(self.source, linear.row, FORMATS.get("bitsandbytes")).dequantize()
        if dequantized and linear.name in self.plan.linears:
            return quantized_weight(self.source, self.plan.scheme)(linear.tensor)
        value = self.source.tensor(linear.tensor).float()
        return value.t().contiguous() if linear.transposed else value

    def dtype(self, linear: Linear) -> torch.dtype:
        """What the merged weight is stored in: as the checkpoint has its weights."""
        if linear.row is None:
            return torch_dtype(self.source.dtype(linear.tensor))
        config = self.source.config
        stated = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
        return stated if isinstance(stated, torch.dtype) else torch.bfloat16


@dataclass(frozen=True)
class MergePlan:
    """What is merged into what. `onto`: dequantized or original; `trained`: what is known of the training."""

    target: Target
    adapters: list[Adapter]
    onto: str
    trained: Finetune | None
    data: DataSettings | None

    def updated(self, onto: str) -> dict[str, Linear]:
        """Every linear whose weight changes when merging `onto` these weights."""
        changed = {name for adapter in self.adapters for name in adapter.parts}
        if onto == "dequantized":
            changed |= set(self.target.plan.linears)
        return {
            name: linear for name, linear in self.target.linears.items() if name in changed or linear.row is not None
        }

    def weight(self, linear: Linear, onto: str) -> torch.Tensor:
        """The merged weight [O, I] in the dtype of the file."""
        base_OI = self.base(linear, onto)
        updates = self.updates(linear.name)
        merged_OI = merged_weight(base_OI, updates) if updates else base_OI
        return merged_OI.to(self.target.dtype(linear))

    def base(self, linear: Linear, onto: str) -> torch.Tensor:
        """What updates are added to [O, I], float32: the checkpoint's weight, or one that an adapter brings along."""
        for adapter in self.adapters:
            if tensor := adapter.bases.get(f"{linear.name}.weight"):
                value = adapter.stored[tensor].load().float()
                return value.t().contiguous() if linear.transposed else value
        return self.target.dense(linear, onto == "dequantized")

    def updates(self, linear: str) -> list[Update]:
        """What every adapter adds to a linear."""
        return [adapter.update(linear) for adapter in self.adapters if linear in adapter.parts]


def plan_merge(source: Checkpoint, references: Sequence[AdapterRef], onto: str, data: DataSettings | None) -> MergePlan:
    """Read the adapters' configs and headers and hold them against the checkpoint.

    Raises: LLMCompressError, all problems together.
    """
    if not references:
        raise LLMCompressError("merge: no adapter is given", "name one in merge.adapters, or put finetune before it")
    adapters = [Adapter.open(reference.path, reference.weight) for reference in references]
    trained = next(filter(None, (trained_on(adapter.folder) for adapter in adapters)), None)
    target, resolved = open_target(source, trained, onto)
    require_fit(target, adapters)
    return MergePlan(target, adapters, resolved, trained, data or _data_of(adapters))


def trained_on(folder: Path) -> Finetune | None:
    """What the report of an adapter of ours says of its training; None for one that we did not make."""
    return RunReport.load(folder).finetune if is_ours(folder) else None


def open_target(source: Checkpoint, trained: Finetune | None, onto: str) -> tuple[Target, str]:
    """The checkpoint to merge onto, and which of its weights: `dequantized` or `original`.

    onto: auto, dequantized or original. trained: what is known of the adapter's training.

    Raises: LLMCompressError where the way that was asked for does not exist.
    """
    plan = plan_base(source, "auto", "lora", False)
    if plan.stored:
        if onto == "original":
            raise LLMCompressError(
                f"{source.name}: holds NF4 codes, so there are no original weights to merge onto",
                "give the full-precision checkpoint as MODEL, or --onto dequantized",
            )
        return _target(source, plan), "dequantized"
    was_nf4 = trained is not None and trained.base_weights == "nf4"
    if onto == "dequantized" and trained is not None and trained.base_weights == "full":
        raise LLMCompressError(
            "--onto dequantized: this adapter was trained on full-precision weights", "use --onto original"
        )
    if onto == "auto":
        onto = "dequantized" if was_nf4 else "original"
    if onto == "dequantized" or was_nf4:
        plan = nf4_plan(source, bool(trained and trained.double_quant))
    return _target(source, plan), onto


def require_fit(target: Target, adapters: Sequence[Adapter]) -> None:
    """Raise unless every update has its linear, of its shape, in the model, and nothing of an adapter is left over.

    Raises: LLMCompressError, all problems together.
    """
    problems = [problem for adapter in adapters for problem in _misfits(target, adapter)]
    if len(adapters) > 1 and any(adapter.dora for adapter in adapters):
        problems.append(LLMCompressError("a DoRA adapter is merged alone: its lengths were learned for one sum"))
    for adapter in adapters:
        if adapter.weight != 1 and (adapter.dora or adapter.whole):
            what = "DoRA" if adapter.dora else "modules_to_save"
            problems.append(
                LLMCompressError(f"{adapter.folder}: holds {what}, which has no half; its weight must be 1")
            )
    raise_all(problems[:12])


def _misfits(target: Target, adapter: Adapter) -> list[LLMCompressError]:
    where, model = str(adapter.folder), target.source.name
    problems = []
    for linear, parts in adapter.parts.items():
        shape = (adapter.stored[parts["lora_B"]].shape[0], adapter.stored[parts["lora_A"]].shape[1])
        if f"{linear}.weight" in target.tied:
            text = f"{where}: adapts {linear}, whose weight {model} shares with its embedding"
            problems.append(LLMCompressError(text, "train the adapter without it"))
        elif linear not in target.linears:
            text = f"{where}: adapts {linear}, and {model} has no such linear"
            problems.append(LLMCompressError(text, "it was trained on another base"))
        elif target.linears[linear].shape != shape:
            text = f"{where}: {linear} is {list(shape)} there and {list(target.linears[linear].shape)} in {model}"
            problems.append(LLMCompressError(text, "it was trained on another base"))
    return [*problems, *_whole_misfits(target, adapter), *_token_misfits(target, adapter)]


def _whole_misfits(target: Target, adapter: Adapter) -> list[LLMCompressError]:
    where, model = str(adapter.folder), target.source.name
    problems = []
    for parameter, name in adapter.whole.items():
        stored = target.parameters.get(parameter)
        shape = adapter.stored[name].shape
        if stored is None:
            what = "shares it with its embedding" if parameter in target.tied else "has no such parameter"
            problems.append(LLMCompressError(f"{where}: replaces {parameter}, and {model} {what}"))
        elif target.source.shape(stored) != shape:
            there = target.source.shape(stored)
            text = f"{where}: {parameter} is {list(shape)} there and {list(there)} in {model}"
            added = shape[0] - there[0]
            hint = RESIZED.format(added) if added > 0 else "it was trained on another base"
            problems.append(LLMCompressError(text, hint))
        elif parameter == target.embedding and target.tied and not _equal(target, parameter, adapter, name):
            problems.append(
                LLMCompressError(f"{where}: replaces {parameter}, which {model} shares with its output; not supported")
            )
    for parameter, name in adapter.bases.items():
        stored = target.parameters.get(parameter)
        if parameter.removesuffix(".weight") in adapter.parts and stored is not None:
            here, there = adapter.stored[name].shape, target.source.shape(stored)
            if here != there and here[0] > there[0]:
                text = f"{where}: {parameter} is {list(here)} there and {list(there)} in {model}"
                problems.append(LLMCompressError(text, RESIZED.format(here[0] - there[0])))
    return problems


def _equal(target: Target, parameter: str, adapter: Adapter, name: str) -> bool:
    """Whether an adapter only repeats the checkpoint's own values, as PEFT saves an embedding that was not trained."""
    own = target.source.tensor(target.parameters[parameter])
    return bool(torch.equal(adapter.stored[name].load().to(own.dtype), own))


def _token_misfits(target: Target, adapter: Adapter) -> list[LLMCompressError]:
    """An adapter whose tokenizer knows more tokens than the model has rows for."""
    if not (adapter.folder / "tokenizer_config.json").is_file():
        return []
    try:
        tokens = len(load_tokenizer(adapter.folder))
    except LLMCompressError:
        return []
    stored = target.parameters.get(target.embedding)
    rows = target.source.shape(stored)[0] if stored else 0
    if not rows or tokens <= rows:
        return []
    return [
        LLMCompressError(
            f"{adapter.folder}: its tokenizer has {tokens} tokens, and {target.source.name} embeds {rows}",
            RESIZED.format(tokens - rows),
        )
    ]


def _target(source: Checkpoint, plan: BasePlan) -> Target:
    model = skeleton.build(source, quantized=plan.stored)
    stored = skeleton.stored_names(model, source.stored)
    rows = {row.name: row for row in _rows(source, plan) if row.outcome != "skipped"}
    linears = {}
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or is_transposed(module)):
            continue
        if name not in rows and f"{name}.weight" not in stored:
            continue
        first, second = module._parameters["weight"].shape
        shape = (second, first) if is_transposed(module) else (first, second)
        tensor = stored.get(f"{name}.weight", f"{name}.weight")
        linears[name] = Linear(name, tensor, shape, is_transposed(module), rows.get(name))
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    embedded = next((f"{name}.weight" for name, module in model.named_modules() if module is embedding), "")
    tied = frozenset(skeleton.tied_parameters(model) - stored.keys())
    return Target(source, plan, linears, stored, tied, embedded)


def _rows(source: Checkpoint, plan: BasePlan) -> list[LinearRow]:
    if not plan.stored:
        return []
    if not is_ours(source.folder):
        raise LLMCompressError(
            f"{source.name}: is NF4 and was not written by llmcompress, so its codes are not known here",
            "merge onto the full-precision checkpoint that it was made from",
        )
    return RunReport.load(source.folder).linears


def _data_of(adapters: Sequence[Adapter]) -> DataSettings | None:
    """The training data of the first adapter of ours, if its file is still there."""
    for adapter in adapters:
        if trained_on(adapter.folder) is None:
            continue
        for stage in RunReport.load(adapter.folder).recipe.get("stages", []):
            if "finetune" in stage:
                data = DataSettings.model_validate(stage["finetune"]["data"])
                there = all(Path(path).exists() for path in (data.path, data.heldout) if path and is_file(path))
                return data if there else None
    return None
