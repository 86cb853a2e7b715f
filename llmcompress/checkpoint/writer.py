"""Checkpoints written whole or not at all, without holding a shard in memory.

Tensors arrive as byte streams (copied from the source, or from the file of a finished layer) and flow into shards of
bounded size; each file's sha256 is taken on the way. The caller fills a temporary folder and renames it at the end.
Only what a run wrote is ever replaced: an inventory in each result lists it; anything else is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Protocol

from llmcompress.checkpoint.files import read_json
from llmcompress.checkpoint.safetensors import DTYPE_BYTES
from llmcompress.errors import LLMCompressError
from llmcompress.files import write_atomic
from llmcompress.report import FILE, FOLDER, PLAIN, Output, RunReport

SHARD_BYTES = 5_000_000_000
INVENTORY = ".files.json"
"""Beside the report: the names of all files that a folder had when it got its name. Of this machine, never pushed."""
LATER = re.compile(
    rf"README\.md|{FOLDER}/({re.escape(FILE)}|{re.escape(INVENTORY)}|\.lock|recipe\.yaml|figures/[^/]+\.png|samples/[^/]+\.jsonl)"
    rf"|({FOLDER}/((figures|samples)/)?)?\.?[\w.-]+\.tmp"
)
"""What stages write into a finished folder: evidence, the card and its figures, and what a killed one left of them."""


class Streamed(Protocol):
    """A tensor that can be written without being held: copied from a file, or computed when its turn comes."""

    @property
    def name(self) -> str:
        """In the file."""
        ...

    @property
    def dtype(self) -> str:
        """In safetensors' spelling."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""
        ...

    @property
    def num_bytes(self) -> int:
        """Of all chunks together."""
        ...

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, a piece at a time."""
        ...


def write_shards(folder: Path, tensors: Sequence[Streamed], shard_bytes: int = SHARD_BYTES) -> dict[str, str]:
    """Write `tensors` into `folder` as model.safetensors, or as shards with an index, in the order given.

    Returns: file name -> sha256 for every file written, index included.
    """
    groups = _grouped(tensors, shard_bytes)
    if len(groups) == 1:
        return {"model.safetensors": write_safetensors(folder / "model.safetensors", groups[0])}
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        digests[file] = write_safetensors(folder / file, group)
        weight_map.update({tensor.name: file for tensor in group})
    total = sum(tensor.num_bytes for tensor in tensors)
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    digests["model.safetensors.index.json"] = hashlib.sha256(index.encode()).hexdigest()
    return digests


def write_safetensors(path: Path, tensors: Sequence[Streamed]) -> str:
    """Write one safetensors file by copying byte streams; returns its sha256. Synced to disk before returning.

    Widest dtypes first, then by name, so that every tensor starts aligned and the same tensors give the same bytes.
    """
    tensors = sorted(tensors, key=lambda tensor: (-DTYPE_BYTES[tensor.dtype], tensor.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha = hashlib.sha256()
    with path.open("wb") as file:
        for piece in _pieces(text, tensors):
            sha.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return sha.hexdigest()


def plain_output(folder: Path, digests: dict[str, str], tensors: Sequence[Streamed]) -> Output:
    """What the report says of a checkpoint of plain weights, none of them quantized, written into `folder`."""
    weights = sum(prod(tensor.shape) for tensor in tensors)
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    return Output(
        format=PLAIN,
        files={name: (folder / name).stat().st_size for name in digests},
        digests=digests,
        weights_bytes=num_bytes,
        bits_per_weight=8 * num_bytes / weights,
        bits_per_weight_model=8 * num_bytes / weights,
        quantized_parameters=0,
        total_parameters=weights,
    )


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """File name -> sha256 of files that another library wrote."""
    found = {}
    for name in names:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def give_name(scratch: Path, out: Path) -> None:
    """Rename a finished folder to its name; an earlier result of ours steps aside first and is removed last.

    What the folder holds now is written into its inventory, so that a later run knows what it may replace.

    Raises: LLMCompressError when something else lies at `out` (see `refuse_strangers`).
    """
    for folder in result_folders(scratch):
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        write_atomic(folder / FOLDER / INVENTORY, json.dumps({"files": names}, indent=1) + "\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    old = set_aside(out)
    if out.is_dir():
        refuse_strangers(out)
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out, old)
    os.replace(scratch, out)
    shutil.rmtree(old, ignore_errors=True)


def unfinished(out: Path) -> Path:
    """Where the work on a result lies until it gets its name; see workspace.py."""
    return out.with_name(f".{out.name}.partial")


def set_aside(out: Path) -> Path:
    """Where an earlier result waits while a new one takes its name."""
    return out.with_name(f".{out.name}.old")


def result_folders(out: Path) -> list[Path]:
    """The folders below `out` that hold a result of ours: itself, one per layout, or none."""
    if (out / FOLDER / FILE).is_file():
        return [out]
    return sorted(path for path in out.iterdir() if (path / FOLDER / FILE).is_file())


def refuse_strangers(out: Path) -> None:
    """Let pass only a folder that may be replaced whole: one result, or the layouts of one run, and nothing beside.

    Raises: LLMCompressError naming files that no run of ours wrote, or the results of other runs.
    """
    results = result_folders(out)
    if results != [out]:
        strangers = [path.name for path in out.iterdir() if path not in results]
        reports = {path.name: RunReport.load(path) for path in results}
        layouts = all(report.output and report.output.format == name for name, report in reports.items())
        if not strangers and (not layouts or len({report.created for report in reports.values()}) > 1):
            raise LLMCompressError(
                f"{out}: holds the results {', '.join(reports)}, which are not of one run and would all be replaced",
                "choose another output, for example a folder inside it",
            )
    else:
        strangers = []
    for folder in results:
        strangers += _strangers(folder)
    if strangers:
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        raise LLMCompressError(
            f"{out}: holds {', '.join(sorted(strangers)[:3])}{more}, which llmcompress did not write",
            "move it elsewhere, or choose another output",
        )


def _strangers(folder: Path) -> list[str]:
    """The files of a result that neither its inventory nor its report lists, and that no later stage writes."""
    inventory, report = folder / FOLDER / INVENTORY, RunReport.load(folder)
    listed = read_json(inventory).get("files") if inventory.is_file() else None
    names = {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else {"config.json"}
    names |= report.output.files.keys() if report.output else set()
    return [
        name
        for path in folder.rglob("*")
        if (path.is_symlink() or not path.is_dir())
        and (name := path.relative_to(folder).as_posix()) not in names
        and not LATER.fullmatch(name)
    ]


def _pieces(header: bytes, tensors: Iterable[Streamed]) -> Iterable[bytes]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors:
        yield from tensor.chunks()


def _grouped(tensors: Sequence[Streamed], shard_bytes: int) -> list[list[Streamed]]:
    groups: list[list[Streamed]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.num_bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.num_bytes
    return groups
