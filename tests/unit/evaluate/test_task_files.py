"""Tasks that came with a suite: read as data, run by nobody's leave but the user's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmcompress.errors import LLMCompressError
from llmcompress.evaluate.engines import load
from llmcompress.evaluate.harness import ReadyTask, find_tasks, item_texts, run_task
from llmcompress.evaluate.suite import TaskEntry
from llmcompress.evaluate.task_files import TaskFiles

from .conftest import task_declaration

Declare = Callable[..., Path]
EVIL = "from pathlib import Path\nPath(r'{mark}').write_text('ran')\nclass Task: ...\ndef run(*a, **k): return []\n"


def find(folder: Path, *, trust: bool = False) -> ReadyTask:
    return find_tasks([TaskEntry(task="choose")], [folder], "S", trust_remote_code=trust)["choose", 0]


@pytest.fixture
def suite(declare: Declare, tmp_path: Path) -> Path:
    """A suite's folder with a module that leaves a mark when it is run."""
    folder = declare().parent
    (folder / "evil.py").write_text(EVIL.format(mark=tmp_path / "mark"))
    return folder


def write(folder: Path, text: str = "", **changes: Any) -> None:
    (folder / "choose.yaml").write_text(yaml.safe_dump(task_declaration() | changes) + text, encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "changes", "expected"),
    [
        ("process_docs: !function evil.run\n", {}, "process_docs: !function evil.run"),
        ("fewshot_config: {doc_to_text: !function evil.run}\n", {}, "fewshot_config.doc_to_text: !function evil.run"),
        ("class: !function evil.Task\n", {}, "class: !function evil.Task"),
        ("custom_dataset: !function evil.run\n", {}, "custom_dataset: !function evil.run"),
        ("include: shared.yaml\n", {}, "process_results: !function evil.run"),
        ("", {"class": "evil.Task"}, "class: evil.Task"),
        ("", {"unsafe_code": True}, "unsafe_code: True"),
        ("", {"use_prompt": "evil.yaml:x"}, "use_prompt: evil.yaml:x"),
        ("", {"metric_list": [{"metric": "./evil.py"}]}, "./evil.py, which is not one of lm-eval's metrics"),
        ("", {"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "not one of lm-eval's metrics"),
        ("", {"dataset_path": "pandas"}, "dataset_path: pandas, which may hold pickles"),
        ("", {"dataset_kwargs": {"cache_dir": "/tmp/x"}}, "dataset_kwargs: cache_dir"),
    ],
)
def test_code_of_a_suite_needs_consent(
    text: str, changes: dict[str, Any], expected: str, suite: Path, tmp_path: Path
) -> None:
    (suite / "shared.yaml").write_text("process_results: !function evil.run\n")
    write(suite, text, **changes)
    with pytest.raises(LLMCompressError) as caught:
        find(suite)
    assert expected in caught.value.message and str(suite / "choose.yaml") in caught.value.message
    assert caught.value.hint == "read it, then pass --trust-remote-code"
    assert not (tmp_path / "mark").exists()


def test_with_consent_it_runs(suite: Path, tmp_path: Path) -> None:
    (suite / "good.py").write_text(EVIL.format(mark=tmp_path / "mark") + "def docs(rows): return rows\n")
    write(suite, "process_docs: !function good.docs\n")
    assert not find(suite, trust=True).sandboxed
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("key", ["doc_to_text", "doc_to_target", "doc_to_choice", "description"])
def test_a_template_is_rendered_in_the_sandbox(key: str, suite: Path, tmp_path: Path) -> None:
    attack = f"{{{{ cycler.__init__.__globals__.os.system('touch {tmp_path / 'mark'}') }}}}"
    write(suite, **{key: attack})
    if key == "description":  # plain text to lm-eval
        find(suite)
    else:
        with pytest.raises(LLMCompressError, match=r"choose\.yaml|template"):
            find(suite)
    assert not (tmp_path / "mark").exists()


def test_a_template_without_end_is_stopped(suite: Path) -> None:
    write(suite, doc_to_text="{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    with pytest.raises(LLMCompressError, match="cannot be rendered"):
        find(suite)


def test_the_sandbox_changes_no_score_and_leaves_lm_eval_as_it_was(suite: Path, dense: Path) -> None:
    from lm_eval import utils

    before = utils.apply_template
    theirs, trusted = find(suite), find(suite, trust=True)
    assert theirs.sandboxed and not trusted.sandboxed and theirs.digest == trusted.digest
    model = load(dense)
    runs = [run_task(task, model.model, model.tokenizer, 4, 2, seed=0) for task in (theirs, trusted)]
    scores = [[(item.scores, item.responses) for item in run.items] for run in runs]
    assert scores[0] == scores[1]
    assert item_texts(theirs, 3) == item_texts(trusted, 3)
    assert utils.apply_template is before


def test_yaml_that_breaks_lm_evals_own_reader_is_named(suite: Path) -> None:
    (suite / "choose.yaml").unlink()
    (suite / "deep.yaml").write_text("task: choose\nx: " + "[" * 200_000)  # a segmentation fault in libyaml
    with pytest.raises(LLMCompressError) as caught:
        find(suite)
    lines = "\n".join(caught.value.lines())
    assert "unknown task 'choose'" in lines and "deep.yaml:2: not YAML (nested more than 40 deep)" in lines


def test_includes_go_one_way(suite: Path) -> None:
    (suite / "a.yaml").write_text("include: b.yaml\ntask: a\n")
    (suite / "b.yaml").write_text("include: [a.yaml]\nx: 1\n")
    (suite / "base.yaml").write_text("x: 1\ny: 1\n")
    (suite / "c.yaml").write_text("include: base.yaml\ntask: c\ny: 2\n")
    (suite / "d.yaml").write_text("include: gone.yaml\ntask: d\n")
    found = TaskFiles.read([suite])
    assert found.tasks["c"].config == {"x": 1, "y": 2, "task": "c"}
    text = "; ".join(problem.message for problem in found.problems)
    assert "in a circle" in text and "gone.yaml: cannot be read" in text


def test_a_home_folder_is_no_folder_of_a_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress.evaluate.task_files.MAX_FILES", 5)
    for index in range(8):
        (tmp_path / f"{index}.yaml").write_text("a: 1")
    with pytest.raises(LLMCompressError, match="more than 5 folders or YAML files lie beside the suite"):
        TaskFiles.read([tmp_path])
