"""A checkpoint folder (ours, or plain weights) as one GGUF file, written tensor by tensor and read back.

Codes are carried over as they are; tensors that are not quantized keep their dtype, or take the one asked for; vectors
are float32, as llama.cpp wants them. The file is reopened, and every tensor that the `gguf` package dequantizes from it
must be what went in: codes and kept dtypes bit for bit, Q8_0 within half a step. Memory holds one tensor at a time.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from llmcompress import __version__
from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.compress.scheme import WeightGrid
from llmcompress.compress.weight import QuantizedWeight
from llmcompress.console import Progress
from llmcompress.errors import LLMCompressError, collected, raise_all
from llmcompress.formats.base import FORMATS, Format
from llmcompress.formats.gguf.blocks import BLOCK, block_type, packed, rounded_q8_0
from llmcompress.formats.gguf.families import Family, add_fields, family_of, interleaved
from llmcompress.formats.gguf.tokenizer import GgufTokenizer, read_tokenizer
from llmcompress.models.loading import read_config
from llmcompress.report import LinearRow, RunReport, is_ours

if TYPE_CHECKING:
    from gguf import GGUFWriter

Dense = Literal["auto", "F32", "F16", "BF16", "Q8_0"]
"""How matrices that are not quantized are stored; auto: in the dtype that they have."""
DENSE: tuple[Dense, ...] = get_args(Dense)
STORED = {"F64": "F32", "F32": "F32", "F16": "F16", "BF16": "BF16"}
"""safetensors' dtype -> ggml's."""
TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
"""general.file_type: what most of a file is."""
LEFT_OUT = (".rotary_emb.inv_freq", ".g_idx", ".masked_bias")
"""Buffers that llama.cpp computes by itself."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file. name: there; source: in the checkpoint. kind: ggml's type. shape: [O, I] or [I].

    row: of the report, for a linear with codes. heads: its rows are interleaved by so many; offset: added to it.
    """

    name: str
    source: str
    kind: str
    shape: tuple[int, ...]
    row: LinearRow | None = None
    heads: int | None = None
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: the file, its size in bytes, tensors by ggml type, and grids whose codes had to be widened."""

    file: Path
    num_bytes: int
    kinds: dict[str, int]
    widened: list[str]

    def __str__(self) -> str:
        from llmcompress.console import megabytes

        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        text = f"{self.file}\n  size     {megabytes(self.num_bytes)}; tensors: {kinds}"
        return text + "".join(f"\n  note     {grid} is exact and takes 4.5 bits a weight" for grid in self.widened)


def export_gguf(
    folder: Path, out: Path, *, dense: Dense = "auto", overwrite: bool = False, progress: Progress
) -> Exported:
    """Write the checkpoint in `folder` as the GGUF file `out`; see the module's docstring.

    Raises: LLMCompressError, before anything is written, for a family, tokenizer or grid that GGUF does not hold and
    for a file that is there already, unless `overwrite`; and where the file does not hold what went in, which is then
    not kept.
    """
    if find_spec("gguf") is None:
        raise LLMCompressError("GGUF export needs the package gguf", "pip install 'llmcompress[gguf]'")
    if out.suffix != ".gguf":
        raise LLMCompressError(f"{out}: a GGUF file ends in .gguf", f"-o {out.with_suffix('.gguf')}")
    if out.exists() and not overwrite:
        raise LLMCompressError(f"{out}: is there already", "choose another name, or pass --overwrite")
    export = Export.plan(folder, dense)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.partial")
    try:
        with progress.step("writing GGUF", len(export.tensors)) as bar:
            for name in export.write(scratch):
                bar.advance(1, name)
        with progress.step("reading it back", len(export.tensors)) as bar:
            for name in export.compare(scratch):
                bar.advance(1, name)
        os.replace(scratch, out)
    finally:
        scratch.unlink(missing_ok=True)
    widened = {tensor.row.scheme for tensor in export.tensors if tensor.row and _grid(tensor.row).num_bits < 4}
    return Exported(
        out,
        out.stat().st_size,
        dict(Counter(tensor.kind for tensor in export.tensors)),
        sorted(f"{scheme} as Q4_0" for scheme in widened),
    )


