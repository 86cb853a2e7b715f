"""A merged checkpoint: adapters in its weights, onto which ones, how close that is, what quantizing left of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from llmcompress.card.markdown import code, section, table
from llmcompress.card.numerals import count, percent, significant
from llmcompress.card.sections import source_name
from llmcompress.report import PLAIN, Merge, RunReport, Survival

ONTO = {
    "dequantized": "the NF4 values that the base had in training",
    "original": "its full-precision weights",
}


class Merged:
    """Plain weights with an adapter in them."""

    name = "merged"
    rank = 2
    relation: Literal["adapter", "merge", "quantized", "finetune"] = "finetune"
    library = "transformers"

    def owns(self, report: RunReport) -> bool:
        """Whether the output is plain weights that an adapter went into."""
        return report.merge is not None and report.output is not None and report.output.format == PLAIN

    def sentence(self, report: RunReport) -> str:
        """Base, adapters, and what they were merged onto."""
        assert report.merge is not None
        number = len(report.merge.adapters)
        what = "an adapter" if number == 1 else f"{number} adapters"
        return f"{source_name(report.source)}, with {what} merged onto {ONTO[report.merge.onto]}."

    def facts(self, report: RunReport) -> Sequence[tuple[str, str]]:
        """How much of the update quantization kept, or how close merging is."""
        if report.survival is not None:
            found = report.survival
            return [("of the adapter kept", f"{percent(found.kept)}; plain rounding {percent(found.kept_rtn)}")]
        return ()

    def sections(self, report: RunReport) -> Sequence[str]:
        """The merge, and what quantizing it kept."""
        merge = [_merge(report.merge)] if report.merge else []
        return [*merge, *([_survival(report.survival)] if report.survival else [])]

    def tags(self, report: RunReport) -> Sequence[str]:
        """That it is merged."""
        return ["merged-adapter"] if report.merge else ()


def _merge(part: Merge) -> str:
    rows = [
        [
            code(one.path.rstrip("/").rpartition("/")[2]),
            one.kind + (", DoRA" if one.dora else ""),
            significant(one.weight),
            code(one.sha256[:16]),
            {True: "this one", False: "**another**", None: "not known"}[one.base_is_this],
        ]
        for one in part.adapters
    ]
    adapters = table(["adapter", "kind", "weight", "sha256 begins", "checkpoint it was trained on"], rows, right=(2,))
    worst = max((one.excess for one in part.linears), default=0.0)
    sizes = [one.relative_update for one in part.linears] or [0.0]
    said = (
        f"Merged onto {ONTO[part.onto]}: {count(len(part.linears))} linears, whose updates are "
        f"{significant(min(sizes), 3)} to {significant(max(sizes), 3)} of the size of the weight. Read back from disk, "
        f"outputs differ from base plus adapter by up to {significant(worst, 2)} of what rounding to the dtype of the "
        "file allows."
    )
    return section("What was merged", adapters, said, _ways(part))


def _ways(part: Merge) -> str:
    found = {"dequantized": part.kl_dequantized, "original": part.kl_original}
    rows = [
        [ONTO[way] + (" (closer)" if part.closer == way else ""), significant(value, 3)]
        for way, value in found.items()
        if value is not None
    ]
    if not rows:
        return f"How close it is to base plus adapter was not measured: {part.not_measured or 'not asked for'}."
    held = f"KL from base plus adapter over {count(part.heldout_tokens)} held-out tokens, in nats per token:"
    return f"{held}\n\n{table(['merged onto', 'KL'], rows, right=(1,))}"


def _survival(part: Survival) -> str:
    rows = [["of the update kept, all linears", percent(part.kept), percent(part.kept_rtn)]]
    if part.kl is not None and part.kl_rtn is not None:
        rows.append(["KL from base plus adapter", significant(part.kl, 3), significant(part.kl_rtn, 3)])
    kept = sorted(part.linears, key=lambda one: one.kept)
    ends = (
        f"From {percent(kept[0].kept)} in {code(kept[0].name)} to {percent(kept[-1].kept)} in {code(kept[-1].name)}. "
        if kept
        else ""
    )
    meaning = (
        "Kept is the part of Q(W + D) - Q(W) that points along the update D, over the size of D: 1 when rounding lets "
        f"all of it through. The KL is over {count(part.heldout_tokens)} held-out tokens."
    )
    title = "What quantizing left of the adapter"
    return section(title, table(["what", "this checkpoint", "plain rounding"], rows, right=(1, 2)), ends + meaning)


ENTRY = Merged()
"""Found by its file."""
