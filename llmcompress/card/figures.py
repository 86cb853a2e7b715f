"""The two plots of a card, as PNG files whose bytes depend on the report alone.

    scores.png   every task: difference with its interval, and the budget; every text: KL and perplexity ratio likewise
    errors.png   every kind of linear: relative error layer by layer, on a log axis

The background is opaque, so that they read the same on a light page and on a dark one. matplotlib is imported here and
nowhere else, without pyplot: no window, no global state, no settings of the user's.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.card.linears import kind_of, layer_of, worst_errors
from llmcompress.evaluate.statistics import verdict
from llmcompress.report import Distillation, Evaluation, Finetune, LinearRow, TextResult

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
WIDTH_IN = 8.0
PAPER, INK, FAINT, BEYOND = "#faf9f5", "#22262b", "#c9c7bf", "#b3261e"
NO_BUDGET, TOO_FEW = "no budget", "too few items"
VERDICT_STYLE = {
    "pass": ("#1b7f4d", "o"),
    "inconclusive": ("#b07800", "D"),
    "fail": (BEYOND, "X"),
    NO_BUDGET: (INK, "s"),
    TOO_FEW: ("#8b8f94", "o"),
}
LONGEST_LABEL = 40
WIDE = 5.0
"""Largest over smallest value from which on a Pareto plot has a log axis."""
PALETTE = ("#0b6fb8", "#d1661a", "#2a8c5a", "#a13d87", "#8a6d00", "#c23b3b", "#3f9fb0", "#5b56b5", "#6b6b6b", "#7a4a21")
MARKERS = "osD^vPX*<>"


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of a plot: a value with its interval, and the budget as a place on the same axis."""

    label: str
    value: float
    interval: tuple[float, float]
    budget: float | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars that share a unit. unchanged: the value of a model that lost nothing."""

    axis: str
    unchanged: float
    bars: list[Bar]


def panels(evaluations: Sequence[Evaluation]) -> list[Panel]:
    """What scores.png shows: one panel per metric, one for KL, one for perplexity."""
    found: dict[str, Panel] = {}
    several = len(evaluations) > 1
    for evaluation in evaluations:
        suffix = f"\n{evaluation.suite}" if several else ""
        for row in evaluation.tasks:
            sign, side = (-1, "left") if row.higher_is_better else (1, "right")
            axis = f"{row.metric}, this checkpoint - base (a loss lies to the {side})"
            bar = Bar(
                f"{row.task}{suffix}",
                row.difference,
                row.interval,
                sign * row.budget,
                row.verdict if row.enough else TOO_FEW,
            )
            found.setdefault(axis, Panel(axis, 0.0, [])).bars.append(bar)
    texts = [text for evaluation in evaluations for text in evaluation.texts]
    if texts:
        found["KL"] = Panel("KL from base, nats per token", 0.0, [_kl(text) for text in texts])
        found["ratio"] = Panel("perplexity, this checkpoint / base", 1.0, [_ratio(text) for text in texts])
    return list(found.values())


def _kl(text: TextResult) -> Bar:
    return _text_bar(text, text.kl, text.kl_interval, text.budget_kl)


def _ratio(text: TextResult) -> Bar:
    ratio = text.compressed_perplexity / text.baseline_perplexity
    return _text_bar(text, ratio, text.perplexity_ratio_interval, text.budget_perplexity_ratio)


def _text_bar(text: TextResult, value: float, interval: tuple[float, float], budget: float | None) -> Bar:
    """A text has one verdict over both its budgets; each bar shows its own."""
    decided = verdict(interval, budget) if budget is not None and text.enough else TOO_FEW
    return Bar(text.name, value, interval, budget, NO_BUDGET if budget is None else decided)


def draw_scores(evaluations: Sequence[Evaluation], path: Path) -> Path | None:
    """Draw scores.png; None when nothing was evaluated."""
    shown = panels(evaluations)
    if not shown:
        return None
    heights = [0.62 + 0.42 * len(panel.bars) for panel in shown]
    with _figure(sum(heights) + 0.75) as figure:
        axes = figure.subplots(len(shown), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axis, panel in zip(axes, shown, strict=True):
            _draw_panel(axis, panel)
        bars = [bar for panel in shown for bar in panel.bars]
        verdicts = {bar.verdict for bar in bars}
        handles = [_verdict_handle(name) for name in VERDICT_STYLE if name in verdicts]
        handles += [_budget_handle()] * any(bar.budget is not None for bar in bars)
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
        return _save(figure, path)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for row, bar in enumerate(panel.bars):
        colour, marker = VERDICT_STYLE[bar.verdict]
        axes.plot(bar.interval, (row, row), color=colour, linewidth=2.2, solid_capstyle="butt", zorder=3)
        axes.plot(bar.interval, (row, row), "|", color=colour, markersize=8, markeredgewidth=1.6, zorder=3)
        axes.plot(bar.value, row, marker, color=colour, markersize=8.5, markeredgecolor=PAPER, zorder=4)
        if bar.budget is not None:
            axes.plot((bar.budget, bar.budget), (row - 0.42, row + 0.42), color=BEYOND, linestyle=(0, (3, 2)), zorder=2)
    budgets = [bar.budget for bar in panel.bars if bar.budget is not None]
    ends = [panel.unchanged, *budgets, *(end for bar in panel.bars for end in (*bar.interval, bar.value))]
    margin = 0.08 * (max(ends) - min(ends)) or 0.01
    axes.set_xlim(min(ends) - margin, max(ends) + margin)
    axes.axvline(panel.unchanged, color=INK, linewidth=1, zorder=1)
    axes.set_yticks(range(len(panel.bars)), [_plain(bar.label) for bar in panel.bars])
    axes.set_ylim(len(panel.bars) - 0.4, -0.6)
    axes.set_xlabel(panel.axis.replace("$", r"\$"))
    axes.grid(axis="x", color=FAINT, linewidth=0.6, zorder=0)


def draw_errors(linears: Sequence[LinearRow], path: Path) -> Path | None:
    """Draw errors.png; None when no linear inside a decoder layer has an error above zero."""
    from matplotlib.ticker import MaxNLocator

    kind = "output" if any(row.error_kind == "output" for row in linears) else "weight"
    lines = worst_errors(linears, kind)
    if not lines:
        return None
    with _figure(4.2) as figure:
        axes = figure.subplots()
        for index, (name, errors) in enumerate(lines.items()):
            layers = sorted(errors)
            colour, marker = PALETTE[index % len(PALETTE)], MARKERS[(index + index // len(PALETTE)) % len(MARKERS)]
            values = [errors[layer] for layer in layers]
            axes.plot(layers, values, marker=marker, color=colour, markersize=4.5, label=_plain(name))
        _log_scale(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("decoder layer")
        axes.set_ylabel(f"relative error of the {kind}")
        axes.grid(color=FAINT, linewidth=0.6, which="both", alpha=0.7)
        figure.legend(loc="outside right upper", frameon=False)
        return _save(figure, path)


def _log_scale(axes: Axes) -> None:
    """Orders of magnitude, their numbers written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


