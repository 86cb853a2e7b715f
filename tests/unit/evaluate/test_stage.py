from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.console import Silent, Step
from llmcompress.errors import LLMCompressError, ProblemsError
from llmcompress.evaluate import baseline as baseline_module
from llmcompress.evaluate import results
from llmcompress.evaluate import stage as stage_module
from llmcompress.evaluate import suite as suite_module
from llmcompress.evaluate.engines import load
from llmcompress.evaluate.harness import Item, ReadyTask, TaskRun
from llmcompress.evaluate.stage import EvaluateSettings, evaluate
from llmcompress.evaluate.suite import TaskEntry
from llmcompress.report import Evaluation

Declare = Callable[..., Path]
ROWS_25 = {"name": "words", "file": "text.txt", "seq_len": 16, "num_tokens": 400, "budget_kl": 0.05}


class Heard(Silent):
    """Progress that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done: dict[str, list[int]] = {}

    def message(self, text: str) -> None:
        self.lines.append(text)

    @contextmanager
    def step(self, title: str, total: int) -> Iterator[Step]:
        self.done[title] = [0, total]
        counts = self.done[title]

        class Count:
            def advance(self, amount: int = 1, note: str = "") -> None:
                counts[0] += amount

        yield Count()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "evaluate"


@pytest.fixture(scope="module")
def perturbed(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(noise=0.15)


def compare(checkpoint: Path, baseline: Path, suite: Path, heard: Heard | None = None, **changes: Any) -> Evaluation:
    samples_dir = changes.pop("samples_dir", None)
    settings = EvaluateSettings(suite=str(suite), **changes)
    progress = heard or Silent()
    opened = Checkpoint.open(baseline)
    return evaluate(checkpoint, opened, settings, seed=0, progress=progress, samples_dir=samples_dir)


def test_a_checkpoint_against_itself(dense: Path, declare: Declare) -> None:
    result = compare(dense, dense, declare())
    task, text = result.tasks[0], result.texts[0]
    assert (task.difference, task.better, task.worse, task.mcnemar_p) == (0.0, 0, 0, 1.0)
    assert task.interval[0] == -task.interval[1] and task.interval[1] > 0.2, "twelve items without a flip tell little"
    assert (text.kl, text.kl_interval, text.top1_agreement) == (0.0, (0.0, 0.0), 1.0)
    agreement = text.figure("top1_agreement").interval
    assert agreement[0] < 1 == agreement[1]
    assert (task.verdict, text.verdict, task.enough, text.enough) == ("inconclusive", "inconclusive", False, False)
    assert text.perplexity_ratio_interval == (1.0, 1.0)
    assert result.verdict == "inconclusive"
    assert (result.baseline_dtype, result.baseline_device, result.differing) == (result.dtype, result.device, [])
    assert Evaluation.model_validate_json(result.model_dump_json()) == result


def test_a_damaged_checkpoint_against_its_source(
    dense: Path, perturbed: Path, declare: Declare, tmp_path: Path
) -> None:
    suite = declare(
        tasks=[{"task": "choose", "metric": metric, "budget": 0.05} for metric in ("acc", "acc_norm")], texts=[ROWS_25]
    )
    heard = Heard()
    result = compare(perturbed, dense, suite, heard, samples_dir=tmp_path / "samples")
    lines = (tmp_path / "samples" / "choose-0shot.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    before, after = (
        np.array([item[side]["scores"]["acc,none"] for item in items]) for side in ("baseline", "compressed")
    )
    task = result.tasks[0]
    assert task.num_items == len(items) == 12
    assert task.baseline.value == before.mean()
    assert task.difference == (after - before).mean()
    assert (task.better, task.worse) == (int((after > before).sum()), int((after < before).sum()))
    assert task.interval[0] <= task.difference <= task.interval[1]
    assert [row.metric for row in result.tasks] == ["acc", "acc_norm"]
    text = result.texts[0]
    assert text.verdict == result.verdict == "fail"
    assert text.kl > 0.05 and text.top1_agreement < 1
    assert (text.num_tokens, text.num_rows) == (25 * 15, 25)
    assert heard.done == {"tasks of own": [2, 2], "held-out text words": [25, 25]}


def test_the_kl_of_a_perturbed_pair_is_the_float64_formula(dense: Path, perturbed: Path, declare: Declare) -> None:
    suite = declare()
    text = compare(perturbed, dense, suite).texts[0]
    base, comp = load(dense), load(perturbed)
    ids = base.tokenizer((suite.parent / "text.txt").read_text(encoding="utf-8")).input_ids[: 9 * 32]
    rows = torch.tensor(ids).reshape(9, 32)
    with torch.inference_mode():
        log_p, log_q = (side.model(rows).logits[:, :-1].double().log_softmax(-1).numpy() for side in (base, comp))
    assert text.kl == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-5)
    nll = -np.take_along_axis(log_q, rows[:, 1:, None].numpy(), -1).mean()
    assert text.compressed_perplexity == pytest.approx(np.exp(nll), rel=1e-5)


def test_the_baseline_is_cached_by_identity(
    dense: Path, perturbed: Path, declare: Declare, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = declare(texts=[])
    first = compare(perturbed, dense, suite)
    assert not first.baseline_cached
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(baseline_module.Baseline, "model", lambda self: pytest.fail("the baseline is loaded"))
        again = compare(perturbed, dense, suite)
    assert again.baseline_cached
    assert again.baseline_engine is None, "nobody ran it"
    varies = {"seconds", "baseline_cached", "baseline_engine"}
    assert again.model_dump(exclude=varies) == first.model_dump(exclude=varies)
    assert not compare(perturbed, dense, suite, limit=5).baseline_cached
    assert not compare(dense, perturbed, suite).baseline_cached
    assert len(list(cache.iterdir())) == 3


def test_a_damaged_cache_costs_a_message(dense: Path, declare: Declare, cache: Path) -> None:
    suite, heard = declare(texts=[]), Heard()
    compare(dense, dense, suite)
    entry = next(cache.iterdir())
    entry.write_bytes(entry.read_bytes()[:100])
    assert not compare(dense, dense, suite, heard).baseline_cached
    assert any("damaged" in line for line in heard.lines)
    assert compare(dense, dense, suite).baseline_cached


def test_a_cached_baseline_that_saw_other_items_is_computed_anew(
    dense: Path, declare: Declare, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, heard = declare(texts=[]), Heard()
    compare(dense, dense, suite)
    monkeypatch.setattr(baseline_module.Baseline, "_key", lambda *_: next(cache.iterdir()).stem)
    data = suite.parent / "data" / "items.jsonl"
    data.write_text(data.read_text(encoding="utf-8").replace("the old", "the small"), encoding="utf-8")
    result = compare(dense, dense, suite, heard)
    assert not result.baseline_cached
    assert "task choose: the cached baseline saw other items; computed anew" in heard.lines


def test_limits_of_suite_and_user_the_smaller_counts(dense: Path, declare: Declare) -> None:
    suite = declare(tasks=[{"task": "choose", "limit": 6}], texts=[])
    assert compare(dense, dense, suite).tasks[0].num_items == 6
    assert compare(dense, dense, suite, limit=4).tasks[0].num_items == 4
    assert compare(dense, dense, suite, limit=8).tasks[0].num_items == 6


def test_texts_are_checked_before_anything_runs(
    dense: Path, make_checkpoint: Callable[..., Path], declare: Declare
) -> None:
    suite = declare(
        texts=[
            {"name": "short", "file": "short.txt", "seq_len": 32},
            {"name": "long", "file": "text.txt", "seq_len": 128},
        ]
    )
    (suite.parent / "short.txt").write_text("the cat sees the dog", encoding="utf-8")
    with pytest.raises(LLMCompressError, match=r"short\.txt not found"):
        (suite.parent / "short.txt").rename(suite.parent / "gone.txt")
        compare(dense, dense, suite)
    (suite.parent / "gone.txt").rename(suite.parent / "short.txt")
    with pytest.raises(ProblemsError) as caught:
        compare(dense, dense, suite)
    lines = caught.value.lines()
    assert "text short: 5 tokens fill 0 rows of seq_len 32" in lines[0]
    assert "text long: seq_len 128 is more than the model's 64 positions" in lines[2]


def test_another_tokenizer_is_refused(dense: Path, make_checkpoint: Callable[..., Path], declare: Declare) -> None:
    other = make_checkpoint(seed=1)
    path = other / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"bird"', '"bard"'), encoding="utf-8")
    with pytest.raises(LLMCompressError, match="tokenizers turn it into different tokens"):
        compare(other, dense, declare())


def test_items_that_differ_are_never_compared() -> None:
    def run(*digests: str) -> TaskRun:
        return TaskRun(
            task="t",
            items=[Item(doc_id=i, digest=d, scores={"acc,none": 1.0}, responses={}) for i, d in enumerate(digests)],
        )

    task = ReadyTask("t", 0, None, ("none",), {"acc": True}, None, None, None, False, "")
    entry = TaskEntry(task="t")
    assert results.task_result(entry, task, run("a", "b"), run("a", "b"), 0).verdict == "inconclusive"
    with pytest.raises(LLMCompressError, match="item 1 of the compressed model is not the baseline's item 1"):
        results.task_result(entry, task, run("a", "b"), run("a", "c"), 0)
    with pytest.raises(LLMCompressError, match="the baseline has 2 items, the compressed model 1"):
        results.task_result(entry, task, run("a", "b"), run("a"), 0)
    broken = run("a", "b")
    broken.items[1].scores["acc,none"] = float("nan")
    with pytest.raises(LLMCompressError, match="item 1 has no finite score for acc,none"):
        results.task_result(entry, task, run("a", "b"), broken, 0)


def pair(better: int, worse: int, same: int, metric: str = "acc", right: float = 1.0) -> tuple[TaskRun, TaskRun]:
    """Two runs whose items flip so often."""
    scores = [(0.0, right)] * better + [(right, 0.0)] * worse + [(right, right)] * same
    runs = (
        TaskRun(
            task="t",
            items=[
                Item(doc_id=i, digest="d", scores={f"{metric},none": value[side]}, responses={})
                for i, value in enumerate(scores)
            ],
        )
        for side in (0, 1)
    )
    before, after = runs
    return before, after


@pytest.mark.parametrize(
    ("flips", "expected"),
    [
        ((0, 0, 4), "inconclusive"),  # a percentile bootstrap has no width here
        ((0, 4, 0), "inconclusive"),  # and would fail this
        ((0, 49, 0), "inconclusive"),
        ((0, 50, 0), "fail"),
        ((0, 0, 50), "inconclusive"),  # enough for a verdict, not for this budget
        ((0, 0, 200), "pass"),
        ((0, 2, 198), "inconclusive"),
        ((10, 10, 3500), "pass"),
        ((0, 40, 460), "fail"),
    ],
)
def test_a_verdict_takes_items(flips: tuple[int, int, int], expected: str) -> None:
    task = ReadyTask("t", 0, None, ("none",), {"acc": True}, None, None, None, False, "")
    row = results.task_result(TaskEntry(task="t", budget=0.02), task, *pair(*flips), 0)
    assert (row.verdict, row.num_items, row.items_needed) == (expected, sum(flips), 3441)
    assert row.interval[0] <= row.difference < row.interval[1]


def test_scores_between_0_and_1_have_an_interval_with_width_where_none_changed() -> None:
    task = ReadyTask("t", 0, None, ("none",), {"f1": True}, None, None, None, False, "")
    row = results.task_result(TaskEntry(task="t", metric="f1"), task, *pair(0, 0, 300, "f1", 0.7), 0)
    assert row.better is None and row.interval[1] == -row.interval[0] > 0.005
    assert (
        row.interval_method
        != results.task_result(
            TaskEntry(task="t"), ReadyTask("t", 0, None, ("none",), {}, None, None, None, False, ""), *pair(0, 0, 60), 0
        ).interval_method
    )


def test_what_a_verdict_takes_is_told_before_anything_runs(dense: Path, declare: Declare) -> None:
    tasks = [
        {"task": "choose", "metric": metric, "budget": budget} for metric, budget in (("acc", 0.02), ("acc_norm", 0.0))
    ]
    heard = Heard()
    compare(dense, dense, declare(tasks=tasks, texts=[]), heard, limit=5)
    first, second = heard.lines[:2]
    assert first == (
        "choose acc: 5 items; a verdict at a budget of 0.02 takes about 3,441 where 10% flip; below 50 there is none"
    )
    assert "a budget of 0 takes more than any number of items" in second


def test_a_limit_is_one_of_rows_too(dense: Path, declare: Declare) -> None:
    result = compare(dense, dense, declare(texts=[ROWS_25]), limit=3)
    assert (result.tasks[0].num_items, result.texts[0].num_rows) == (3, 3)


def test_tasks_by_name_are_a_suite_of_their_own(dense: Path, monkeypatch: pytest.MonkeyPatch, declare: Declare) -> None:
    folder = declare().parent
    monkeypatch.setattr(suite_module, "bundled_tasks", lambda: folder)
    settings = EvaluateSettings(tasks=["choose:acc_norm"], limit=4)
    result = evaluate(dense, Checkpoint.open(dense), settings, seed=0, progress=Silent(), samples_dir=None)
    assert (result.suite, result.texts) == ("choose", [])
    assert [(row.task, row.metric, row.num_items, row.budget) for row in result.tasks] == [
        ("choose", "acc_norm", 4, 0.02)
    ]


@pytest.mark.parametrize(
    ("given", "match"), [({}, "one of the two"), ({"suite": "tiny", "tasks": ["x"]}, "one of the two")]
)
def test_a_suite_or_tasks(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        EvaluateSettings.model_validate(given)


def test_the_baseline_runs_in_the_dtype_of_the_compressed_model(
    dense: Path, declare: Declare, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = stage_module.engines.load

    def in_bfloat16(folder: Path, choice: Any = "auto", trust: bool = False, dtype: Any = None, **how: Any) -> Any:
        return own(folder, choice, trust, dtype or torch.bfloat16, **how)

    monkeypatch.setattr(stage_module.engines, "load", in_bfloat16)
    result = compare(dense, dense, declare(texts=[]))
    assert (result.dtype, result.baseline_dtype, result.baseline_stored_dtype) == ("bfloat16", "bfloat16", "float32")
    assert result.differing == []
    other = result.model_copy(update={"baseline_dtype": "float32"})
    assert other.differing == ["dtype: base float32, compressed bfloat16"]


def test_settings_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValueError, match="engine"):
        EvaluateSettings.model_validate({"suite": "s", "engine": "fast"})
    with pytest.raises(ValueError, match="batch"):
        EvaluateSettings.model_validate({"suite": "s", "batch": 3})


def test_a_student_with_other_padding_rows_against_its_teacher(
    make_checkpoint: Callable[..., Path], dense: Path, declare: Declare
) -> None:
    """The rows of the vocabulary that only one of them has are left out, and that is said."""
    vocabulary = json.loads((dense / "config.json").read_text())["vocab_size"]
    student, heard = make_checkpoint(seed=5, num_hidden_layers=1, vocab_size=vocabulary + 8), Heard()
    result = compare(student, dense, declare(), heard)
    assert result.texts[0].shared_vocabulary == vocabulary and result.texts[0].kl > 0
    assert any(f"{vocabulary} and {vocabulary + 8} rows of logits for the same" in line for line in heard.lines)
    assert compare(dense, student, declare()).texts[0].shared_vocabulary == vocabulary


def test_a_token_of_a_text_without_a_row_is_one_line(dense: Path, declare: Declare, tmp_path: Path) -> None:
    import shutil

    from llmcompress.checkpoint.source import load_tokenizer

    grown = Path(shutil.copytree(dense, tmp_path / "grown"))
    tokenizer = load_tokenizer(grown)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(grown)
    suite = declare(tasks=[])
    path = suite.parent / "text.txt"
    path.write_text("zebra " + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(
        LLMCompressError, match=r"grown/tokenizer\.json: token 'zebra' has id 19, and the model embeds 19"
    ):
        compare(grown, grown, suite)


def test_a_token_of_a_task_without_a_row_is_one_line(dense: Path, declare: Declare, tmp_path: Path) -> None:
    """Requests are made by lm-eval, so the model itself asks."""
    import shutil

    from llmcompress.checkpoint.source import load_tokenizer

    grown = Path(shutil.copytree(dense, tmp_path / "grown"))
    tokenizer = load_tokenizer(grown)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(grown)
    suite = declare(texts=[])
    items = suite.parent / "data" / "items.jsonl"
    items.write_text(items.read_text(encoding="utf-8").replace("the old", "the zebra"), encoding="utf-8")
    with pytest.raises(LLMCompressError, match=r"grown/tokenizer\.json: token 'zebra' has id 19"):
        compare(grown, grown, suite)


def test_a_budget_of_an_unknown_metric_is_refused_before_anything_runs(dense: Path, declare: Declare) -> None:
    suite = declare(texts=[{"name": "words", "file": "text.txt", "seq_len": 32, "budgets": {"kld": 0.1}}])
    with pytest.raises(LLMCompressError, match="text words: unknown text metric 'kld'; known: kl, perplexity"):
        compare(dense, dense, suite)
