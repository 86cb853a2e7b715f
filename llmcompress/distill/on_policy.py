"""Distillation on text that the student writes itself (GKD): prompts, what does not combine, and the training.

    row      prompt and answer     the prompt is what is not trained; the student writes the answer
             text alone            its first `prompt_tokens` tokens; the student goes on

The loop, the drawing and the writing are trl's (training/on_policy.py); the losses are ours, so several teachers, a
temperature and vocabularies that differ in padding rows work as they do elsewhere.

Shapes: B rows of a batch, P tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llmcompress.console import Progress
from llmcompress.data.collate import IGNORED
from llmcompress.distill.objective import Distiller
from llmcompress.distill.rows import Row, Rows
from llmcompress.distill.settings import DistillSettings, OnPolicySettings
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.models.tasks import Task
from llmcompress.report import OnPolicy, Training
from llmcompress.training.on_policy import OwnText, numbered, own_text_engine, require_trl, untouched
from llmcompress.training.trainer import train


def require_on_policy(settings: DistillSettings, task: Task) -> None:
    """Before anything is loaded.

    Raises: LLMCompressError where the model writes no text, rows are packed, or trl is missing.
    """
    if settings.on_policy is None:
        return
    problems = []
    if not task.generates:
        problems.append(LLMCompressError(f"on_policy: a {task.name} model writes no text", "language models only"))
    if settings.data.packing:
        problems.append(
            LLMCompressError("on_policy: packed rows have no prompt of their own", "leave out data.packing")
        )
    raise_all(problems)
    require_trl()


def prompt_of(row: Row, plain: bool, asked: OnPolicySettings) -> list[int]:
    """The tokens that the student goes on from: those before the first trained one, or the first of a `plain` text."""
    labels = row.labels if isinstance(row.labels, list) else []
    length = next((place for place, label in enumerate(labels) if label != IGNORED), 0)
    if plain or not length:
        length = min(asked.prompt_tokens, max(1, len(row.ids) - 1))
    return row.ids[:length]


def with_prompts(rows: Rows, picked: Sequence[Row], asked: OnPolicySettings) -> dict[str, torch.Tensor]:
    """A batch as elsewhere, and `prompts` and `prompt_attention_mask` int64 [B, P], filled up on the left."""
    prompts = [prompt_of(row, rows.summary.kind == "text", asked) for row in picked]
    longest = max(map(len, prompts))
    ids = [[rows.padding] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return rows.batch(picked) | {"prompts": torch.tensor(ids), "prompt_attention_mask": torch.tensor(mask)}


def train_on_policy(
    distiller: Distiller, rows: Rows, settings: DistillSettings, tokenizer: Any, folder: Path, seed: int,
    progress: Progress,
) -> tuple[Training, OnPolicy]:  # fmt: skip
    """Train the distiller's student, a share of the batches on its own text.

    Raises: LLMCompressError when a prompt and what is to be written are longer than the student's positions.
    """
    asked = settings.on_policy
    assert asked is not None
    _fits(distiller.student, rows, asked)
    counted = OwnText()
    restore = untouched(distiller.student)
    engine = own_text_engine(
        tokenizer, rows.padding, asked.lmbda, asked.max_new_tokens, asked.sampling_temperature
    )  # fmt: skip
    training = train(
        distiller.student,
        rows.train,  # type: ignore[arg-type]
        settings.training,
        folder,
        padding=rows.padding,
        seq_len=settings.data.seq_len,
        seed=seed,
        progress=progress,
        loss=lambda model, batch, _: (distiller.loss(model, batch)["loss"], None),
        driver=counted,
        batch=numbered(rows.train, lambda picked: with_prompts(rows, picked, asked)),
        engine=engine,
    )
    restore()
    return training, OnPolicy(
        lmbda=asked.lmbda,
        max_new_tokens=asked.max_new_tokens,
        sampling_temperature=asked.sampling_temperature,
        batches=counted.batches,
        student_batches=counted.student_batches,
        student_tokens=counted.student_tokens,
    )


def _fits(student: Any, rows: Rows, asked: OnPolicySettings) -> None:
    most = getattr(student.config, "max_position_embeddings", None)
    longest = max(len(prompt_of(row, rows.summary.kind == "text", asked)) for row in rows.train)
    if most is not None and longest + asked.max_new_tokens > most:
        raise LLMCompressError(
            f"on_policy.max_new_tokens {asked.max_new_tokens}: with prompts of up to {longest} tokens that is more "
            f"than the {most} positions of the student",
            f"write at most {max(1, most - longest)}, or cut prompts (data.seq_len)",
        )