@dataclass(frozen=True, slots=True)
class Point:
    """One version in a Pareto plot: size in MB, value with its interval, and whether none beats it."""

    label: str
    size_mb: float
    value: float
    interval: tuple[float, float]
    best: bool


def draw_pareto(plots: Sequence[tuple[str, Sequence[Point]]], base_mb: float, path: Path) -> Path | None:
    """Size against value, one panel for each (axis label, points); None without points. The base is a dashed line."""
    shown = [(axis, points) for axis, points in plots if points]
    if not shown:
        return None
    with _figure(3.3 * len(shown) + 0.3) as figure:
        for axes, (axis, points) in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
            _draw_points(axes, axis, points, base_mb)
        return _save(figure, path)


def _draw_points(axes: Axes, axis: str, points: Sequence[Point], base_mb: float) -> None:
    for index, point in enumerate(points):
        colour, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
        axes.plot((point.size_mb, point.size_mb), point.interval, color=colour, linewidth=2, zorder=3)
        axes.plot(point.size_mb, point.value, marker, color=colour, markersize=8.5, markeredgecolor=PAPER, zorder=4,
                  label=_plain(point.label))  # fmt: skip
    front = sorted((point.size_mb, point.value) for point in points if point.best)
    axes.plot(*zip(*front, strict=True), color=INK, linewidth=1, zorder=2, label="not beaten")
    ends = [end for point in points for end in point.interval]
    if min(ends) > 0:
        if max(ends) > WIDE * min(ends):
            _log_scale(axes)
    else:
        axes.axhline(0, color=FAINT, linestyle=(0, (3, 2)), label="the base")
    axes.axvline(base_mb, color=FAINT, linestyle=(0, (1, 2)), label="size of the base")
    axes.set_xlim(left=0)
    axes.set_xlabel("weights, MB")
    axes.set_ylabel(axis)
    axes.grid(color=FAINT, linewidth=0.6, alpha=0.7)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def draw_training(part: Finetune | Distillation, path: Path) -> Path | None:
    """Draw training.png: the loss over the steps, and for AdaLoRA the rank of every linear; None without a curve."""
    from matplotlib.ticker import MaxNLocator

    curve = part.training.curve
    if len(curve) < 2:
        return None
    adapter = part if isinstance(part, Finetune) else None
    ranks = ranks_by_kind(adapter) if adapter is not None and adapter.initial_rank is not None else {}
    with _figure(3.6 + (2.8 if ranks else 0)) as figure:
        panels = figure.subplots(2 if ranks else 1, 1, squeeze=False)[:, 0]
        axes = panels[0]
        axes.plot([one.step for one in curve], [one.loss for one in curve], color=PALETTE[0], linewidth=1.4)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("training loss, nats per token" if adapter is not None else "training loss, all terms")
        axes.grid(color=FAINT, linewidth=0.6, alpha=0.7)
        for index, (kind, of_layer) in enumerate(ranks.items()):
            colour, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
            panels[1].plot(
                list(of_layer), list(of_layer.values()), marker=marker, color=colour, markersize=4.5, label=_plain(kind)
            )
        if ranks and adapter is not None:
            panels[1].xaxis.set_major_locator(MaxNLocator(integer=True))
            panels[1].yaxis.set_major_locator(MaxNLocator(integer=True))
            panels[1].axhline(adapter.rank, color=INK, linewidth=1, linestyle=(0, (3, 2)))
            panels[1].set_xlabel("decoder layer")
            panels[1].set_ylabel("rank at the end")
            panels[1].grid(color=FAINT, linewidth=0.6, alpha=0.7)
            figure.legend(loc="outside right upper", frameon=False)
        return _save(figure, path)


