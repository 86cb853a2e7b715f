"""A distilled student: what was distilled from what, and teacher and student side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from llmcompress.card.markdown import code, section, table, text
from llmcompress.card.numerals import count, fixed, percent, places, significant
from llmcompress.card.sections import source_name
from llmcompress.report import Distillation, DistillScore, RunReport

FIGURE = "llmcompress/figures/training.png"
"""Loss over the steps; drawn by figures.py for every report with a curve."""
LOSSES = {
    "forward_kl": "KL(teacher || student)",
    "reverse_kl": "KL(student || teacher)",
    "js": "generalized Jensen-Shannon",
    "ce": "cross-entropy on the data's labels",
    "sentence": "cosine of sentence vectors",
    "hidden_mse": "squared error of hidden states",
    "hidden_cosine": "cosine of hidden states",
    "attention_kl": "KL of attention probabilities",
    "attention_mse": "squared error of attention probabilities",
    "embedding": "squared error of embeddings",
}
CLASSES = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "embedding": "AutoModel",
}
UNITS = {"causal": "tokens", "masked": "tokens", "classification": "texts", "embedding": "texts"}


class Distilled:
    """A student that was trained to do what its teachers do."""

    name = "distilled"
    rank = 3
    relation: Literal["adapter", "merge", "quantized", "finetune"] = "finetune"
    library = "transformers"

    def owns(self, report: RunReport) -> bool:
        """Whether the output is a student."""
        return report.distillation is not None and report.output is not None

    def sentence(self, report: RunReport) -> str:
        """What was distilled from what."""
        found = report.distillation
        assert found is not None
        others = len(found.teachers) - 1
        more = f" and {count(others)} more" if others else ""
        return f"A student distilled from {_unstarted(source_name(report.source))}{more}; it is {text(found.student)}."

    def facts(self, report: RunReport) -> Sequence[tuple[str, str]]:
        """Parameters, speed and the scores beside the teacher's."""
        found = report.distillation
        if found is None:
            return ()
        first = found.teachers[0] if found.teachers else None
        rows = []
        if first is not None and first.num_parameters:
            share = percent(found.student_parameters / first.num_parameters)
            rows.append(("parameters", f"{count(found.student_parameters)}, {share} of the teacher's"))
        if found.teacher_rows_per_s and found.student_rows_per_s:
            ratio = found.student_rows_per_s / found.teacher_rows_per_s
            rows.append(("forward passes", f"{ratio:.2f} x the teacher's rows per second"))
        return [*rows, *((one.metric, _after(one)) for one in found.scores)]

    def sections(self, report: RunReport) -> Sequence[str]:
        """How it was distilled."""
        found = report.distillation
        return () if found is None else (distillation(found),)

    def tags(self, report: RunReport) -> Sequence[str]:
        """That it is distilled."""
        return ("distillation",) if report.distillation is not None else ()


def distillation(found: Distillation) -> str:
    """The section: teacher and student side by side, then how it was done and what must be known of it."""
    unit = UNITS[found.kind]
    legend = (
        f"Means over {count(found.num_heldout)} held-out {unit}. The student after training was measured from the "
        "files that were written; rows per second are forward passes over the held-out rows on the machine named below."
    )
    side = table(["figure", "teacher", "student untrained", "student"], _side_by_side(found), right=(1, 2, 3))
    said = [f"- {line}" for line in (*_how(found), *found.notes)]
    curve = f"![Training loss over the steps]({FIGURE})" if len(found.training.curve) > 1 else ""
    return section("Teacher and student", side, legend, "\n".join(said), curve)


def _side_by_side(found: Distillation) -> list[list[str]]:
    first = found.teachers[0] if found.teachers else None
    parameters = count(first.num_parameters) if first is not None and first.num_parameters else "-"
    rows = [["parameters", parameters, count(found.student_parameters), count(found.student_parameters)]]
    if found.student_rows_per_s:
        speed = significant(found.teacher_rows_per_s, 3) if found.teacher_rows_per_s else "-"
        rows.append(["rows per second", speed, "-", significant(found.student_rows_per_s, 3)])
    for one in found.scores:
        better = "higher" if one.higher_is_better else "lower"
        rows.append([f"{text(one.metric)} ({better} is better)", *_cells(one)])
    return rows


def _cells(one: DistillScore) -> list[str]:
    known = [value for value in (one.teacher, one.before, one.after) if value is not None]
    digits = places(known, least=3)
    return ["-" if value is None else fixed(value, digits) for value in (one.teacher, one.before, one.after)]


def _after(one: DistillScore) -> str:
    teacher, before, after = _cells(one)
    beside = f"; the teacher {teacher}" if one.teacher is not None else ""
    return f"{after}{beside}; untrained {before}"


def _how(found: Distillation) -> list[str]:
    losses = ", ".join(f"{significant(weight, 3)} x {LOSSES[name]}" for name, weight in found.losses.items())
    lines = [f"Loss: {losses}, at temperature {significant(found.temperature, 3)}"]
    if found.beta is not None:
        lines[0] += f", beta {significant(found.beta, 3)}"
    if found.phase_frac:
        share = percent(found.phase_frac)
        lines.append(f"In two phases: the first {share} of the steps on the insides, the rest on the predictions")
    lines += [f"Layers, student:teacher: {code(one)}" for one in found.layer_maps]
    if len(found.teachers) > 1:
        named = ", ".join(f"{code(one.hub_id or one.name)} {percent(one.share)}" for one in found.teachers)
        lines.append(f"Teachers: {named}; their {found.combine} are averaged")
    if found.cache is not None:
        kept = f"{count(found.cache.num_kept)} likeliest tokens and the exact mass of all others"
        rest = f"{percent(found.cache.mean_rest)} on average, {percent(found.cache.largest_rest)} at most"
        lines.append(f"Predictions of the teacher were read from a cache: the {kept} ({rest})")
    if found.on_policy is not None:
        own = found.on_policy
        lines.append(
            f"On-policy (GKD): the student wrote the text of {count(own.own_batches)} of {count(own.batches)} batches "
            f"itself (lmbda {significant(own.lmbda, 3)}, {count(own.own_tokens)} tokens, at most "
            f"{count(own.max_new_tokens)} per row)"
        )
    if found.grid is not None:
        share = percent(found.grid.changed_codes_frac)
        lines.append(
            f"Quantized before it was trained: adapters of rank {count(found.grid.rank)} on "
            f"{count(found.grid.num_linears)} linears, rounded onto the grid in every step, so nothing is lost in "
            f"writing; {share} of the codes changed"
        )
    data, run = found.data, found.training
    lines.append(
        f"{count(run.steps)} steps of {count(run.effective_batch)} rows over {count(data.num_rows)} rows "
        f"({count(data.num_tokens)} tokens) of {code(data.source)}; {count(run.trained_parameters)} parameters trained"
    )
    if data.heldout_also_trained:
        lines.append(f"**{count(data.heldout_also_trained)} held-out rows are also trained on, token for token**")
    return lines


def _unstarted(name: str) -> str:
    """A name in the middle of a sentence."""
    return name[0].lower() + name[1:] if name.startswith(("The ", "A ")) else name


ENTRY = Distilled()
