"""README, guides and results are what they promise: short, complete, and their commands and links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT

GUIDES = sorted((ROOT / "llmcompress" / "guides").glob("*.md"))
RESULTS = sorted((ROOT / "eval" / "results").glob("*.md"))
README = ROOT / "README.md"
MOST_LINES_IN_README = 200
JOBS = {"quantize", "calibrate", "finetune", "distill", "evaluate", "ship", "large-models", "python"}

every_document = pytest.mark.parametrize(
    "path", [README, ROOT / "CHANGELOG.md", *GUIDES, *RESULTS], ids=lambda path: str(path.relative_to(ROOT))
)


def links(text: str) -> list[str]:
    """Targets of Markdown links and images that are neither anchors nor on the web.

    >>> links("[a](b.md#c) ![d](e/f.png) [g](https://h.i) [j](#k)")
    ['b.md', 'e/f.png']
    """
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target.split("#")[0] for target in targets if not re.match(r"#|\w+:", target)]


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_LINES_IN_README


@every_document
def test_links_lead_somewhere(path: Path) -> None:
    missing = [link for link in links(path.read_text(encoding="utf-8")) if not (path.parent / link).exists()]
    assert not missing


def test_every_job_has_a_guide() -> None:
    assert {path.stem for path in GUIDES} >= JOBS


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_guide_begins_with_its_title_and_has_blocks_that_close(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.match(r"# \S", text)
    assert text.count("\n```") % 2 == 0


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_guides_name_guides_that_exist(path: Path) -> None:
    named = re.findall(r"llmcompress guide ([a-z-]+)", path.read_text(encoding="utf-8"))
    assert set(named) <= {guide.stem for guide in GUIDES}


@pytest.mark.parametrize("path", [path for path in RESULTS if path.stem != "README"], ids=lambda path: path.stem)
def test_results_begin_with_the_command_that_makes_them(path: Path) -> None:
    title, command = re.match(r"# (.+)\n(?:.*\n)*?```bash\n(.+)", path.read_text(encoding="utf-8")).groups()  # type: ignore[union-attr]
    assert title and re.match(r"scripts/|llmcompress ", command)


def test_results_are_listed() -> None:
    listed = set(links((ROOT / "eval" / "results" / "README.md").read_text(encoding="utf-8")))
    assert {path.name for path in RESULTS if path.stem != "README"} <= listed


@every_document
def test_files_that_a_document_names_exist(path: Path) -> None:
    named = re.findall(
        r"(?<![\w/])(?:scripts|tests|llmcompress|eval|calibration)/[\w/.-]*\w", path.read_text(encoding="utf-8")
    )
    assert not [name for name in named if not (ROOT / name).exists()]
