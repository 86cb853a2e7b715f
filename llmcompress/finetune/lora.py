"""The one place that talks to PEFT: adapters put on a model, driven, saved and loaded.

LoRA (Hu et al. 2021) adds s B A to a frozen weight, with s = alpha / rank (rsLoRA: alpha / sqrt(rank)); DoRA scales
each row of the sum to a learned length. AdaLoRA (Zhang et al. 2023) trains B diag(E) A at a higher rank and cuts the
least important triplets until the average rank is the target:

    rank   initial ───┐                          steps: | warm-up | ranks fall, cubically | final: ranks stay |
                      └──────____________ target
    each optimizer step, gradients still there: importance of every triplet is updated; `update_and_allocate`

PEFT defines that method and leaves it to the caller; a trainer that never calls it trains at the initial rank.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmcompress.errors import LLMCompressError
from llmcompress.report import AdapterModule

NAME = "default"
SHORTEST_ADALORA = 10
"""Steps below which a budget cannot fall in any sensible way."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What an adapter is made of; see FinetuneSettings."""

    rank: int
    alpha: float
    dropout: float
    dora: bool = False
    rslora: bool = False


@dataclass(frozen=True, slots=True)
class Budget:
    """AdaLoRA's schedule in steps, `target` the average rank at the end.

    parts: batches of all processes that a step adds up. PEFT adds the orthogonality term to the loss of each, so each
    gets its share of the weight.
    """

    target: int
    initial: int
    warmup: int
    final: int
    total: int
    orthogonality: float
    parts: int

    @classmethod
    def of(
        cls, target: int, initial: int | None, warmup_frac: float, final_frac: float, total: int, orthogonality: float,
        parts: int,
    ) -> Budget:  # fmt: skip
        """The schedule for a run of `total` optimizer steps.

        Raises: LLMCompressError for a run too short, and an initial rank that is not above the target.
        """
        first = initial if initial is not None else max(target + 1, round(1.5 * target))
        if first <= target:
            raise LLMCompressError(
                f"adalora: initial_rank {first} is not above rank {target}, so there is nothing to cut",
                f"drop adalora.initial_rank, or raise it to {round(1.5 * target) + 1}",
            )
        if total < SHORTEST_ADALORA:
            raise LLMCompressError(
                f"adalora: {total} optimizer steps are too few for ranks to fall; {SHORTEST_ADALORA} are needed",
                "train longer (--epochs, --max-steps), with a smaller --batch-size, or use --adapter lora",
            )
        warmup, final = int(warmup_frac * total), max(1, int(final_frac * total))
        return cls(target, first, min(warmup, total - final - 1), final, total, orthogonality, parts)


def attach(model: nn.Module, targets: Sequence[str], shape: Shape, budget: Budget | None, seed: int) -> Any:
    """The model with a fresh adapter on the linears at `targets`; only the adapter requires gradients.

    The random factors are drawn from `seed`; the global generators are left as they were.
    """
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    common: dict[str, Any] = {
        "target_modules": _compact(model, targets),
        "lora_alpha": int(shape.alpha) if float(shape.alpha).is_integer() else shape.alpha,
        "lora_dropout": shape.dropout,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in targets),
    }
    config: Any
    if budget is not None:
        config = AdaLoraConfig(
            target_r=budget.target,
            init_r=budget.initial,
            tinit=budget.warmup,
            tfinal=budget.final,
            deltaT=max(1, budget.total // 100),
            total_step=budget.total,
            orth_reg_weight=budget.orthogonality / budget.parts,
            **common,
        )
    else:
        config = LoraConfig(r=shape.rank, use_dora=shape.dora, use_rslora=shape.rslora, **common)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(model, config)


def put_factors(model: Any, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], base: Any) -> None:
    """Give adapters their first factors, B [O, R] and A [R, I] by linear, so that the adapter adds exactly B A.

    base: linear -> its dense weight [O, I]; DoRA's lengths are taken anew from it.
    """
    with torch.no_grad():
        for name, (b_OR, a_RI) in factors.items():
            layer = model.base_model.model.get_submodule(name)
            root = float(layer.scaling[NAME]) ** 0.5
            layer.lora_A[NAME].weight.copy_(a_RI / root)
            layer.lora_B[NAME].weight.copy_(b_OR / root)
            if getattr(layer, "lora_magnitude_vector", None):
                whole_OI = base(name) + b_OR @ a_RI
                layer.lora_magnitude_vector[NAME].weight.copy_(torch.linalg.norm(whole_OI, dim=1))


