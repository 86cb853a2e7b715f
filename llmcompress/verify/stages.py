"""The stages of this folder: verify computes, check applies the rules of engines' loaders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmcompress.config.stage import Stage, Work
from llmcompress.verify.settings import CheckSettings, VerifySettings

if TYPE_CHECKING:
    from llmcompress.report import RunReport


class Verify(Stage):
    """What lies on disk, held against the report, the source and its own codes; see `stage.py`."""

    name = "verify"
    kind = "check"
    help = "Compare the files of a checkpoint with its report and its source: digests, tensors, codes, a forward pass."
    Settings = VerifySettings
    takes_adapter = True

    def run(self, settings: VerifySettings, work: Work) -> None:
        """Run every check in a process of its own."""
        from llmcompress.verify.stage import verify

        work.report.checks = verify(
            work.out, settings, progress=work.progress,
            trust_remote_code=work.trust_remote_code, allow_pickle=work.allow_pickle,
        )  # fmt: skip

    def summary(self, report: RunReport) -> list[str]:
        """How many checks passed, which were not run, and each that failed."""
        if not report.checks:
            return []
        ran = [check for check in report.checks if check.ran]
        failed = [check for check in report.checks if not check.passed]
        not_run = ", ".join(check.name for check in report.checks if not check.ran)
        text = f"  checks   {len(ran) - len(failed)} of {len(ran)} passed"
        return [text + (f"; not run: {not_run}" if not_run else "")] + [
            f"           FAILED {check.name}: {check.detail}" for check in failed
        ]

    def rows(self, settings: VerifySettings, report: RunReport) -> list[Any]:
        """The checks."""
        return list(report.checks)

    def failures(self, report: RunReport) -> list[str]:
        """Checks that did not pass."""
        return [f"check {check.name}: {check.detail}" for check in report.checks if not check.passed]


class Check(Stage):
    """Which engines load a checkpoint, by the rules of their own loaders; see `check.py`."""

    name = "check"
    kind = "check"
    help = "List the engines that load a checkpoint, by the rules of their own loaders. Loads nothing."
    Settings = CheckSettings

    def run(self, settings: CheckSettings, work: Work) -> None:
        """Judge the output; verdicts on other engines stay."""
        from llmcompress.verify.check import check

        verdicts = {verdict.engine: verdict for verdict in work.report.engines}
        verdicts |= {verdict.engine: verdict for verdict in check(work.open(str(work.out)), settings)}
        work.report.engines = [verdicts[name] for name in sorted(verdicts)]

    def summary(self, report: RunReport) -> list[str]:
        """One line with every engine's verdict."""
        texts = {True: "loads", False: "does not load", None: "not judged"}
        verdicts = [f"{verdict.engine} {verdict.version}: {texts[verdict.loads]}" for verdict in report.engines]
        return [f"  engines  {'; '.join(verdicts)}"] if verdicts else []

    def rows(self, settings: CheckSettings, report: RunReport) -> list[Any]:
        """The verdicts on the engines that were asked for."""
        return [verdict for verdict in report.engines if settings.engine in (None, verdict.engine)]

    def failures(self, report: RunReport) -> list[str]:
        """Where no engine at all loads the checkpoint."""
        if not report.engines or any(verdict.loads for verdict in report.engines):
            return []
        return [f"check: none of {', '.join(verdict.engine for verdict in report.engines)} loads it"]
