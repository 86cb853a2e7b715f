"""Which feed-forward units and which heads a model would miss least, measured on calibration text.

    x ──up, gate──> h ──down──> y          unit j adds  h_j * down[:, j]  to y; its size over the tokens is
                                           importance_j = sqrt(mean h_j^2) * ||down[:, j]||

The same holds for a head, whose outputs are a block of inputs of the attention's output projection. One forward pass
gives both: every layer's `down` and output projection is listened to (Minitron, Muralidharan et al. 2024, uses
activations likewise; weighing by the column that reads them is what makes it the size of the contribution).

Shapes: I in_features of the listened linear, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from llmcompress.models.blocks import weight_OI


def contributions(
    model: nn.Module, watched: Mapping[str, nn.Module], batches: Iterable[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Name -> size of what each input feature adds to the linear's output, float64 [I].

    batches: arguments of the model's forward; `attention_mask` says which tokens count.
    """
    sums_I = {name: torch.zeros(weight_OI(one).shape[1], dtype=torch.float64) for name, one in watched.items()}
    mask_BS = torch.ones(0)
    num_tokens = 0

    def listener(name: str) -> Any:
        def listen(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen_TI = inputs[0].reshape(-1, inputs[0].shape[-1])[mask_BS.reshape(-1).bool()]
            sums_I[name] += seen_TI.double().square().sum(0).cpu()

        return listen

    hooks = [module.register_forward_pre_hook(listener(name)) for name, module in watched.items()]
    try:
        with torch.inference_mode():
            for batch in batches:
                mask_BS = batch["attention_mask"]
                num_tokens += int(mask_BS.sum())
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    columns_I = {name: weight_OI(module).detach().double().norm(dim=0).cpu() for name, module in watched.items()}
    return {name: (total / max(num_tokens, 1)).sqrt() * columns_I[name] for name, total in sums_I.items()}


def largest(values_I: torch.Tensor, count: int, block: int = 1) -> torch.Tensor:
    """Indices of the features in the `count` blocks of `block` that contribute most, in their own order, int64.

    >>> largest(torch.tensor([1.0, 5.0, 0.0, 4.0]), 2)
    tensor([1, 3])
    >>> largest(torch.tensor([1.0, 5.0, 0.0, 4.0]), 1, block=2)
    tensor([0, 1])
    """
    sizes = values_I.view(-1, block).square().sum(-1)
    blocks = sizes.topk(count).indices.sort().values
    return (blocks[:, None] * block + torch.arange(block)).reshape(-1)
