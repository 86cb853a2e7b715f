"""The figures show what the report holds, on any matplotlib settings."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.image

from llmcompress.card.figures import NO_BUDGET, PAPER, draw_errors, draw_scores, panels
from llmcompress.card.linears import worst_errors
from tests.unit.card.sample_report import full_report


def test_one_panel_per_unit() -> None:
    report = full_report()
    shown = panels(report.evaluations)
    assert [panel.axis.split(",")[0] for panel in shown] == ["acc", "exact_match", "KL from base", "perplexity"]
    assert [bar.budget for bar in shown[0].bars] == [-0.02] * 3
    assert [bar.verdict for bar in shown[0].bars] == ["pass", "fail", "inconclusive"]
    assert shown[3].unchanged == 1.0


def test_a_budget_lies_on_the_side_of_the_loss_and_may_be_missing() -> None:
    report = full_report()
    evaluation = report.evaluations[0]
    task = evaluation.tasks[0].model_copy(update={"higher_is_better": False})
    text = evaluation.texts[0].model_copy(deep=True)
    text.figure("kl").budget = None
    shown = panels([evaluation.model_copy(update={"tasks": [task], "texts": [text]})])
    assert shown[0].bars[0].budget == 0.02
    assert (shown[1].bars[0].budget, shown[1].bars[0].verdict) == (None, NO_BUDGET)
    assert shown[2].bars[0].verdict == "pass"


def test_errors_are_the_worst_of_a_kind_in_a_layer() -> None:
    rows = full_report().linears
    lines = worst_errors(rows, "output")
    assert list(lines) == [row.name.removeprefix("model.layers.0.") for row in rows[:7]]
    assert len(lines["mlp.down_proj"]) == 5, "the one that fell back has an error of another kind"
    assert lines["self_attn.q_proj"][0] == rows[0].relative_error
    experts = [rows[0].model_copy(update={"name": f"m.layers.2.experts.{i}.w", "relative_error": i}) for i in (1, 3, 2)]
    assert worst_errors(experts, "output") == {"experts.*.w": {2: 3}}


def test_figures_are_opaque_and_do_not_follow_the_users_settings(tmp_path: Path) -> None:
    report = full_report()
    first, errors = tmp_path / "a.png", tmp_path / "e.png"
    assert draw_scores(report.evaluations, first) == first
    assert draw_errors(report.linears, errors) == errors
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.transparent": True}):
        draw_scores(report.evaluations, tmp_path / "b.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert first.read_bytes() == (tmp_path / "b.png").read_bytes()
    assert b"oftware" not in first.read_bytes()
    paper = [int(PAPER[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    for path in (first, errors):
        pixels = matplotlib.image.imread(path)
        assert abs(pixels[0, 0, :3] - paper).max() < 1e-6
        assert pixels.shape[2] == 3 or (pixels[:, :, 3] == 1).all()


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert draw_scores([], tmp_path / "s.png") is None
    assert draw_errors([], tmp_path / "e.png") is None
    zero = [row.model_copy(update={"relative_error": 0.0}) for row in full_report().linears]
    assert draw_errors(zero, tmp_path / "e.png") is None
    assert not list(tmp_path.iterdir())


def test_odd_labels_are_drawn(tmp_path: Path) -> None:
    report = full_report()
    task = report.evaluations[0].tasks[0].model_copy(update={"task": "$\\frac$ " + "long" * 30, "metric": "a$b_"})
    assert draw_scores([report.evaluations[0].model_copy(update={"tasks": [task]})] * 2, tmp_path / "s.png")
