"""How compressed linears lie on disk: the interface of a layout, and the set of those known.

A format turns one CompressedWeight into the tensors that an engine expects under a linear's name, and back. It sees
local names (`qweight`, not `model.layers.0...qweight`) and never changes what it is given. Everything that the rest of
the package asks of a layout it says itself: sizes for a plan, the config and how it is read back, the tensor by which a
header shows a packed linear, the packages an engine needs. So a layout more is one file.

Free of torch, so that plans and `--help` load at once: a format imports it where it packs.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmcompress.compress.scheme import EXPERT as EXPERT
from llmcompress.compress.scheme import Part, Scheme, unserved
from llmcompress.errors import LLMCompressError
from llmcompress.registry import Registry

if TYPE_CHECKING:
    import torch

    from llmcompress.checkpoint.reader import Checkpoint
    from llmcompress.checkpoint.safetensors import StoredTensor
    from llmcompress.compress.weight import CompressedWeight

WEIGHTS: frozenset[Part] = frozenset({"weights"})


@dataclass(frozen=True, slots=True)
class Layout:
    """What a format must know of the whole checkpoint to write its config.

    schemes: scheme per compressed linear, in model order. skipped: linears left in full precision (module paths,
    `lm_head` included where the model has one). dtype: of the source's weights. method, knobs: how the values were
    chosen; a format records those knobs that its config has a place for. version: of llmcompress. dense_on_loading:
    whether transformers is asked to make weights dense while loading, where a format's config has a word for that.
    """

    schemes: Mapping[str, Scheme]
    skipped: tuple[str, ...]
    dtype: torch.dtype
    method: str
    knobs: Mapping[str, Any]
    version: str
    dense_on_loading: bool = False


@dataclass(frozen=True, slots=True)
class Package:
    """What an engine needs beside transformers: the name it is imported by, and the one it is installed by."""

    module: str
    distribution: str


@dataclass(frozen=True, slots=True)
class DeclaredGrid:
    """A grid as some checkpoint's config declares it: anybody's, so nothing in it is checked; None where not said."""

    num_bits: Any = None
    group_size: Any = None
    symmetric: Any = None
    actorder: Any = None

    @property
    def width(self) -> int | None:
        """`num_bits` where it is one."""
        return self.num_bits if isinstance(self.num_bits, int) and self.num_bits > 0 else None


def declared_grids(config: Mapping[str, Any]) -> list[DeclaredGrid]:
    """The one grid of a quantization_config that is flat (gptq, awq, …); none where it says no `bits`."""
    if "bits" not in config:
        return []
    return [DeclaredGrid(config["bits"], config.get("group_size"), config.get("sym"))]


class Format(Protocol):
    """One on-disk layout of compressed linears.

    readers: engines that load it, each with what that rests on: "tested" (our tests load it there) or "by its source"
    (its loader accepts the layout as written). quant_method: as config.json's quantization_config names it. packages:
    what transformers needs beside itself. kernels: what its loader computes with, one line. module_classes: the modules
    that its loader replaces. keeps_dtypes: whether transformers loads plain tensors of such a checkpoint in the dtypes
    of the files, whatever it is asked for. float16_scales: whether scales are float16 whatever dtype the source has.
    marker: the local tensor by which a header shows a packed linear. groups: the local tensor and the axis along which
    groups are counted, or None.
    """

    name: str
    summary: str
    readers: Mapping[str, str]
    quant_method: str
    packages: tuple[Package, ...]
    kernels: str
    module_classes: frozenset[str]
    keeps_dtypes: bool
    float16_scales: bool
    marker: str
    groups: tuple[str, int] | None

    def is_default_for(self, scheme: Scheme) -> bool:
        """Whether this is what is written for such a scheme when nobody says otherwise."""
        ...

    def refuses(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        """Why this layout cannot hold such a linear (the rule and the way out, one line), or None."""
        ...

    def refuses_layout(self, layout: Layout) -> str | None:
        """Why this layout cannot describe this mix of schemes and skipped linears, or None."""
        ...

    def packed_bytes(self, scheme: Scheme, out_features: int, in_features: int, dtype: str) -> int:
        """Bytes of the tensors that `pack` gives; dtype: of the source's weight, in safetensors' spelling."""
        ...

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """The local tensor names that `pack` writes for this scheme."""
        ...

    def pack(self, weight: CompressedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Local tensor names to tensors, e.g. {"qweight": ..., "scales": ...}; `dtype` is the source weight's."""
        ...

    def unpack(
        self, tensors: Mapping[str, torch.Tensor], scheme: Scheme, out_features: int, in_features: int
    ) -> CompressedWeight:
        """The exact inverse of `pack`. Raises LLMCompressError naming a missing or misshapen tensor."""
        ...

    def quantization_config(self, layout: Layout) -> dict[str, Any]:
        """The object for config.json["quantization_config"]."""
        ...

    def extra_files(self, layout: Layout) -> dict[str, str]:
        """Further files of the folder, name to text (gptq: quantize_config.json)."""
        ...

    def declared(self, config: Mapping[str, Any]) -> list[DeclaredGrid]:
        """The grids that a quantization_config of this layout declares, whoever wrote it."""
        ...

    def packed_shape(self, marker: StoredTensor, grids: Sequence[DeclaredGrid]) -> tuple[int, int] | None:
        """out_features and in_features of a packed linear from its marker, or None where that does not tell."""
        ...


