"""A quantized checkpoint: which grid, chosen how, in which layout."""

from __future__ import annotations

from collections.abc import Sequence

from llmcompress.card.kind import Relation
from llmcompress.card.markdown import code
from llmcompress.card.sections import grid_name, source_name
from llmcompress.formats.base import FORMATS
from llmcompress.report import RunReport


class Quantized:
    """Codes in place of weights."""

    name = "quantized"
    rank = 0
    relation: Relation = "quantized"
    library = "transformers"

    def owns(self, report: RunReport) -> bool:
        """Whether the output holds codes."""
        return report.output is not None and report.output.quantized_parameters > 0

    def sentence(self, report: RunReport) -> str:
        """Source, grid, method and layout."""
        assert report.output is not None
        quantized = [row for row in report.linears if row.outcome == "quantized"]
        methods = sorted({row.method for row in quantized if row.method})
        grids = list(dict.fromkeys(grid_name(row) for row in report.linears if row.outcome != "skipped"))
        how = f" by {' and '.join(map(code, methods))}" if methods else ""
        onto = f" to {' and '.join(grids)}" if grids else ""
        return f"{source_name(report.source)}, quantized{onto}{how}, stored in the {code(report.output.format)} layout."

    def facts(self, report: RunReport) -> Sequence[tuple[str, str]]:
        """Nothing that the table has not already."""
        return ()

    def sections(self, report: RunReport) -> Sequence[str]:
        """None: sizes, linears and calibration are sections of every card that has them."""
        return ()

    def tags(self, report: RunReport) -> Sequence[str]:
        """Layout, width, grid and method, as people search for them."""
        if report.output is None or not self.owns(report):
            return ()
        tags = ["quantized", FORMATS.get(report.output.format).quant_method]
        for row in report.linears:
            if row.outcome != "skipped" and row.grid:
                bits = row.grid["num_bits"]
                tags += [f"{bits}-bit", str(row.grid["codebook"] or f"int{bits}")]
                tags += [row.method] if row.method and row.outcome == "quantized" else []
        return tags


ENTRY = Quantized()
