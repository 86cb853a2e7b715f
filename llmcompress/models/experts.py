"""Mixtures of experts: the fused parameters of transformers taken apart into ordinary linears, one set per expert.

    on disk (Qwen, Mixtral, OLMoE, DeepSeek, GLM …)     in transformers' model          here
    experts.0.gate_proj [F, H] ┐
    experts.0.up_proj   [F, H] ┼ stacked while loading ─> gate_up_proj [E, 2F, H]       experts.0.gate_proj  nn.Linear
    experts.1.gate_proj …      ┘                          down_proj    [E, H, F]        experts.0.up_proj    nn.Linear
    or fused as they are (Granite): [E, 2F, H]                                          …

`split` puts a `SplitExperts` in the place of every fused module. It computes the same, expert by expert: its linears
are called as on disk, and everything else (which linears there are, what each reads, packing, verifying, dequantizing)
sees linears and no mixture. The names are those of transformers' own conversion rules, activation and limits are the
module's own, and before a module is replaced the two are compared on random numbers: where they differ, or where its
interface is another one, the architecture is refused by name.

Which tokens an expert sees is decided by the block's own router. While text is calibrated on (`others_share`), an
expert that few tokens of a batch were routed to is shown some of the batch's others too; they change nothing of what
the block hands on. `routing_of` says of a linear's input which rows are which.

Shapes: T tokens of a batch, K experts of a token, E experts, H hidden size, F width of an expert.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import StoredTensor
from llmcompress.compress.scheme import EXPERT
from llmcompress.errors import LLMCompressError

PER_EXPERT = re.compile(r"experts\.\*\.(?P<leaf>\w+)\.weight$")
"""A source of a conversion rule that stacks one linear of every expert, with its dots plain."""
UNFUSED_NAMES = {True: ("w1", "w3", "w2"), False: ("gate_proj", "up_proj", "down_proj")}
"""What gate, up and down are called where the file has them fused; True below a `block_sparse_moe`, as in Mixtral."""
TINY = {"experts": 4, "hidden": 16, "width": 8}
AGREEMENT = 1e-5
"""Largest difference, relative to the largest value, between a module and its split: float32 sums in another order."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Of an expert's input: the token of each row in the batch, and how many were routed to it; the rest are others."""

    tokens_N: torch.Tensor
    num_routed: int


def routing_of(inputs: torch.Tensor) -> Routing | None:
    """What `SplitExperts` noted of an input; None for any other tensor."""
    routing: Routing | None = vars(inputs).get("routing")
    return routing


