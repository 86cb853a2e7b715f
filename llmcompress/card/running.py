"""How to run a checkpoint: code to copy, per layout."""

from __future__ import annotations

import json
import re
import shlex

from llmcompress.card.markdown import code, fenced, section
from llmcompress.report import RunReport

PACKAGES = {
    "gptq": ("optimum", "gptqmodel"),
    "compressed_tensors": ("compressed-tensors",),
    "bitsandbytes": ("bitsandbytes",),
}
"""Layout -> what transformers needs beside itself to read it."""
VLLM = ("gptq", "compressed_tensors")
"""The layouts that vLLM reads."""


def how_to_run(report: RunReport, name: str) -> str:
    """The section on loading the checkpoint called `name`."""
    title = "How to run it"
    if report.output is None:
        return section(title, "The report describes no compressed checkpoint, so there is nothing to run.")
    layout = report.output.format
    if layout not in PACKAGES:
        return section(title, f"No loading code is known for the layout {code(layout)}.")
    model_id, trust = placeholder(name), bool(report.recipe.get("trust_remote_code"))
    parts = [
        f"{code(model_id)} is this repository's name on the Hub; the path of a folder with its files does as well.",
        *_transformers(layout, model_id, trust),
    ]
    if layout in VLLM:
        parts += _vllm(model_id, trust)
    return section(title, *parts, _tried(report, layout))


def _transformers(layout: str, model_id: str, trust: bool) -> list[str]:
    packages = " ".join(["transformers", "accelerate", *PACKAGES[layout]])
    lines = [
        "from transformers import pipeline",
        "",
        f"model_id = {json.dumps(model_id, ensure_ascii=False)}",
        f'generate = pipeline("text-generation", model=model_id, device_map="auto"{_trusted(trust)})',
        'print(generate("Once upon a time", max_new_tokens=40)[0]["generated_text"])',
    ]
    return [
        f"With transformers and {' and '.join(map(code, PACKAGES[layout]))}:",
        fenced("bash", f"pip install {packages}"),
        fenced("python", "\n".join(lines)),
    ]


def _trusted(trust: bool) -> str:
    return ", trust_remote_code=True" if trust else ""


def _vllm(model_id: str, trust: bool) -> list[str]:
    option = " --trust-remote-code" if trust else ""
    return ["With vLLM:", fenced("bash", f"pip install vllm\nvllm serve {shlex.quote(model_id)}{option}")]


def _tried(report: RunReport, layout: str) -> str:
    """Which of these ways the run itself went, as far as the report says."""
    engines = list(dict.fromkeys(f"{one.engine} ({one.engine_note})" for one in report.evaluations))
    used = f"The scores above were taken with {'; '.join(map(code, engines))}." if engines else ""
    vllm = any("vllm" in one.engine.lower() for one in report.evaluations)
    untried = "Nothing was run through vLLM here." if layout in VLLM and not vllm else ""
    return " ".join(part for part in (used or "This run loaded it in no engine.", untried) if part)


def placeholder(name: str) -> str:
    """What stands for a checkpoint's repository until it has one; a push puts the true name in its place."""
    return f"USER/{_repository(name)}"


def _repository(name: str) -> str:
    """The name in letters that a Hub repository may have."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "MODEL"
