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
from llmcompress.quantize.hessian import accumulate, relative_error
from llmcompress.quantize.method import METHODS, Method
from llmcompress.quantize.targets import Target
from llmcompress.quantize.weight import QuantizedWeight
from llmcompress.report import LinearRow


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
    scale_dtype: torch.dtype
    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    rows: list[LinearRow] = field(default_factory=list)
    _inputs: list[torch.Tensor] = field(default_factory=list)
    _hessian: tuple[torch.Tensor, int] | None = None

    def due(self, local: str, inputs: list[torch.Tensor], batches: list[int]) -> None:
        """Quantize one linear on `inputs` ([..., I] per batch), and put the dequantized weight in its place.

        The Hessian of the linear before is used again where it was computed from the very same tensors.
        """
        same = len(inputs) == len(self._inputs) and all(a is b for a, b in zip(inputs, self._inputs, strict=True))
        if not same or self._hessian is None:
            masks = [self.masks[batch] for batch in batches]
            self._refuse_padding_lost(local, inputs, masks)
            hessian_II, num_tokens = accumulate(inputs, masks)
            self._hessian, self._inputs = (hessian_II.cpu(), num_tokens), inputs
        self._quantize(local, *self._hessian)

    def without_calibration(self, local: str) -> None:
        """Quantize one linear that no text is needed for, or that none reached."""
        self._quantize(local, None, 0)

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

    def _quantize(self, local: str, hessian_II: torch.Tensor | None, num_tokens: int) -> None:
        target, module = self.targets[local], self.layer.get_submodule(local)
        original_OI = weight_OI(module).to("cpu", torch.float32).contiguous()
        reason, method = None, self.method
        try:
            if self.method.needs_hessian and num_tokens == 0:
                raise LLMCompressError("no calibration token reached it", "use more or other calibration text")
            weight = self.method.solve(original_OI, hessian_II, target.scheme, self.scale_dtype, self.settings)
        except LLMCompressError as error:
            if self.on_failure != "rtn":
                hint = error.hint or "pass --on-failure rtn to round such linears"
                raise LLMCompressError(f"{target.name}: {error.message}", hint) from error
            reason, method = error.message, METHODS.get("rtn")
            hessian_II = None
            weight = method.solve(original_OI, None, target.scheme, self.scale_dtype, method.settings())
        dense_OI = weight.dequantize()
        self.weights[local] = weight
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
                num_tokens=num_tokens or None,
                digest=weight.digest(),
            )
        )
        put_weight_OI(module, dense_OI.to(weight_OI(module).device))
