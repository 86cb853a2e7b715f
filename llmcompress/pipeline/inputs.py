"""What the names in a recipe stand for: all of them looked up before any work, and their content taken into the keys.

A recipe says `calibration: my.txt`; the run depends on what that file holds. So its digest is part of the stage's key:
other text, another run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from llmcompress.config.recipe import Recipe
from llmcompress.errors import LLMCompressError, ProblemsError, raise_all

T = TypeVar("T")


def input_digests(recipe: Recipe) -> dict[str, str]:
    """What the names in a recipe stand for, as a digest per stage.

    Raises: LLMCompressError, one for each method, layout, calibration set or suite that is unknown or broken.
    """
    digests: dict[str, str] = {}
    problems: list[LLMCompressError] = []
    for stage in recipe.stages:
        named = _NAMES.get(stage.name, _no_names)
        model = recipe.model
        if stage.name == "quantize" and stage.settings.calibration is None and _trains(recipe):  # type: ignore[attr-defined]
            named, model = _method_names, ""
        digests[stage.name] = sha256(named(model, stage.settings, problems))
    raise_all(problems)
    return digests


def _trains(recipe: Recipe) -> bool:
    """Whether the text that a model was trained on stands in for a calibration set; the keys before hold its digest."""
    return any(stage.name in ("finetune", "merge", "distill") for stage in recipe.stages)


def _method_names(model: str, settings: Any, problems: list[LLMCompressError]) -> str:
    """Method and layouts are looked up; whether the method needs text is said by what it gives."""
    from llmcompress.compress.methods.base import METHODS
    from llmcompress.formats.base import FORMATS

    for name in settings.formats():
        _looked_up(partial(FORMATS.get, name, "quantize.format"), problems)
    method = _looked_up(partial(METHODS.get, settings.method, "quantize.method"), problems)
    return "text" if method is not None and method.needs_hessian else ""


def _quantize_names(model: str, settings: Any, problems: list[LLMCompressError]) -> str:
    """The calibration set as declared and the bytes of its text; method and layouts are looked up on the way."""
    from llmcompress.data.calibration_spec import CalibrationSpec

    if not _method_names(model, settings, problems):
        return ""
    spec = _looked_up(partial(CalibrationSpec.choose, settings.calibration, model), problems)
    if spec is None:
        return ""
    text = spec.text_file.read_bytes() if spec.text and spec.text_file.is_file() else b""
    return spec.model_dump_json() + sha256(text)


def _evaluate_names(model: str, settings: Any, problems: list[LLMCompressError]) -> str:
    """The bytes of the suite and of its texts."""
    from llmcompress.evaluate.suite import load_suite

    suite = _looked_up(partial(load_suite, settings.suite), problems)
    if suite is None:
        return ""
    files = [suite.path, *(suite.text_path(entry) for entry in suite.texts)]
    return " ".join(sha256(path.read_bytes()) for path in files)


def _training_names(model: str, settings: Any, problems: list[LLMCompressError]) -> str:
    """The bytes of the training data."""
    from llmcompress.data.examples import data_digest

    return _looked_up(partial(data_digest, settings.data), problems) or ""


def _merge_names(model: str, settings: Any, problems: list[LLMCompressError]) -> str:
    """The bytes of the adapters and of the rows that are measured on."""
    from llmcompress.finetune.merge import adapter_digest

    found = [_looked_up(partial(adapter_digest, one.path), problems) or "" for one in settings.adapters]
    return " ".join([*found, _training_names(model, settings, problems) if settings.data else ""])


def _no_names(model: str, settings: Any, problems: list[LLMCompressError]) -> str:
    return ""


_NAMES: dict[str, Callable[[str, Any, list[LLMCompressError]], str]] = {
    "finetune": _training_names,
    "merge": _merge_names,
    "distill": _training_names,
    "quantize": _quantize_names,
    "evaluate": _evaluate_names,
}


def _looked_up(action: Callable[[], T], problems: list[LLMCompressError]) -> T | None:
    """What `action` gives; its complaint joins the problems instead."""
    try:
        return action()
    except ProblemsError as error:
        problems.extend(error.problems)
    except LLMCompressError as error:
        problems.append(error)
    return None


def sha256(content: str | bytes) -> str:
    """Hex digest of bytes, or of a text's UTF-8."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
