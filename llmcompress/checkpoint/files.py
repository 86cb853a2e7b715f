"""Files that somebody else wrote, read with bounds: JSON of a checkpoint, and names that must stay inside its folder.

A checkpoint is downloaded. Its files are opened by name, so a name (or a link under that name) that leads out of the
folder would put a private file of this machine into the output, and from there on the Hub. A path is therefore resolved
first, and must lie in the folder, or, for a snapshot in the Hub's cache, among the blobs that its links are made for:

    models--org--name/snapshots/COMMIT/config.json  ->  ../../blobs/HASH
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from llmcompress.errors import LLMCompressError, first_line, shown

MAX_JSON_BYTES = 64 << 20
MAX_NAME_BYTES = 255


def read_json(path: Path, rule: str = "", *, unique_keys: bool = False) -> dict[str, Any]:
    """The JSON object in a file of at most 64 MiB; `rule` says why the file is needed.

    unique_keys: refuse a key that an object gives twice, which JSON leaves open and Python resolves silently.

    Raises: LLMCompressError when the file is missing, unreadable, too large, not JSON, nested too deeply, or not an
    object.
    """
    with readable(str(path)):
        if not path.is_file():
            raise LLMCompressError(f"{path}: not found" + (f"; {rule}" if rule else ""))
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise LLMCompressError(f"{path}: {size} bytes, where at most {MAX_JSON_BYTES} are read as JSON")
        data = path.read_bytes()
    return json_object(data, str(path), unique_keys=unique_keys)


def json_object(data: bytes, where: str, *, unique_keys: bool = False) -> dict[str, Any]:
    """The JSON object in `data`, which lies at `where`.

    Raises: LLMCompressError for anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise LLMCompressError(f"{where}: gives {shown(key)} twice", "the file is damaged: fetch it again")
            found[key] = value
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique if unique_keys else None)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair has no UTF-8, and no digest
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else shown(error, 120)
        raise LLMCompressError(f"{where}: not valid JSON ({reason})", "fetch the file again") from error
    if not isinstance(value, dict):
        raise LLMCompressError(f"{where}: holds a {type(value).__name__}, not an object")
    return value


@contextmanager
def readable(name: str) -> Iterator[None]:
    """What the system says of a file or folder below `name` (no permission, too many open files) as one problem.

    Raises: LLMCompressError.
    """
    try:
        yield
    except OSError as error:
        place = shown(error.filename, 200) if error.filename else name
        raise LLMCompressError(f"{place}: cannot be read ({error.strerror or first_line(error)})") from error


def inside(folder: Path, name: str, where: Path) -> Path:
    """The path of the file `name` of the checkpoint in `folder`; `where` is the file that names it.

    Raises: LLMCompressError for a name that is absolute, goes up, or is none, and for a link that leads out.
    """
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or not _plain(name):
        raise LLMCompressError(
            f"{where}: names {shown(name)!r}; a file of a checkpoint lies inside its folder",
            "a name there is relative, without `..`",
        )
    path = folder / name
    refuse_outside(folder, [path])
    return path


def refuse_outside(folder: Path, paths: Iterable[Path]) -> None:
    """Let pass what lies in `folder` when every link on its way is followed, or among a Hub snapshot's blobs.

    Raises: LLMCompressError naming the first link that leads elsewhere or nowhere.
    """
    root = folder.resolve()
    blobs = root.parent.parent / "blobs"
    roots = [root, blobs] if root.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink() else [root]
    for path in paths:
        try:
            target = path.resolve()
            exists = target.exists()
        except (OSError, RuntimeError) as error:  # a link to itself, a name too long for the disk
            raise LLMCompressError(f"{shown(path, 200)}: cannot be followed ({shown(error)})") from error
        if not any(target.is_relative_to(allowed) for allowed in roots):
            raise LLMCompressError(
                f"{path}: is a link out of the checkpoint's folder, to {shown(target, 200)}",
                "put the file itself there: what a link outside shows would be copied into the output",
            )
        if path.is_symlink() and not exists:
            raise LLMCompressError(f"{path}: is a link to nothing ({shown(target, 200)})", "fetch the checkpoint again")


def _plain(name: str) -> bool:
    return len(name.encode(errors="surrogatepass")) <= MAX_NAME_BYTES and name.isprintable()
