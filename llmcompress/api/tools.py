"""The verbs that are no stages, for Python: what there is, what a run would take, and what is done with an output."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.api.models import named
from llmcompress.api.results import Artifact, Rows
from llmcompress.api.verbs import execute, recipe_of
from llmcompress.config.recipe import Recipe
from llmcompress.config.recipe import load as load_recipe
from llmcompress.config.stage import stage
from llmcompress.console import Progress, duration, megabytes, watched
from llmcompress.errors import unknown

if TYPE_CHECKING:
    from llmcompress.api.models import Model
    from llmcompress.checkpoint.hub import Pushed
    from llmcompress.compress.planning import QuantizePlan
    from llmcompress.formats.gguf.export import Exported
    from llmcompress.publish.push import Plan as PushPlan

EXPORT_FORMATS = ("gguf",)
"""Files that `export` writes."""
PROBE_FEATURES = 4096
"""A width that every rule on divisibility accepts, so that what is refused is the grid itself."""
PROBE_SIZE = 512
"""Of the square matrices whose product is timed."""


def load(folder: str | PathLike[str]) -> Artifact:
    """What llmcompress wrote to `folder`; `.load()` of it gives the model. Raises: LLMCompressError."""
    return Artifact.open(Path(folder))


def run(
    recipe: str | PathLike[str] | Mapping[str, Any] | Recipe,
    *overrides: str,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Progress | bool | None = None,
) -> Artifact:
    """Run a recipe: a YAML file, the name of a shipped one, its content, or a `Recipe`; a stopped run goes on.

    overrides: `key=value`, as on the command line. Raises: LLMCompressError, all problems of a recipe together.
    """
    given = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    consent = [f"{key}=true" for key, said in given.items() if said]
    if isinstance(recipe, Recipe | Mapping):
        data = recipe.dump() if isinstance(recipe, Recipe) else recipe
        built = Recipe.of(data, [*overrides, *consent])
    else:
        built = load_recipe(str(recipe), [*overrides, *consent])
    reports = execute(built, progress=progress, overwrite=overwrite, fresh=fresh)
    return Artifact.of(reports, Path(built.output))


def export(
    model: Model,
    output: str | PathLike[str],
    *,
    format: str = "gguf",
    dense: str = "auto",
    overwrite: bool = False,
    progress: Progress | bool | None = None,
) -> Exported:
    """Write a checkpoint (of llmcompress, or plain weights) as a file of another engine's own; codes stay as they are.

    format: gguf, what llama.cpp reads. dense: type of the matrices that are not quantized: auto (as stored), F32, F16,
    BF16 or Q8_0.

    Raises: LLMCompressError for what the format does not hold, before anything is written, and for a file that does
    not hold what went in.
    """
    from llmcompress.checkpoint.reader import Checkpoint
    from llmcompress.formats.gguf.export import DENSE, export_gguf

    if format not in EXPORT_FORMATS:
        raise unknown("export format", format, EXPORT_FORMATS)
    kind = next((known for known in DENSE if known == dense), None)
    if kind is None:
        raise unknown("type", dense, DENSE, "dense")
    with named(model) as source:
        folder = Checkpoint.open(source.name).folder
        return export_gguf(folder, Path(output), dense=kind, overwrite=overwrite, progress=watched(progress))


@dataclass(frozen=True, slots=True)
class Plan:
    """What quantizing a model would take and give; reads as a few lines."""

    model: str
    details: QuantizePlan

    def __str__(self) -> str:
        plan = self.details
        grids = Counter(linear.scheme.label() for linear in plan.linears)
        mixture = (
            f"; {plan.experts} experts a layer, {plan.active_parameters:,} parameters active" if plan.experts else ""
        )
        lines = [
            self.model,
            f"  model    {plan.parameters:,} parameters, {plan.layers} decoder layers{mixture}",
            f"  size     {megabytes(plan.after_bytes)} from {megabytes(plan.before_bytes)} "
            f"({plan.after_bytes / plan.before_bytes:.3f} of it); {plan.bits_per_weight:.3f} bits per quantized weight",
            "  linears  " + ", ".join(f"{count} to {label}" for label, count in grids.items()),
        ]
        for reason, count in Counter(plan.skipped.values()).items():
            names = [name for name, why in plan.skipped.items() if why == reason]
            lines.append(f"  skipped  {count} {reason}: {', '.join(names[:3])}{' …' if count > 3 else ''}")
        lines.append(f"  memory   {megabytes(plan.peak_memory_bytes)} at most")
        if plan.streaming and plan.streaming.reason:
            streaming = plan.streaming
            lines.append(f"           {streaming.form}, activations in {streaming.activations}: {streaming.reason}")
        lines.append(f"  disk     {megabytes(plan.disk_bytes)} while it runs")
        lines.append(f"  time     some {duration(plan.seconds)} on this machine")
        return "\n".join(lines)

    __repr__ = __str__


def plan(model: Model, *, num_samples: int = 128, seq_len: int = 2048, **options: Any) -> Plan:
    """Sizes, memory, disk and time of quantizing `model` on so much text; no weight is read. `options`: of quantize.

    Raises: LLMCompressError, all problems together.
    """
    from llmcompress.checkpoint.reader import Checkpoint
    from llmcompress.compress.planning import plan_quantization

    with named(model) as source:
        recipe, _ = recipe_of(stage("quantize"), source, Path("-"), options)
        checkpoint = Checkpoint.open(
            source.name, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code,
            allow_pickle=recipe.allow_pickle,
        )  # fmt: skip
        settings: Any = recipe.stages[0].settings
        details = plan_quantization(checkpoint, settings, num_samples * seq_len, seq_len, _matmul_flops_per_s())
        return Plan(source.alias or source.name, details)


def _matmul_flops_per_s() -> float:
    """The rate of a float32 matrix product with numpy here, measured in some hundredths of a second."""
    import numpy as np

    left = np.ones((PROBE_SIZE, PROBE_SIZE), np.float32)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - began)
    return 2.0 * PROBE_SIZE**3 / best


def compare(*artifacts: str | PathLike[str], html: str | Path | None = None, figure: str | Path | None = None) -> Rows:
    """Compressed versions of one base beside each other, a row each, out of their reports.

    html, figure: files to write a page and the Pareto figure to. Raises: LLMCompressError when their bases differ.
    """
    from llmcompress.card.compare import compare as compared
    from llmcompress.card.compare import page, plots, rows

    comparison = compared([Path(artifact) for artifact in artifacts])
    if html or figure:
        from llmcompress.card.figures import draw_pareto

        with tempfile.TemporaryDirectory() as scratch:
            target = Path(figure) if figure else Path(scratch) / "pareto.png"
            drawn = draw_pareto(plots(comparison), comparison.base_bytes / 1e6, target)
            if html:
                Path(html).parent.mkdir(parents=True, exist_ok=True)
                Path(html).write_text(page(comparison, drawn), encoding="utf-8")
    made = Rows(rows(comparison))
    made.note = {"base": comparison.base, "base_bytes": comparison.base_bytes}
    return made


def reproduce(
    artifact: str | PathLike[str],
    *,
    keep: str | Path | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress | bool | None = None,
) -> Rows:
    """Make a checkpoint again from the recipe in its report and compare the bytes: a row for each file.

    keep: folder to leave the result in. `.failures` says what differed among the inputs where files differ.
    Raises: LLMCompressError when there is nothing to reproduce, or what the recipe names is gone.
    """
    from llmcompress.api.verbs import random_states_kept
    from llmcompress.pipeline.reproduce import reproduce as again

    with random_states_kept():
        result = again(
            Path(artifact), Path(keep) if keep else None, watched(progress),
            trust_remote_code=trust_remote_code, allow_pickle=allow_pickle,
        )  # fmt: skip
    rows = [{"file": name, "same": same} for name, same in result.files.items()]
    return Rows(rows, folder=result.folder, failures=result.reasons)


def push_plan(
    artifact: str | PathLike[str], repo: str, *, public: bool = False, include: Sequence[str] = ()
) -> PushPlan:
    """The files that `push` would send and what stands in the way; nothing is sent. include: as in `push`."""
    from llmcompress.publish.push import plan as planned

    return planned(Path(artifact), repo, public=public, include=include)


def push(
    artifact: str | PathLike[str],
    repo: str,
    *,
    public: bool = False,
    revision: str | None = None,
    pull_request: bool = False,
    include: Sequence[str] = (),
) -> Pushed:
    """Put a verified checkpoint with its card on the Hub, in one commit; the token is HF_TOKEN or `hf auth login`'s.

    include: patterns of files that no checkpoint has by itself and that go out too (`*` crosses folders).

    Raises: LLMCompressError, one for each reason why it may not leave the machine, and what the Hub says.
    """
    from llmcompress.publish.push import push as pushed

    plan = push_plan(artifact, repo, public=public, include=include)
    return pushed(plan, public=public, revision=revision, pull_request=pull_request)


def serve(
    model: str | PathLike[str],
    *,
    engine: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: str | Path | None = None,
    make_api_key: bool = False,
    name: str | None = None,
    trust_remote_code: bool = False,
    announce: Any = None,
    **limits: Any,
) -> None:
    """Serve a checkpoint with an OpenAI-compatible API until a signal ends it; this process becomes the server.

    limits: fields of `publish.limits.ServerLimits`, what one request and all of them may ask for.
    announce: called with the engine, why it was chosen, the model's name, the address, and the key where one was made.
    Raises: LLMCompressError when no engine can run it here, or the port is taken.
    """
    from llmcompress.checkpoint.reader import Checkpoint
    from llmcompress.config.validation import validated
    from llmcompress.publish import serve as serving
    from llmcompress.publish.limits import ServerLimits

    bounds = validated(ServerLimits, limits)
    file = Path(api_key_file) if api_key_file else None
    key = serving.api_key(file, make_api_key)
    serving.require_key(host, key)
    checkpoint = Checkpoint.open(str(model), trust_remote_code=trust_remote_code)
    choice = serving.choose(checkpoint, engine)
    port = serving.free_port(host, port)
    called = name or checkpoint.hub_id or checkpoint.folder.resolve().name
    if announce:
        made = key if make_api_key and not (file and file.is_file()) else None
        announce(
            {"engine": choice.engine, "why": choice.why, "model": called, "address": f"http://{host}:{port}/v1"}, made
        )
    serving.run(checkpoint, choice.engine, called, host=host, port=port, key=key, limits=bounds)


def recipes() -> Rows:
    """The recipes that come with llmcompress: name, stages, and what it is."""
    from llmcompress.config.recipe import load, recipe_file, shipped_names

    rows = []
    for name in shipped_names():
        first = recipe_file(name).read_text(encoding="utf-8").splitlines()[0]
        stages = ", ".join(step.name for step in load(name).stages)
        rows.append({"recipe": name, "stages": stages, "what it is": first.removeprefix("# ")})
    return Rows(rows)


class Catalogue(dict[str, Rows]):
    """Tables by their names; reads as one below the other."""

    def __str__(self) -> str:
        return "\n\n".join(str(rows) for rows in self.values())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(f"<h4>{name}</h4>{rows._repr_html_()}" for name, rows in self.items())


def methods() -> Catalogue:
    """Methods, layouts with their readers, and grids with the layouts that hold them."""
    from llmcompress.compress.methods.base import METHODS
    from llmcompress.compress.scheme import PRESETS, preset
    from llmcompress.formats.base import FORMATS

    made = [
        {"method": method.name, "calibration": "yes" if method.needs else "no", "what it does": method.summary}
        for method in METHODS
    ]
    layouts = [
        {
            "layout": layout.name,
            "holds": layout.summary,
            "read by": "; ".join(f"{engine} ({how})" for engine, how in layout.readers.items()),
        }
        for layout in FORMATS
    ]
    grids = []
    for name, scheme in PRESETS.items():
        for grid in [scheme] if scheme.grid.codebook else [scheme, preset(name, symmetric=False)]:
            row = {"scheme": name, "grid": grid.label()}
            for layout in FORMATS:
                row[layout.name] = "no" if layout.refuses(grid, PROBE_FEATURES, PROBE_FEATURES) else "yes"
            grids.append(row)
    return Catalogue(methods=Rows(made), layouts=Rows(layouts), grids=Rows(grids))
