"""The two plots of the demo: loss per system and domain, and routing shares per domain.

They use the object-oriented interface of Matplotlib, which has no global state and needs no display. Does not cover
computing the values (`scoring`, `report`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, MUTED, GRID = "#1f2430", "#8a91a0", "#e6e8ee"
ACCENT, CEILING, OTHER = "#0f7b6c", "#c8a24a", "#b9c0cc"
HIGHLIGHTED = ("composed", "true-domain")
_TEAL = LinearSegmentedColormap.from_list("teal", ["#f6faf9", "#0f7b6c"])


def plot_losses(losses: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """One panel per domain and one for the mean, with a labelled dot per system; the composed model is highlighted.

    All panels cover the same range of nats, so that distances are comparable.
    """
    systems = list(losses)[::-1]
    domains = list(losses[systems[0]])
    panels = {domain: [losses[s][domain] for s in systems] for domain in domains}
    panels["mean"] = [sum(losses[s].values()) / len(domains) for s in systems]
    figure = Figure(figsize=(2.1 * len(panels) + 1.6, 0.34 * len(systems) + 1.1), dpi=140, facecolor="white")
    axes = figure.subplots(1, len(panels), sharey=True)
    width = max(max(values) - min(values) for values in panels.values()) or 1.0
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        _loss_panel(axis, title, systems, values)
        axis.set_xlim(min(values) - 0.12 * width, min(values) + 1.6 * width)  # with room for the last label
        axis.xaxis.set_major_locator(MaxNLocator(4))
    axes[0].set_yticks(range(len(systems)), systems, fontsize=9)
    for label in axes[0].get_yticklabels():
        label.set_color(_color(label.get_text()) if label.get_text() in HIGHLIGHTED else INK)
        label.set_fontweight("bold" if label.get_text() == "composed" else "normal")
    figure.supxlabel("held-out loss, nats per token (lower is better)", fontsize=9, color=MUTED)
    _save(figure, path)


def plot_routing(routing: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """A heat map of the share of the routing weight, by domain (rows) and expert (columns)."""
    domains, experts = list(routing), list(next(iter(routing.values())))
    values = [[routing[d].get(e, 0.0) for e in experts] for d in domains]
    figure = Figure(figsize=(0.95 * len(experts) + 1.6, 0.62 * len(domains) + 1.3), dpi=140, facecolor="white")
    axis = figure.subplots()
    axis.imshow(values, cmap=_TEAL, vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(values):
        for x, share in enumerate(row):
            axis.text(
                x, y, f"{share:.0%}", ha="center", va="center", fontsize=9, color="white" if share > 0.55 else INK
            )
    axis.set_xticks(range(len(experts)), experts, fontsize=9, color=INK)
    axis.set_yticks(range(len(domains)), domains, fontsize=9, color=INK)
    axis.xaxis.tick_top()
    axis.set_xlabel("expert", fontsize=9, color=MUTED)
    axis.xaxis.set_label_position("top")
    axis.set_ylabel("text", fontsize=9, color=MUTED)
    _hide_frame(axis)
    _save(figure, path)


def _loss_panel(axis: Axes, title: str, systems: list[str], values: list[float]) -> None:
    composed = dict(zip(systems, values, strict=True)).get("composed")
    axis.hlines(range(len(systems)), min(values), values, color=GRID, linewidth=2, zorder=1)
    axis.scatter(values, range(len(systems)), s=34, color=[_color(s) for s in systems], zorder=3)
    if composed is not None:
        axis.axvline(composed, color=ACCENT, linewidth=0.8, alpha=0.5, zorder=2)
    for row, (system, value) in enumerate(zip(systems, values, strict=True)):
        axis.annotate(
            f"{value:.3f}",
            (value, row),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=_color(system) if system in HIGHLIGHTED else INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            zorder=2.5,
        )
    axis.set_title(title, fontsize=10, color=INK, fontweight="bold" if title == "mean" else "normal")
    axis.tick_params(axis="x", labelsize=8, labelcolor=MUTED)
    _hide_frame(axis)


def _color(system: str) -> str:
    return {"composed": ACCENT, "true-domain": CEILING}.get(system, OTHER)


def _hide_frame(axis: Axes) -> None:
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})  # makes the bytes reproducible
