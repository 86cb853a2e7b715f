"""Where the data that travels with the package lies: `calibration/`, `eval/` and `recipes/`.

In a checkout the first two lie beside the package; the wheel carries copies of them inside it. Nothing else in the
package knows the difference.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
BUNDLED = "bundled/"
"""`bundled/tiny` names the checkpoint that travels with the package; no Hub organisation can be called that here."""


def folder(name: str) -> Path:
    """The folder `calibration` or `eval`, in the wheel or in the checkout."""
    packed = PACKAGE / "_data" / name
    return packed if packed.is_dir() else PACKAGE.parent / name


def recipes() -> Path:
    """The folder of shipped recipes."""
    return PACKAGE / "recipes"


def bundled_checkpoint(name: str) -> Path | None:
    """The folder of `bundled/NAME`, or None when `name` is not of that form or nothing of that name is bundled."""
    if not name.startswith(BUNDLED):
        return None
    path = folder("eval") / "checkpoints" / name.removeprefix(BUNDLED)
    return path if path.is_dir() else None
