"""On-policy training: the loss is trl's own, the whole run is trl's own, and an interruption is not seen afterwards."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llmcompress.console import Silent
from llmcompress.data.collate import Example
from llmcompress.distill.layer_map import layer_map
from llmcompress.distill.objective import Distiller, Objective
from llmcompress.distill.on_policy import prompt_of, train_on_policy, with_prompts
from llmcompress.distill.rows import Row, Rows
from llmcompress.distill.settings import DistillSettings, OnPolicySettings
from llmcompress.distill.teachers import Online
from llmcompress.errors import LLMCompressError
from llmcompress.models.tasks import CAUSAL
from llmcompress.seed import derive
from llmcompress.training.on_policy import to_the_left
from llmcompress.training.trainer import Guarded
from tests import tiny_models

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:You are importing from 'trl.experimental'")
V, WRITTEN = 96, 6


def model(seed: int, eos: int | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = tiny_models.configs()["llama"]
    config.eos_token_id = eos
    found = AutoModelForCausalLM.from_config(config).float()
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.1)
    return found.eval()


def distiller(student: nn.Module, teachers: list[nn.Module], temperature: float = 1.0, **weights: float) -> Distiller:
    shared = [(teacher, 1 / len(teachers)) for teacher in teachers]
    source = Online(shared, CAUSAL, V, "probabilities", temperature, False, False)
    of = Objective(CAUSAL, weights or {"js": 1.0}, temperature, maps=[layer_map("uniform", 2, 2)], vocabulary=V)
    return Distiller(student, source, of, [])


def rows() -> Rows:
    """Prompts of several lengths, answers of WRITTEN tokens each."""
    draw = random.Random(0)
    found = []
    for number in range(12):
        prompt = [draw.randrange(3, V) for _ in range(draw.randrange(2, 7))]
        ids = prompt + [draw.randrange(3, V) for _ in range(WRITTEN)]
        learned = [at >= len(prompt) for at in range(len(ids))]
        labels = [one if learn else -100 for one, learn in zip(ids, learned, strict=True)]
        found.append(Row(number, ids, labels, None, Example("here", ids, learned)))
    return Rows(CAUSAL, found, [], 0, SimpleNamespace(kind="prompt"))  # type: ignore[arg-type]


def settings(lmbda: float = 0.5, **training: Any) -> DistillSettings:
    how = {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "schedule": "constant", "warmup_frac": 0.0}
    asked = {"lmbda": lmbda, "max_new_tokens": WRITTEN}
    return DistillSettings.model_validate({"data": "x", "training": how | training, "on_policy": asked})


def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tiny_models.save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("name", "beta"), [("forward_kl", 0.0), ("js", 0.5), ("reverse_kl", 1.0)])
def test_the_loss_is_that_of_trl(name: str, beta: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = model(0), model(1)
    batch = rows().batch(rows().train[:4])
    ours = distiller(student, [teacher], **{name: 1.0})(**batch)["loss"]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = [one(**inputs).logits[:, :-1] for one in (student, teacher)]
    theirs = GKDTrainer.generalized_jsd_loss(*logits, labels=batch["labels"][:, 1:], beta=beta)
    assert ours.item() == pytest.approx(float(theirs), rel=1e-5)


def test_the_run_is_that_of_trl(tmp_path: Path) -> None:
    """The same draws, the same text written, the same losses and the same weights as trl's trainer by itself."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    data, asked = rows(), settings()
    student, teacher = model(0), model(1)
    theirs = copy.deepcopy(student)
    run, own = train_on_policy(
        distiller(student, [teacher]), data, asked, tokenizer(tmp_path), tmp_path / "ours", 0, Silent()
    )
    config = GKDConfig(
        output_dir=str(tmp_path / "trl"), max_steps=6, learning_rate=1e-2, lr_scheduler_type="constant_with_warmup",
        per_device_train_batch_size=4, logging_steps=1, seed=derive(0, "training"), use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", gradient_checkpointing=False, lmbda=0.5, beta=0.5, temperature=1.0,
        max_new_tokens=WRITTEN,
    )  # fmt: skip
    assert asked.on_policy is not None
    trainer = GKDTrainer(
        model=theirs, teacher_model=teacher, args=config, processing_class=tokenizer(tmp_path),
        train_dataset=Dataset.from_dict({"place": list(range(len(data.train)))}),
        data_collator=lambda found: with_prompts(data, [data.train[one["place"]] for one in found], asked.on_policy),
    )  # fmt: skip
    trainer.train()
    wanted = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert [point.loss for point in run.curve] == pytest.approx(wanted, rel=1e-3)
    for (name, mine), one in zip(student.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, one, rtol=1e-2, atol=2e-3, msg=name)
    assert 0 < own.student_batches < own.batches == 6 and own.student_tokens == own.student_batches * 4 * WRITTEN