def ranks_by_kind(part: Finetune) -> dict[str, dict[int, int]]:
    """Kind of linear -> decoder layer -> rank at the end of the training."""
    found: dict[str, dict[int, int]] = {}
    for one in part.modules:
        layer = layer_of(one.name)
        if layer is not None:
            found.setdefault(kind_of(one.name), {})[layer] = one.rank
    return found


@contextmanager
def _figure(height_in: float) -> Iterator[Figure]:
    """A figure drawn with matplotlib's own settings and ours on top, whatever the user's are."""
    import matplotlib
    from matplotlib.figure import Figure

    ours: Any = {
        "axes.edgecolor": INK,
        "axes.facecolor": PAPER,
        "axes.labelcolor": INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.h_pad": 0.12,
        "figure.constrained_layout.w_pad": 0.12,
        "figure.facecolor": PAPER,
        "font.size": 10,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(ours)
        yield Figure(figsize=(WIDTH_IN, height_in), layout="constrained")


def _save(figure: Figure, path: Path) -> Path:
    """Write the PNG, without the name and version of the program in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})
    return path


def _verdict_handle(verdict: str) -> Any:
    from matplotlib.lines import Line2D

    colour, marker = VERDICT_STYLE[verdict]
    return Line2D([], [], color=colour, marker=marker, linewidth=2.2, markersize=7.5, label=verdict)


def _budget_handle() -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=BEYOND, linestyle=(0, (3, 2)), label="budget")


def _plain(label: str) -> str:
    """Text that matplotlib does not take for mathematics, its middle left out where it is long."""
    lines = [one if len(one) <= LONGEST_LABEL else f"{one[:18]}…{one[-18:]}" for one in label.splitlines()]
    return "\n".join(lines).replace("$", r"\$")
