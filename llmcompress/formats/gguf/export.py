"""A checkpoint folder (ours, or plain weights) as one GGUF file, written tensor by tensor and read back.

Codes are carried over as they are; tensors that are not quantized keep their dtype, or take the one asked for; vectors
are float32, as llama.cpp wants them. The file is reopened and every tensor dequantized by the `gguf` package must be
bit for bit what went in. Memory holds one tensor at a time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from llmcompress import __version__
from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.compress.scheme import WeightScheme
from llmcompress.compress.weight import QuantizedWeight
from llmcompress.console import Progress
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.formats.base import FORMATS
from llmcompress.formats.gguf.blocks import BLOCK, BlockType, block_type, packed, rounded_q8_0
from llmcompress.formats.gguf.families import Family, add_fields, family_of, interleaved
from llmcompress.formats.gguf.tokenizer import GgufTokenizer, read_tokenizer
from llmcompress.report import FILE, FOLDER, LinearRow, RunReport

if TYPE_CHECKING:
    from gguf import GGUFWriter

Dense = Literal["auto", "F32", "F16", "BF16", "Q8_0"]
"""How tensors that are not quantized are stored; auto: in the dtype that they have."""
STORED = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F32"}
"""safetensors' dtype -> ggml's."""
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
"""general.file_type, llama.cpp's name for what most of a file is."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor to be written. name: in the file. kind: ggml's type. shape: as in the checkpoint, [O, I] or [I].

    row: of the report, for a linear with codes. heads: interleave rows by so many heads; offset: add to every entry.
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
    """What was written: the file, its size, tensors by ggml type, and grids whose codes were widened to fit a block."""

    file: Path
    num_bytes: int
    kinds: dict[str, int]
    carried: list[str]


def export_gguf(folder: Path, out: Path, *, dense: Dense = "auto", progress: Progress) -> Exported:
    """Write the checkpoint in `folder` as the GGUF file `out`; see the module's docstring.

    Raises: LLMCompressError, before anything is written, for a family, tokenizer or grid that GGUF does not hold, and
    where the written file does not say what went in; the file is then not there.
    """
    if find_spec("gguf") is None:
        raise LLMCompressError("GGUF export needs the package gguf", "pip install 'llmcompress[gguf]'")
    if out.suffix != ".gguf":
        raise LLMCompressError(f"{out}: a GGUF file ends in .gguf", f"-o {out.with_suffix('.gguf')}")
    from transformers import AutoConfig

    checkpoint = Checkpoint.open(folder)
    config = AutoConfig.from_pretrained(folder)
    family = family_of(config, str(folder))
    rows = _quantized_rows(folder)
    tensors = _tensors(checkpoint, config, family, rows, dense)
    embedding = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
    tokenizer = read_tokenizer(folder, embedding.shape[0])
    scratch = out.with_name(f".{out.name}.partial")
    try:
        with progress.step("writing GGUF", 2 * len(tensors)) as bar:
            extra = _write(scratch, folder, config, family, tokenizer, tensors, checkpoint, bar)
            _compare(scratch, checkpoint, tensors, extra, bar)
        os.replace(scratch, out)
    finally:
        scratch.unlink(missing_ok=True)
    kinds: dict[str, int] = {}
    for tensor in tensors:
        kinds[tensor.kind] = kinds.get(tensor.kind, 0) + 1
    carried = sorted({f"{row.scheme} as Q4_0" for row in rows.values() if _block(row).carried})
    return Exported(out, out.stat().st_size, kinds, carried)


def _quantized_rows(folder: Path) -> dict[str, LinearRow]:
    """Tensor name -> the report's row of the linear, for linears with codes."""
    if not (folder / FOLDER / FILE).is_file():
        return {}
    report = RunReport.load(folder)
    return {f"{row.stem}.weight": row for row in report.linears if row.outcome != "skipped"}


