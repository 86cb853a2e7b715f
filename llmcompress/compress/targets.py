"""Which linears are quantized, on which grid; every reason why not, found before any work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.compress.scheme import WeightScheme
from llmcompress.compress.settings import QuantizeSettings
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.formats.base import Format
from llmcompress.models.blocks import DecoderLayers, is_transposed, linears
from llmcompress.report import LinearRow


@dataclass(frozen=True, slots=True)
class Target:
    """One linear to quantize. name: module path. tensor: its weight's name in the checkpoint. layer: which one."""

    name: str
    tensor: str
    layer: int
    local: str
    out_features: int
    in_features: int
    scheme: WeightScheme
    transposed: bool

    @property
    def stem(self) -> str:
        """What the packed tensors' names begin with, in the checkpoint's own spelling."""
        return self.tensor.removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class Plan:
    """targets in model order; skipped: a row for every other linear, with the reason."""

    targets: tuple[Target, ...]
    skipped: tuple[LinearRow, ...]

    def of_layer(self, layer: int) -> list[Target]:
        """The targets of one decoder layer."""
        return [target for target in self.targets if target.layer == layer]


def plan(
    model: nn.Module, layers: DecoderLayers, names: Mapping[str, str], checkpoint: Checkpoint,
    settings: QuantizeSettings, formats: Sequence[Format],
) -> Plan:  # fmt: skip
    """Decide over every linear of the model.

    Raises: LLMCompressError, all problems together: a pattern that matches nothing, a group size that does not divide
    a width, a linear or a mix that a requested layout cannot hold.
    """
    scheme_of = _choice(settings)
    targets: list[Target] = []
    skipped: list[LinearRow] = []
    for index, layer in enumerate(layers.layers):
        for local, module in linears(layer).items():
            name = f"{layers.name(index)}.{local}"
            rows, columns = _shape(module)
            if any(fnmatchcase(name, pattern) for pattern in settings.ignore):
                skipped.append(_skipped(name, rows, columns, "ignored on request"))
                continue
            tensor = names[f"{name}.weight"]
            transposed = is_transposed(module)
            targets.append(Target(name, tensor, index, local, rows, columns, scheme_of(name), transposed))
    inside = {row.name for row in skipped} | {target.name for target in targets}
    for name, module in model.named_modules():
        if name not in inside and (isinstance(module, nn.Linear) or is_transposed(module)):
            skipped.append(_skipped(name, *_shape(module), "outside the decoder layers"))
    raise_all(_pattern_problems(settings, [*inside, *(row.name for row in skipped)]))
    if not targets:
        raise LLMCompressError(
            f"{checkpoint.name}: no linear is left to quantize", "drop some of the --ignore patterns"
        )
    raise_all(_group_problems(targets) or _format_problems(targets, formats))
    return Plan(tuple(targets), tuple(skipped))


def _choice(settings: QuantizeSettings) -> Callable[[str], WeightScheme]:
    default = settings.weight_scheme()
    overrides = [(override.pattern, settings.override_scheme(override)) for override in settings.overrides]

    def scheme_of(name: str) -> WeightScheme:
        return next((scheme for pattern, scheme in overrides if fnmatchcase(name, pattern)), default)

    return scheme_of


def _shape(module: nn.Module) -> tuple[int, int]:
    first, second = module._parameters["weight"].shape  # type: ignore[union-attr]
    return (second, first) if is_transposed(module) else (first, second)


def _skipped(name: str, rows: int, columns: int, reason: str) -> LinearRow:
    return LinearRow(name=name, shape=(rows, columns), scheme=None, method=None, outcome="skipped", reason=reason)


def _pattern_problems(settings: QuantizeSettings, names: Sequence[str]) -> list[LLMCompressError]:
    patterns = [("ignore", pattern) for pattern in settings.ignore]
    patterns += [("override", override.pattern) for override in settings.overrides]
    return [
        LLMCompressError(
            f"{kind} pattern {pattern!r} matches no linear", f"linears are called like {min(names)}; * stands for any"
        )
        for kind, pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]


def _group_problems(targets: Sequence[Target]) -> list[LLMCompressError]:
    problems: dict[tuple[int, int], list[str]] = {}
    for target in targets:
        group = target.scheme.group_width(target.in_features)
        if target.in_features % group:
            problems.setdefault((group, target.in_features), []).append(target.name)
    found = []
    for (group, width), names in problems.items():
        fits = [str(size) for size in (128, 64, 32) if width % size == 0]
        ways = f"--group-size {' or '.join(fits)}, or -1 for one scale per row" if fits else "--group-size -1"
        found.append(
            LLMCompressError(
                f"group size {group} does not divide the {width} in_features of {_some(names)}",
                f"use {ways}, or leave them out: --ignore {_pattern(names)!r}",
            )
        )
    return found


def _format_problems(targets: Sequence[Target], formats: Sequence[Format]) -> list[LLMCompressError]:
    found = []
    for format in formats:
        reasons: dict[str, list[str]] = {}
        for target in targets:
            reason = format.refuses(target.scheme, target.out_features, target.in_features)
            if reason is None and target.transposed and format.name == "compressed_tensors":
                reason = "GPT-2's Conv1D is not a torch Linear, which is all that compressed-tensors replaces"
            if reason:
                reasons.setdefault(reason, []).append(target.name)
        for reason, names in reasons.items():
            hint = None if len(names) == len(targets) else f"or leave them out: --ignore {_pattern(names)!r}"
            found.append(LLMCompressError(f"format {format.name}: {reason} ({_some(names)})", hint))
    return found


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _pattern(names: Sequence[str]) -> str:
    kinds = {name.rsplit(".", 1)[-1] for name in names}
    return f"*.{kinds.pop()}" if len(kinds) == 1 else names[0]
