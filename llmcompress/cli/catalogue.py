"""What there is to choose from: recipes, methods, layouts, and which grid goes into which layout and engine."""

from __future__ import annotations

from typing import Any

from llmcompress.config.recipe import shipped_names

PROBE_FEATURES = 4096
"""A width that every rule on divisibility accepts, so that what is refused is the grid itself."""


def recipe_rows() -> list[dict[str, str]]:
    """The shipped recipes: name, stages, and the first comment of the file."""
    from llmcompress.config.recipe import load, recipe_file

    rows = []
    for name in shipped_names():
        first = recipe_file(name).read_text(encoding="utf-8").splitlines()[0]
        stages = ", ".join(stage.name for stage in load(name).stages)
        rows.append({"recipe": name, "stages": stages, "what it is": first.removeprefix("# ")})
    return rows


def method_catalogue() -> dict[str, list[dict[str, str]]]:
    """Every method, every layout with its readers, and every grid with the layouts that hold it."""
    from llmcompress.compress.methods.base import METHODS
    from llmcompress.formats.base import FORMATS

    return {
        "methods": [
            {"method": one.name, "calibration text": "yes" if one.needs else "no", "what it does": one.summary}
            for one in METHODS
        ],
        "layouts": [
            {
                "layout": one.name,
                "holds": one.summary,
                "read by": "; ".join(f"{k} ({v})" for k, v in one.readers.items()),
            }
            for one in FORMATS
        ],
        "grids": _grid_rows(),
    }


def _grid_rows() -> list[dict[str, str]]:
    from llmcompress.compress.scheme import PRESETS, preset
    from llmcompress.formats.base import FORMATS

    rows = []
    for name, scheme in PRESETS.items():
        kinds = [scheme] if scheme.grid.codebook else [scheme, preset(name, symmetric=False)]
        for kind in kinds:
            row = {"scheme": name, "grid": kind.label()}
            for layout in FORMATS:
                row[layout.name] = "no" if layout.refuses(kind, PROBE_FEATURES, PROBE_FEATURES) else "yes"
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of the same keys as aligned columns under their keys.

    >>> print(table([{"a": "1", "long": "x"}, {"a": "22", "long": "y"}]))
    a   long
    1   x
    22  y
    """
    lines = [list(rows[0]), *[[str(value) for value in row.values()] for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in padded)


def tables(catalogue: dict[str, list[dict[str, str]]]) -> str:
    """The tables of a catalogue, one below the other."""
    return "\n\n".join(table(rows) for rows in catalogue.values())
