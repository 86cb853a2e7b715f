"""What a verb gives back: an artifact (a folder with its report), or rows that read as a table, in a notebook too."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from llmcompress.errors import LLMCompressError

if TYPE_CHECKING:
    from llmcompress.report import RunReport


OF_CARDS = ("higher_is_better", "hub_dataset", "dataset_name", "dataset_path", "dataset_split")
"""Fields of rows that a card needs and a table does not show."""


@dataclass(frozen=True, repr=False)
class Artifact:
    """A folder that llmcompress wrote: config, weights and tokenizer as loaders expect them, report and card beside.

    known: its report, where it is in memory already. layouts: format -> the artifact in it, where several were asked
    for; this one is the first of them.
    """

    folder: Path
    known: RunReport | None
    layouts: Mapping[str, Artifact]

    @property
    def report(self) -> RunReport:
        """What the run wrote down. Raises: LLMCompressError where there is none in the folder (yet)."""
        from llmcompress.report import RunReport

        return self.known if self.known is not None else RunReport.load(self.folder)

    @classmethod
    def open(cls, folder: str | Path) -> Artifact:
        """The artifact in `folder`. Raises: LLMCompressError where llmcompress wrote none there."""
        from llmcompress.report import RunReport

        return cls(Path(folder), RunReport.load(Path(folder)), {})

    @classmethod
    def of(cls, reports: Mapping[Path, RunReport], out: Path) -> Artifact:
        """The artifact of a run's reports, by their folders; for a process that only helped, what the other writes."""
        if not reports:
            return cls(out, None, {})
        made = [cls(folder, report, {}) for folder, report in reports.items()]
        layouts = {artifact.folder.name: artifact for artifact in made} if len(made) > 1 else {}
        return cls(made[0].folder, made[0].known, layouts)

    def summary(self) -> str:
        """What the command prints: size, what each stage has to say, where the card is."""
        from llmcompress.pipeline.summary import summary

        return summary(self.folder, self.report)

    @property
    def failures(self) -> list[str]:
        """Checks that did not pass and budgets that were exceeded, a line each; empty where all is well."""
        from llmcompress.pipeline.summary import failures

        return failures(self.report)

    @property
    def card(self) -> str:
        """The model card, as Markdown. Raises: LLMCompressError where it has not been drawn."""
        path = self.folder / "README.md"
        if not path.is_file():
            raise LLMCompressError(f"{self.folder}: has no card", "llmcompress.card(folder) draws it")
        return path.read_text(encoding="utf-8")

    def load(self, **kwargs: Any) -> Any:
        """The model, by transformers (`from_pretrained` of its architecture, with `kwargs`,
        among which trust_remote_code is consent); an adapter on its base.

        Raises: LLMCompressError where transformers cannot load it, such as for want of a package of the layout.
        """
        import transformers

        config = self.folder / "config.json"
        try:
            content = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
            names = content.get("architectures") or ["AutoModelForCausalLM"]
            kind = getattr(transformers, names[0], transformers.AutoModelForCausalLM)
            return kind.from_pretrained(self.folder, **{"trust_remote_code": False, **kwargs})
        except Exception as error:  # transformers and the packages of layouts raise all kinds
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise LLMCompressError(
                f"{self.folder}: transformers cannot load it ({said})",
                "llmcompress.check(folder) lists the engines that do, and what they need",
            ) from error

    def __fspath__(self) -> str:
        return str(self.folder)

    def __str__(self) -> str:
        return self.summary()

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        return f"```\n{self.summary()}\n```"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.summary())}</pre>"


class Rows(list[Any]):
    """Rows of a report as a list that reads as a table.

    failures: why a check failed, a line each; empty where it passed. report, folder: the whole report that they are
    part of, and where it lies. note: what holds for all rows.
    """

    def __init__(
        self,
        rows: Iterable[Any],
        *,
        folder: Path | None = None,
        report: RunReport | None = None,
        failures: Iterable[str] = (),
    ) -> None:
        super().__init__(rows)
        self.folder = folder
        self.report = report
        self.failures = list(failures)
        self.note: dict[str, Any] = {}

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def tables(self) -> list[list[dict[str, str]]]:
        """What is shown, a table for each kind of row: plain values by column, without columns that no row fills."""
        kinds: dict[object, list[dict[str, str]]] = {}
        for row in self:
            kinds.setdefault(dict if isinstance(row, Mapping) else type(row), []).append(_plain(row))
        tables = []
        for rows in kinds.values():
            columns = [key for key in _keys(rows) if any(row.get(key) for row in rows)]
            tables.append([{key: row.get(key, "") for key in columns} for row in rows])
        return tables

    def __str__(self) -> str:
        shown = "\n\n".join(table(rows) for rows in self.tables()) or "(no rows)"
        return "\n".join([shown, *(f"FAILED {reason}" for reason in self.failures)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        parts = []
        for rows in self.tables():
            lines = (
                [f"<th>{html.escape(key)}</th>" for key in rows[0]],
                *([f"<td>{html.escape(value)}</td>" for value in row.values()] for row in rows),
            )
            head, *body = (f"<tr>{''.join(line)}</tr>" for line in lines)
            parts.append(f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>")
        return "".join(parts + [f"<p>FAILED {html.escape(reason)}</p>" for reason in self.failures])


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


def _plain(row: Any) -> dict[str, str]:
    """Column -> cell: numbers to four digits, lists of plain values joined, a score as its value, the rest left out."""
    values = row if isinstance(row, Mapping) else {name: getattr(row, name) for name in type(row).model_fields}
    cells = {}
    for key, value in values.items():
        if key in OF_CARDS:
            continue
        if isinstance(value, BaseModel):
            value = getattr(value, "value", None)
        if isinstance(value, bool):
            cells[key] = "yes" if value else "no"
        elif isinstance(value, list | tuple):
            items = [_number(item) for item in value if isinstance(item, str | int | float)]
            cells[key] = f"[{', '.join(items)}]" if isinstance(value, tuple) else ", ".join(items)
        elif isinstance(value, str | int | float):
            cells[key] = _number(value)
    return cells


def _number(value: str | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _keys(rows: list[dict[str, str]]) -> list[str]:
    """The columns of rows that need not have the same, in the order in which they appear."""
    return list(dict.fromkeys(key for row in rows for key in row))
