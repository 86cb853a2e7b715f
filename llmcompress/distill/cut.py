"""Cut a student out of its teacher: fewer layers, narrower feed-forward parts, fewer heads; every weight is a copy.

    teacher  0 1 2 3 4 5     layers (0, 2, 5)      ┌ up   [F, H] ─ rows ────┐ the same F' units of each layer,
             │   │     │                           │ gate [F, H] ─ rows ────┤ those that contribute most
    student  0   1     2                           └ down [H, F] ─ columns ─┘ (importance.py)

    heads leave in groups: a key-value head with the query heads that read it, so that grouped attention stays grouped.

The student is transformers' own class with another config, filled by name and loaded strictly: a tensor that was cut in
the wrong place does not fit. Which linears are the feed-forward's is told by their shapes, not by a table of names.

Shapes: H hidden size, F feed-forward units, D size of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llmcompress.errors import LLMCompressError
from llmcompress.models.blocks import decoder_layers, is_transposed, linears, weight_OI

WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim")
"""What configs call the number of feed-forward units."""
QUERIES, KEYS_VALUES = ("q_proj",), ("k_proj", "v_proj")
OUTPUTS = ("o_proj", "out_proj", "dense")


@dataclass(frozen=True)
class Widths:
    """Where one layer is cut: local paths of linears. `ups` lose rows, `downs` columns."""

    ups: tuple[str, ...]
    down: str
    queries: str | None
    keys_values: tuple[str, ...]
    output: str | None


@dataclass(frozen=True)
class Selection:
    """What of one teacher layer stays: indices of units, and of rows of queries and of keys and values. None: all."""

    units: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    keys_values: torch.Tensor | None = None


@dataclass(frozen=True)
class Shape:
    """A student's shape. layers: of the teacher, in order. num_units, num_heads, num_groups: None where unchanged."""

    layers: tuple[int, ...]
    num_units: int | None = None
    num_heads: int | None = None
    num_groups: int | None = None
    selections: dict[int, Selection] = field(default_factory=dict)


def num_units(config: Any, layer: nn.Module) -> int:
    """Feed-forward units of a layer, F.

    Raises: LLMCompressError where the config does not say it and no linear shows it.
    """
    name = width_field(config)
    value = getattr(config, name)
    if isinstance(value, int):
        return value
    widest = max((weight_OI(one).shape[0] for one in linears(layer).values()), default=0)
    return int(widest)


def width_field(config: Any) -> str:
    """What this config calls its feed-forward width.

    Raises: LLMCompressError.
    """
    for name in WIDTHS:
        if hasattr(config, name):
            return name
    raise LLMCompressError(f"{config.model_type}: its config has no feed-forward width ({', '.join(WIDTHS)})")


