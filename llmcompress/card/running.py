"""How to run a checkpoint: code to copy, for the engines that passed `check` and for no other.

Which engines those are is the report's to say (`engines`, written by the check stage); what each rests on stands beside
it: loaded here and compared, or by the rules of its loader.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable

from llmcompress.card.glance import engine_name, loaded
from llmcompress.card.kinds.adapter import how_to_use
from llmcompress.card.kinds.distilled import CLASSES
from llmcompress.card.markdown import code, fenced, section
from llmcompress.report import ADAPTER, EngineVerdict, RunReport

TITLE = "How to run it"


def how_to_run(report: RunReport, name: str) -> str:
    """The section on loading the checkpoint called `name`."""
    if report.output is None:
        return section(TITLE, "The report describes no compressed checkpoint, so there is nothing to run.")
    model_id = placeholder(name)
    first = f"{code(model_id)} is this repository's name on the Hub; the path of a folder with its files does as well."
    if report.output.format == ADAPTER:
        return section(TITLE, first, *how_to_use(report, model_id))
    if report.distillation is not None and report.distillation.kind != "causal":
        return section(TITLE, first, *_encoder(CLASSES[report.distillation.kind], model_id))
    if not report.engines:
        return section(TITLE, "Which engines load it was not looked into: `llmcompress check` does.")
    passed = [one for one in report.engines if one.loads and one.engine in WAYS]
    if not passed:
        return section(TITLE, "No engine that was looked into loads it.", _others(report))
    trust = bool(report.recipe.get("trust_remote_code"))
    passed.sort(key=lambda one: (not loaded(report, one.engine), list(WAYS).index(one.engine)))
    ways = [part for one in passed for part in (_title(report, one), *WAYS[one.engine](one, model_id, trust))]
    return section(TITLE, first, *ways, _others(report))


def _encoder(loader: str, model_id: str) -> list[str]:
    quoted = json.dumps(model_id, ensure_ascii=False)
    lines = [
        f"from transformers import AutoTokenizer, {loader}",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({quoted})",
        f"model = {loader}.from_pretrained({quoted})",
        'out = model(**tokenizer("Once upon a time", return_tensors="pt"))',
    ]
    return [fenced("bash", "pip install transformers"), fenced("python", "\n".join(lines))]


def placeholder(name: str) -> str:
    """What stands for a checkpoint's repository until it has one; a push puts the true name in its place."""
    return f"USER/{_repository(name)}"


def _title(report: RunReport, verdict: EngineVerdict) -> str:
    seen = {"loaded and compared": "loaded here, and what it computes was compared"}
    found = loaded(report, verdict.engine)
    basis = seen.get(found, "loaded here, and it wrote text") if found else "by its loader's rules"
    minded = "".join(f" Mind: {one.detail}." for one in verdict.findings if one.level == "warns")
    return f"**{engine_name(verdict)}** ({basis}).{minded}"


def _others(report: RunReport) -> str:
    """The engines that do not load it, each with its first reason."""
    lines = [
        f"- {engine_name(one)}: {next(each.detail for each in one.findings if each.level == 'refuses')}"
        for one in report.engines
        if one.loads is False
    ]
    return "It does not run in:\n\n" + "\n".join(lines) if lines else ""


def _transformers(verdict: EngineVerdict, model_id: str, trust: bool) -> list[str]:
    packages = " ".join(shlex.quote(one) for one in ["transformers", "accelerate", *verdict.needs])
    quoted = json.dumps(model_id, ensure_ascii=False)
    option = ", trust_remote_code=True" if trust else ""
    lines = [
        "from transformers import pipeline",
        "",
        f'generate = pipeline("text-generation", model={quoted}, device_map="auto"{option})',
        'print(generate("Once upon a time", max_new_tokens=40)[0]["generated_text"])',
    ]
    return [fenced("bash", f"pip install {packages}"), fenced("python", "\n".join(lines))]


def _vllm(verdict: EngineVerdict, model_id: str, trust: bool) -> list[str]:
    option = " --trust-remote-code" if trust else ""
    return [fenced("bash", f"pip install vllm\nvllm serve {shlex.quote(model_id)}{option}")]


def _sglang(verdict: EngineVerdict, model_id: str, trust: bool) -> list[str]:
    option = " --trust-remote-code" if trust else ""
    command = f"python -m sglang.launch_server --model-path {shlex.quote(model_id)}{option}"
    return [fenced("bash", f"pip install sglang\n{command}")]


WAYS: dict[str, Callable[[EngineVerdict, str, bool], list[str]]] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "sglang": _sglang,
}
"""Engines with code to copy, in the order in which they are shown."""


def _repository(name: str) -> str:
    """The name in letters that a Hub repository may have."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "MODEL"