@contextmanager
def muted(model: Any) -> Iterator[None]:
    """The model as if it had no adapter, however it is wrapped; every layer still takes part."""
    layers = [(layer, layer.scaling[NAME]) for layer in model.modules() if NAME in getattr(layer, "lora_A", {})]
    for layer, _ in layers:
        layer.scaling[NAME] = 0.0
    try:
        yield
    finally:
        for layer, scale in layers:
            layer.scaling[NAME] = scale


class AdaLoraDriver:
    """Calls `update_and_allocate` on every optimizer step, and remembers importances over an interruption."""

    def __init__(self, model: Any, budget: Budget) -> None:
        self._tuner, self._budget = model.base_model, budget

    def start(self, total_steps: int) -> None:
        """Raises: LLMCompressError when the run has another length than the schedule was made for."""
        if total_steps != self._budget.total:
            raise LLMCompressError(f"adalora: made for {self._budget.total} steps, the run has {total_steps}")

    def step(self, step: int) -> None:
        """Update importances and the budget."""
        self._tuner.update_and_allocate(step)

    def state(self) -> dict[str, Any]:
        """Importances and the rank pattern."""
        allocator = self._tuner.rankallocator
        pattern = self._tuner.peft_config[NAME].rank_pattern
        parts = ("ipt", "exp_avg_ipt", "exp_avg_unc")
        return {"rank_pattern": pattern} | {part: dict(getattr(allocator, part)) for part in parts}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._tuner.peft_config[NAME].rank_pattern = state["rank_pattern"]
        for part in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            setattr(self._tuner.rankallocator, part, state[part])


def modules(model: Any) -> list[AdapterModule]:
    """Every adapted linear with its rank; for AdaLoRA the triplets that were kept."""
    pattern = model.peft_config[NAME].rank_pattern if getattr(model.base_model, "rankallocator", None) else None
    kept = {name.partition(".lora_E")[0]: sum(mask) for name, mask in (pattern or {}).items()}
    adapted = []
    for name, module in model.base_model.model.named_modules():
        if NAME in getattr(module, "lora_A", {}):
            rank = kept.get(name, int(module.r[NAME]))
            adapted.append(AdapterModule(name=name, shape=(module.out_features, module.in_features), rank=rank))
    return adapted


def save(model: Any, folder: Path, base_name: str, budget: Budget | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT reads. budget: AdaLoRA's, as trained with."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config_file = folder / "adapter_config.json"
    values = json.loads(config_file.read_text(encoding="utf-8"))
    if isinstance(values.get("target_modules"), list):
        values["target_modules"] = sorted(values["target_modules"])
    if budget is not None:
        values["orth_reg_weight"] = budget.orthogonality
    config_file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load(model: nn.Module, adapters: Sequence[tuple[Path, float]]) -> Any:
    """The model with saved adapters on it, all active, each scaled by its weight; in eval mode, as PEFT computes it.

    Raises: LLMCompressError when PEFT refuses the combination.
    """
    from peft import PeftModel

    try:
        (first, _), *others = adapters
        loaded: Any = PeftModel.from_pretrained(model, str(first), adapter_name="a0")
        for index, (path, _) in enumerate(others, 1):
            loaded.load_adapter(str(path), adapter_name=f"a{index}")
        names = [f"a{index}" for index in range(len(adapters))]
        loaded.base_model.set_adapter(names)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise LLMCompressError(f"{adapters[0][0]}: PEFT cannot load it on this base ({first_line})") from error
    for module in loaded.modules():
        for name, (_, weight) in zip(names, adapters, strict=True):
            if name in getattr(module, "lora_A", {}) and weight != 1:
                module.scaling[name] *= weight
    return loaded.eval()


def _compact(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Last parts of the paths where they name exactly these linears, else the paths."""
    last = {name.rpartition(".")[2] for name in targets}
    alike = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last) if alike == set(targets) else list(targets)
