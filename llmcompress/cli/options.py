"""Options of the command line, made from the settings of the stages, and how `--help` shows them.

    rank: int = option(16, "Rank of every adapted linear.", group="Adapter", metavar="R")

    Adapter:
      --rank R    Rank of every adapted linear. [default: 16]

click parses and completes; what a value may be is pydantic's to say, so it is said once, for recipes and Python too.
Choices are shown and completed, and a value is sent on as it was typed.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import click
from click.shell_completion import CompletionItem
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from llmcompress.config.options import Leaf, leaves

WIDTH = 110
"""Columns of `--help` at most."""
COMMON = "Common"
"""Heading of what every verb takes."""


class Names(click.ParamType):  # type: ignore[type-arg]  # generic in later versions of click alone
    """Text, with the names that are known for completion; asked for them only then, and by `--help`."""

    name = "text"

    def __init__(self, known: Callable[[], Iterable[str]]) -> None:
        self.known = known

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that begin like `incomplete`; behind a comma those of the next one."""
        before, comma, rest = incomplete.rpartition(",")
        return [CompletionItem(before + comma + name) for name in self.known() if name.startswith(rest)]


class Option(click.Option):
    """An option under a heading, which shows its choices and default behind its help."""

    def __init__(self, *args: Any, group: str | None = None, shown: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group
        self.shown = shown

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Left and right column."""
        if self.hidden:
            return None
        left = ", ".join([*self.opts, *self.secondary_opts])
        left += "" if self.is_flag or self.count else f" {self.metavar}"
        help_text, _, note = (self.help or "").removesuffix("]").partition(" [")
        notes = [", ".join(self.type.known())] if isinstance(self.type, Names) else []
        notes += [note] if note else []
        if self.required:
            notes.append("required")
        elif self.shown is not None and self.shown is not False and self.shown not in ("", [], {}):
            shown = ",".join(map(str, self.shown)) if isinstance(self.shown, list) else self.shown
            notes.append(f"default: {shown}")
        return left, help_text + (f" [{'; '.join(notes)}]" if notes else "")


class Argument(click.Argument):
    """A positional argument with a line of help."""

    def __init__(self, *args: Any, help: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = help

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Left and right column."""
        return self.make_metavar(ctx).strip("[]{}"), self.help or ""


class Verb(click.Command):
    """A command whose options are shown under their headings, with an example at the end."""

    def __init__(self, name: str, *, example: str = "", **kwargs: Any) -> None:
        settings = {"help_option_names": ["-h", "--help"], "max_content_width": WIDTH}
        super().__init__(name, context_settings=settings, **kwargs)
        self.example = example

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Arguments first, then each group in the order in which it appears, `Common` last."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        common: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            group = "Arguments" if isinstance(param, Argument) else getattr(param, "group", COMMON) or "Options"
            if record is not None:
                (common if group == COMMON else groups.setdefault(group, [])).append(record)
        for title, records in {**groups, COMMON: common}.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records, col_max=34)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """`MODEL -o OUT [OPTIONS]`: what must be given comes first."""
        params = self.get_params(ctx)
        pieces = [param.make_metavar(ctx).strip("{}") for param in params if isinstance(param, Argument)]
        must = [param for param in params if isinstance(param, Option) and param.required]
        return [*pieces, *(f"{param.opts[0]} {param.metavar}" for param in must), "[OPTIONS]"]

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Nothing: `format_options` shows them, as in versions of click that had no help of arguments."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The example."""
        if self.example:
            with formatter.section("Example"):
                for line in self.example.splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def settings_options(
    settings: type[BaseModel], group: str | None = None, leave_out: Iterable[str] = ()
) -> list[Option]:
    """An option for each setting, but those that are hidden or named in `leave_out`; `group`: where they have none."""
    return [
        _option(leaf, leaf.group or group)
        for leaf in leaves(settings)
        if not leaf.option.hidden and leaf.name not in leave_out
    ]


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what was not given, so that defaults have one place, the settings' own."""
    return {key: value for key, value in values.items() if value not in (None, ())}


def _option(leaf: Leaf, group: str | None) -> Option:
    field, own = leaf.field, leaf.option
    shown = None if field.default is PydanticUndefined else field.default
    plain = {"help": field.description, "group": group, "shown": shown, "default": None}
    kinds = [kind for kind in _members(field.annotation) if kind is not type(None)]
    if bool in kinds:
        off = own.negative or f"--no-{leaf.flag.removeprefix('--')}"
        names = leaf.flag if shown is False and not own.negative else f"{leaf.flag}/{off}"
        return Option([leaf.name, names], is_flag=True, **(plain | {"shown": "on" if shown else None}))
    choices = own.choices or _literals(kinds)
    repeated = typing.get_origin(kinds[0]) in (list, dict) or kinds[0] in (list, dict)
    return Option(
        [leaf.name, leaf.flag], type=Names(choices) if choices else click.STRING, multiple=repeated,
        metavar=own.metavar or _metavar(kinds, bool(choices)), required=field.is_required(),
        callback=_split if repeated else None, **plain,
    )  # fmt: skip


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type; without the metadata around it."""
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return tuple(member for part in typing.get_args(annotation) for member in _members(part))
    return (annotation,)


def _literals(kinds: list[Any]) -> Callable[[], Iterable[str]] | None:
    values = [value for kind in kinds if typing.get_origin(kind) is Literal for value in typing.get_args(kind)]
    return (lambda: values) if values else None


def _metavar(kinds: list[Any], has_choices: bool) -> str:
    if has_choices:
        return "NAME"
    return "N" if int in kinds or float in kinds else "TEXT"


def _split(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> list[str] | None:
    """Values that were given one by one or with commas between them."""
    return [piece for text in value for piece in text.split(",") if piece] if value else None
