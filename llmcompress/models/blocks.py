"""Where the decoder layers and their linears are, found in the model and not in a table of architectures.

The decoder layers are the module list that holds most of the model's parameters; a linear is an `nn.Linear`, or
GPT-2's `Conv1D`, which stores the transpose. A layer that keeps several matrices in one three-dimensional parameter
(fused experts) is refused by name. "Decoder layer" and "block" are one thing; an encoder's layers are found the
same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llmcompress.errors import LLMCompressError
from llmcompress.models.config import hidden_size as config_width


@dataclass(frozen=True, slots=True)
class DecoderLayers:
    """`path`: of the module list, e.g. model.layers. `layers`: its modules, in order."""

    path: str
    layers: tuple[nn.Module, ...]

    def name(self, index: int) -> str:
        """Path of one layer, e.g. model.layers.3."""
        return f"{self.path}.{index}"


def decoder_layers(model: nn.Module) -> DecoderLayers:
    """The list of decoder layers: of all module lists, the one with most parameters.

    Raises: LLMCompressError when there is none, or a layer holds a fused three-dimensional weight.
    """
    lists = [
        (sum(p.numel() for p in module.parameters()), path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    if not lists:
        raise LLMCompressError(f"{type(model).__name__}: has no list of decoder layers")
    _, path, layers = max(lists, key=lambda entry: (entry[0], -len(entry[1])))
    for name, parameter in layers.named_parameters():
        if parameter.dim() > 2 and "conv" not in name:
            raise LLMCompressError(
                f"{type(model).__name__}: {path}.{name} {list(parameter.shape)} holds several matrices in one tensor; "
                "fused mixture-of-experts layers are not supported"
            )
    return DecoderLayers(path, tuple(layers))


def is_transposed(module: nn.Module) -> bool:
    """Whether the module keeps its weight as [in_features, out_features] (GPT-2's Conv1D)."""
    return type(module).__name__ == "Conv1D"


def linears(layer: nn.Module) -> dict[str, nn.Module]:
    """Local path -> linear below `layer`, in module order."""
    return {
        name: module
        for name, module in layer.named_modules()
        if name and (isinstance(module, nn.Linear) or is_transposed(module))
    }


def weight_OI(module: nn.Module) -> torch.Tensor:
    """The linear's weight as [out_features, in_features]."""
    weight: torch.Tensor = module._parameters["weight"]  # type: ignore[assignment]
    return weight.t() if is_transposed(module) else weight


def put_weight_OI(module: nn.Module, value_OI: torch.Tensor) -> None:
    """Replace the linear's weight, given as [out_features, in_features]."""
    value = value_OI.t().contiguous() if is_transposed(module) else value_OI
    module._parameters["weight"] = nn.Parameter(value, requires_grad=False)


def hidden_size(model: nn.Module) -> int:
    """Width of the hidden state that decoder layers hand on: the config's own, or that of the token embeddings."""
    width = config_width(getattr(model, "config", None))
    return width or int(model.get_input_embeddings().weight.shape[-1])  # type: ignore[operator]
