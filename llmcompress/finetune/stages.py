"""The stages of this folder: finetune makes an adapter, merge puts adapters into weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmcompress.config.stage import Context, FollowUp, Stage, Work
from llmcompress.errors import LLMCompressError, collected, raise_all
from llmcompress.finetune.settings import FinetuneSettings, MergeSettings

if TYPE_CHECKING:
    from llmcompress.data.settings import DataSettings
    from llmcompress.report import RunReport


class Finetune(Stage):
    """A low-rank adapter trained on a frozen base; see `stage.py`."""

    name = "finetune"
    kind = "transform"
    help = "Train an adapter on a frozen checkpoint, measure it on held-out rows, verify the files, and write the card."
    Settings = FinetuneSettings
    makes_adapter = True
    trains = True

    def fingerprint(self, settings: FinetuneSettings, context: Context) -> str:
        """The digest of the training data."""
        from llmcompress.data.examples import data_digest

        return data_digest(settings.data)

    def run(self, settings: FinetuneSettings, work: Work) -> None:
        """Train; the output is a folder that plain PEFT loads."""
        from llmcompress.finetune.stage import finetune

        finetune(
            work.checkpoint, work.out, settings,
            seed=work.seed, key=work.key, report=work.report, progress=work.progress,
        )  # fmt: skip

    def training_data(self, settings: FinetuneSettings, report: RunReport | None) -> DataSettings | None:
        """The rows of the settings."""
        return settings.data

    def summary(self, report: RunReport) -> list[str]:
        """Held-out loss of the base and with the adapter."""
        part = report.finetune
        if part is None or part.heldout_loss_base is None or part.heldout_loss is None:
            return []
        return [f"  loss     {part.heldout_loss:.4f} on held-out rows, from {part.heldout_loss_base:.4f} of the base"]


class Merge(Stage):
    """Adapters added to the weights of a checkpoint; see `merge.py`."""

    name = "merge"
    kind = "transform"
    help = "Merge adapters into the weights of a checkpoint, check every linear, and write the card."
    Settings = MergeSettings
    takes_adapter = True
    trains = True

    def fingerprint(self, settings: MergeSettings, context: Context) -> str:
        """The bytes of the adapters and of the rows that are measured on."""
        from llmcompress.data.examples import data_digest
        from llmcompress.finetune.merge import adapter_digest

        digests: list[str] = []
        problems: list[LLMCompressError] = []
        for reference in settings.adapters:
            with collected(problems):
                digests.append(adapter_digest(reference.path))
        if settings.data is not None:
            with collected(problems):
                digests.append(data_digest(settings.data))
        raise_all(problems)
        return " ".join(digests)

    def run(self, settings: MergeSettings, work: Work) -> None:
        """Merge the adapter of the finetune stage before, or those that the settings name."""
        from llmcompress.finetune.merge import merge

        merge(
            work.checkpoint, work.adapter, work.out, settings,
            seed=work.seed, key=work.key, report=work.report, progress=work.progress,
        )  # fmt: skip

    def training_data(self, settings: MergeSettings, report: RunReport | None) -> DataSettings | None:
        """The rows that the adapters were trained on, as their own reports name them."""
        from llmcompress.data.settings import DataSettings

        data = report.merge.data if report and report.merge else None
        return DataSettings.model_validate(data) if data else None

    def follow_up(self, settings: MergeSettings, work: FollowUp) -> None:
        """How much of the adapter the transform after the merge kept: it is run again on weights without the adapter.

        Taken once, for the first output, and put into the report of each.
        """
        from llmcompress.finetune.retention import measure_retention
        from llmcompress.report import RunReport

        merged = work.mine.folders[0]
        first = RunReport.load(work.later.folders[0])
        if not settings.survival or first.adapter_retention is not None or not first.linears or not merged.is_dir():
            return
        survival = measure_retention(
            work.open(work.source), work.open(str(merged)), work.later.folders[0], settings.data, work.again,
            work.scratch, work.seed, work.progress,
        )  # fmt: skip
        for folder in work.later.folders:
            report = RunReport.load(folder)
            report.adapter_retention = survival
            work.save(report, folder)

    def summary(self, report: RunReport) -> list[str]:
        """What quantizing kept of the adapter, where that was measured."""
        part = report.adapter_retention
        if part is None:
            return []
        kl = "" if part.kl is None else f"; KL from base plus adapter {part.kl:.5f} nats per token"
        lines = []
        if part.loss_quantized is not None:
            losses = f"base {part.loss_base:.4f}, adapter {part.loss_adapter:.4f}, merged {part.loss_merged:.4f}"
            lines.append(f"  adapter  loss on held-out rows: {losses}, quantized {part.loss_quantized:.4f}")
        if part.gain_kept is not None and part.gain_kept_interval is not None:
            low, high = part.gain_kept_interval
            lines.append(f"  adapter  {part.gain_kept:.1%} [{low:.1%}, {high:.1%}] of what it gained kept{kl}")
        elif part.loss_quantized is not None:
            lines.append(f"  adapter  what it gained is not told from 0 on {part.num_rows} rows{kl}")
        return lines
