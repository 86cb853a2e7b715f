"""What quantizing kept of an adapter: exactly all of it where nothing is lost, and the projection where something is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.finetune.retention import measure_retention
from llmcompress.formats.base import FORMATS
from llmcompress.formats.roundtrip import unpack_row
from llmcompress.pipeline.run import run
from llmcompress.report import RunReport
from llmcompress.training.heldout import ratio_interval
from tests.unit.finetune.conftest import recipe


def quantize(model: Path, out: Path) -> Path:
    stage = {"quantize": {"scheme": "W4A16", "method": "rtn", "group_size": 32, "format": "compressed_tensors"}}
    run(Recipe.of({"model": str(model), "output": str(out), "stages": [stage]}), Silent())
    return out


@pytest.fixture
def merged(model: Path, rows: Path, tmp_path: Path) -> Path:
    merge: dict[str, Any] = {"merge": {"measure": False}}
    run(recipe(model, tmp_path / "merged", rows, merge, training={"learning_rate": 0.05}), Silent())
    return tmp_path / "merged"


def dense(folder: Path, name: str) -> torch.Tensor:
    report = RunReport.load(folder)
    assert report.output is not None
    row = next(row for row in report.linears if row.name == name)
    return unpack_row(Checkpoint.open(folder), row, FORMATS.get(report.output.format)).dequantize().double()


def test_what_is_kept_is_the_projection_onto_the_update(model: Path, merged: Path, tmp_path: Path) -> None:
    """By plain rounding, so both figures must agree; and one linear spelled out from the files alone."""
    quantized = quantize(merged, tmp_path / "quantized")
    with_adapter, scratch = tmp_path / "with", tmp_path / "scratch"
    kept = tmp_path / "kept"

    def again(checkpoint: Checkpoint, folder: Path) -> None:
        assert checkpoint.folder == model, "a full-precision base needs no second copy"
        quantize(checkpoint.folder, folder)
        shutil.copytree(folder, kept)

    source, merged_checkpoint = Checkpoint.open(model), Checkpoint.open(merged)
    survival = measure_retention(source, merged_checkpoint, quantized, None, again, scratch, 0, Silent())
    assert not scratch.exists() and not with_adapter.exists()
    assert len(survival.linears) == 14 and survival.kl is not None and survival.heldout_tokens > 0
    assert survival.kl == pytest.approx(survival.kl_rtn, rel=1e-3)
    for row in survival.linears:
        assert row.kept == pytest.approx(row.kept_rtn, abs=1e-5)
    row = survival.linears[3]
    tensor = f"{row.name}.weight"
    update_OI = merged_checkpoint.tensor(tensor).double() - source.tensor(tensor).double()
    moved_OI = dense(quantized, row.name) - dense(kept, row.name)
    expected = float((moved_OI * update_OI).sum() / (update_OI * update_OI).sum())
    assert row.kept == pytest.approx(expected, rel=1e-4)
    rest_OI = (moved_OI - expected * update_OI) * update_OI
    assert row.noise == pytest.approx(float(rest_OI.square().sum().sqrt() / update_OI.square().sum()), rel=1e-3)
    assert sum(row.size for row in survival.linears) == pytest.approx(1)
    assert survival.kept == pytest.approx(sum(row.kept * row.size for row in survival.linears), rel=1e-6)
    finetuned = RunReport.load(merged).finetune
    assert finetuned is not None
    assert survival.loss_base == pytest.approx(finetuned.heldout_loss_base, rel=1e-4)
    assert survival.loss_adapter == pytest.approx(finetuned.heldout_loss, rel=1e-4)
    assert survival.loss_merged == pytest.approx(survival.loss_adapter, rel=1e-3)
    assert survival.loss_quantized is not None and survival.loss_base is not None and survival.loss_adapter is not None
    if survival.gain_kept is not None and survival.gain_kept_interval is not None:
        share = (survival.loss_base - survival.loss_quantized) / (survival.loss_base - survival.loss_adapter)
        assert survival.gain_kept == pytest.approx(share, rel=1e-6)
        assert survival.gain_kept_interval[0] <= share <= survival.gain_kept_interval[1]


def test_the_interval_of_a_ratio_holds_just_what_a_paired_t_test_does_not_refuse() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    whole = 1 + 0.5 * torch.randn(20, generator=generator, dtype=torch.float64)
    part = 0.8 * whole + 0.2 * torch.randn(20, generator=generator, dtype=torch.float64)
    interval = ratio_interval(part, whole)
    assert interval is not None
    for ratio in interval:
        assert stats.ttest_1samp((part - ratio * whole).numpy(), 0).pvalue == pytest.approx(0.05, rel=1e-6)
    assert stats.ttest_1samp((part - sum(interval) / 2 * whole).numpy(), 0).pvalue > 0.05
    assert ratio_interval(whole, whole) == pytest.approx((1, 1))


def test_a_ratio_to_what_is_not_told_from_zero_has_no_interval() -> None:
    assert ratio_interval(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -1.0, 0.1])) is None
    assert ratio_interval(torch.tensor([1.0]), torch.tensor([1.0])) is None


def test_a_checkpoint_that_was_not_merged_is_refused(model: Path, rows: Path, tmp_path: Path) -> None:
    quantized = quantize(model, tmp_path / "quantized")
    source = Checkpoint.open(model)
    with pytest.raises(LLMCompressError, match="its report tells of no merge"):
        measure_retention(
            source, Checkpoint.open(quantized), quantized, None, lambda *_: None, tmp_path / "s", 0, Silent()
        )
