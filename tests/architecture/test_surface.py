"""The public names, and that having them costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import llmcompress as lc
from llmcompress.config.stage import STAGES
from tests.architecture.sources import ROOT

NAMES = {
    "load", "quantize", "finetune", "merge", "distill", "plan", "verify", "check", "evaluate", "measure", "card",
    "compare", "export", "reproduce", "push", "serve", "run", "recipes", "methods",
    "Artifact", "Checkpoint", "LLMCompressError", "Progress", "Recipe", "Report", "Rows", "Scheme", "WeightGrid",
    "__version__",
}  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert set(lc.__all__) == NAMES and len(lc.__all__) == len(NAMES) and set(dir(lc)) >= NAMES
    assert set(STAGES) <= NAMES, "every stage is a verb"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_is_there_and_documented(name: str) -> None:
    value = getattr(lc, name)
    assert value.__doc__ and (callable(value) or name == "__version__")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="quantise"):
        _ = lc.quantise


@pytest.mark.parametrize("name", ["card", "distill", "evaluate", "finetune", "verify"])
def test_a_package_of_a_verbs_name_is_the_verb_and_the_package(name: str) -> None:
    code = f"""
from inspect import signature
import llmcompress as lc
before = lc.{name}
import llmcompress.{name}.stages as module
assert lc.{name} is before and callable(lc.{name}) and lc.{name}.stages is module
try:
    lc.{name}("no/such/folder", **({{"out": "x"}} if "out" in signature(lc.{name}).parameters else {{}}), nonsense=1)
except lc.LLMCompressError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "unknown option 'nonsense'" in done.stdout


def test_importing_is_cheap() -> None:
    code = """
import sys, time
began = time.process_time()
import llmcompress
print(time.process_time() - began, [name for name in ("torch", "pydantic", "click", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, _, loaded = done.stdout.partition(" ")
    assert float(seconds) < 0.1 and loaded.strip() == "[]"
