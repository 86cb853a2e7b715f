from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmcompress.errors import LLMCompressError, ProblemsError
from llmcompress.evaluate import suite as module
from llmcompress.evaluate.suite import chosen_suite, load_suite, suite_names

Declare = Callable[..., Path]


def test_a_suite_is_read_with_its_defaults(declare: Declare) -> None:
    suite = load_suite(str(declare()))
    assert (suite.name, suite.tasks[0].num_fewshot, suite.tasks[0].limit) == ("own", 0, None)
    assert suite.text_path(suite.texts[0]).is_file()
    assert Path(suite.where).parent in suite.task_folders()


def test_a_bundled_suite_by_name(declare: Declare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "eval"
    (root / "tasks").mkdir(parents=True)
    declare().parent.rename(root / "suites")
    monkeypatch.setattr(module, "folder", lambda name: tmp_path / name)
    assert suite_names() == ["choose", "suite"]
    assert load_suite("suite").task_folders() == [root / "tasks"]
    with pytest.raises(LLMCompressError) as caught:
        load_suite("suit")
    assert caught.value.lines() == ["unknown suite 'suit'; known: choose, suite", "hint: did you mean 'suite'?"]


def test_every_bundled_suite_is_valid() -> None:
    for name in suite_names():
        assert load_suite(name).description


def test_every_problem_is_told_with_its_key(declare: Declare) -> None:
    path = declare(
        description=3,
        tasks=[{"task": "choose", "metrics": "acc", "budget": -1}, {"metric": "acc", "limit": 1}],
        extra=1,
    )
    with pytest.raises(ProblemsError) as caught:
        load_suite(str(path))
    lines = "\n".join(caught.value.lines())
    assert all(line.startswith((str(path), "hint")) for line in caught.value.lines())
    assert "description: Input should be a valid string, got 3" in lines
    assert "tasks.0: unknown key 'metrics'" in lines
    assert "did you mean 'metric'?" in lines
    assert "tasks.0.budget: Input should be greater than or equal to 0, got -1" in lines
    assert "tasks.1.task: Field required" in lines
    assert "tasks.1.limit" in lines
    assert "unknown key 'extra'" in lines


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tasks": [], "texts": []}, "nothing would be measured"),
        ({"tasks": [{"task": "choose"}, {"task": "choose", "budget": 0.1}]}, "choose, acc, 0 shots is listed 2 times"),
        ({"texts": [{"name": "t", "file": "absent.txt"}]}, "absent.txt not found"),
        ({"texts": [{"name": "t", "file": "text.md"}]}, "must end in .txt or .jsonl"),
        ({"texts": [{"name": "t", "file": "text.txt", "seq_len": 64, "num_tokens": 100}]}, "less than two rows"),
        ({"texts": [{"name": "t", "file": "text.txt"}, {"name": "t", "file": "text.txt"}]}, "'t' is used 2 times"),
        ({"texts": [{"name": "t", "file": "text.txt", "budget_perplexity_ratio": 0.9}]}, "budget_perplexity_ratio"),
    ],
)
def test_what_a_suite_may_not_say(declare: Declare, changes: dict[str, object], expected: str) -> None:
    with pytest.raises(LLMCompressError, match=expected):
        load_suite(str(declare(**changes)))


def test_files_that_are_no_suite(tmp_path: Path) -> None:
    with pytest.raises(LLMCompressError, match="no such suite file"):
        load_suite(str(tmp_path / "none.yaml"))
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: x\n  tasks: [", encoding="utf-8")
    with pytest.raises(LLMCompressError, match=r"bad\.yaml:2: not YAML"):
        load_suite(str(bad))
    bad.write_text("- 1\n", encoding="utf-8")
    with pytest.raises(LLMCompressError, match="must be a list of `key: value` lines"):
        load_suite(str(bad))
    bad.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(LLMCompressError, match="not YAML text"):
        load_suite(str(bad))


def test_a_description_is_optional(declare: Declare) -> None:
    path = declare()
    path.write_text("name: own\ntasks:\n  - {task: choose}\n", encoding="utf-8")
    assert load_suite(str(path)).description == ""


def test_tasks_stand_in_the_place_of_a_suite() -> None:
    suite = chosen_suite(None, ["arc_easy:acc_norm", "lambada_openai"])
    assert [(entry.task, entry.metric, entry.budget) for entry in suite.tasks] == [
        ("arc_easy", "acc_norm", 0.02), ("lambada_openai", "acc", 0.02),
    ]  # fmt: skip
    assert (suite.name, suite.where) == ("arc_easy + lambada_openai", "--tasks")
    assert suite.task_folders() == [module.bundled_tasks()], "nothing of the working directory is read"
    assert suite.digest() != chosen_suite(None, ["arc_easy"]).digest()


@pytest.mark.parametrize("tasks", [["arc_easy:"], [":acc"], ["arc_easy", "arc_easy"]])
def test_tasks_that_name_none_or_one_twice(tasks: list[str]) -> None:
    with pytest.raises(LLMCompressError, match="--tasks: "):
        chosen_suite(None, tasks)
