"""Which linears are compressed, by which scheme; every reason why not, found before any work. Free of torch.

    linears of the model, or of a checkpoint's headers ──> choose ──> targets, each with its scheme
                                                             ├──────> skipped, each with the reason
                                                             └──────> all problems at once

The run asks the model which linears there are (`model_linears`), a plan the headers (`planning.header_linears`); the
rest is decided once, here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING

from llmcompress.compress.scheme import Scheme, unserved
from llmcompress.compress.settings import QuantizeSettings
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.formats.base import EXPERT, FORMATS, Format
from llmcompress.report import LinearRow

if TYPE_CHECKING:
    from torch import nn

    from llmcompress.checkpoint.safetensors import StoredTensor
    from llmcompress.models.blocks import DecoderLayers

OUTSIDE = "outside the decoder layers"
NARROW = 32
"""Linears of fewer in_features that no group fits (coefficients of AltUp, time steps) are not worth an error."""
UNREAD = "stored beside the language model, which does not read it"
GATE = "router or gate of a mixture of experts"


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear. name: module path. tensor: its weight's name in the checkpoint. layer: which one, None outside them.

    local: path inside the layer. module_class: Linear, or Conv1D, which stores the transpose. dtype: of the stored
    weight, in safetensors' spelling.
    """

    name: str
    tensor: str
    layer: int | None
    local: str
    out_features: int
    in_features: int
    module_class: str
    dtype: str

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as [in_features, out_features]."""
        return self.module_class == "Conv1D"

    @property
    def stem(self) -> str:
        """What the packed tensors' names begin with, in the checkpoint's own spelling."""
        return self.tensor.removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class Target(Linear):
    """A linear of a decoder layer to compress, and the scheme that it becomes."""

    layer: int
    scheme: Scheme


@dataclass(frozen=True, slots=True)
class Targets:
    """targets in model order; skipped: every other linear, with the reason."""

    targets: tuple[Target, ...]
    skipped: tuple[tuple[Linear, str], ...]

    def of_layer(self, layer: int) -> list[Target]:
        """The targets of one decoder layer."""
        return [target for target in self.targets if target.layer == layer]

    def skipped_rows(self) -> list[LinearRow]:
        """What the report says of the linears that were left alone."""
        return [
            LinearRow(
                name=linear.name, shape=(linear.out_features, linear.in_features), scheme=None, method=None,
                outcome="skipped", reason=reason,
            )
            for linear, reason in self.skipped
        ]  # fmt: skip


def model_linears(
    model: nn.Module, layers: DecoderLayers, names: Mapping[str, str], dtype_of: Callable[[str], str]
) -> list[Linear]:
    """Every linear of the model, those of the decoder layers first. names: parameter -> tensor in the checkpoint."""
    from llmcompress.models.blocks import is_transposed, linears

    def described(name: str, module: nn.Module, layer: int | None, local: str) -> Linear:
        first, second = module._parameters["weight"].shape  # type: ignore[union-attr]
        rows, columns = (second, first) if is_transposed(module) else (first, second)
        kind = "Conv1D" if is_transposed(module) else "Linear"
        tensor = names.get(f"{name}.weight", "")
        return Linear(name, tensor, layer, local, rows, columns, kind, dtype_of(tensor) if tensor else "")

    inside = [
        described(f"{layers.name(index)}.{local}", module, index, local)
        for index, layer in enumerate(layers.layers)
        for local, module in linears(layer).items()
    ]
    seen = {linear.name for linear in inside}
    outside = [described(name, module, None, name) for name, module in linears(model).items() if name not in seen]
    return inside + outside


def model_kept(
    model: nn.Module, layers: DecoderLayers, names: Mapping[str, str], stored: Mapping[str, StoredTensor]
) -> list[tuple[Linear, str]]:
    """What stays as it is whatever is asked for, with the reason: matrices that are no linear's, and stored ones that
    the model does not read (heads that predict several tokens, layers beyond those configured).

    names: parameter -> tensor in the checkpoint. stored: the checkpoint's tensors, some of which no parameter reads.
    """
    from llmcompress.models.blocks import unpackable
    from llmcompress.models.meta import stored_names

    kept = []
    for index, layer in enumerate(layers.layers):
        for local, (shape, reason) in unpackable(layer).items():
            name = f"{layers.name(index)}.{local}"
            kept.append((Linear(name, names.get(f"{name}.weight", ""), index, local, *_flat(shape), "", ""), reason))
    parameters = model.state_dict()
    read = {tensor for name, tensor in stored_names(model, stored).items() if name in parameters}
    for name, tensor in stored.items():
        if len(tensor.shape) == 2 and name.endswith(".weight") and name not in read:
            stem = name.removesuffix(".weight")
            kept.append((Linear(stem, name, None, stem, *_flat(tensor.shape), "", tensor.dtype), UNREAD))
    return kept


def _flat(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor's shape as that of a matrix: its first dimension, and all others."""
    return shape[0], prod(shape[1:])


