"""The teacher's predictions on disk, so that a student can be trained, and trained again, without the teacher.

    CACHE/KEY/manifest.json      what was asked (the key is its sha256), who the teachers were, how much mass is left
              ids.npy            int32   [N, S, K]      memory-mapped; row n is row n of the training data
              log_probs.npy      float32 [N, S, K + 1]  of those tokens, and of all others together (topk.py)

The key holds every teacher's identity and share, the digest of the token rows and of their masks, K, the temperature
and how teachers are combined: what was filled by another teacher or from other data can never be read by mistake. A
folder is for one teacher (or mixture) and one data set: an entry for something else is an error which names
both, unless it is asked to be filled again. An entry is written beside its place and renamed, whole or not at all.

Shapes: N rows, S tokens of a row, K tokens kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from llmcompress.errors import LLMCompressError

VERSION = 2
PartName = Literal["training", "held-out"]
MANIFEST, IDS, LOG_PROBS = "manifest.json", "ids.npy", "log_probs.npy"


class CachedTeacher(BaseModel):
    """One teacher as an entry knows it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    identity: str
    share: float


class CacheRequest(BaseModel):
    """What an entry holds; its sha256 is the entry's key. Teachers' names are left out of it: identity counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    teachers: tuple[CachedTeacher, ...]
    data: str
    num_rows: int
    row_tokens: int
    num_kept: int
    vocabulary: int
    temperature: float
    combine: str
    part: PartName = "training"

    def key(self) -> str:
        """The name of the entry: 32 hex digits."""
        values = self.model_dump(mode="json", exclude={"teachers"})
        values["teachers"] = sorted([teacher.identity, teacher.share] for teacher in self.teachers)
        return hashlib.sha256(json.dumps([VERSION, values], sort_keys=True).encode()).hexdigest()[:32]


class Manifest(BaseModel):
    """An entry's first file. rest: mass outside the kept tokens over the tokens that count, mean and largest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    asked: CacheRequest
    mean_rest: float
    largest_rest: float
    num_tokens: int