class Exporter(Protocol):
    """Turns a finished checkpoint into a folder or file of another engine's own (GGUF, ONNX).

    reads: quant_methods of the checkpoints that it takes over as they are, "none" for plain weights.
    """

    name: str
    summary: str
    readers: Mapping[str, str]
    reads: frozenset[str]
    packages: tuple[Package, ...]

    def refuses(self, checkpoint: Checkpoint) -> str | None:
        """Why this checkpoint cannot be exported so (the rule and the way out, one line), or None; reads no weight."""
        ...

    def export(self, checkpoint: Checkpoint, out: Path) -> list[Path]:
        """Write `checkpoint` into the new folder `out`, a linear in memory at a time; returns the files.

        Raises: LLMCompressError for what the target cannot hold, naming the tensor.
        """
        ...


FORMATS: Registry[Format] = Registry("format", "llmcompress.formats")


def default_format(scheme: Scheme) -> Format:
    """The layout that is written for a scheme when nobody says otherwise.

    Raises: LLMCompressError where no layout holds it.
    """
    for entry in FORMATS:
        if entry.is_default_for(scheme):
            return entry
    raise LLMCompressError(
        f"scheme {scheme.label()}: no layout holds it", "choose a scheme of `llmcompress methods`, such as W4A16"
    )


def by_quant_method(quant_method: str) -> Format | None:
    """The format whose config names this quant_method, or None for a layout of others'."""
    return next((entry for entry in FORMATS if entry.quant_method == quant_method), None)


def integer_grid_refusal(scheme: Scheme, in_features: int, format_name: str) -> str | None:
    """Why a layout of integer grids cannot hold this scheme in rows of `in_features`, or None."""
    if reason := unserved(scheme, WEIGHTS, f"format {format_name}"):
        return reason
    grid = scheme.grid
    if grid.codebook:
        holders = [f"write {entry.name}" for entry in FORMATS if entry.is_default_for(scheme)]
        way = holders[0] if holders else "choose an integer scheme such as W4A16"
        return f"{format_name} holds integer grids, not {grid.codebook}; {way}"
    if in_features % grid.group_width(in_features):
        return (
            f"group_size {grid.group_size} does not divide in_features {in_features}; "
            "choose a divisor, or -1 for one scale per row"
        )
    return None


def nothing_compressed(schemes: Mapping[str, Scheme]) -> str | None:
    """Why a checkpoint without a compressed linear cannot be described, or None."""
    return None if schemes else "no linear is quantized; quantize at least one, or copy the checkpoint as it is"


def cast_exactly(scale: torch.Tensor, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """A copy of float32 `scale` in `dtype`, contiguous, with no value changed.

    Raises: LLMCompressError when a value is not representable: the file would not hold what the solver worked with.
    """
    cast = scale.to(dtype, copy=True).contiguous()
    wrong = cast.float() != scale
    if bool(wrong.any()):
        value = scale[wrong][0].item()
        raise LLMCompressError(
            f"{layout} stores scales as {dtype_name(dtype)}, which cannot hold {int(wrong.sum())} of {scale.numel()} "
            f"of them exactly (the first is {value!r})",
            "write this layout from its own run, so that its scales are rounded before the codes are chosen",
        )
    return cast


def take(
    tensors: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype | None, shape: tuple[int, ...]
) -> torch.Tensor:
    """The tensor `name` as a file gave it. `dtype` None allows any.

    Raises: LLMCompressError naming the tensor that is missing or of another dtype or shape.
    """
    if name not in tensors:
        raise LLMCompressError(f"tensor {name} is missing; found {', '.join(sorted(tensors)) or 'none'}")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        raise LLMCompressError(f"tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise LLMCompressError(f"tensor {name} is {dtype_name(tensor.dtype)}, expected {dtype_name(dtype)}")
    return tensor


def dtype_name(dtype: torch.dtype) -> str:
    """The name that configs use, e.g. bfloat16."""
    return str(dtype).removeprefix("torch.")
