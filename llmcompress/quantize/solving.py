"""One decoder layer, quantized: Hessians from what flows through it, codes from the method, a row for the report.

Between `LayerStream`, which says when a linear is due, and `Method`, which knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from pydantic import BaseModel
from torch import nn

from llmcompress.errors import LLMCompressError
from llmcompress.models.layout import put_weight_OI, weight_OI
from llmcompress.quantize.choosing import Choice, choose
from llmcompress.quantize.hessian import Hessians, hessians, relative_error
from llmcompress.quantize.method import METHODS, Method
from llmcompress.quantize.targets import Target
from llmcompress.quantize.weight import QuantizedWeight
from llmcompress.report import LinearRow
from llmcompress.scheme import WeightScheme

DAMPENING_FRAC = 0.05
"""Of the refinement, after a method that does not damp."""


@dataclass
class LayerSolver:
    """Quantizes the targets of one layer as they fall due; collects weights and rows.

    masks: per batch, bool [B, S] with False on padding, or None where every token is real.
    """

    layer: nn.Module
    targets: dict[str, Target]
    masks: Sequence[torch.Tensor | None]
    method: Method
    settings: BaseModel
    on_failure: str
    refine_sweeps: int
    scale_dtype: torch.dtype
    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    rows: list[LinearRow] = field(default_factory=list)
    _inputs: list[torch.Tensor] = field(default_factory=list)
    _hessians: Hessians | None = None

    def due(self, local: str, inputs: list[torch.Tensor], batches: list[int]) -> None:
        """Quantize one linear on `inputs` ([..., I] per batch), and put the dequantized weight in its place.

        The Hessian of the linear before is used again where it was computed from the very same tensors.
        """
        same = len(inputs) == len(self._inputs) and all(a is b for a, b in zip(inputs, self._inputs, strict=True))
        if not same or self._hessians is None:
            masks = [self.masks[batch] for batch in batches]
            self._refuse_padding_lost(local, inputs, masks)
            self._hessians, self._inputs = hessians(inputs, masks), inputs
        self._quantize(local, self._hessians)

    def without_calibration(self, local: str) -> None:
        """Quantize one linear that no text is needed for, or that none reached."""
        self._quantize(local, None)

    def _refuse_padding_lost(
        self, local: str, inputs: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]
    ) -> None:
        for x, mask in zip(inputs, masks, strict=True):
            if mask is not None and x.shape[:-1] != mask.shape:
                raise LLMCompressError(
                    f"{self.targets[local].name}: sees tokens in another arrangement {list(x.shape)} than the padded "
                    f"calibration rows {list(mask.shape)}, so padding cannot be kept out of its Hessian",
                    "calibrate on packed text (chat_template: false)",
                )

    def _quantize(self, local: str, seen: Hessians | None) -> None:
        target, module = self.targets[local], self.layer.get_submodule(local)
        original_OI = weight_OI(module).to("cpu", torch.float32).contiguous()
        reason, method = None, self.method
        try:
            choice = self._solved(original_OI, target.scheme, seen)
        except LLMCompressError as error:
            if self.on_failure != "rtn":
                hint = error.hint or "pass --on-failure rtn to round such linears"
                raise LLMCompressError(f"{target.name}: {error.message}", hint) from error
            reason, method, seen = error.message, METHODS.get("rtn"), None
            choice = Choice(method.solve(original_OI, None, target.scheme, self.scale_dtype, method.settings()))
        hessian_II = seen.solve_II if seen else None
        dense_OI = choice.weight.dequantize()
        self.weights[local] = choice.weight
        self.rows.append(
            LinearRow(
                name=target.name,
                shape=(target.out_features, target.in_features),
                scheme=target.scheme.label(),
                grid=asdict(target.scheme),
                stem=target.stem,
                method=method.name,
                outcome="fell_back" if reason else "quantized",
                reason=reason,
                relative_error=relative_error(original_OI, dense_OI, hessian_II),
                error_kind="weight" if hessian_II is None else "output",
                held_out_error=choice.held_out_error,
                plain_held_out_error=choice.plain_held_out_error,
                num_tokens=seen.num_tokens if seen else None,
                digest=choice.weight.digest(),
            )
        )
        put_weight_OI(module, dense_OI.to(weight_OI(module).device))

    def _solved(self, original_OI: torch.Tensor, scheme: WeightScheme, seen: Hessians | None) -> Choice:
        if not self.method.needs_hessian:
            return Choice(self.method.solve(original_OI, None, scheme, self.scale_dtype, self.settings))
        if seen is None or seen.num_tokens == 0:
            raise LLMCompressError("no calibration token reached it", "use more or other calibration text")
        plain = self.method.solve(original_OI, seen.solve_II, scheme, self.scale_dtype, self.settings)
        dampening_frac = getattr(self.settings, "dampening_frac", DAMPENING_FRAC)
        return choose(original_OI, plain, seen, dampening_frac, self.scale_dtype, self.refine_sweeps)
