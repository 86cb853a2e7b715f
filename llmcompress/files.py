"""Files that are whole or not there at all: the one way in which this package writes a file in place."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomic(path: Path, content: str | bytes) -> Path:
    """Write `path` (text as UTF-8, line ends as they are) and make its folder; returns `path`.

    The content goes to a scratch file beside it, reaches the disk, and takes the name in one step: a reader, or a run
    that is killed, sees the old file or the new one and never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return path
