from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from llmcompress import resources
from llmcompress.data.calibration import CalibrationSpec
from llmcompress.errors import LLMCompressError


def _set(folder: Path, name: str = "mine", **changes: Any) -> Path:
    path = folder / f"{name}.yaml"
    values = {"name": name, "description": "some words", "text": "words.txt", "licence": "Apache-2.0"} | changes
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


def _problems(path: Path) -> list[str]:
    """What is wrong with the file, without the numbers of lines."""
    with pytest.raises(LLMCompressError) as caught:
        CalibrationSpec.find(str(path))
    return [re.sub(rf"^({re.escape(str(path))}):\d+: ", r"\1: ", line) for line in caught.value.lines()]


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "calibration"
    folder.mkdir()
    monkeypatch.setattr(resources, "folder", lambda name: tmp_path / name)
    return folder


def test_a_bundled_name(bundled: Path) -> None:
    _set(bundled, "stories", seq_len=64)
    spec = CalibrationSpec.find("stories")
    assert (spec.name, spec.seq_len, spec.num_samples, spec.seed) == ("stories", 64, 128, 0)
    assert spec.text_file == bundled / "words.txt"
    assert spec.source == "words.txt"
    assert not spec.chat


def test_an_unknown_name_suggests_the_nearest(bundled: Path) -> None:
    _set(bundled, "stories")
    with pytest.raises(LLMCompressError) as caught:
        CalibrationSpec.find("storeis")
    assert caught.value.lines() == [
        "unknown calibration set 'storeis'; known: stories",
        "hint: did you mean 'stories'?",
    ]


@pytest.mark.parametrize("name", ["../stories", "zzzzzz", "", "model.safetensors"])
def test_names_that_are_no_set(bundled: Path, name: str) -> None:
    _set(bundled.parent, "stories")
    with pytest.raises(LLMCompressError, match="unknown calibration set"):
        CalibrationSpec.find(name)


@pytest.mark.parametrize("name", ["nothing.yaml", "nothing.txt", "nothing.jsonl"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(LLMCompressError, match="no such file"):
        CalibrationSpec.find(str(tmp_path / name))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_text_file_has_the_defaults(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"book{suffix}"
    path.write_text("x")
    spec = CalibrationSpec.find(str(path))
    assert (spec.name, spec.field, spec.text_file, spec.source) == ("book", "text", path, path.name)
    assert spec == CalibrationSpec.find(str(path))


def test_a_yaml_by_path(tmp_path: Path) -> None:
    spec = CalibrationSpec.find(str(_set(tmp_path)))
    assert spec.text_file == tmp_path / "words.txt"
    assert "_folder" not in spec.model_dump()


def test_a_dataset(tmp_path: Path) -> None:
    of = {"path": "someone/words", "name": "small", "split": "train", "revision": "abc"}
    spec = CalibrationSpec.find(str(_set(tmp_path, text=None, dataset=of, field="body")))
    assert spec.dataset is not None
    assert spec.source == "someone/words (small), split train, revision abc"


def test_a_hub_id_is_a_dataset() -> None:
    spec = CalibrationSpec.find("someone/words")
    assert spec.dataset is not None and spec.source == "someone/words, split train" and not spec.names_field


def test_messages_are_chat(tmp_path: Path) -> None:
    assert CalibrationSpec.find(str(_set(tmp_path, text="a.jsonl", field="messages"))).chat
    assert CalibrationSpec.find(str(_set(tmp_path, chat_template=True))).chat


def test_all_problems_at_once_each_with_its_key(tmp_path: Path) -> None:
    path = _set(tmp_path, num_sample=3, seq_len=1, num_samples="many", chat_template="yes", seed=True, sha256="12")
    shown = _problems(path)
    assert f"{path}: seq_len: input should be greater than or equal to 2, not 1" in shown
    assert f"{path}: num_samples: input should be a valid integer, not 'many'" in shown
    assert any(line.startswith(f"{path}: chat_template: ") for line in shown)
    assert any(line.startswith(f"{path}: seed: ") for line in shown)
    assert any(line.startswith(f"{path}: sha256: ") for line in shown)
    assert any(line.startswith(f"{path}: unknown key 'num_sample'") for line in shown)
    assert "hint: did you mean 'num_samples'?" in shown


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"name": None}, "name: must be given"),
        ({"text": None}, "dataset: exactly one of `text` and `dataset` must be given"),
        ({"dataset": {"path": "a", "split": "b"}}, "dataset: exactly one of `text` and `dataset` must be given"),
        ({"text": "words.doc"}, "text: must end in one of .jsonl, .json, .parquet, .csv, .txt"),
        ({"field": "body"}, "field: a .txt file has no fields; other files and datasets have"),
        ({"text": None, "dataset": {"path": "a"}}, "dataset.split: must be given"),
        (
            {"text": None, "dataset": {"path": "a", "split": "b"}, "sha256": "0" * 64},
            "sha256: belongs to a `text` file",
        ),
        (
            {"text": None, "dataset": {"path": "a", "split": "b", "splot": "c"}},
            "unknown key 'splot'; known: name, path, revision, split",
        ),
    ],
)
def test_what_a_set_may_not_say(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    path = _set(tmp_path, **changes)
    shown = _problems(path)
    assert shown[0].startswith(f"{path}: {problem}")
    assert len([line for line in shown if not line.startswith("hint")]) == 1


@pytest.mark.parametrize("text", ["", "- a\n", "a: [\n", "plain"])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert _problems(path)[0].startswith(f"{path}: ")
    assert "\n" not in _problems(path)[0]


def test_keys_that_are_not_words(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: a\ntext: b.txt\n1: x\n")
    assert _problems(path)[0].startswith(f"{path}: a key must be plain text")


def test_a_set_is_frozen() -> None:
    spec = CalibrationSpec.model_validate({"name": "a", "text": "a.txt"})
    with pytest.raises(ValidationError):
        spec.seq_len = 3  # type: ignore[misc]


def test_declarations_need_no_engine() -> None:
    program = (
        "import sys; from llmcompress.data.calibration import CalibrationSpec; "
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
