"""Whether plain transformers will load what is about to be written, asked before any work.

chosen linears ──> config of each format ──> dry build (models/dry_build.py) ──┬─> loads
       ^                                                                       ├─> does not replace some linears:
       └────────────── those stay, with the reason ────────────────────────────┘   they are left out
                       weights made dense on loading (compressed-tensors) <────┴─> fails in the model's own class
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.compress.targets import Linear, Targets
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.formats.base import FORMATS, Format, Layout
from llmcompress.models.dry_build import DryBuild, dry_build, dtype_clash


def loadable(
    source: Checkpoint, chosen: Targets, formats: Sequence[Format], describe: Callable[[Targets], Layout]
) -> tuple[Targets, Layout]:
    """The linears to compress and the layout to write, such that transformers loads every format.

    describe: the layout of chosen linears. A linear that a format's quantizer does not replace (a subclass of its own)
    is left out; where the model's class itself fails with packed linears, weights are made dense while loading, which
    compressed-tensors can be told. A format whose package is not installed is not asked.

    Raises: LLMCompressError, one for each format that transformers would not load, with those that it would.
    """
    layout = describe(chosen)
    problems = []
    for format in formats:
        if format.refuses_layout(layout):
            continue  # said by the caller, all formats together
        built = _built(source, format, chosen, layout)
        if isinstance(built, DryBuild) and built.problem() and 0 < len(built.not_replaced) < len(chosen.targets):
            chosen = _without(
                chosen, built.not_replaced, f"transformers' quantizer for {format.name} does not replace it"
            )
            layout = replace(describe(chosen), dense_on_loading=layout.dense_on_loading)
            built = _built(source, format, chosen, layout)
        if isinstance(built, DryBuild) and built.failures:
            dense = replace(layout, dense_on_loading=True)
            again = _built(source, format, chosen, dense)
            if isinstance(again, DryBuild) and again.problem() is None:
                layout, built = dense, again
        problem = built.problem() if isinstance(built, DryBuild) else None
        if not problem and format.keeps_dtypes and (clash := dtype_clash(source, list(layout.schemes))):
            problems.append(
                LLMCompressError(
                    f"format {format.name}: it is loaded in the dtypes of the files, and in those of {source.name} "
                    f"({_dtypes(source)}) the model does not run ({clash})",
                    "save it in one dtype first: AutoModelForCausalLM.from_pretrained(…, dtype=…).save_pretrained(…)",
                )
            )
        if problem:
            hint = f"write {' or '.join(_others(source, chosen, layout, format))}" if len(formats) == 1 else None
            problems.append(LLMCompressError(f"format {format.name}: {problem}", hint))
    raise_all(problems)
    return chosen, layout


def _dtypes(source: Checkpoint) -> str:
    counts = Counter(source.dtype(name) for name in source.stored)
    return ", ".join(f"{count} tensors {dtype}" for dtype, count in counts.most_common())


def _built(source: Checkpoint, format: Format, chosen: Targets, layout: Layout) -> DryBuild | str:
    stems = {target.tensor: target.stem for target in chosen.targets}
    kept = [name for name in source.stored if name not in stems]
    return dry_build(source, format.quantization_config(layout), list(stems.values()), kept)


def _without(chosen: Targets, names: Sequence[str], reason: str) -> Targets:
    """The same with the linears called `names` left as they are."""
    own = [field.name for field in fields(Linear)]
    left = [Linear(**{key: asdict(target)[key] for key in own}) for target in chosen.targets if target.name in names]
    targets = tuple(target for target in chosen.targets if target.name not in names)
    return Targets(targets, (*chosen.skipped, *((linear, reason) for linear in left)))


def _others(source: Checkpoint, chosen: Targets, layout: Layout, refused: Format) -> list[str]:
    """The other formats that hold these linears and that transformers loads."""
    names = []
    for format in FORMATS:
        holds = all(
            format.refuses(target.scheme, target.out_features, target.in_features) is None for target in chosen.targets
        )
        if format is refused or not holds or format.refuses_layout(layout):
            continue
        built = _built(source, format, chosen, layout)
        if isinstance(built, DryBuild) and built.problem() is None:
            names.append(format.name)
    return names or ["an integer scheme as compressed_tensors"]