def test_the_student_is_left_as_it_was_but_for_its_weights(tmp_path: Path) -> None:
    student = model(0, eos=2)
    before = student.config.to_dict(), student.generation_config.to_dict()
    train_on_policy(distiller(student, [model(1)]), rows(), settings(), tokenizer(tmp_path), tmp_path, 0, Silent())
    assert (student.config.to_dict(), student.generation_config.to_dict()) == before
    assert "forward" not in vars(student)


def test_a_run_that_was_killed_goes_on_with_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(folder: Path) -> Any:
        student = model(0)
        both = distiller(student, [model(1), model(2)])
        found = train_on_policy(both, rows(), settings(save_every=2), tokenizer(tmp_path), folder, 0, Silent())
        return found, student

    (whole, own), first = run(tmp_path / "whole")
    step, calls = Guarded.training_step, iter(range(100))

    def stopped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Guarded, "training_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    monkeypatch.setattr(Guarded, "training_step", step)
    (rest, own_too), second = run(tmp_path / "killed")
    assert rest.resumed_from == 4 and own_too == own
    assert rest.curve == whole.curve
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_text_is_moved_to_the_left_row_by_row() -> None:
    ids = torch.tensor([[0, 0, 5, 6, 7, 0], [3, 4, 5, 6, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, -100, 6, 7, -100], [-100, -100, -100, 6, -100, -100]])
    moved = to_the_left(ids, mask, labels)
    assert moved[0].tolist() == [[5, 6, 7, 0, 0, 0], [3, 4, 5, 6, 0, 0]]
    assert moved[1].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert moved[2][0].tolist() == [-100, 6, 7, -100, -100, -100]


def test_prompts() -> None:
    asked = OnPolicySettings(prompt_tokens=3)
    answered = Row(0, [5, 6, 7, 8], [-100, -100, 7, 8])
    plain = Row(0, [5, 6, 7, 8], [5, 6, 7, 8])
    assert prompt_of(answered, False, asked) == [5, 6] and prompt_of(plain, False, asked) == [5, 6, 7]
    first_never_learned = Row(0, [1, 6, 7, 8], [-100, 6, 7, 8])
    assert prompt_of(first_never_learned, True, asked) == [1, 6, 7]
    assert prompt_of(Row(0, [5, 6], [5, 6]), True, asked) == [5]
    batch = with_prompts(rows(), rows().train[:3], asked)
    assert all(row[-1] != 0 for row in batch["prompts"].tolist())
    assert torch.equal(batch["prompts"] != 0, batch["prompt_attention_mask"].bool())


def test_more_than_the_student_has_positions_for(tmp_path: Path) -> None:
    student = model(0)
    student.config.max_position_embeddings = 8
    with pytest.raises(LLMCompressError, match=r"max_new_tokens 6: with prompts of up to 6 tokens .* 8 positions"):
        train_on_policy(distiller(student, [model(1)]), rows(), settings(), tokenizer(tmp_path), tmp_path, 0, Silent())
