"""One decoder layer, quantized: Hessians from what flows through it, codes from the method, a row for the report.

Between the layer stream, which says what a linear is about to read and when all of it was seen, and `LinearMethod`,
which knows no model. Linears that read the same tensor are solved as one tall weight: one Hessian, one factor, one
sweep. A weight is in memory from when it is its turn until the text has gone through it.

An expert of a mixture sees the tokens routed to it, and beside them some of the batch's others (`models/experts.py`).
The two are summed apart; where all batches together routed fewer than `expert_tokens` to it, it is solved on both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby

import torch
from torch import nn

from llmcompress.compress.grid import SMALLEST_SCALE
from llmcompress.compress.methods.base import METHODS, HessianSettings, LinearMethod, MethodSettings, Need
from llmcompress.compress.selection import Choice, best, candidates
from llmcompress.compress.stacking import solve_rows
from llmcompress.compress.statistics import Statistics, StatisticsSums, relative_error
from llmcompress.compress.targets import Target
from llmcompress.compress.timing import Ledger
from llmcompress.compress.weight import CompressedWeight, QuantizedWeight
from llmcompress.distributed import ProcessLostError, World
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import EXPERT
from llmcompress.memory import give_back
from llmcompress.models.blocks import put_weight_OI, weight_OI
from llmcompress.models.experts import Routing, routing_of
from llmcompress.models.meta import set_parameter
from llmcompress.report import LinearRow

TINY_SCALE = 16 * SMALLEST_SCALE
"""Below it float16 has so few bits left that a layer of such scales is better solved with another exponent."""


def scaled(weight: CompressedWeight, power: int) -> CompressedWeight:
    """The weight times a power of two: the same codes, its scales with another exponent."""
    assert isinstance(weight, QuantizedWeight) and weight.nested is None
    return replace(weight, scale_OG=weight.scale_OG * 2.0**power)


@dataclass
class LayerSolver:
    """Quantizes the targets of one layer as they fall due; collects weights and rows.

    masks: per batch, bool [B, S] with False on padding, or None where every token is real. device, dtype: of the
    forward pass. needs: the statistics to accumulate. read: a target's weight, as it is stored. world: the processes
    that share the work. float16_scales: whether a layout that is written holds no others.
    """

    layer: nn.Module
    targets: dict[str, Target]
    masks: Sequence[torch.Tensor | None]
    method: LinearMethod
    settings: MethodSettings
    on_failure: str
    refine_sweeps: int
    expert_tokens: int
    needs: frozenset[Need]
    scale_dtype: torch.dtype
    device: torch.device
    dtype: torch.dtype
    read: Callable[[Target], torch.Tensor]
    ledger: Ledger
    world: World
    float16_scales: bool = False
    weights: dict[str, CompressedWeight] = field(default_factory=dict)
    rows: list[LinearRow] = field(default_factory=list)
    _sums: StatisticsSums | None = None
    _others: StatisticsSums | None = None
    _num_routed: int | None = None

    def see(self, names: Sequence[str], inputs: torch.Tensor, batch: int, original: torch.Tensor | None = None) -> None:
        """Add what `names` are about to read in one batch ([..., I]) to their Hessian; see `Solver.see`."""
        routing = routing_of(inputs)
        if routing is not None:
            self._see_expert(names, inputs, routing, batch)
            return
        mask = self.masks[batch]
        if mask is not None and inputs.shape[:-1] != mask.shape:
            raise LLMCompressError(
                f"{self.targets[names[0]].name}: sees tokens in another arrangement {list(inputs.shape)} than the "
                f"padded calibration rows {list(mask.shape)}, so padding cannot be kept out of its Hessian",
                "calibrate on packed text (chat_template: false)",
            )
        with self.ledger.of("hessian"):
            if self._sums is None:
                self._sums = StatisticsSums(inputs.shape[-1], inputs.device, self.needs)
            before = self._sums.num_tokens
            self._sums.add(inputs, mask, original)
        tokens = self._sums.num_tokens - before
        self.ledger.needs("hessian", tokens * inputs.shape[-1] ** 2 * (1 if original is None else 3))
        passes = 1 if original is None else 2
        for name in names:
            self.ledger.needs("forward", 2.0 * passes * tokens * self.targets[name].out_features * inputs.shape[-1])

    def _see_expert(self, names: Sequence[str], inputs_NI: torch.Tensor, routing: Routing, batch: int) -> None:
        """The same of an expert; the original model routes other tokens to its own, so that is not asked."""
        mask, num_tokens = self.masks[batch], len(inputs_NI)
        mask_N = None if mask is None else mask.reshape(-1)[routing.tokens_N]
        with self.ledger.of("hessian"):
            if self._sums is None or self._others is None:
                needs = self.needs - {"shift"}
                self._sums, self._others = (
                    StatisticsSums(inputs_NI.shape[-1], inputs_NI.device, needs) for _ in range(2)
                )
            for sums, part in (
                (self._sums, slice(routing.num_routed)),
                (self._others, slice(routing.num_routed, None)),
            ):
                sums.add(inputs_NI[part], None if mask_N is None else mask_N[part])
        self.ledger.needs("hessian", num_tokens * inputs_NI.shape[-1] ** 2)
        for name in names:
            self.ledger.needs("forward", 2.0 * num_tokens * self.targets[name].out_features * inputs_NI.shape[-1])

    def forget(self) -> None:
        """Drop what was seen since the last solution."""
        self._sums = self._others = None

    def solve(self, names: Sequence[str]) -> None:
        """Quantize linears that read one tensor, and put the dequantized weights in their places."""
        self._release()
        give_back()
        width = self.targets[names[0]].in_features
        with self.ledger.of("hessian"):
            sums, self._sums = self._sums or StatisticsSums(width, self.device, self.needs), None
            for total in sums.every():
                self.world.add_up(total)
            self._num_routed = self._with_others(sums)
            seen = sums.means()
        self.ledger.needs("solving", width**3 / 3)
        with self.ledger.of("solving"):
            for _, alike in groupby(names, lambda name: self.targets[name].scheme):
                self._quantize(list(alike), seen)
            give_back()

    def _with_others(self, sums: StatisticsSums) -> int | None:
        """Add the tokens routed elsewhere where an expert saw too few of its own; returns how many those were."""
        if self._others is None:
            return None
        others, self._others, num_routed = self._others, None, sums.num_tokens
        if num_routed < self.expert_tokens:
            for total, more in zip(sums.every(), others.every(), strict=True):
                self.world.add_up(more)
                total.sum_II += more.sum_II
                total.num_tokens += more.num_tokens
        return num_routed

    def without_calibration(self, name: str) -> None:
        """Quantize one linear that no text is needed for, or that none reached."""
        self._release()
        self._num_routed = None
        with self.ledger.of("solving"):
            self._quantize([name], None)
        self._release()

    def present(self, name: str) -> None:
        """Put a solved weight back in its place, should it have left it."""
        module = self.layer.get_submodule(name)
        if weight_OI(module).is_meta:
            put_weight_OI(module, self.weights[name].dequantize().to(self.device, self.dtype))

    def _release(self) -> None:
        for name in self.weights:
            module = self.layer.get_submodule(name)
            if not weight_OI(module).is_meta:
                set_parameter(module, "weight", torch.empty_like(module.weight, device="meta"))  # type: ignore[arg-type]

    def _quantize(self, names: list[str], seen: Statistics | None) -> None:
        """Solve linears of one scheme that read one tensor."""
        first = self.targets[names[0]]
        whole_OI = self._stacked(names)
        sizes = [self.targets[name].out_features for name in names]
        reason, method = None, self.method
        weights = first.scheme.weights
        depend = not method.rows_independent or (weights is not None and weights.double_quant)
        try:
            if method.needs and (seen is None or seen.num_tokens == 0):
                way = "use more or other calibration text"
                way += ", or raise --expert-tokens" if EXPERT.fullmatch(first.name) else ""
                raise LLMCompressError("no calibration token reached it", way)
            power = self._power(whole_OI, first)
            solved = solve_rows(
                whole_OI * 2.0**power if power else whole_OI, sizes,
                lambda rows_OI: self._solved(rows_OI, first, seen), self.world, depend,
            )  # fmt: skip
            if power:
                solved = [[scaled(version, -power) for version in versions] for versions in solved]
        except ProcessLostError:
            raise
        except LLMCompressError as error:
            if self.on_failure != "rtn":
                hint = error.hint or "pass --on-failure rtn to round such linears"
                raise LLMCompressError(f"{first.name}: {error.message}", hint) from error
            reason, method, seen = error.message, METHODS.get("rtn"), None
            solved = solve_rows(whole_OI, sizes, lambda rows_OI: self._rounded(rows_OI, first), self.world, depend)
        seen = None if seen is None else seen.cpu()
        for name, original_OI, versions in zip(names, whole_OI.split(sizes), solved, strict=True):
            choice = best(original_OI, versions, seen) if seen else Choice(versions[0])
            self._keep(name, original_OI, choice, method.name, reason, seen)

    def _power(self, weight_OI: torch.Tensor, target: Target) -> int:
        """The power of two that weights are multiplied by while they are solved for, and their scales divided by after.

        Scales are rounded to what is both a float16 and a number of the file's dtype, and the least float16 is 6e-8;
        where every scale lies below, those of the file's dtype are wanted, which shifting the exponent gives exactly.

        Raises: LLMCompressError where the scales cannot but be float16 and all codes would be zero.
        """
        weights = target.scheme.weights
        largest = float(weight_OI.abs().max())
        if weights is None or weights.codebook or largest == 0 or 2 * largest / weights.num_codes >= TINY_SCALE:
            return 0
        if not self.float16_scales and self.scale_dtype != torch.float16:
            return -math.frexp(largest)[1]
        if largest < SMALLEST_SCALE / 2:
            raise LLMCompressError(
                f"its weights reach {largest:.2g}, and the least scale that float16 holds is {SMALLEST_SCALE:.2g}: all "
                "would be rounded to zero",
                "write compressed_tensors from a bfloat16 or float32 checkpoint, or leave it as it is: "
                f"--ignore {target.name!r}",
            )
        return 0

    def _few_tokens(self) -> list[str]:
        routed, floor = self._num_routed, self.expert_tokens
        if routed is None or routed >= floor:
            return []
        return [
            f"{routed} tokens were routed to this expert, fewer than expert_tokens {floor}; it was shown others too"
        ]

    def _solved(self, weight_OI: torch.Tensor, target: Target, seen: Statistics | None) -> list[CompressedWeight]:
        """The method's solution for some rows, and what was made of it where there is a Hessian to judge by."""

        def solve(goal_OI: torch.Tensor) -> CompressedWeight:
            return self.method.solve(goal_OI, seen, target.scheme, self.scale_dtype, self.settings)

        if seen is None:
            return [solve(weight_OI)]
        assert isinstance(self.settings, HessianSettings), "a method that needs statistics damps its Hessian"
        return candidates(weight_OI, solve, seen, self.settings.dampening_frac, self.scale_dtype, self.refine_sweeps)

    def _rounded(self, weight_OI: torch.Tensor, target: Target) -> list[CompressedWeight]:
        rtn = METHODS.get("rtn")
        return [rtn.solve(weight_OI, None, target.scheme, self.scale_dtype, rtn.settings())]

    def _stacked(self, names: Sequence[str]) -> torch.Tensor:
        """The weights of `names` in float32 on the processor, one below the other."""
        targets = [self.targets[name] for name in names]
        sizes = [target.out_features for target in targets]
        whole_OI = torch.empty(sum(sizes), targets[0].in_features)
        for target, rows_OI in zip(targets, whole_OI.split(sizes), strict=True):
            stored = self.read(target)
            rows_OI.copy_(stored.t() if target.transposed else stored)
        return whole_OI

    def _keep(
        self, name: str, original_OI: torch.Tensor, choice: Choice, method: str, reason: str | None,
        seen: Statistics | None,
    ) -> None:  # fmt: skip
        target, dense_OI = self.targets[name], choice.weight.dequantize()
        hessian_II = seen.hessian_II if seen else None
        self.weights[name] = choice.weight
        if hessian_II is not None:
            self.ledger.needs("solving", target.out_features * target.in_features**2)
        self.rows.append(
            LinearRow(
                name=target.name,
                shape=(target.out_features, target.in_features),
                scheme=target.scheme.label(),
                grid=asdict(target.scheme.grid),
                tensor_prefix=target.stem,
                method=method,
                outcome="fell_back" if reason else "quantized",
                reason=reason,
                relative_error=relative_error(original_OI, dense_OI, hessian_II),
                error_kind="weight" if hessian_II is None else "output",
                solution=choice.version,
                held_out_error=choice.held_out_error,
                plain_held_out_error=choice.plain_held_out_error,
                num_tokens=seen.num_tokens if seen else None,
                num_routed_tokens=self._num_routed,
                notes=self._few_tokens(),
                digest=choice.weight.digest(),
            )
        )
        put_weight_OI(self.layer.get_submodule(name), dense_OI.to(self.device, self.dtype))
