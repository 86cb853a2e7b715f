"""One declaration per option: what a recipe, the command line, Python and the docs say of a setting.

    class QuantizeSettings(BaseModel):
        group_size: int | None = option(None, "Input features that share a scale.", group="Scheme", metavar="N", ge=1)

    recipe            quantize: {group_size: 64}          key and type from the field, rules from pydantic
    command line      --group-size 64                     flag from the field's name, help from the description
    Python            lc.quantize(…, group_size=64)

A setting is a pydantic field; `option` adds to it what only a command line needs. Settings inside settings are
flattened: `training.learning_rate` of a recipe is `--learning-rate` and `learning_rate=`. A nested model that is itself
declared with `option` stays one option, which takes its short form. Free of torch at import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from llmcompress.config.yaml_lines import parse_yaml
from llmcompress.errors import raise_all, unknown


@dataclass(frozen=True, slots=True)
class Option:
    """How a setting looks on the command line.

    group: heading in `--help`; None: that of the settings around it.
    flag: its option, such as `--data`; None: the field's name with dashes.
    negative: the option that sets a switch to False, such as `--asymmetric`; None: `--no-NAME` where it is of use.
    metavar: what stands for the value; None: by its type.
    choices: the names that there are, where the type is plain text; asked for only by `--help` and completion.
    hidden: can be set by recipes, Python and `--set`, but has no option.
    """

    group: str | None = None
    flag: str | None = None
    negative: str | None = None
    metavar: str | None = None
    choices: Callable[[], Iterable[str]] | None = None
    hidden: bool = False


def option(
    default: Any,
    description: str,
    *,
    group: str | None = None,
    flag: str | None = None,
    negative: str | None = None,
    metavar: str | None = None,
    choices: Callable[[], Iterable[str]] | None = None,
    hidden: bool = False,
    **rules: Any,
) -> Any:
    """A setting with its default (`...`: required), its help (a noun phrase), and how it looks on the command line.

    `rules` are pydantic's: `ge`, `lt`, `min_length`, `default_factory` and so on.

    >>> from pydantic import BaseModel
    >>> class Settings(BaseModel):
    ...     rank: int = option(16, "Rank of every adapted linear.", group="Adapter", metavar="R", ge=1)
    >>> Settings().rank, option_of(Settings.model_fields["rank"]).metavar
    (16, 'R')
    """
    field: FieldInfo = Field(default, description=description, **rules)
    field.metadata.append(Option(group, flag, negative, metavar, choices, hidden))
    return field


def option_of(field: FieldInfo) -> Option:
    """How `field` looks on the command line; for a plain pydantic field, an `Option` of defaults."""
    return next((entry for entry in field.metadata if isinstance(entry, Option)), Option())


@dataclass(frozen=True, slots=True)
class Leaf:
    """One option of a settings class. path: the keys that lead to it, e.g. ("training", "learning_rate")."""

    path: tuple[str, ...]
    field: FieldInfo
    option: Option
    group: str | None

    @property
    def flag(self) -> str:
        """Its option, `--learning-rate`."""
        return self.option.flag or "--" + self.path[-1].replace("_", "-")

    @property
    def name(self) -> str:
        """Its keyword in Python: the option's name with underscores."""
        return self.flag.removeprefix("--").replace("-", "_")


def leaves(settings: type[BaseModel]) -> Iterator[Leaf]:
    """The options of a settings class in the order of its fields, those of nested models in their place."""
    yield from _leaves(settings, (), None)


def _leaves(settings: type[BaseModel], path: tuple[str, ...], group: str | None) -> Iterator[Leaf]:
    for name, field in settings.model_fields.items():
        own = option_of(field)
        nested = nested_model(field.annotation)
        if nested is not None and own == Option():
            yield from _leaves(nested, (*path, name), group)
        else:
            yield Leaf((*path, name), field, own, own.group or group)


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The model class of a field of type `Model` or `Model | None`."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)


def nested(settings: type[BaseModel], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` by field or by option name (`data="rows.jsonl", learning_rate=1e-4`) as a recipe has them.

    Raises: LLMCompressError, all problems together, for names that `settings` does not know.
    """
    values = {key: value.model_dump() if isinstance(value, BaseModel) else value for key, value in values.items()}
    places = {leaf.name: leaf.path for leaf in leaves(settings)}
    fields = settings.model_fields
    known = {*fields, *places}
    raise_all([unknown("option", name, known, where) for name in values if name not in known])
    built: dict[str, Any] = {}
    for name in sorted(values, key=lambda name: len(places.get(name, (name,)))):
        first, *rest = places.get(name, (name,))
        given = values[name]
        if name in fields and isinstance(given, Mapping):
            built[name] = {**built.get(name, {}), **given}
        elif not rest:
            built[first] = given
        else:
            inner = built.setdefault(first, {})
            for key in rest[:-1]:
                inner = inner.setdefault(key, {})
            inner[rest[-1]] = given
    return built


def pairs(value: Any) -> Any:
    """A list of `KEY=VALUE` texts as a mapping, for a validator of a field that is one; values are YAML.

    >>> pairs(["dampening_frac=0.1"])
    {'dampening_frac': 0.1}
    """
    if not isinstance(value, list):
        return value
    split = [str(text).partition("=") for text in value]
    for key, equals, _ in split:
        if not equals:
            raise ValueError(f"{key!r} must be KEY=VALUE")
    return {key: parse_yaml(raw, key) for key, _, raw in split}