def head_size(config: Any) -> int:
    """Features of one head, D: as the config says, or the hidden size over the number of heads."""
    return getattr(config, "head_dim", None) or int(config.hidden_size // config.num_attention_heads)


def find_widths(layer: nn.Module, config: Any, heads: bool) -> Widths:
    """Where a layer would be cut.

    Raises: LLMCompressError when its feed-forward part cannot be told from the rest, or, with `heads`, its attention
    is not four projections whose head size the config keeps.
    """
    hidden, units = config.hidden_size, num_units(config, layer)
    shapes = {name: tuple(weight_OI(one).shape) for name, one in linears(layer).items()}
    ups = tuple(name for name, (out, into) in shapes.items() if (out, into) == (units, hidden))
    downs = [name for name, (out, into) in shapes.items() if (out, into) == (hidden, units)]
    if len(downs) != 1 or not ups or units == hidden or any("proj" in x and "attn" in x for x in (*ups, *downs)):
        raise LLMCompressError(
            f"{config.model_type}: cannot tell its feed-forward linears by their shapes (hidden size {hidden}, width "
            f"{units}); its width cannot be cut",
            "cut layers only",
        )
    if not heads:
        return Widths(ups, downs[0], None, (), None)
    if config.model_type in _TIED_HEADS:
        size = f"{hidden} / {config.num_attention_heads}"
        raise LLMCompressError(
            f"{config.model_type}: computes the size of a head as hidden size over heads ({size}), whatever its config "
            "says, so that fewer heads would each have to be larger and none could be copied",
            "cut layers and feed-forward units only (--keep, --keep-units)",
        )
    named = {name.rpartition(".")[2]: name for name in shapes if name not in (*ups, *downs)}
    output = next((named[one] for one in OUTPUTS if one in named), None)
    missing = [one for one in (*QUERIES, *KEYS_VALUES) if one not in named]
    if missing or output is None:
        raise LLMCompressError(
            f"{config.model_type}: fewer heads need q_proj, k_proj, v_proj and an output projection",
            "cut layers and feed-forward units only",
        )
    return Widths(ups, downs[0], named["q_proj"], tuple(named[one] for one in KEYS_VALUES), output)


_TIED_HEADS = ("albert", "bert", "camembert", "distilbert", "electra", "gpt2", "gpt_neox", "mpnet", "opt", "roberta",
               "xlm-roberta")  # fmt: skip
"""Models that compute the size of a head from hidden size and number of heads, whatever head_dim says. transformers 5
builds all of them so, and no longer reads the `pruned_heads` of a config; the tests ask it."""


def cut(teacher: nn.Module, shape: Shape, widths: Widths | None) -> nn.Module:
    """A new model of the teacher's class and the given shape, holding copies of the teacher's weights.

    Raises: LLMCompressError when the result does not fit together, which names the tensor.
    """
    layers = decoder_layers(teacher)
    new_place = {old: new for new, old in enumerate(shape.layers)}
    transposed = {name for name, module in teacher.named_modules() if is_transposed(module)}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in teacher.state_dict().items():
        if not name.startswith(f"{layers.path}."):
            state[name] = tensor.clone()
            continue
        index, _, local = name.removeprefix(f"{layers.path}.").partition(".")
        if int(index) in new_place:
            chosen = shape.selections.get(int(index), Selection())
            kept = _kept(tensor, local, chosen, widths, name.rpartition(".")[0] in transposed)
            state[f"{layers.path}.{new_place[int(index)]}.{local}"] = kept.clone()
    student = type(teacher)(_config(teacher.config, shape, len(layers.layers)))
    student = student.to(next(teacher.parameters()).dtype)
    try:
        student.load_state_dict(state, strict=True)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise LLMCompressError(f"{type(teacher).__name__}: cannot be cut to this shape ({first[:300]})") from error
    student.tie_weights()  # type: ignore[operator]
    return student.eval()


def _kept(tensor: torch.Tensor, local: str, chosen: Selection, widths: Widths | None, transposed: bool) -> torch.Tensor:
    if widths is None:
        return tensor
    path, _, leaf = local.rpartition(".")
    rows: Sequence[tuple[tuple[str | None, ...], torch.Tensor | None]] = (
        (widths.ups, chosen.units),
        ((widths.queries,), chosen.queries),
        (widths.keys_values, chosen.keys_values),
    )
    for paths, indices in rows:
        if path in paths and indices is not None:
            return tensor.index_select(1 if transposed and leaf == "weight" else 0, indices)
    columns = {widths.down: chosen.units, widths.output: chosen.queries}
    indices = columns.get(path)
    if indices is not None and leaf == "weight":
        return tensor.index_select(0 if transposed else 1, indices)
    return tensor


def _config(teacher: Any, shape: Shape, num_layers: int) -> Any:
    """The teacher's config in the student's shape; lists of one value per layer keep those of the layers that stay."""
    config = copy.deepcopy(teacher)
    for name, value in teacher.to_dict().items():
        if isinstance(value, list | tuple) and len(value) == num_layers and name not in ("architectures",):
            setattr(config, name, [value[index] for index in shape.layers])
    config.num_hidden_layers = len(shape.layers)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if shape.num_units is not None:
        setattr(config, width_field(config), shape.num_units)
    if shape.num_heads is not None:
        config.head_dim = head_size(teacher)
        config.num_attention_heads, config.num_key_value_heads = shape.num_heads, shape.num_groups
    return config
