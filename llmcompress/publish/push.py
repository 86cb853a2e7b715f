"""Push: an output folder becomes a repository, in one commit, or does not leave the machine at all.

OUT ──> contents (what strangers may see) ──> gate (gate.py) ──┬─ refused: every reason, nothing is sent
                                                               └─ one commit: card, weights, evidence
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmcompress.checkpoint.hub import Pushed
from llmcompress.checkpoint.hub import push as push_files
from llmcompress.errors import LLMCompressError, raise_all, third_party
from llmcompress.publish.contents import File, contents
from llmcompress.publish.gate import Findings, inspect
from llmcompress.report import RunReport

REPO_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]{0,95}(?<![.-])")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a push would do."""

    repo_id: str
    files: list[File]
    findings: Findings

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(file.num_bytes for file in self.files)


def plan(folder: Path, repo_id: str, *, public: bool, include: Sequence[str] = ()) -> Plan:
    """The files and the findings; nothing is sent and no network is needed.

    include: patterns of files that go out besides those that a checkpoint is known to have.

    Raises: LLMCompressError for a repository name that the Hub does not take, or a folder without a report.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise LLMCompressError(f"{repo_id}: no repository name; it must be USER/NAME or ORGANISATION/NAME")
    report = RunReport.load(folder)
    with third_party(f"{folder}: what its report says cannot be held against its files"):
        carried = contents(folder, report, repo_id, include)
        return Plan(repo_id, carried.files, inspect(folder, report, carried, public=public))


def push(plan: Plan, *, public: bool, revision: str | None = None, pull_request: bool = False) -> Pushed:
    """Carry a plan out.

    Raises: LLMCompressError, one for each finding that refuses it; and what the Hub says when it fails.
    """
    raise_all(plan.findings.refusals)
    if pull_request and revision is not None:
        raise LLMCompressError(f"--pr and --revision {revision}: a pull request is opened against main", "choose one")
    return push_files(
        plan.repo_id,
        [(file.name, file.source) for file in plan.files],
        message="Add the checkpoint, its card and its evidence",
        public=public,
        revision=revision,
        pull_request=pull_request,
    )
