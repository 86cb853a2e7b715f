"""What must hold before a checkpoint leaves this machine. Everything wrong with it is found at once.

    OUT ──> known files ── verified, and unchanged since? ── license ── card: front matter, fields, paths ── secrets
                │ others            │ no                        │ forbids        │                            │
                └───────────────────┴───────────────────────────┴────────────────┴── refused, each with its reason

What may be wanted but should be known (nothing was evaluated, no license is stated and the repository is private) is a
warning: it is shown and stops nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llmcompress.card.metadata import problems as front_matter_problems
from llmcompress.card.public import local_paths
from llmcompress.config.yaml_lines import parse_yaml
from llmcompress.errors import LLMCompressError
from llmcompress.publish.contents import CARD, Contents, File, grouped
from llmcompress.publish.secrets import secret_in
from llmcompress.report import RunReport
from llmcompress.resources import BUNDLED
from llmcompress.verify.stage import names_of

OPTIONAL = ("untouched", "side files", "engine")
"""The checks that need what may be gone or not installed; every other must have been run, not merely not failed."""
ADAPTER_CONFIG = "adapter_config.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
NO_DERIVATIVES = re.compile(r"cc-by(-nc)?-nd-.*")
PLACEHOLDER = re.compile(r"\[more information needed\]|\bTODO\b|\bTBD\b|\bFIXME\b|lorem ipsum", flags=re.I)


@dataclass
class Findings:
    """What stands in the way, and what should merely be known."""

    refusals: list[LLMCompressError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def refuse(self, message: str, hint: str | None = None) -> None:
        """Add a reason not to push."""
        self.refusals.append(LLMCompressError(message, hint))


def inspect(folder: Path, report: RunReport, carried: Contents, *, public: bool) -> Findings:
    """Everything about an output folder that a push must not carry out into the world."""
    found = Findings()
    files = carried.files
    _allowed(folder, carried, found)
    _verified(folder, report, found)
    _license(report, public, found)
    card = next((file.content() for file in files if file.name == CARD), None)
    if card is None:
        found.refuse(f"{folder}: has no card ({CARD})", f"llmcompress card {folder}")
    else:
        for problem in card_problems(card.decode("utf-8", "replace")):
            found.refuse(f"{folder / CARD}: {problem}", "mend what it is drawn from, then `llmcompress card`")
    _bases(folder, files, found)
    for file in files:
        kind = secret_in(file)
        if kind is not None:
            found.refuse(f"{folder / file.name}: holds what looks like a secret ({kind})", "remove it, and revoke it")
    return found


def _allowed(folder: Path, carried: Contents, found: Findings) -> None:
    """What lies in the folder and is no part of a checkpoint."""
    for pattern in carried.unmatched:
        found.refuse(f"--include {pattern}: matches no file of {folder}")
    for name, why in carried.never.items():
        found.refuse(f"{folder / name}: {why}", "remove it")
    for name in grouped(carried.unknown):
        pattern = f"{name.partition('/')[0]}/*" if "/" in name else name
        found.refuse(
            f"{folder / name}: is no file of a checkpoint that a push knows",
            f"move it elsewhere, or pass --include '{pattern}'",
        )
    if carried.left:
        found.warnings.append(f"stays here: {', '.join(grouped(carried.left))}")


def _verified(folder: Path, report: RunReport, found: Findings) -> None:
    again = f"llmcompress verify {folder}"
    row = next((row for row in report.stages if row.name == "verify"), None)
    if report.output is None or row is None:
        found.refuse(f"{folder}: was not verified", again)
        return
    for stage in report.stages:
        if stage.status == "failed" and stage.name != "card":
            found.refuse(f"{folder}: stage {stage.name} failed: {stage.error}", "run it again")
    for check in report.checks:
        if not check.passed:
            found.refuse(f"{folder}: check {check.name} failed: {check.detail}", "make it anew")
    ran = {check.name for check in report.checks if check.ran}
    missing = [name for name in names_of(report) if name not in ran and name not in OPTIONAL]
    if missing:
        found.refuse(f"{folder}: was not verified in full (not run: {', '.join(missing)})", again)
    for name, digest in report.output.digests.items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            found.refuse(f"{folder / name}: is not the file that was verified", again)
    if not report.evaluations:
        found.warnings.append("nothing was evaluated: the card says so")
    for one in report.evaluations:
        if one.verdict == "fail":
            found.warnings.append(f"it lost more than the budget of suite {one.suite} allows: the card says so")


def _bases(folder: Path, files: list[File], found: Findings) -> None:
    """An adapter's base must be one that others have; a path in another config is no more than untidy."""
    for file in files:
        if file.name == ADAPTER_CONFIG:
            try:
                adapter = json.loads(file.content())
            except (ValueError, RecursionError):
                adapter = None
            base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
            if (
                not isinstance(base, str)
                or not HUB_ID.fullmatch(base)
                or base.startswith(BUNDLED)
                or Path(base).exists()
            ):
                found.refuse(
                    f"{folder / file.name}: names {base!r} as its base, which is no Hub id",
                    "train it on a checkpoint of the Hub, or push what `llmcompress merge` makes of it",
                )
        elif "/" not in file.name and file.name.endswith("config.json"):
            paths = local_paths(file.content().decode("utf-8", "replace"))
            found.warnings += [f"{file.name}: shows a path of a machine ({path})" for path in paths]


def _license(report: RunReport, public: bool, found: Findings) -> None:
    source = report.source
    license = source.license.strip().lower() if source and source.license else None
    if license and NO_DERIVATIVES.fullmatch(license):
        found.refuse(
            f"license {license}: forbids sharing a changed version, and a compressed checkpoint is one",
            "ask the original's authors",
        )
    if license is None and public:
        found.refuse("the original states no license, so nothing allows sharing it", "leave --public out, or find out")
    elif license is None:
        found.warnings.append("the original states no license: private repositories only")


def card_problems(content: str) -> list[str]:
    """What is wrong with a card: its front matter by the Hub's rules, empty fields and sections, paths of a machine."""
    parts = content.split("---\n", 2)
    if len(parts) < 3 or parts[0]:
        return ["has no front matter"]
    try:
        front = parse_yaml(parts[1], "its front matter")
    except LLMCompressError as error:
        return error.lines()
    if not isinstance(front, dict):
        return ["its front matter is no mapping"]
    return [*(f"front matter: {one}" for one in front_matter_problems(front)), *_body_problems(parts[2])]


def _body_problems(body: str) -> Iterator[str]:
    prose = re.sub(r"^(`{3,}).*?^\1$", "code", body, flags=re.M | re.S)
    for match in PLACEHOLDER.finditer(prose):
        yield f"holds a placeholder ({match[0]})"
    lines = [line for line in prose.splitlines() if line.strip()]
    for line, after in zip(lines, [*lines[1:], "# "], strict=True):
        level, below = (len(one) - len(one.lstrip("#")) for one in (line, after))
        if level and below and below <= level:
            yield f"section {line.lstrip('# ')!r} is empty"
        if line.startswith("|") and any(not cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]):
            yield f"has an empty cell in {line.strip()!r}"
    yield from (f"shows a path of this machine ({path})" for path in local_paths(body))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
