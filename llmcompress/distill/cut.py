"""Cut a student out of its teacher: fewer layers, narrower feed-forward parts, fewer heads; every weight is a copy.

    teacher  0 1 2 3 4 5     layers (0, 2, 5)      ┌ up   [F, H] ─ rows ────┐ the same F' units of each layer,
             │   │     │                           │ gate [F, H] ─ rows ────┤ those that contribute most
    student  0   1     2                           └ down [H, F] ─ columns ─┘

    heads leave in groups: a key-value head with the query heads that read it, so that grouped attention stays grouped.

The student is transformers' own class with another config, filled by name and loaded strictly: a tensor that was cut in
the wrong place does not fit. Which linears are the feed-forward's is told by their shapes, not by a table of names.

Which units and heads a model would miss least is measured on calibration text:

    x ──up, gate──> h ──down──> y          unit j adds  h_j * down[:, j]  to y; its size over the tokens is
                                           importance_j = sqrt(mean h_j^2) * ||down[:, j]||

The same holds for a head, whose outputs are a block of inputs of the attention's output projection. One forward pass
gives both: every layer's `down` and output projection is listened to (Minitron, Muralidharan et al. 2024, uses
activations likewise; weighing by the column that reads them is what makes it the size of the contribution).

Shapes: H hidden size, F feed-forward units, D size of a head, I in_features of a linear, T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llmcompress.distill.layer_map import evenly
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.models.blocks import decoder_layers, is_transposed, linears, weight_OI
from llmcompress.models.config import text_config

WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim")
"""What configs call the number of feed-forward units."""
KEYS_VALUES = ("k_proj", "v_proj")
OUTPUTS = ("o_proj", "out_proj", "dense")
ROUND_TO = 64
"""Feed-forward widths are rounded down to a multiple of this where the teacher's is one, so that groups of a quantized
student come out even."""


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
    widest = max((weight_OI(linear).shape[0] for linear in linears(layer).values()), default=0)
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
    shapes = {name: tuple(weight_OI(linear).shape) for name, linear in linears(layer).items()}
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
    output = next((named[name] for name in OUTPUTS if name in named), None)
    missing = [name for name in ("q_proj", *KEYS_VALUES) if name not in named]
    if missing or output is None:
        raise LLMCompressError(
            f"{config.model_type}: fewer heads need q_proj, k_proj, v_proj and an output projection",
            "cut layers and feed-forward units only",
        )
    return Widths(ups, downs[0], named["q_proj"], tuple(named[name] for name in KEYS_VALUES), output)


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
    config = _config(teacher.config, shape, len(layers.layers))
    head = teacher.get_output_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is not teacher.get_input_embeddings().weight:  # type: ignore[operator]
        text_config(config).tie_word_embeddings = False  # whatever the teacher's config says, it has its own
    student = type(teacher)(config)
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


def student_from(
    teacher: nn.Module, *, keep: float | None, layers: Sequence[int], keep_units: float | None,
    keep_heads: float | None, batches: Iterable[Mapping[str, torch.Tensor]],
) -> tuple[nn.Module, str]:  # fmt: skip
    """The student, and one line on what was kept.

    keep, keep_units, keep_heads: fractions in (0, 1]. layers: which ones, instead of `keep`. batches: calibration text
    as arguments of the model's forward, read only where the width is cut.

    Raises: LLMCompressError for layers that the teacher does not have, and as `cut`.
    """
    blocks = decoder_layers(teacher).layers
    config: Any = teacher.config
    kept = kept_layers(len(blocks), keep, layers)
    parts = [f"layers {', '.join(map(str, kept))} of {len(blocks)}"]
    if keep_units is None and keep_heads is None:
        return cut(teacher, Shape(kept), None), parts[0]
    widths = [find_widths(block, config, keep_heads is not None) for block in blocks]
    watched = {
        f"{index}.{local}": block.get_submodule(local)
        for index, (block, width) in enumerate(zip(blocks, widths, strict=True))
        for local in (width.down, width.output)
        if local is not None
    }
    sizes = contributions(teacher, watched, batches)
    units = _fewer_units(config, blocks[0], keep_units)
    heads = _fewer_heads(config, keep_heads)
    selections = {index: _select(index, widths[index], sizes, units, heads, config) for index in kept}
    parts += [f"{units} of {num_units(config, blocks[0])} feed-forward units"] if units else []
    parts += [f"{heads[0]} of {config.num_attention_heads} heads"] if heads else []
    shape = Shape(kept, units, heads[0] if heads else None, heads[1] if heads else None, selections)
    return cut(teacher, shape, widths[0]), f"{'; '.join(parts)}, those that contribute most on the calibration text"


def kept_layers(num_layers: int, keep: float | None, layers: Sequence[int]) -> tuple[int, ...]:
    """Which of the teacher's layers stay, in order.

    Raises: LLMCompressError for a layer that there is not, one named twice, or layers out of order.

    >>> kept_layers(6, 0.5, ()), kept_layers(6, None, [0, 3]), kept_layers(3, None, ())
    ((0, 2, 5), (0, 3), (0, 1, 2))
    """
    if not layers:
        return evenly(max(1, round((1.0 if keep is None else keep) * num_layers)), num_layers)
    problems = [
        LLMCompressError(f"layers: {index} is out of range; the teacher has layers 0 to {num_layers - 1}")
        for index in layers
        if not 0 <= index < num_layers
    ]
    if sorted(set(layers)) != list(layers):
        problems.append(LLMCompressError(f"layers: {list(layers)} must be increasing, each layer once"))
    raise_all(problems)
    return tuple(layers)


def _fewer_units(config: Any, layer: nn.Module, keep: float | None) -> int | None:
    if keep is None:
        return None
    whole = num_units(config, layer)
    step = ROUND_TO if whole % ROUND_TO == 0 and keep * whole >= ROUND_TO else 1
    return max(1, int(keep * whole) // step * step)


def _fewer_heads(config: Any, keep: float | None) -> tuple[int, int] | None:
    """(query heads, key-value heads) that stay."""
    if keep is None:
        return None
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    kept = max(1, round(keep * groups))
    return kept * (heads // groups), kept


def _select(
    index: int, widths: Widths, sizes: Mapping[str, torch.Tensor], units: int | None,
    heads: tuple[int, int] | None, config: Any,
) -> Selection:  # fmt: skip
    kept_units = largest(sizes[f"{index}.{widths.down}"], units) if units else None
    if heads is None:
        return Selection(kept_units)
    all_groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_group = config.num_attention_heads // all_groups * head_size(config)
    queries = largest(sizes[f"{index}.{widths.output}"], heads[1], per_group)
    groups = (queries.view(-1, per_group)[:, 0] // per_group)[:, None]
    size = head_size(config)
    keys = (groups * size + torch.arange(size)).reshape(-1)
    return Selection(kept_units, queries, keys)


def contributions(
    model: nn.Module, watched: Mapping[str, nn.Module], batches: Iterable[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Name -> size of what each input feature adds to the linear's output, float64 [I].

    batches: arguments of the model's forward; `attention_mask` says which tokens count.
    """
    sums_I = {name: torch.zeros(weight_OI(linear).shape[1], dtype=torch.float64) for name, linear in watched.items()}
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