class SplitExperts(nn.Module):
    """The experts of one block, a module `E` for each with its linears, as children called 0, 1, ….

    leaves: names of gate, up and down; without a gate, of up and down. others_share: of a batch's tokens, how many an
    expert sees at least; 0 runs each expert on the tokens routed to it alone.
    """

    def __init__(self, fused: nn.Module, leaves: tuple[str, ...]) -> None:
        super().__init__()
        self.leaves, self.others_share = leaves, 0.0
        rule = copy.copy(fused)  # what is not the parameters': activation, limits, gating
        rule._parameters = {}
        self._rule = [rule]  # a list: its modules are not listed as the split's
        down_EHF = fused._parameters["down_proj"]
        assert down_EHF is not None
        self.num_experts, hidden, width = down_EHF.shape
        for index in range(self.num_experts):
            expert = nn.Module()
            for leaf in leaves[:-1]:
                expert.add_module(leaf, nn.Linear(hidden, width, bias=False, device="meta", dtype=down_EHF.dtype))
            expert.add_module(leaves[-1], nn.Linear(width, hidden, bias=False, device="meta", dtype=down_EHF.dtype))
            self.add_module(str(index), expert)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H], [T, K], [T, K] -> [T, H], the sum of the experts' outputs by their weights."""
        if hidden_states.is_meta:  # shapes alone: every expert reads a tensor of its own
            return torch.stack([self._expert(index, hidden_states.clone()) for index in range(self.num_experts)]).sum(0)
        num_slots = top_k_index.shape[1]
        flat = top_k_index.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat.clamp(max=self.num_experts), minlength=self.num_experts + 1)
        total_TH = torch.zeros_like(hidden_states)
        for index, slots in enumerate(order.split(counts.tolist())[: self.num_experts]):
            tokens = slots // num_slots
            if len(tokens) or self.others_share:
                outputs_NH = self.run(index, hidden_states, tokens)
                weights_N1 = top_k_weights[tokens, slots % num_slots][:, None]
                total_TH = total_TH.index_add(0, tokens, (outputs_NH * weights_N1).to(total_TH.dtype))
        return total_TH

    def run(self, index: int, hidden_TH: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """One expert on the tokens routed to it, and on others that are dropped again: [len(tokens), H]."""
        rows = torch.cat((tokens, self._others(tokens, len(hidden_TH))))
        inputs_NH = hidden_TH[rows]
        inputs_NH.routing = Routing(rows, len(tokens))  # type: ignore[attr-defined]
        return self._expert(index, inputs_NH)[: len(tokens)]

    def _expert(self, index: int, inputs_NH: torch.Tensor) -> torch.Tensor:
        expert, rule = self.get_submodule(str(index)), self._rule[0]
        projected = [expert.get_submodule(leaf)(inputs_NH) for leaf in self.leaves[:-1]]
        inner_NF = rule._apply_gate(torch.cat(projected, -1)) if len(projected) == 2 else rule.act_fn(projected[0])  # type: ignore[operator]
        if (routing := routing_of(inputs_NH)) is not None:
            inner_NF.routing = routing
        outputs_NH: torch.Tensor = expert.get_submodule(self.leaves[-1])(inner_NF)
        return outputs_NH

    def _others(self, tokens: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Tokens routed elsewhere, evenly over the batch, as many as are lacking."""
        lacking = math.ceil(self.others_share * num_tokens) - len(tokens)
        if lacking <= 0:
            return tokens[:0]
        free = torch.ones(num_tokens, dtype=torch.bool, device=tokens.device)
        free[tokens] = False
        candidates = free.nonzero()[:, 0]
        lacking = min(lacking, len(candidates))
        return candidates[torch.arange(lacking, device=tokens.device) * len(candidates) // max(lacking, 1)]


def show_others(module: nn.Module, share: float) -> None:
    """Set `others_share` of all experts below `module`."""
    for experts in module.modules():
        if isinstance(experts, SplitExperts):
            experts.others_share = share


def experts_of(layer: nn.Module, local: str) -> SplitExperts | None:
    """The experts that the linear at `local` below `layer` belongs to, or None."""
    path = local.rpartition(".")[0].rpartition(".")[0]
    module = layer.get_submodule(path) if path else None
    return module if isinstance(module, SplitExperts) else None


def split(model: nn.Module) -> None:
    """Replace every fused experts module of `model`, whose parameters are on the meta device.

    Raises: LLMCompressError naming a module whose experts cannot be taken apart.
    """
    fused = {path: module for path, module in model.named_modules() if is_fused(module)}
    if not fused:
        return
    leaves = _stored_leaves(model)
    agreed: set[type[nn.Module]] = set()
    for path, module in fused.items():
        if reason := _refusal(module):
            raise LLMCompressError(f"{type(model).__name__}: {path} ({type(module).__name__}): {reason}")
        names = leaves.get(path) or UNFUSED_NAMES["block_sparse_moe" in path]
        names = names if module.has_gate else names[-2:]
        if type(module) not in agreed:
            if reason := disagreement(module):
                raise LLMCompressError(f"{type(model).__name__}: {path} ({type(module).__name__}): {reason}")
            agreed.add(type(module))
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, SplitExperts(module, names))


def is_fused(module: nn.Module) -> bool:
    """Whether a module keeps the matrices of several experts in one parameter, in transformers' common form."""
    return hasattr(module, "has_gate") and hasattr(module, "is_concatenated")


def _refusal(module: nn.Module) -> str | None:
    """Why the experts of a module cannot be linears of their own, or None."""
    if module.is_transposed or not module.is_concatenated:
        return (
            "keeps its experts transposed or with gate and up interleaved, as they are stored; "
            "no reader takes such experts quantized one by one"
        )
    wanted = {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}
    others = {name for name, _ in module.named_parameters()} - wanted
    if module.has_bias or module.has_post_expert_norm or others:
        return f"its experts have more than plain linears ({', '.join(sorted(others)) or 'a bias or norm'})"
    if len(inspect.signature(type(module).forward).parameters) != 4:
        return "its forward takes more than hidden states, expert numbers and weights"
    return None


def disagreement(module: nn.Module) -> str | None:
    """How a fused module and its split differ, on random numbers at a small size; None where they agree.

    The module is copied with small parameters; its integers that are one of its sizes become the small ones.
    """
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    experts, hidden, width = module._parameters["down_proj"].shape  # type: ignore[union-attr]
    small = {width: TINY["width"]} | {hidden: TINY["hidden"]} | {experts: TINY["experts"]}
    E, H, F = TINY["experts"], small[hidden], small[width]
    fused = copy.copy(module)
    fused._parameters = dict(module._parameters)
    for name, value in list(vars(fused).items()):
        if isinstance(value, int) and not isinstance(value, bool) and value in small:
            setattr(fused, name, small[value])
    fused.num_experts = E  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    fused._parameters[up_name] = nn.Parameter(random(E, F * (2 if module.has_gate else 1), H), requires_grad=False)
    fused._parameters["down_proj"] = nn.Parameter(random(E, H, F), requires_grad=False)
    parts = SplitExperts(fused, UNFUSED_NAMES[False] if module.has_gate else UNFUSED_NAMES[False][1:])
    up_EFH, down_EHF = fused._parameters[up_name], fused._parameters["down_proj"]
    assert up_EFH is not None and down_EHF is not None
    for index in range(E):
        for leaf, value in zip(parts.leaves, (*up_EFH[index].split(F), down_EHF[index]), strict=True):
            parts.get_submodule(f"{index}.{leaf}")._parameters["weight"] = nn.Parameter(value, requires_grad=False)
    hidden_TH, index_TK = random(12, H), random(12, E).topk(2).indices
    weights_TK = random(12, 2).sigmoid()
    try:
        with torch.no_grad():
            theirs, ours = (m(hidden_TH, index_TK, weights_TK) for m in (fused, parts))
    except (RuntimeError, TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
        return f"cannot be run by itself ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    if theirs.shape != ours.shape or float((theirs - ours).abs().max()) > AGREEMENT * float(theirs.abs().max()):
        return "computes something else than gate, up and down of each expert, weighted and summed"
    return None


def _stored_leaves(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Path of a fused module -> what gate, up and down (or up and down) of one expert are called where they are stored
    one by one, by the conversion rules of transformers; not where its rules know no such storage.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    rules = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    leaves: dict[str, dict[str, tuple[str, ...]]] = {}
    for rule in rules:
        sources = [
            PER_EXPERT.search(pattern.replace("\\", "")) for pattern in getattr(rule, "_original_source_patterns", [])
        ]
        if not isinstance(rule, WeightConverter) or not sources or not all(sources):
            continue
        names = tuple(match["leaf"] for match in sources if match)
        for path, module in model.named_modules():
            if not is_fused(module):
                continue
            for parameter in module._parameters:
                stored = f"{path}.0.{names[0]}.weight"
                if rule.rename_source_key(stored)[0] == f"{path}.{parameter}":
                    leaves.setdefault(path, {})[parameter] = names
    return {
        path: (*found.get("gate_up_proj", found.get("up_proj", ())), *found["down_proj"])
        for path, found in leaves.items()
        if len(found) == 2
    }


def unread(checkpoint: Checkpoint) -> str | None:
    """Why transformers does not load the packed experts of a checkpoint, or None where it does or there are none.

    It holds a layer's experts in one parameter. What compressed-tensors packed is made dense and stacked while loading,
    by the rule that stacks plain experts, where transformers has one; other layouts' loaders replace linears alone.
    """
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    packed = {name.rpartition(".")[0] for name in checkpoint.stored if not name.endswith((".weight", ".bias"))}
    first = next((name for name in sorted(packed) if EXPERT.fullmatch(name)), None)
    if method is None or first is None:
        return None
    model_type = checkpoint.config.get("model_type")
    if method != "compressed-tensors":
        return (
            f"transformers fuses {model_type}'s experts while loading, and its {method} loader replaces linears alone"
        )
    from llmcompress.models.meta import build

    model = build(checkpoint, quantized=True, split_experts=False)
    stacked = _stored_leaves(model)
    if all(path in stacked for path, module in model.named_modules() if is_fused(module)):
        return None
    return f"transformers has no rule that stacks {model_type}'s experts, which are stored one by one ({first} first)"


def sliced(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """The checkpoint with every tensor that holds all experts of a block taken apart, without reading it.

    A row of [E, 2F, H] is one expert's gate and up, one after the other in the file: each is a byte range of its own.
    model: split. The checkpoint itself where no tensor is fused.

    Raises: LLMCompressError for a fused tensor of another shape than the config's.
    """
    names = _renamed(model, checkpoint.stored)
    stored: dict[str, StoredTensor] = dict(checkpoint.stored)
    for path, module in model.named_modules():
        if not isinstance(module, SplitExperts):
            continue
        gates = module.leaves[:-1]
        for parameter, leaves in (
            ("gate_up_proj" if len(gates) == 2 else "up_proj", gates),
            ("down_proj", module.leaves[-1:]),
        ):
            name = names.get(f"{path}.{parameter}")
            if name is None:
                continue
            linears = [module.get_submodule(f"0.{leaf}") for leaf in leaves]
            rows, columns = linears[0].weight.shape  # type: ignore[misc]
            fused = stored.pop(name)
            wanted = (module.num_experts, rows * len(leaves), columns)
            if fused.shape != wanted:
                raise LLMCompressError(
                    f"{fused.path}: tensor {name} is {list(fused.shape)}, the config makes it {list(wanted)}",
                    "config.json and weights do not belong together",
                )
            size = fused.num_bytes // (module.num_experts * len(leaves))
            for number in range(module.num_experts * len(leaves)):
                expert, leaf = divmod(number, len(leaves))
                own = f"{path}.{expert}.{leaves[leaf]}.weight"
                stored[own] = replace(
                    fused, name=own, shape=(rows, columns), start=fused.start + number * size, num_bytes=size
                )
    return checkpoint if stored.keys() == checkpoint.stored.keys() else replace(checkpoint, stored=stored)


def _renamed(model: nn.Module, stored: Mapping[str, Any]) -> dict[str, str]:
    """Name in transformers' model -> stored name, by the rules that rename alone."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]  # type: ignore[arg-type]
    return {apply_renamings(name, renamings): name for name, tensor in stored.items() if len(tensor.shape) == 3}