def choose(
    linears: Sequence[Linear], settings: QuantizeSettings, formats: Sequence[Format], model_name: str,
    kept: Sequence[tuple[Linear, str]] = (),
) -> Targets:  # fmt: skip
    """Decide over every linear. kept: what stays in any case, and why.

    Raises: LLMCompressError, all problems together: a pattern that matches nothing, a scheme that the method does not
    serve, a group size that does not divide a width, a linear that a requested layout cannot hold.
    """
    default = settings.weight_scheme()
    overrides = [(override.pattern, settings.override_scheme(override)) for override in settings.overrides]
    targets: list[Target] = []
    skipped: list[tuple[Linear, str]] = []
    gates = _gates(linears)
    for linear in linears:
        if linear.layer is None:
            skipped.append((linear, OUTSIDE))
        elif linear.name in gates:
            skipped.append((linear, GATE))
        elif any(fnmatchcase(linear.name, pattern) for pattern in settings.ignore):
            skipped.append((linear, "ignored on request"))
        elif settings.include and not any(fnmatchcase(linear.name, pattern) for pattern in settings.include):
            skipped.append((linear, "not among those to include"))
        else:
            scheme = next((scheme for pattern, scheme in overrides if fnmatchcase(linear.name, pattern)), default)
            if (
                linear.in_features < NARROW
                and scheme.weights
                and linear.in_features % scheme.weights.group_width(linear.in_features)
            ):
                skipped.append((linear, f"too narrow for a group: {linear.in_features} in_features"))
                continue
            targets.append(Target(**asdict(linear), scheme=scheme))
    raise_all(_pattern_problems(settings, linears, [linear for linear, _ in kept]))
    if not targets:
        raise LLMCompressError(f"{model_name}: no linear is left to quantize", "drop some of the --ignore patterns")
    raise_all(_method_problems(settings, {target.scheme: target for target in targets}))
    raise_all(_group_problems(targets) or _format_problems(targets, formats))
    return Targets(tuple(targets), (*skipped, *kept))


def _gates(linears: Sequence[Linear]) -> set[str]:
    """Routers, and gates of shared experts: below a block with experts, with one output for each of them, or one."""
    numbers: dict[str, set[str]] = {}
    for linear in linears:
        if match := EXPERT.fullmatch(linear.name):
            numbers.setdefault(match["block"], set()).add(match["number"])
    return {
        linear.name
        for linear in linears
        for block, experts in numbers.items()
        if linear.name.startswith(f"{block}.")
        and re.match(r"(\w+_)?(gate|router)(\.|$)", linear.name[len(block) + 1 :])
        and linear.out_features in (1, len(experts))
    }


def _pattern_problems(
    settings: QuantizeSettings, linears: Sequence[Linear], kept: Sequence[Linear]
) -> list[LLMCompressError]:
    """Patterns that match nothing; of those that only widen, patterns that match nothing inside the decoder layers."""
    inside = [linear.name for linear in linears if linear.layer is not None]
    every = [linear.name for linear in [*linears, *kept]]
    patterns = [("ignore", pattern, every) for pattern in settings.ignore]
    patterns += [("include", pattern, inside) for pattern in settings.include]
    patterns += [("override", override.pattern, inside) for override in settings.overrides]
    problems = []
    for kind, pattern, names in patterns:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        elsewhere = any(fnmatchcase(name, pattern) for name in every)
        where = " of a decoder layer, and only those are quantized" if elsewhere else ""
        hint = f"linears are called like {min(inside or every)}; * stands for any"
        problems.append(LLMCompressError(f"{kind} pattern {pattern!r} matches no linear{where}", hint))
    return problems


def _method_problems(settings: QuantizeSettings, schemes: Mapping[Scheme, Target]) -> list[LLMCompressError]:
    method, _ = settings.solver()
    reasons = [unserved(scheme, method.makes, f"method {method.name}") for scheme in schemes]
    return [LLMCompressError(reason) for reason in reasons if reason]


def _group_problems(targets: Sequence[Target]) -> list[LLMCompressError]:
    by_width: dict[tuple[int, int], list[str]] = {}
    for target in targets:
        if target.scheme.weights is None:
            continue
        group = target.scheme.weights.group_width(target.in_features)
        if target.in_features % group:
            by_width.setdefault((group, target.in_features), []).append(target.name)
    problems = []
    for (group, width), names in by_width.items():
        fits = [str(size) for size in (128, 64, 32) if width % size == 0]
        ways = f"--group-size {' or '.join(fits)}, or -1 for one scale per row" if fits else "--group-size -1"
        problems.append(
            LLMCompressError(
                f"group size {group} does not divide the {width} in_features of {_first_of(names)}",
                f"use {ways}, or leave them out: --ignore {_pattern(names)!r}",
            )
        )
    return problems


def _format_problems(targets: Sequence[Target], formats: Sequence[Format]) -> list[LLMCompressError]:
    problems = []
    for format in formats:
        reasons: dict[str, list[str]] = {}
        for target in targets:
            reason = format.refuses(target.scheme, target.out_features, target.in_features)
            if reason is None and target.module_class not in format.module_classes:
                reason = (
                    f"its loader replaces {' and '.join(sorted(format.module_classes))}, not {target.module_class} "
                    f"(GPT-2's, which stores the transpose); write {' or '.join(_holders(target)) or 'none: ignore it'}"
                )
            if reason:
                reasons.setdefault(reason, []).append(target.name)
        for reason, names in reasons.items():
            hint = None if len(names) == len(targets) else f"or leave them out: --ignore {_pattern(names)!r}"
            problems.append(LLMCompressError(f"format {format.name}: {reason} ({_first_of(names)})", hint))
    return problems


def _holders(target: Target) -> list[str]:
    """The layouts that take this very linear."""
    return [
        format.name
        for format in FORMATS
        if target.module_class in format.module_classes
        and format.refuses(target.scheme, target.out_features, target.in_features) is None
    ]


def _first_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _pattern(names: Sequence[str]) -> str:
    """A pattern that covers all of `names` where they end alike, else the first one."""
    leaves = {name.rsplit(".", 1)[-1] for name in names}
    return f"*.{leaves.pop()}" if len(leaves) == 1 else names[0]