@dataclass(frozen=True, slots=True)
class Export:
    """One export, decided: config and family, tokenizer, and every tensor in the order of the blocks."""

    checkpoint: Checkpoint
    config: Any
    family: Family
    tokenizer: GgufTokenizer
    tensors: list[GgufTensor]
    layout: Format | None

    @classmethod
    def plan(cls, folder: Path, dense: Dense) -> Export:
        """Decide over every tensor. Raises: LLMCompressError, all problems together."""
        checkpoint = Checkpoint.open(folder)
        config = read_config(folder, checkpoint.trust_remote_code)
        family = family_of(config, str(folder))
        report = RunReport.load(folder) if is_ours(folder) else None
        linears = report.linears if report and report.output and report.output.quantized_parameters else []
        rows = {f"{row.tensor_prefix}.weight": row for row in linears if row.outcome != "skipped"}
        layout = FORMATS.get(report.output.format) if report and report.output and rows else None
        if "quantization_config" in checkpoint.config and layout is None:
            raise LLMCompressError(
                f"{folder}: was quantized by another tool, so its codes are not known here",
                "export the original checkpoint, or quantize it with llmcompress first",
            )
        tensors = _tensors(checkpoint, config, family, rows, layout, dense)
        embedding = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
        return cls(checkpoint, config, family, read_tokenizer(folder, embedding.shape[0]), tensors, layout)

    def write(self, file: Path) -> Iterator[str]:
        """Write the file; gives the name of each tensor as it is done."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

        matrices = Counter(tensor.kind for tensor in self.tensors if len(tensor.shape) == 2)
        writer = GGUFWriter(file, self.family.arch)
        writer.add_quantization_version(2)
        writer.add_file_type(FILE_TYPES[matrices.most_common(1)[0][0]])
        writer.add_string("general.quantized_by", f"llmcompress {__version__}")
        extra = add_fields(writer, self.config)
        _add_tokenizer(writer, self.checkpoint.folder, self.tokenizer)
        for name, value in extra.items():
            writer.add_tensor_info(name, value.shape, value.numpy().dtype, value.numel() * value.element_size())
        for tensor in self.tensors:
            kind = GGMLQuantizationType[tensor.kind]
            block, num_bytes = GGML_QUANT_SIZES[kind]
            size = num_bytes * (torch.Size(tensor.shape).numel() // block)
            writer.add_tensor_info(tensor.name, tensor.shape, torch.empty(0).numpy().dtype, size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for value in extra.values():
            writer.write_tensor_data(value.numpy())
        for tensor in self.tensors:
            writer.write_tensor_data(self.stored(tensor).numpy())
            yield tensor.name
        writer.close()

    def value(self, tensor: GgufTensor) -> torch.Tensor | QuantizedWeight:
        """What a tensor is to hold, rows interleaved and the offset added: float32, or codes and scales."""
        if tensor.row is None:
            value = self.checkpoint.tensor(tensor.source).to(torch.float32) + tensor.offset
            return interleaved(value, tensor.heads) if tensor.heads else value
        from llmcompress.formats.roundtrip import unpack_codes

        assert self.layout is not None, "codes without a layout"
        weight = unpack_codes(self.checkpoint, tensor.row, self.layout)
        if tensor.heads is None:
            return weight
        zeros_OG = weight.zero_point_OG
        return replace(
            weight,
            codes_OI=interleaved(weight.codes_OI, tensor.heads),
            scale_OG=interleaved(weight.scale_OG, tensor.heads),
            zero_point_OG=None if zeros_OG is None else interleaved(zeros_OG, tensor.heads),
        )

    def stored(self, tensor: GgufTensor) -> torch.Tensor:
        """The tensor as it lies in the file."""
        value = self.value(tensor)
        if isinstance(value, QuantizedWeight):
            return packed(value)
        if tensor.kind == "Q8_0":
            return rounded_q8_0(value)
        stored = value.to(TORCH[tensor.kind])
        return stored.view(torch.uint8) if tensor.kind == "BF16" else stored

    def compare(self, file: Path) -> Iterator[str]:
        """Reopen the file and hold every tensor against what went in; gives the name of each that is right.

        Raises: LLMCompressError naming the first tensor that is missing or differs.
        """
        from gguf import GGUFReader
        from gguf.quants import dequantize

        written = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
        for tensor in self.tensors:
            if tensor.name not in written:
                raise LLMCompressError(f"{file}: {tensor.name} is missing", "the disk is at fault; run again")
            data = dequantize(written[tensor.name].data, written[tensor.name].tensor_type)
            if not _same(tensor, self.value(tensor), torch.from_numpy(data.copy()).reshape(tensor.shape)):
                raise LLMCompressError(
                    f"{file}: {tensor.name} does not hold what was written", "the disk is at fault; run again"
                )
            yield tensor.name


def _same(tensor: GgufTensor, value: torch.Tensor | QuantizedWeight, read: torch.Tensor) -> bool:
    """Whether what was read is what went in; rounding to Q8_0 is allowed half a step and the float16 of the scale."""
    if isinstance(value, QuantizedWeight):
        return torch.equal(read, value.dequantize())
    if tensor.kind != "Q8_0":
        return torch.equal(read, value.to(TORCH[tensor.kind]).float())
    step_OB1 = value.abs().reshape(len(value), -1, BLOCK).amax(-1, keepdim=True) / 127
    error_OBi = (read - value).abs().reshape(len(value), -1, BLOCK)
    return bool((error_OBi <= 0.57 * step_OB1 + 1e-7).all())


def _grid(row: LinearRow) -> WeightGrid:
    assert row.grid is not None, "a linear with codes has a grid"
    return WeightGrid(**row.grid)  # type: ignore[arg-type]


def _tensors(
    checkpoint: Checkpoint, config: Any, family: Family, rows: dict[str, LinearRow], layout: Format | None, dense: Dense
) -> list[GgufTensor]:
    """Every tensor of the file, in the order of the blocks.

    Raises: LLMCompressError, one for each grid that no block holds and each tensor without a name in the family.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    from llmcompress.formats.roundtrip import row_scheme

    arch = next(known for known, name in MODEL_ARCH_NAMES.items() if name == family.arch)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    packed_names = {
        f"{row.tensor_prefix}.{suffix}"
        for row in rows.values()
        for suffix in (layout.suffixes(row_scheme(row)) if layout else ())
    }
    dense_names = [name for name in checkpoint.stored if name not in packed_names]
    query, key = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    problems: list[LLMCompressError] = []
    tensors: list[GgufTensor] = []
    for source in [*dense_names, *rows]:
        if source.endswith(LEFT_OUT) or (source == "lm_head.weight" and config.tie_word_embeddings):
            continue
        with collected(problems):
            row = rows.get(source)
            name = names.get_name(source, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise LLMCompressError(f"{checkpoint.name}: {source} has no name in llama.cpp's {family.arch}")
            shape = row.shape if row else checkpoint.shape(source)
            module = source.rsplit(".", 2)[-2]
            heads = {"q_proj": query, "k_proj": key}.get(module) if family.permutes else None
            offset = family.norm_offset if "norm" in module else 0.0
            tensors.append(
                GgufTensor(name, source, _kind(checkpoint, source, row, dense), tuple(shape), row, heads, offset)
            )
    raise_all(list({problem.message: problem for problem in problems}.values()))
    return sorted(
        tensors, key=lambda tensor: [int(part) if part.isdecimal() else -1 for part in tensor.name.split(".")]
    )


def _block_order(tensor: GgufTensor) -> list[int]:
    return [int(part) if part.isdecimal() else -1 for part in tensor.name.split(".")]


def _kind(checkpoint: Checkpoint, source: str, row: LinearRow | None, dense: Dense) -> str:
    """ggml's type for a tensor. Raises: LLMCompressError where there is none."""
    if row is not None:
        block = block_type(_grid(row), row.shape[1])
        if isinstance(block, str):
            raise LLMCompressError(f"{row.scheme}: {block}")
        return block.name
    shape, stored = checkpoint.shape(source), checkpoint.dtype(source)
    if stored not in STORED:
        raise LLMCompressError(f"{checkpoint.name}: {source} is stored as {stored}, which is no plain weight")
    if len(shape) == 1:
        return "F32"
    if dense == "Q8_0":
        return "Q8_0" if shape[1] % BLOCK == 0 else STORED[stored]
    return STORED[stored] if dense == "auto" else dense


def _add_tokenizer(writer: GGUFWriter, folder: Path, tokenizer: GgufTokenizer) -> None:
    from llmcompress.checkpoint.source import load_tokenizer

    loaded = load_tokenizer(folder)
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.merges:
        writer.add_token_merges(tokenizer.merges)
    if tokenizer.scores:
        writer.add_token_scores(tokenizer.scores)
    for add, token in (
        (writer.add_bos_token_id, loaded.bos_token_id),
        (writer.add_eos_token_id, loaded.eos_token_id),
        (writer.add_unk_token_id, loaded.unk_token_id),
        (writer.add_pad_token_id, loaded.pad_token_id),
    ):
        if token is not None:
            add(token)
    first = loaded("a", add_special_tokens=True)["input_ids"][:1]
    writer.add_add_bos_token(first == [loaded.bos_token_id])
    writer.add_add_space_prefix(bool(tokenizer.add_space_prefix))
    if isinstance(loaded.chat_template, str):
        writer.add_chat_template(loaded.chat_template)
