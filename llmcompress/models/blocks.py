"""Where the decoder layers and their linears are, found in the model and not in a table of architectures.

The decoder layers are the module list that holds most of the language model's parameters; a linear is an `nn.Linear`,
or GPT-2's `Conv1D`, which stores the transpose. "Decoder layer" and "block" are one thing; an encoder's layers are
found the same way.

A wrapper (vision-language, audio) holds its language model beside towers and projectors. The language model is the
smallest part that has both the token embedding and a list of layers:

    model.visual.blocks …          tower, left as it is
    model.language_model.embed_tokens   ┐
    model.language_model.layers …       ┘ the language model

What is no linear stays: convolutions, and gates that keep several matrices in one tensor (RecurrentGemma's, block
diagonal). A mixture whose experts `experts.split` does not know is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llmcompress.errors import LLMCompressError
from llmcompress.models.config import hidden_size as config_width
from llmcompress.models.config import num_experts


@dataclass(frozen=True, slots=True)
class DecoderLayers:
    """`path`: of the module list, e.g. model.layers. `layers`: its modules, in order."""

    path: str
    layers: tuple[nn.Module, ...]

    def name(self, index: int) -> str:
        """Path of one layer, e.g. model.layers.3."""
        return f"{self.path}.{index}"


def decoder_layers(model: nn.Module) -> DecoderLayers:
    """The list of decoder layers: of all module lists of the language model, the one with most parameters.

    Raises: LLMCompressError when there is none, or a layer holds the experts of a mixture in one tensor.
    """
    prefix, language = language_model(model)
    lists = [
        (sum(p.numel() for p in module.parameters()), path, module)
        for path, module in language.named_modules(prefix=prefix)
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    if not lists:
        raise LLMCompressError(f"{type(model).__name__}: has no list of decoder layers")
    _, path, layers = max(lists, key=lambda entry: (entry[0], -len(entry[1])))
    mixture = num_experts(getattr(model, "config", None)) > 1
    for name, parameter in layers.named_parameters():
        named = mixture or "expert" in name or "moe" in name
        if parameter.dim() > 2 and named and "conv" not in name:
            raise LLMCompressError(
                f"{type(model).__name__}: {path}.{name} {list(parameter.shape)} holds several matrices in one tensor; "
                "experts fused in a form of their own are not supported"
            )
    return DecoderLayers(path, tuple(layers))


def language_model(model: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of the part that reads tokens; the model itself ("") where that cannot be told."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return "", model
    path = next((name for name, module in model.named_modules() if module is embedding), "")
    while path:
        path = path.rpartition(".")[0]
        part = model.get_submodule(path)
        if any(isinstance(module, nn.ModuleList) and len(module) > 0 for module in part.modules()):
            return path, part
    return "", model


def unpackable(layer: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Local path -> (shape, why it stays) of every tensor below `layer` that holds matrices and is no linear's weight.

    The path is the module's where the tensor is its `weight`, else the parameter's own. Embeddings are not named.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path, module in layer.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) or is_transposed(module):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            convolution = isinstance(module, nn.modules.conv._ConvNd) or "conv" in path.rpartition(".")[2]
            several = "several matrices in one tensor, which no layout holds" if parameter.dim() > 2 else ""
            reason = "a convolution" if convolution else several or "a matrix that is no linear's"
            local = path if leaf == "weight" else f"{path}.{leaf}".strip(".")
            found[local] = (tuple(parameter.shape), reason)
    return found


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