def _grid(row: LinearRow) -> WeightScheme:
    assert row.grid is not None, "a skipped linear has no grid"
    return WeightScheme(**row.grid)  # type: ignore[arg-type]


def _block(row: LinearRow) -> BlockType:
    kind = block_type(_grid(row), row.shape[1])
    assert isinstance(kind, BlockType), kind
    return kind


def _tensors(
    checkpoint: Checkpoint, config: Any, family: Family, rows: dict[str, LinearRow], dense: Dense
) -> list[GgufTensor]:
    """Every tensor of the file, in the order of the blocks.

    Raises: LLMCompressError, one for each grid that no block holds and each tensor without a name in the family.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(known for known, name in MODEL_ARCH_NAMES.items() if name == family.arch)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    shapes = {name: stored.shape for name, stored in checkpoint.stored.items()} | {
        name: row.shape for name, row in rows.items()
    }
    packed_names = {f"{row.stem}.{suffix}" for row in rows.values() for suffix in _suffixes(checkpoint, row)}
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    }
    problems: dict[str, LLMCompressError] = {}
    found: list[GgufTensor] = []
    for source, shape in shapes.items():
        if source in packed_names and source not in rows or source.endswith((".rotary_emb.inv_freq", ".g_idx")):
            continue
        if source == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            problems[source] = LLMCompressError(f"{checkpoint.name}: {source} has no name in llama.cpp's {family.arch}")
            continue
        row = rows.get(source)
        kind = _kind(checkpoint, source, shape, row, dense)
        if not isinstance(kind, str):
            problems[kind.message] = kind
            continue
        leaf = source.rsplit(".", 2)[-2]
        permuted = heads.get(leaf) if family.permutes else None
        offset = family.norm_offset if "norm" in leaf else 0.0
        found.append(GgufTensor(name, source, kind, tuple(shape), row, permuted, offset))
    raise_all(list(problems.values()))
    return sorted(found, key=lambda tensor: [int(part) if part.isdecimal() else -1 for part in tensor.name.split(".")])


def _suffixes(checkpoint: Checkpoint, row: LinearRow) -> tuple[str, ...]:
    return FORMATS.get(RunReport.load(checkpoint.folder).output.format).suffixes(_grid(row))  # type: ignore[union-attr]


def _kind(
    checkpoint: Checkpoint, source: str, shape: tuple[int, ...], row: LinearRow | None, dense: Dense
) -> str | LLMCompressError:
    if row is not None:
        block = block_type(_grid(row), shape[1])
        return LLMCompressError(f"{row.scheme}: {block}") if isinstance(block, str) else block.name
    if len(shape) == 1:
        return "F32"
    if dense == "Q8_0" and shape[1] % BLOCK == 0:
        return "Q8_0"
    stored = checkpoint.stored[source].dtype
    if stored not in STORED:
        return LLMCompressError(f"{checkpoint.name}: {source} is stored as {stored}, which is no plain weight")
    return STORED[stored] if dense in ("auto", "Q8_0") else dense


def _write(
    file: Path, folder: Path, config: Any, family: Family, tokenizer: GgufTokenizer, tensors: list[GgufTensor],
    checkpoint: Checkpoint, bar: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(file, family.arch)
    writer.add_quantization_version(2)
    writer.add_file_type(
        FILE_TYPES[max((t.kind for t in tensors if len(t.shape) == 2), key=[t.kind for t in tensors].count)]
    )
    writer.add_string("general.quantized_by", f"llmcompress {__version__}")
    extra = add_fields(writer, config)
    _add_tokenizer(writer, folder, tokenizer)
    for name, value in extra.items():
        writer.add_tensor_info(name, value.shape, value.numpy().dtype, value.numel() * 4)
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.kind]
        block, num_bytes = GGML_QUANT_SIZES[kind]
        size = num_bytes * (torch.Size(tensor.shape).numel() // block)
        writer.add_tensor_info(tensor.name, tensor.shape, torch.empty(0).numpy().dtype, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for value in extra.values():
        writer.write_tensor_data(value.numpy())
    for tensor in tensors:
        writer.write_tensor_data(_bytes(checkpoint, tensor).numpy())
        bar.advance(1, tensor.name)
    writer.close()
    return extra


def _add_tokenizer(writer: GGUFWriter, folder: Path, tokenizer: GgufTokenizer) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
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
    begins = loaded("a", add_special_tokens=True)["input_ids"][:1] == [loaded.bos_token_id]
    writer.add_add_bos_token(begins)
    writer.add_add_space_prefix(bool(tokenizer.add_space_prefix))
    if isinstance(loaded.chat_template, str):
        writer.add_chat_template(loaded.chat_template)


def _value(checkpoint: Checkpoint, tensor: GgufTensor) -> torch.Tensor | QuantizedWeight:
    """What a tensor holds, with rows interleaved and the offset added: float32, or codes and scales."""
    if tensor.row is None:
        value = checkpoint.tensor(tensor.source).to(torch.float32) + tensor.offset
        return interleaved(value, tensor.heads) if tensor.heads else value
    from llmcompress.compress.roundtrip import unpack_row

    weight = unpack_row(checkpoint, tensor.row, FORMATS.get(_format(checkpoint)))
    if tensor.heads is None:
        return weight
    zeros = weight.zero_point_OG
    return QuantizedWeight(
        interleaved(weight.codes_OI, tensor.heads),
        interleaved(weight.scale_OG, tensor.heads),
        None if zeros is None else interleaved(zeros, tensor.heads),
        weight.codebook,
        weight.scheme,
    )


def _format(checkpoint: Checkpoint) -> str:
    output = RunReport.load(checkpoint.folder).output
    assert output is not None, "a report with linears names its output"
    return output.format


def _bytes(checkpoint: Checkpoint, tensor: GgufTensor) -> torch.Tensor:
    """The tensor as it lies in the file."""
    value = _value(checkpoint, tensor)
    if isinstance(value, QuantizedWeight):
        return packed(value)
    if tensor.kind == "Q8_0":
        return rounded_q8_0(value)
    if tensor.kind == "BF16":
        return value.to(torch.bfloat16).view(torch.uint8)
    return value.to(torch.float16 if tensor.kind == "F16" else torch.float32)


def _compare(
    file: Path, checkpoint: Checkpoint, tensors: list[GgufTensor], extra: dict[str, torch.Tensor], bar: Any
) -> None:
    """Reopen the file and hold every tensor, dequantized by the format's own library, against what went in."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    written = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    missing = {tensor.name for tensor in tensors} ^ (written.keys() - extra.keys())
    if missing:
        raise LLMCompressError(f"{file}: {sorted(missing)[0]} is not what was to be written", "run again")
    for tensor in tensors:
        value = _value(checkpoint, tensor)
        wanted = value.dequantize() if isinstance(value, QuantizedWeight) else value
        found = torch.from_numpy(dequantize(written[tensor.name].data, written[tensor.name].tensor_type).copy())
        exact = isinstance(value, QuantizedWeight) or tensor.kind == "F32"
        near = exact or tensor.kind == "Q8_0" or tensor.kind == STORED.get(checkpoint.dtype(tensor.source))
        if tensor.kind in ("F16", "BF16"):
            wanted = wanted.to(torch.float16 if tensor.kind == "F16" else torch.bfloat16).float()
        if tensor.kind == "Q8_0" and tensor.row is None:
            bound = wanted.abs().reshape(len(wanted), -1, BLOCK).amax(-1, keepdim=True) / 127
            error = (found - wanted).abs().reshape(len(wanted), -1, BLOCK)
            same = bool((error <= bound * 0.51 + 1e-7).all())
        else:
            same = torch.equal(found.reshape(wanted.shape), wanted)
        if not same or not near:
            raise LLMCompressError(
                f"{file}: {tensor.name} does not hold what was written", "the disk is at fault; run again"
            )
        bar.advance(1, tensor.name)
