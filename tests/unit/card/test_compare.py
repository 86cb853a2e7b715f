"""Several versions side by side: what is compared, what is refused, who is beaten, and a page that stands alone."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llmcompress.card.compare import compare, page, plots, rows
from llmcompress.card.figures import draw_pareto
from llmcompress.errors import LLMCompressError
from llmcompress.report import RunReport
from tests.unit.card.sample_report import full_report


@pytest.fixture
def versions(tmp_path: Path) -> Callable[..., list[Path]]:
    """versions((size, kl), …): a folder each with a report of one base."""

    def build(*wanted: tuple[int, float]) -> list[Path]:
        folders = []
        for index, (size, kl) in enumerate(wanted):
            report = full_report()
            assert report.output is not None
            report.output.weights_bytes = size
            for text in report.evaluations[0].texts:
                figure = text.figure("kl")
                figure.value, figure.interval = kl, (kl * 0.9, kl * 1.1)
            report.save(tmp_path / f"v{index}")
            folders.append(tmp_path / f"v{index}")
        return folders

    return build


def test_a_version_that_is_larger_and_worse_is_beaten(versions: Callable[..., list[Path]]) -> None:
    found = compare(versions((100, 0.01), (200, 0.02), (50, 0.05), (100, 0.01), (300, 0.001)))
    assert [one.beaten_by for one in found.versions] == [None, "v0", None, None, None]


def test_cells_are_the_reports_figures(versions: Callable[..., list[Path]]) -> None:
    folders = versions((1_000_000, 0.01), (2_000_000, 0.02))
    report = RunReport.load(folders[0])
    row = rows(compare(folders))[0]
    task, text = report.evaluations[0].tasks[0], report.evaluations[0].texts[0]
    assert row["version"] == "v0" and row["size"] == "1.00 MB"
    assert row[f"{task.task} {task.metric} {task.num_fewshot}-shot"].startswith(
        f"{task.compressed.value:.4f} ({task.difference:+.4f}"
    )
    assert row[f"KL {sorted(one.name for one in report.evaluations[0].texts)[0]}"].startswith("0.01000") or text
    assert row["decode tokens/s"] == "-"


def test_the_mean_counts_a_loss_as_a_loss_and_adds_intervals_as_independent(
    versions: Callable[..., list[Path]],
) -> None:
    folders = versions((1, 0.1), (2, 0.1))
    for folder in folders:
        report = RunReport.load(folder)
        first, second = report.evaluations[0].tasks[:2]
        report.evaluations[0].tasks = [
            first.model_copy(update={"difference": -0.02, "interval": (-0.05, 0.01), "higher_is_better": True}),
            second.model_copy(update={"difference": 0.04, "interval": (0.0, 0.08), "higher_is_better": False}),
        ]
        report.save(folder)
    mean, low, high = compare(folders).versions[0].score or (0, 0, 0)
    assert mean == pytest.approx(-0.03)
    assert high - mean == pytest.approx(mean - low) == pytest.approx((0.03**2 + 0.04**2) ** 0.5 / 2)


def test_only_what_all_of_them_ran_is_compared(versions: Callable[..., list[Path]]) -> None:
    folders = versions((1, 0.1), (2, 0.1))
    report = RunReport.load(folders[1])
    kept = report.evaluations[0].tasks[:1]
    report.evaluations[0].tasks, report.evaluations[0].texts = kept, []
    report.save(folders[1])
    found = compare(folders)
    assert len(found.tasks) == 1 and found.text is None
    report.evaluations = []
    report.save(folders[1])
    assert rows(compare(folders))[1]["verdict"] == "not evaluated"


def test_differences_from_another_baseline_do_not_count(versions: Callable[..., list[Path]]) -> None:
    folders = versions((1, 0.1), (2, 0.1))
    report = RunReport.load(folders[1])
    report.evaluations[0].baseline = "0" * 64
    report.save(folders[1])
    assert compare(folders).tasks == []


def test_other_bases_and_single_versions_are_refused(versions: Callable[..., list[Path]], tmp_path: Path) -> None:
    folders = versions((1, 0.1), (2, 0.1))
    with pytest.raises(LLMCompressError, match="nothing to be compared with"):
        compare(folders[:1])
    report = RunReport.load(folders[1])
    assert report.source is not None
    report.source.identity = "1" * 64
    report.save(folders[1])
    with pytest.raises(LLMCompressError, match="other weights"):
        compare(folders)
    with pytest.raises(LLMCompressError, match="not found"):
        compare([folders[0], tmp_path / "none"])


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"num_tokens": 4080}, "tokens 4080"),
        ({"tokens_sha256": "b" * 64}, "digest of the tokens bbbbbbbbbbbb"),
        ({"base": 26.06}, "perplexity of the base 26.06"),
    ],
)
def test_a_text_that_was_measured_otherwise_is_not_compared(
    versions: Callable[..., list[Path]], changes: dict[str, Any], differs: str
) -> None:
    folders = versions((1, 0.1), (2, 0.2))
    for folder, update in zip(folders, ({"tokens_sha256": "a" * 64}, changes), strict=True):
        report = RunReport.load(folder)
        text = (
            report.evaluations[0]
            .texts[0]
            .model_copy(update={k: v for k, v in update.items() if k != "base"}, deep=True)
        )
        text.figure("perplexity").baseline = update.get("base", text.figure("perplexity").baseline)
        report.evaluations[0].texts = [text]
        report.evaluations[0].tasks = []
        report.save(folder)
    found = compare(folders)
    name = found.texts[0]
    assert found.text is None and [one.kl for one in found.versions] == [None, None]
    assert [one.beaten_by for one in found.versions] == [None, None]
    assert rows(found)[1][f"KL {name}"] == f"not comparable: {differs}"
    assert not any(points for _, points in plots(found)) and "not comparable" in page(found, None)


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"kernels": "dequantized"}, {"harness": "lm-eval 0.4.9"}])
def test_another_arithmetic_is_not_compared(versions: Callable[..., list[Path]], changes: dict[str, str]) -> None:
    folders = versions((1, 0.1), (2, 0.2))
    report = RunReport.load(folders[1])
    report.evaluations[0] = report.evaluations[0].model_copy(update=changes)
    report.save(folders[1])
    found = compare(folders)
    assert set(found.differing) == {*found.tasks, *found.texts} and found.versions[0].score is None
    assert all(next(iter(changes)) in way for ways in found.differing.values() for way in ways)


def test_fewer_items_of_one_task_leave_the_others_comparable(versions: Callable[..., list[Path]]) -> None:
    folders = versions((1, 0.1), (2, 0.2))
    report = RunReport.load(folders[1])
    report.evaluations[0].tasks[0].num_items = 4
    report.save(folders[1])
    found = compare(folders)
    assert list(found.differing) == [
        name for name in found.tasks if name.startswith(report.evaluations[0].tasks[0].task)
    ]
    assert found.versions[0].score is not None and found.text is not None
    assert rows(found)[0][next(iter(found.differing))] == "not comparable: items 500"


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_with_its_figure(versions: Callable[..., list[Path]], tmp_path: Path) -> None:
    found = compare(versions((1_000_000, 0.01), (2_000_000, 0.02), (500_000, 0.2)))
    drawn = draw_pareto(plots(found), 4.0, tmp_path / "pareto.png")
    assert drawn is not None
    content = page(found, drawn)
    links = Links()
    links.feed(content)
    assert not links.open and len(links.sources) == 1
    picture = base64.b64decode(links.sources[0].removeprefix("data:image/png;base64,"))
    assert picture == drawn.read_bytes() and picture.startswith(b"\x89PNG")
    assert len(re.findall("<td>", content)) == 3 * (len(rows(found)[0]) - 1)
    again = draw_pareto(plots(found), 4.0, tmp_path / "again.png")
    assert again is not None and again.read_bytes() == picture


def test_names_are_escaped(versions: Callable[..., list[Path]], tmp_path: Path) -> None:
    folders = versions((1, 0.1), (2, 0.1))
    evil = folders[0].rename(tmp_path / "<script>alert(1)<")
    assert "<script>" not in page(compare([evil, folders[1]]), None)


def test_without_scores_there_is_nothing_to_plot(tmp_path: Path) -> None:
    assert draw_pareto([("x", [])], 1.0, tmp_path / "none.png") is None
