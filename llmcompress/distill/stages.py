"""The stage of this folder: distill."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmcompress.config.stage import Context, Stage, Work
from llmcompress.distill.settings import DistillSettings

if TYPE_CHECKING:
    from llmcompress.data.settings import DataSettings
    from llmcompress.report import RunReport


class Distill(Stage):
    """A student trained to predict what its teachers predict; see `stage.py`."""

    name = "distill"
    kind = "transform"
    help = "Train a student to predict what its teachers predict, verify the files, and write its card."
    Settings = DistillSettings
    trains = True

    def fingerprint(self, settings: DistillSettings, context: Context) -> str:
        """The digest of the training data."""
        from llmcompress.data.examples import data_digest

        return data_digest(settings.data)

    def run(self, settings: DistillSettings, work: Work) -> None:
        """Distill; the checkpoint that goes in is the first teacher."""
        from llmcompress.distill.stage import distill

        distill(
            work.checkpoint, work.out, settings, open=work.open,
            seed=work.seed, key=work.key, report=work.report, progress=work.progress,
        )  # fmt: skip

    def training_data(self, settings: DistillSettings, report: RunReport | None) -> DataSettings | None:
        """The rows of the settings."""
        return settings.data

    def summary(self, report: RunReport) -> list[str]:
        """The student's scores on held-out rows, before and after, beside the teacher's."""
        lines = []
        for score in report.distillation.scores if report.distillation else []:
            figures = [
                f"{who} {value:.4g}"
                for who, value in (("teacher", score.teacher), ("before", score.before), ("after", score.after))
                if value is not None
            ]
            lines.append(f"  student  {score.metric} on held-out rows: {', '.join(figures)}")
        return lines
