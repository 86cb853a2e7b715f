from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmcompress.errors import LLMCompressError, ProblemsError
from llmcompress.evaluate.engines import Loaded, load
from llmcompress.evaluate.harness import _language_model, find_tasks, run_task
from llmcompress.evaluate.suite import TaskEntry, load_suite

from .conftest import task_declaration

Declare = Callable[..., Path]


@pytest.fixture(scope="module")
def loaded(dense: Path) -> Loaded:
    return load(dense)


def entries(*metrics: str, num_fewshot: int = 0) -> list[TaskEntry]:
    return [TaskEntry(task="choose", metric=metric, num_fewshot=num_fewshot) for metric in metrics]


def test_a_task_beside_the_suite_gives_every_item(declare: Declare, loaded: Loaded) -> None:
    folder = declare().parent
    task = find_tasks(entries("acc"), [folder], "suite")["choose", 0]
    assert (task.dataset_path, task.dataset_split, task.hub_dataset) == ("json", "test", False)
    run = run_task(task, loaded.model, loaded.tokenizer, None, 4, seed=0)
    assert [item.doc_id for item in run.items] == list(range(12))
    assert len({item.digest for item in run.items}) == 12
    assert all(item.scores["acc,none"] in (0.0, 1.0) for item in run.items)
    assert "mcc,none" not in run.items[0].scores  # a pair of labels, not a number


def test_scores_equal_our_own_likelihoods(declare: Declare, loaded: Loaded) -> None:
    task = find_tasks(entries("acc"), [declare().parent], "suite")["choose", 0]
    run = run_task(task, loaded.model, loaded.tokenizer, 5, 3, seed=0)
    for item in run.items:
        doc = task.handle.test_docs()[item.doc_id]
        context = loaded.tokenizer(doc["context"], return_tensors="pt").input_ids
        with torch.inference_mode():
            log_p = loaded.model(context).logits[0, -1].log_softmax(-1)
        expected = [float(log_p[loaded.tokenizer.convert_tokens_to_ids(choice)]) for choice in doc["choices"]]
        assert [response[0] for response in item.responses["none"]] == pytest.approx(expected, abs=1e-4)
        assert item.scores["acc,none"] == float(expected.index(max(expected)) == doc["gold"])


def test_a_tokenizer_without_a_first_and_a_last_token_scores_the_same(declare: Declare, loaded: Loaded) -> None:
    task = find_tasks(entries("acc"), [declare().parent], "suite")["choose", 0]
    bare = copy.deepcopy(loaded.tokenizer)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        setattr(bare, name, None)
    runs = [run_task(task, loaded.model, tokenizer, 6, 4, seed=0) for tokenizer in (loaded.tokenizer, bare)]
    assert [item.scores for item in runs[0].items] == [item.scores for item in runs[1].items]
    assert bare.pad_token is None and len(bare) == len(loaded.tokenizer), "nothing is added to the caller's tokenizer"


def test_what_needs_a_token_that_nobody_names_is_one_line(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = copy.deepcopy(loaded.tokenizer)
    bare.bos_token = bare.eos_token = None
    assert _language_model(loaded.model, bare, 1).eot_token_id == loaded.model.config.eos_token_id
    monkeypatch.setattr(loaded.model.config, "eos_token_id", None)
    with pytest.raises(LLMCompressError, match=r"has no eos_token, nor does config.json name one"):
        _ = _language_model(loaded.model, bare, 1).eot_token_id


def test_two_models_get_the_same_few_shot_prompts(declare: Declare, dense: Path, loaded: Loaded) -> None:
    tasks = find_tasks([*entries("acc", num_fewshot=2), *entries("acc")], [declare().parent], "suite")
    assert set(tasks) == {("choose", 2), ("choose", 0)}
    runs = [run_task(tasks["choose", 2], loaded.model, loaded.tokenizer, 6, 2, seed) for seed in (0, 0, 1)]
    digests = [[item.digest for item in run.items] for run in runs]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]
    zero = run_task(tasks["choose", 0], loaded.model, loaded.tokenizer, 6, 2, 0)
    assert not set(digests[0]) & {item.digest for item in zero.items}


def test_the_digest_of_a_task_follows_its_declaration_and_data(declare: Declare) -> None:
    folder = declare().parent

    def digest() -> str:
        return find_tasks(entries("acc"), [folder], "suite")["choose", 0].digest

    first = digest()
    assert digest() == first
    data = folder / "data" / "items.jsonl"
    data.write_text(data.read_text(encoding="utf-8").replace("the old", "the new"), encoding="utf-8")
    second = digest()
    (folder / "choose.yaml").write_text(yaml.safe_dump(task_declaration() | {"description": "x"}), encoding="utf-8")
    assert len({first, second, digest()}) == 3


