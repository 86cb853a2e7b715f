"""A comparison as one HTML page: the table and its figures inside the file, right on light and on dark screens."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from llmcompress.card.compare import Comparison, rows
from llmcompress.card.numerals import size

STYLE = """
:root { color-scheme: light dark; --ink: #22262b; --paper: #ffffff; --line: #d8d6cf; --faint: #5c6168; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e5df; --paper: #17191c; --line: #3a3e44; --faint: #a4a9b0; } }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto;
       max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem; }
th, td { border-bottom: 1px solid var(--line); padding: .4rem .7rem; text-align: left; white-space: nowrap; }
th { color: var(--faint); font-weight: 600; }
img { max-width: 100%; height: auto; border-radius: 6px; }
p.note { color: var(--faint); max-width: 46rem; }
"""


def page(found: Comparison, figure: Path | None) -> str:
    """The page; `figure` is the Pareto plot, if there was anything to plot."""
    table = rows(found)
    names = [row["version"] for row in table]
    header = "<th></th>" + "".join(f"<th>{escape(name)}</th>" for name in names)
    keys = [key for key in table[0] if key != "version"]
    body = "".join(_line(key, [row[key] for row in table]) for key in keys)
    title = f"{len(found.versions)} versions of {found.base}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>The base takes {escape(size(found.base_bytes))}. Differences are those of paired evaluations against it, "
        "on the same items, with 95% intervals.</p>",
        f'<div class="wide"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>',
        _plot(figure),
        f'<p class="note">{escape(_note(found))}</p>',
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    style = f"<style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}{style}</head>\n<body>{"".join(parts)}</body></html>\n'


def _line(key: str, cells: list[str]) -> str:
    return f"<tr><th>{escape(key)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _plot(figure: Path | None) -> str:
    if figure is None:
        return "<p>There is nothing to plot: no task or text was evaluated for all of them.</p>"
    content = base64.b64encode(figure.read_bytes()).decode()
    alt = "Size against what was lost, one point for each version, with intervals"
    return f'<h2>Size against loss</h2><img alt="{alt}" src="data:image/png;base64,{content}">'


def _note(found: Comparison) -> str:
    said = (
        [f"The mean is over {', '.join(found.tasks)}, its interval takes those of the tasks as independent."]
        if found.tasks
        else []
    )
    said += ["A version is beaten when another is no larger and no worse, and better in one of the two."]
    return " ".join(said)
