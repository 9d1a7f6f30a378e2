"""Plots of docs/benchmarks.md, from the results of `make bench`.

Does not cover the plots of the demo (`flexmoe.demo.plots`).
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

ROUTING_PLOT = "routing-speed.png"
CPU_PLOT = "cpu-speed.png"


def draw(docs: Path) -> None:
    """Draws the plots into `docs`, from the results in `docs/benchmarks`."""
    plot_cpu_speed(docs / "benchmarks" / "forward_avx512_bf16.json", docs / CPU_PLOT)
    if (routing := docs / "benchmarks" / "routing.json").exists():
        plot_routing_speed(routing, docs / ROUTING_PLOT)


def plot_cpu_speed(path: Path, to: Path) -> None:
    """Milliseconds of a forward pass in bfloat16: FlexMoE as loaded and prepacked, and FlexOlmo's implementations."""
    result = json.loads(path.read_text(encoding="utf-8"))
    names = ["flexmoe", "prepacked", "eager", "grouped_mm"]
    labels = ["FlexMoE", "FlexMoE, prepacked", "FlexOlmo, eager", "FlexOlmo, grouped_mm"]
    cases = [name for name in result["rows"] if name.endswith("bfloat16")]
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases)), cases, strict=True):
        milliseconds = result["rows"][case]["milliseconds"]
        measured = [
            (label, milliseconds[name]) for name, label in zip(names, labels, strict=True) if name in milliseconds
        ]
        for at, (label, value) in enumerate(measured):
            bar = axes.bar(at, value, color=f"C{labels.index(label)}", label=label)
            axes.bar_label(bar, [f"{value:,.0f}" if value >= 100 else f"{value:.3g}"], fontsize=8)
        axes.margins(y=0.1)
        axes.set(title=case.removesuffix(", bfloat16"), xticks=[], ylabel="milliseconds")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.savefig(to, dpi=120)


def plot_routing_speed(path: Path, to: Path) -> None:
    """Microseconds of a block by number of tokens: FlexMoE's kernels, other implementations, and the floor."""
    rows = [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["kind"] == "block"]
    names = ["flexmoe", "grouped_mm", "batched_mm", "eager", "cuBLAS loop"]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        own = [row["microseconds"] if i == 0 else row["others"].get(name, {}).get("microseconds") for row in rows]
        places = [at + (i - 2) * 0.16 for at, value in enumerate(own) if value]
        bars = axes.bar(places, [value for value in own if value], width=0.15, label=name)
        axes.bar_label(bars, fmt="{:.3g}", fontsize=6, rotation=90, padding=2)
    for at, row in enumerate(rows):
        label = "floor" if at == 0 else None
        axes.hlines(row["floor_us"], at - 0.42, at + 0.42, colors="black", linestyles="dashed", label=label)
    axes.set(yscale="log", ylabel="microseconds", xticks=range(len(rows)), xticklabels=[row["case"] for row in rows])
    axes.legend()
    figure.savefig(to, dpi=120)