def test_metrics_are_checked_before_anything_runs(declare: Declare) -> None:
    with pytest.raises(ProblemsError) as caught:
        find_tasks(entries("acc_nrom", "mcc", "acc,stric"), [declare().parent], "S")
    lines = caught.value.lines()
    assert lines[:2] == [
        "S: task choose: unknown metric 'acc_nrom'; known: acc, acc_norm, mcc",
        "hint: did you mean 'acc_norm'?",
    ]
    assert "metric mcc is not a mean over items" in lines[2]
    assert lines[3] == "hint: metrics of this task that are: acc, acc_norm"
    assert "unknown filter 'stric'" in lines[4]


def test_data_files_are_found_beside_the_yaml_or_named(declare: Declare, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = declare().parent
    monkeypatch.chdir(folder.parent)
    (folder / "data" / "items.jsonl").unlink()
    with pytest.raises(LLMCompressError, match=r"choose\.yaml: data_files: .*items\.jsonl not found"):
        find_tasks(entries("acc"), [folder], "suite")
    (folder / "data" / "items.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(LLMCompressError, match=r"items\.jsonl is empty"):
        find_tasks(entries("acc"), [folder], "suite")
    (folder / "data" / "items.jsonl").write_text("{broken\n", encoding="utf-8")
    with pytest.raises(LLMCompressError, match=r"task choose \(.*choose\.yaml\): cannot be loaded"):
        find_tasks(entries("acc"), [folder], "suite")


def test_lm_evals_own_tasks_and_groups(declare: Declare, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    def catalogue(include_path: list[Path], include_defaults: bool = True) -> TaskManager:
        own = [Path(lm_eval.tasks.__file__).parent / "arc"] if include_defaults else []
        return TaskManager(include_path=[*own, *include_path], include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", catalogue)  # one folder of the catalogue's thousands
    folders = [declare().parent]
    with pytest.raises(ProblemsError) as caught:
        find_tasks([TaskEntry(task="arc_eesy"), TaskEntry(task="ai2_arc"), TaskEntry(task="chose")], folders, "S")
    lines = caught.value.lines()
    assert lines[0].startswith("S: unknown task 'arc_eesy', not among the")
    assert lines[1] == "hint: did you mean 'arc_easy'?"
    assert "'ai2_arc' is a group of tasks" in lines[2]
    assert lines[5] == "hint: did you mean 'choose'?"
    with pytest.raises(LLMCompressError) as offline:
        find_tasks([TaskEntry(task="arc_easy")], folders, "S")
    assert "task arc_easy: its data, allenai/ai2_arc, has no local copy" in offline.value.message
    assert "data_files" in str(offline.value.hint)


def test_without_a_connection_the_first_task_ends_it(monkeypatch: pytest.MonkeyPatch, declare: Declare) -> None:
    """Nobody is asked twice: one question to the Hub, then local copies alone, then one line."""
    import datasets.config
    from huggingface_hub import constants

    from llmcompress.evaluate import connection, harness

    asked: list[str] = []
    tried: list[tuple[str, bool, bool]] = []

    def load(catalogue: Any, name: str, num_fewshot: int, file: Any) -> Any:
        tried.append((name, constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        raise LLMCompressError(f"{name}: no copy")

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    monkeypatch.setattr(connection, "reachable", lambda: bool(asked.append("head")))
    monkeypatch.setattr(harness, "_load", load)
    monkeypatch.setattr(harness, "_hub_data", lambda path: "org/data")
    entries = [TaskEntry(task="choose", num_fewshot=shots) for shots in (0, 1, 2)]
    with pytest.raises(LLMCompressError) as caught:
        find_tasks(entries, [declare().parent], "S")
    assert (
        not isinstance(caught.value, ProblemsError) and "the Hugging Face Hub cannot be reached" in caught.value.message
    )
    assert (asked, tried) == (["head"], [("choose", True, True)])
    assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


def test_a_connection_that_breaks_off_is_seen_through_what_is_wrapped_around_it() -> None:
    from llmcompress.evaluate.connection import lost

    assert lost(TimeoutError()) and lost(ConnectionResetError())
    assert not lost(ValueError("a template"))
    try:
        try:
            raise ConnectionError("no route")
        except ConnectionError as error:
            raise LLMCompressError("cannot be loaded") from error
    except LLMCompressError as error:
        assert lost(error)


def test_the_terminal_stays_quiet_and_settings_come_back(
    declare: Declare, loaded: Loaded, capfd: pytest.CaptureFixture[str]
) -> None:
    tqdm = import_module("tqdm").tqdm

    before = vars(tqdm)["__init__"], logging.getLogger("lm_eval").level
    suite = load_suite(str(declare()))
    task = find_tasks(suite.tasks, suite.task_folders(), "suite")["choose", 0]
    run_task(task, loaded.model, loaded.tokenizer, 3, 2, seed=0)
    assert capfd.readouterr() == ("", "")
    assert (vars(tqdm)["__init__"], logging.getLogger("lm_eval").level) == before
