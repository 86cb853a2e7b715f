"""The stages of this folder: quantize."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from llmcompress.compress.settings import QuantizeSettings
from llmcompress.config.stage import Context, Stage, Work, sha256
from llmcompress.errors import LLMCompressError, collected, raise_all

if TYPE_CHECKING:
    from llmcompress.data.calibration import CalibrationSet
    from llmcompress.report import RunReport


class Quantize(Stage):
    """A checkpoint in, one with quantized linears out, in one folder per layout; see `layerwise.py`."""

    name = "quantize"
    kind = "transform"
    help = "Quantize a checkpoint, verify the files, list the engines that load them, and write the card."
    Settings = QuantizeSettings

    def problems(self, settings: QuantizeSettings) -> list[LLMCompressError]:
        """Grids that do not exist, found without torch."""
        problems: list[LLMCompressError] = []
        with collected(problems, "scheme: "):
            settings.weight_scheme()
        for override in settings.overrides:
            with collected(problems, "overrides: "):
                settings.override_scheme(override)
        return problems

    def fingerprint(self, settings: QuantizeSettings, context: Context) -> str:
        """The calibration set as declared and the bytes of its text; method and layouts are looked up on the way."""
        from llmcompress.compress.methods.base import METHODS
        from llmcompress.data.calibration_spec import CalibrationSpec
        from llmcompress.formats.base import FORMATS

        problems: list[LLMCompressError] = []
        for name in settings.formats():
            with collected(problems):
                FORMATS.get(name, "quantize.format")
        reads_text = trained = False
        with collected(problems):
            reads_text = bool(METHODS.get(settings.method, "quantize.method").needs)
            trained = settings.calibration is None and any(step.stage.trains for step in context.before)
        if not reads_text or trained:  # the keys of the stages before hold the digest of the training rows
            raise_all(problems)
            return "text" if reads_text else ""
        with collected(problems):
            spec = CalibrationSpec.choose(settings.calibration, context.model)
            text = spec.text_file.read_bytes() if spec.text and spec.text_file.is_file() else b""
        raise_all(problems)
        return spec.model_dump_json() + sha256(text)

    def outputs(self, settings: QuantizeSettings, out: Path) -> list[Path]:
        """One folder per layout below `out` where there are several."""
        formats = settings.formats()
        return [out] if len(formats) == 1 else [out / name for name in formats]

    def one_output(self, settings: QuantizeSettings) -> QuantizeSettings:
        """The first layout alone: which codes are chosen does not depend on how they are packed."""
        return settings.model_copy(update={"format": settings.formats()[:1]})

    def run(self, settings: QuantizeSettings, work: Work) -> None:
        """Quantize; where the model was trained in this run and no text is named, calibrated on the training rows."""
        from llmcompress.compress.layerwise import quantize

        quantize(
            work.checkpoint, work.out, settings, seed=work.seed, key=work.key, report=work.report,
            progress=work.progress, calibration=_training_rows(settings, work),
        )  # fmt: skip

    def summary(self, report: RunReport) -> list[str]:
        """How many linears on which grid, where the time went, which solutions were kept, what tuning gained."""
        lines = []
        if report.linears:
            outcomes = Counter(row.outcome for row in report.linears)
            grids = sorted({f"{row.scheme} by {row.method}" for row in report.linears if row.outcome == "quantized"})
            text = f"  linears  {outcomes['quantized']} to {', '.join(grids)}"
            text += f"; {outcomes['fell_back']} fell back" if outcomes["fell_back"] else ""
            lines.append(text + (f"; {outcomes['skipped']} left as they were" if outcomes["skipped"] else ""))
        work = report.profile
        if work is not None and (seconds := sum(work.seconds.values())):
            phases = sorted(work.seconds.items(), key=lambda phase: -phase[1])
            shares = ", ".join(f"{name} {share / seconds:.0%}" for name, share in phases)
            lines.append(f"  time     {seconds:.1f} s in the layers: {shares}")
            kept = Counter(row.solution for row in report.linears if row.held_out_error is not None)
            if kept:
                counts = ", ".join(f"{number} {version}" for version, number in kept.most_common())
                lines.append(
                    f"  kept     {counts}, by the error on held-out tokens; {work.num_worse} above the plain method's"
                )
            if work.reason:
                lines.append(f"  memory   {work.schedule}, activations in {work.activations}: {work.reason}")
        if report.tuning is not None:
            tuning = report.tuning
            gain = f"KL on held-out rows {tuning.held_out_kl_after:.4f} from {tuning.held_out_kl_before:.4f}"
            codes = f"{tuning.num_codes_changed:,} of {tuning.num_codes:,} codes changed"
            lines.append(f"  tuned    {gain}; {codes}" + ("" if tuning.kept else "; not kept"))
        return lines


def _training_rows(settings: QuantizeSettings, work: Work) -> CalibrationSet | None:
    from llmcompress.checkpoint.source import load_tokenizer
    from llmcompress.compress.methods.base import METHODS
    from llmcompress.data.calibration import training_calibration

    if settings.calibration is not None or not METHODS.get(settings.method).needs:
        return None
    for finished in work.before:
        data = finished.step.stage.training_data(finished.step.settings, finished.report)
        if data is not None:
            tokenizer = load_tokenizer(work.checkpoint)
            return training_calibration(data, tokenizer, work.seed, settings.num_samples, settings.seq_len)
    return None
