"""Evaluate: one suite, two checkpoints, the same items; what comes back is what the report says.

    tasks   compressed ──> TaskRun ─┐ item by item, digests equal ──> difference, interval, flips, p ──> verdict
            baseline ──> TaskRun ───┘ (cached on disk)
    texts   both models, same rows ──> perplexity ratio, KL, agreement ──> verdict

Everything that can be wrong with a suite is found before the first item runs: names, metrics, data, texts too short.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.source import load_tokenizer
from llmcompress.console import Progress
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.evaluate import contamination, engines, results, text
from llmcompress.evaluate.baseline import Baseline, BaselineCache, cache_folder
from llmcompress.evaluate.harness import (
    ReadyTask,
    TaskRun,
    find_tasks,
    harness_version,
    item_texts,
    num_items,
    refuse_generation,
    run_task,
)
from llmcompress.evaluate.provenance import Consent
from llmcompress.evaluate.settings import EvaluateSettings
from llmcompress.evaluate.statistics import EXPECTED_DISCORDANCE, items_needed, overall, paired_interval
from llmcompress.evaluate.suite import Suite, TaskEntry, TextEntry, chosen_suite
from llmcompress.evaluate.text_metrics import text_metric
from llmcompress.models.config import stored_dtype
from llmcompress.models.loading import best_device
from llmcompress.models.vocabulary import VocabularySide, shared_vocabulary
from llmcompress.report import MIN_ITEMS, Contamination, Evaluation, RunReport, TaskResult, TextResult, is_ours

if TYPE_CHECKING:
    import torch

RunKey = tuple[str, int, int | None]
"""Task, few-shot count, limit: the entries of a suite that share these share one run."""


def evaluate(
    checkpoint: Path,
    baseline: Checkpoint,
    settings: EvaluateSettings,
    *,
    seed: int,
    progress: Progress,
    samples_dir: Path | None,
    allow_pickle: bool = False,
) -> Evaluation:
    """Compare the checkpoint in a folder with its baseline on every task and text of a suite.

    samples_dir: where each task's items are written, TASK-Kshot.jsonl, both models' scores and responses in one line.
    allow_pickle: the caller's consent for the sources of calibration text; consent to run code is the baseline's own.

    Raises: LLMCompressError for a bad suite, task, metric or text, a checkpoint that does not load, and models whose
    tokenizers or items differ.
    """
    began = time.monotonic()
    suite = chosen_suite(settings.suite, settings.tasks)
    tasks = find_tasks(suite.tasks, suite.task_folders(), suite.where, trust_remote_code=baseline.trust_remote_code)
    for line in plan_lines(suite, tasks, settings.limit):
        progress.message(line)
    rows = _rows(suite, checkpoint, baseline, settings.limit)
    consent = Consent(baseline.trust_remote_code, allow_pickle)
    overlaps = _overlaps(suite, tasks, checkpoint, settings, consent, progress)
    progress.message(f"loading {checkpoint}")
    compressed = engines.load(checkpoint, settings.engine, baseline.trust_remote_code, streams=True).guarded()
    if compressed.streamed:
        refuse_generation(tasks.values())
    cache = BaselineCache(cache_folder(), progress.message)
    base = Baseline(
        baseline, cache, progress, settings.batch_size, seed, compressed.model.dtype, settings.engine == "stream"
    )
    task_rows = _evaluate_tasks(suite, tasks, compressed, base, settings.limit, samples_dir)
    text_rows = [_evaluate_text(entry, rows[entry.name], compressed, base) for entry in suite.texts]
    return Evaluation(
        suite=suite.name,
        baseline=baseline.identity(),
        baseline_cached=bool(task_rows) and not base.num_computed,
        engine=compressed.engine,
        engine_note=compressed.note,
        kernels=compressed.kernels,
        device=compressed.device,
        dtype=compressed.dtype,
        **_baseline_run(base),
        seed=seed,
        harness=harness_version(),
        tasks=task_rows,
        texts=text_rows,
        contamination=overlaps,
        contamination_allowed=settings.allow_overlap,
        verdict=overall([*(row.verdict for row in task_rows), *(row.verdict for row in text_rows)]),
        seconds=time.monotonic() - began,
    )


def plan_lines(suite: Suite, tasks: Mapping[tuple[str, int], ReadyTask], limit: int | None) -> list[str]:
    """For each task how many items there are and how many a verdict at its budget takes, a line each."""
    lines = []
    for entry in suite.tasks:
        task, num_fewshot, most = _run_key(entry, limit)
        there, needed = num_items(tasks[task, num_fewshot], most), items_needed(entry.budget)
        head = f"{entry.task} {entry.metric}: {there:,} items; a verdict at a budget of {entry.budget:g}"
        if needed is None:
            lines.append(f"{head} takes more than any number of items: only a gain can be shown")
            continue
        line = f"{head} takes about {needed:,} where {EXPECTED_DISCORDANCE:.0%} flip"
        if there < MIN_ITEMS:
            line += f"; below {MIN_ITEMS} there is none"
        elif -float(paired_interval(0, 0, there)[0]) > entry.budget:
            line += "; with so few it cannot pass, even where nothing flips"
        lines.append(line)
    return lines


def _baseline_run(base: Baseline) -> dict[str, str | None]:
    """What the baseline was computed by; where all of it was cached, in the dtype and on the device of its key."""
    stored = stored_dtype(base.checkpoint.config)
    engine, device = (base.loaded.engine, base.loaded.device) if base.loaded else (None, str(best_device()))
    return {
        "baseline_engine": engine,
        "baseline_dtype": base.loaded.dtype if base.loaded else str(base.dtype).removeprefix("torch."),
        "baseline_stored_dtype": None if stored is None else str(stored).removeprefix("torch."),
        "baseline_device": device,
    }


def _overlaps(
    suite: Suite,
    tasks: Mapping[tuple[str, int], ReadyTask],
    checkpoint: Path,
    settings: EvaluateSettings,
    consent: Consent,
    progress: Progress,
) -> list[Contamination]:
    """The rows of the contamination gate, for a checkpoint whose making is known.

    Raises: LLMCompressError where one is above the bound and that was not allowed.
    """
    if not is_ours(checkpoint):
        return []
    progress.message("looking for the suite's items in the text that the checkpoint was made with")
    parts: dict[str, list[str]] = {}
    for entry in suite.tasks:
        key = _run_key(entry, settings.limit)
        parts.setdefault(entry.task, item_texts(tasks[key[:2]], key[2]))
    for held_out in suite.texts:
        parts[held_out.name] = contamination.text_items(text.read_text(suite.text_path(held_out), held_out.field))
    rows = contamination.overlaps(RunReport.load(checkpoint), parts, consent)
    if not settings.allow_overlap:
        contamination.refuse(rows, settings.overlap_bound, suite.name)
    return rows


def _rows(suite: Suite, checkpoint: Path, baseline: Checkpoint, limit: int | None) -> dict[str, torch.Tensor]:
    """The token rows of every text, int64 [N, S] N at most `limit`; both tokenizers were seen to give the same ones."""
    if not suite.texts:
        return {}
    trust = baseline.trust_remote_code
    tokenizers = [load_tokenizer(folder, trust) for folder in (baseline.folder, checkpoint)]
    longest = [engines.max_positions(folder) for folder in (baseline.folder, checkpoint)]
    rows: dict[str, torch.Tensor] = {}
    problems: list[LLMCompressError] = []
    for entry in suite.texts:
        where = f"{suite.where}: text {entry.name}"
        try:
            for metric in entry.budgets:
                text_metric(metric, where)
            content = text.read_text(suite.text_path(entry), entry.field)
            ours, theirs = (
                text.token_rows(content, tokenizer, entry.seq_len, entry.num_tokens, where) for tokenizer in tokenizers
            )
        except LLMCompressError as error:
            problems.append(error)
            continue
        problems += _row_problems(entry, where, ours.equal(theirs), [limit for limit in longest if limit is not None])
        rows[entry.name] = ours[:limit]
    raise_all(problems)
    return rows


def _row_problems(entry: TextEntry, where: str, same_tokens: bool, longest: Sequence[int]) -> list[LLMCompressError]:
    problems = []
    if not same_tokens:
        problems.append(
            LLMCompressError(
                f"{where}: the two checkpoints' tokenizers turn it into different tokens",
                "a baseline needs the tokenizer of the checkpoint that was compressed",
            )
        )
    if longest and entry.seq_len > min(longest):
        problems.append(
            LLMCompressError(f"{where}: seq_len {entry.seq_len} is more than the model's {min(longest)} positions")
        )
    return problems


def _evaluate_tasks(
    suite: Suite,
    tasks: Mapping[tuple[str, int], ReadyTask],
    compressed: engines.Loaded,
    base: Baseline,
    limit: int | None,
    samples_dir: Path | None,
) -> list[TaskResult]:
    """Run what the entries need, each run once, and compare entry by entry."""
    runs: dict[RunKey, tuple[TaskRun, TaskRun]] = {}
    keys = [_run_key(entry, limit) for entry in suite.tasks]
    with base.progress.step(f"tasks of {suite.name}", total=2 * len(set(keys))) as step:
        for key in dict.fromkeys(keys):
            task = tasks[key[:2]]
            after = run_task(task, compressed.model, compressed.tokenizer, key[2], base.batch_size, base.seed)
            step.advance(1, f"{task.name}, compressed")
            before = base.run(task, key[2], after)
            step.advance(1, f"{task.name}, baseline")
            runs[key] = before, after
    rows = [
        results.task_result(entry, tasks[key[:2]], *runs[key], base.seed)
        for entry, key in zip(suite.tasks, keys, strict=True)
    ]
    if samples_dir is not None:
        for key, (before, after) in runs.items():
            results.write_samples(samples_dir / _samples_name(key), before, after)
    return rows


def _run_key(entry: TaskEntry, limit: int | None) -> RunKey:
    limits = [value for value in (entry.limit, limit) if value is not None]
    return entry.task, entry.num_fewshot, min(limits, default=None)


def _samples_name(key: RunKey) -> str:
    task, num_fewshot, limit = key
    return f"{task}-{num_fewshot}shot{'' if limit is None else f'-first{limit}'}.jsonl"


def _evaluate_text(entry: TextEntry, rows_NS: torch.Tensor, compressed: engines.Loaded, base: Baseline) -> TextResult:
    """Both models over the rows of one text."""
    baseline, entries = base.model(), None
    if baseline.num_logits != compressed.num_logits:
        sides = (("the baseline", baseline), ("the compressed model", compressed))
        shared = shared_vocabulary(
            *(VocabularySide(name, loaded.tokenizer.get_vocab(), loaded.num_logits) for name, loaded in sides)
        )
        base.progress.message(f"held-out text {entry.name}: {shared.note}")
        entries = shared.size
    widest = max(baseline.num_logits, compressed.num_logits)
    at_once = text.rows_at_once(base.batch_size, entry.seq_len, widest)
    with base.progress.step(f"held-out text {entry.name}", total=len(rows_NS)) as step:
        figures = text.compare_rows(baseline.over, compressed.over, rows_NS, at_once, step.advance, entries)
    known = {"tokens_sha256": hashlib.sha256(rows_NS.numpy().tobytes()).hexdigest()}
    return results.text_result(entry, figures, base.seed, entries).model_copy(update=known)
