"""Every language model of transformers: quantized, it loads and agrees; or it is refused by name before any work.

The default run tries one of each kind; `-m slow` all of them, as `scripts/architectures` does for the table in
eval/results/architectures.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import architectures

WORKS = [
    "llama", "gemma3", "qwen3_5", "qwen3_vl", "llava", "mistral3",  # alone, and in wrappers
    "recurrent_gemma", "mamba2", "lfm2",  # hybrids and state-space models
    "bert-generation",  # whose head shares its bias too
    "falcon", "nanochat", "gpt_bigcode", "modernbert-decoder",  # whose own class fails with packed linears
]  # fmt: skip
REFUSED = {"bert": "is an encoder", "gpt_oss": "keeps its experts transposed"}


@pytest.mark.parametrize("model_type", WORKS)
def test_one_of_each_kind_loads_as_declared_and_agrees(model_type: str, tmp_path: Path) -> None:
    trial = architectures.attempt(model_type, tmp_path)
    assert (trial.outcome, trial.checked) == ("works", True), trial


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_not_supported_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    trial = architectures.attempt(model_type, tmp_path)
    assert trial.outcome == "refused" and REFUSED[model_type] in trial.detail, trial


@pytest.mark.slow
@pytest.mark.parametrize("model_type", architectures.every_type())
def test_every_architecture_works_or_is_refused(model_type: str, tmp_path: Path) -> None:
    trial = architectures.attempt(model_type, tmp_path)
    if trial.outcome == "not built":
        pytest.skip(trial.detail)
    assert trial.outcome in ("works", "refused"), trial
