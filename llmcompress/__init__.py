"""llmcompress: make a language-model checkpoint small, measure what that cost, and ship it with the evidence.

    import llmcompress as lc

    small = lc.quantize("org/name", "OUT", scheme="W4A16", method="gptq")    # an Artifact: folder, report, .load()
    lc.evaluate(small, suite="tiny")                                         # Rows, a table in a notebook
    lc.push(small, "user/name")

    quantize finetune merge distill               a checkpoint into another                      ──> Artifact
    verify check evaluate measure                 what is known of one                           ──> Rows
    card                                          its model card, drawn anew                     ──> Artifact
    run                                           a whole recipe, a file or a mapping            ──> Artifact
    load                                          an artifact that was made before               ──> Artifact
    export                                        a file of another engine's own (GGUF)          ──> Exported
    plan compare reproduce push serve             before, beside, again, to the Hub, as a server
    recipes methods                               what there is to choose from                   ──> tables

A model is a folder, a Hub id, an `Artifact`, a `Checkpoint` or a loaded `PreTrainedModel` (saved with its tokenizer to
a temporary folder first; the model itself is left as it is, and reports call it by its `name_or_path`). Keywords are
the settings of the stage, as recipes and the command line have them: `help(lc.quantize)`. Whatever a user can mend is
an `LLMCompressError`. A call shows progress where a person watches (`progress=`) and changes nothing else of
the process.

Everything is imported on first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from inspect import Signature, signature
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_TOOLS = ("compare", "export", "load", "methods", "plan", "push", "recipes", "reproduce", "run", "serve")
_VERBS = ("card", "check", "distill", "evaluate", "finetune", "measure", "merge", "quantize", "verify")
_TYPES = {
    "Artifact": "llmcompress.api.results",
    "Checkpoint": "llmcompress.checkpoint.reader",
    "LLMCompressError": "llmcompress.errors",
    "Progress": "llmcompress.console",
    "Recipe": "llmcompress.config.recipe",
    "Report": "llmcompress.report:RunReport",
    "Rows": "llmcompress.api.results",
    "Scheme": "llmcompress.compress.scheme",
    "WeightGrid": "llmcompress.compress.scheme",
}

__all__ = [*_TOOLS, *_VERBS, *_TYPES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _TOOLS:
        return getattr(import_module("llmcompress.api.tools"), name)
    if name in _TYPES:
        module, _, attribute = _TYPES[name].partition(":")
        return getattr(import_module(module), attribute or name)
    if name in _VERBS:
        own = f"llmcompress.{name}"
        return import_module(own) if find_spec(own) else _verb(name)
    raise AttributeError(f"module 'llmcompress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _verb(name: str) -> Any:
    return import_module("llmcompress.api.verbs").verb(name)


class _VerbPackage(ModuleType):
    """A subpackage with the name of a verb, such as `llmcompress.evaluate`: calling it calls the verb."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _verb(self.__name__.rpartition(".")[2])(*args, **kwargs)

    @property
    def __signature__(self) -> Signature:
        return signature(_verb(self.__name__.rpartition(".")[2]))

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return str(_verb(self.__name__.rpartition(".")[2]).__doc__)


class _Package(ModuleType):
    """This package: a subpackage that is imported and has the name of a verb becomes callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERBS and isinstance(value, ModuleType):
            value.__class__ = _VerbPackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmcompress.api.results import Artifact as Artifact
    from llmcompress.api.results import Rows as Rows
    from llmcompress.api.tools import compare as compare
    from llmcompress.api.tools import export as export
    from llmcompress.api.tools import load as load
    from llmcompress.api.tools import methods as methods
    from llmcompress.api.tools import plan as plan
    from llmcompress.api.tools import push as push
    from llmcompress.api.tools import recipes as recipes
    from llmcompress.api.tools import reproduce as reproduce
    from llmcompress.api.tools import run as run
    from llmcompress.api.tools import serve as serve
    from llmcompress.checkpoint.reader import Checkpoint as Checkpoint
    from llmcompress.config.recipe import Recipe as Recipe
    from llmcompress.console import Progress as Progress
    from llmcompress.errors import LLMCompressError as LLMCompressError
    from llmcompress.report import RunReport

    Report = RunReport

    quantize: Callable[..., Artifact]
    merge: Callable[..., Artifact]
    check: Callable[..., Rows]
    measure: Callable[..., Rows]