@dataclass(frozen=True)
class TeacherCache:
    """An entry open for reading."""

    folder: Path
    manifest: Manifest
    ids_NSK: Any
    log_probs_NSK1: Any

    def rows(self, rows_B: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids int64 [B, S, K], log-probabilities float32 [B, S, K + 1]) of some rows, cut to `length` tokens."""
        picked = rows_B.cpu().numpy()
        ids = torch.from_numpy(self.ids_NSK[picked, :length].astype(np.int64))
        return ids, torch.from_numpy(np.ascontiguousarray(self.log_probs_NSK1[picked, :length]))


Rows = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
"""(first row, behind the last) -> (ids [B, S, K], log-probabilities [B, S, K + 1]) of those rows."""


def find(root: Path, request: CacheRequest) -> TeacherCache | None:
    """The entry for `request`, or None where there is none yet.

    Raises: LLMCompressError for an entry that is damaged.
    """
    folder = root / request.key()
    return _open(folder) if folder.is_dir() else None


def entries(root: Path) -> list[TeacherCache]:
    """Every entry below `root`, by name; what is no entry is passed over."""
    return [_open(path.parent) for path in sorted(root.glob(f"*/{MANIFEST}"))] if root.is_dir() else []


def check(root: Path, request: CacheRequest) -> None:
    """Nothing below `root` holds something else for the same part of the rows.

    Raises: LLMCompressError that says what it was filled for and what is asked.
    """
    for entry in entries(root):
        filled = entry.manifest.asked
        if filled.part == request.part and filled.key() != request.key():
            raise LLMCompressError(
                f"cache {root}: was not filled for this ({request.part} rows): "
                f"{'; '.join(differences(filled, request))}",
                "name another folder (--cache), or fill this one again (--refill-cache)",
            )


def clear(root: Path, request: CacheRequest) -> list[str]:
    """Remove the entries that `check` refuses, and damaged ones; the names of those that are gone."""
    gone = []
    for path in sorted(root.glob(f"*/{MANIFEST}")):
        try:
            filled = _open(path.parent).manifest.asked
            keep = filled.part != request.part or filled.key() == request.key()
        except LLMCompressError:
            keep = False
        if not keep:
            shutil.rmtree(path.parent)
            gone.append(path.parent.name)
    return gone


def differences(filled: CacheRequest, request: CacheRequest) -> list[str]:
    """In what two entries differ, in words."""
    reasons = []
    before, now = (sorted((teacher.identity, teacher.share) for teacher in each.teachers) for each in (filled, request))
    if before != now:
        reasons.append(f"it holds the predictions of {_named(filled)}, and the teacher is {_named(request)}")
    if filled.data != request.data:
        reasons.append(
            f"it is of other rows (digest {filled.data[:12]}, now {request.data[:12]}: another file, seq_len or seed)"
        )
    for name, what in (
        ("temperature", "temperature"),
        ("num_kept", "likeliest tokens kept"),
        ("vocabulary", "entries of a prediction"),
        ("combine", "averaged over teachers"),
    ):
        values = getattr(filled, name), getattr(request, name)
        if values[0] != values[1]:
            reasons.append(f"{what} {values[0]}, now {values[1]}")
    return reasons or ["it is of another version of this cache"]


def _named(request: CacheRequest) -> str:
    shares = len(request.teachers) > 1
    return " and ".join(
        f"{teacher.name} (identity {teacher.identity[:12]}{f', share {teacher.share:g}' if shares else ''})"
        for teacher in request.teachers
    )


def write(root: Path, request: CacheRequest, counts_NS: torch.Tensor, rows: Rows, rows_at_once: int) -> TeacherCache:
    """Fill the entry for `request` from `rows`, a few rows at a time; whole or not at all.

    counts_NS: bool, the tokens that count (of which `mean_rest` is taken).
    """
    folder, scratch = root / request.key(), root / f".{request.key()}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    shape = (request.num_rows, request.row_tokens, request.num_kept)
    ids = np.lib.format.open_memmap(scratch / IDS, mode="w+", dtype=np.int32, shape=shape)
    wider = (*shape[:2], shape[2] + 1)
    log_probs = np.lib.format.open_memmap(scratch / LOG_PROBS, mode="w+", dtype=np.float32, shape=wider)
    total, largest = 0.0, 0.0
    for start in range(0, request.num_rows, rows_at_once):
        stop = min(request.num_rows, start + rows_at_once)
        ids_BSK, log_probs_BSK1 = rows(start, stop)
        ids[start:stop], log_probs[start:stop] = ids_BSK.cpu().numpy(), log_probs_BSK1.cpu().numpy()
        rest = log_probs_BSK1[..., -1].cpu().double().exp()[counts_NS[start:stop]]
        total += float(rest.sum())
        largest = max(largest, float(rest.max()) if len(rest) else 0.0)
    ids.flush()
    log_probs.flush()
    num_tokens = int(counts_NS.sum())
    mean = total / max(num_tokens, 1)
    manifest = Manifest(asked=request, mean_rest=mean, largest_rest=largest, num_tokens=num_tokens)
    (scratch / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(scratch, folder)
    return _open(folder)


def _open(folder: Path) -> TeacherCache:
    hint = "remove that folder; it is filled again from the teacher"
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))
        ids, log_probs = (np.load(folder / name, mmap_mode="r") for name in (IDS, LOG_PROBS))
    except (OSError, ValueError, ValidationError) as error:
        raise LLMCompressError(f"{folder}: a damaged teacher cache ({str(error).splitlines()[0]})", hint) from error
    request = manifest.asked
    if ids.shape != (request.num_rows, request.row_tokens, request.num_kept) or request.key() != folder.name:
        raise LLMCompressError(f"{folder}: a teacher cache whose files and manifest do not belong together", hint)
    return TeacherCache(folder, manifest, ids, log_probs)
