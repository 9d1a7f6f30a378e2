"""Generated blocks of README.md, ARCHITECTURE.md and docs/benchmarks.md, from the results that `make` has written.

Run as a script, it replaces what is between the markers `<!-- name: begin -->` and `<!-- name: end -->`. The tests
assert that the blocks are up to date. Does not cover `docs/results.md` (`results.py`) or drawing (`readme_plots.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from readme_plots import CPU_PLOT, ROUTING_PLOT, draw

ROOT = Path(__file__).resolve().parents[1]
PREPACKED = ", prepacked"  # suffix of row names of bench_forward
RESULTS, BENCHMARKS, ARCHITECTURE = "README.md", "docs/benchmarks.md", "ARCHITECTURE.md"


def figures(docs: Path) -> dict[str, dict[str, str]]:
    """{file: {marker: Markdown that ends in a newline}}."""
    return {
        RESULTS: {
            "results": _demo(
                json.loads((docs / "demo" / "report.json").read_text(encoding="utf-8")),
                _eight(json.loads((docs / "benchmarks" / "eight_owners.json").read_text(encoding="utf-8"))),
            )
            + "\n"
            + _results(json.loads((docs / "results.json").read_text(encoding="utf-8")))
        },
        BENCHMARKS: {
            "benchmarks": _benchmarks(docs / "benchmarks"),
            "routing": _routing(docs / "benchmarks" / "routing.json"),
        },
        ARCHITECTURE: {"structure": _structure(docs / "benchmarks")},
    }


def _demo(report: dict[str, Any], eight: str) -> str:
    """The systems of the demo's run on SmolLM2-135M, and what it shows."""
    domains, owners, systems = report["domains"], report["owners"], report["systems"]
    lines = [f"| system | {' | '.join(domains)} | mean |", f"|---|{'---:|' * (len(domains) + 1)}"]
    for name in ("anchor", "soup", "composed", "opted-out", "true-domain"):
        cells = [f"{systems[name]['loss'][domain]:.3f}" for domain in domains]
        bold = "**" if name == "composed" else ""
        lines.append(f"| {bold}{name}{bold} | {' | '.join(cells)} | {systems[name]['mean']:.3f} |")
    kept = ", ".join(f"{owner} {report['kept'][owner]:.0%}" for owner in owners)
    public = systems["composed"]["loss"]["public"] / systems["anchor"]["loss"]["public"] - 1
    exact = all(value for key, value in report["opt_out"].items() if key.endswith("_equal"))
    summary = (
        f"Share of each expert's gain that the composed model keeps: {kept}. Change on public text: {public:+.1%}. "
        "`true-domain` routes each text to its owner's expert, `soup` is one dense model with the experts' average, "
        "`opted-out` the composed model without "
        f"{report['opt_out']['owner']}: {'equal' if exact else 'NOT EQUAL'}, bit for bit, to one composed without it. "
        f"{report['seconds'] / 60:.0f} minutes, {report['peak_bytes'] / 1e9:.1f} GB."
    )
    if systems["soup"]["mean"] < systems["composed"]["mean"]:
        summary += (
            " Three experts trained this briefly interfere little: the soup is as good, but no owner can leave it."
        )
    return "\n".join([*lines, "", f"{summary} {eight}"]) + "\n"


def _eight(result: dict[str, Any]) -> str:
    """The mean losses with eight owners, and what they keep; means over seeds."""
    runs = [seed["losses"] for seed in result["seeds"].values()]
    domains = ["public", *result["owners"]]
    anchor, soup, composed = (
        mean(losses[name][domain] for losses in runs for domain in domains) for name in ("anchor", "soup", "composed")
    )

    def kept(losses: dict[str, Any], owner: str) -> float:
        gains = [losses["anchor"][owner] - losses[name][owner] for name in ("composed", "composed, each expert alone")]
        return float(gains[0] / gains[1])

    shares = [mean(kept(losses, owner) for losses in runs) for owner in result["owners"]]
    return (
        f"With {len(result['owners'])} owners and {len(runs)} seeds ([table](docs/eight-owners.md)): anchor "
        f"{anchor:.3f}, soup {soup:.3f}, composed {composed:.3f}; owners keep {mean(shares):.0%}, the worst "
        f"{min(shares):.0%}."
    )


def _results(result: dict[str, Any]) -> str:
    """What the demo with its own anchor shows, over several seeds."""
    systems, verdicts, anchor = result["systems"], result["opt_out"], result["systems"]["anchor"]["mean"]
    kept = ", ".join(f"{owner} {result['kept'][owner]:.0%}" for owner in result["owners"])
    public = mean(result["public_change"])
    above = systems["composed"]["mean"] / systems["true-domain"]["mean"] - 1
    paper = mean(result["trained"]["paper's recipe"]["composed"].values())
    exact = sum(verdict["state_dict_equal"] and verdict["logits_equal"] for verdict in verdicts)
    return (
        "On an anchor trained from nothing on 5 MB, with three seeds (mathematics, Python, Unicode tables): mean loss "
        f"{anchor:.3f} for the anchor, {systems['soup']['mean']:.3f} for the soup, {paper:.3f} for the "
        f"recipe of the FlexOlmo paper, {systems['composed']['mean']:.3f} composed, {above:.1%} above an oracle that "
        f"routes each text to its owner's expert. Kept gain: {kept}. Change on public text: {public:+.1%}. Opt-outs "
        f"that are exact: {exact} of {len(verdicts)}.\n"
    )


def _benchmarks(folder: Path) -> str:
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    rows = [
        ("", "measured", "threshold"),
        ("---", "---:", "---:"),
        *_graft_rows(results["graft"]),
        *_start_rows(results.get("graft_start")),
        *_mergekit_rows(results.get("mergekit")),
        *_training_rows(results["training"]),
        *_loading_rows(results["loading"]),
        *_package_rows(results.get("packages")),
        *_import_rows(results["import"]),
        *_forward_rows(results["forward"], "on the CPU"),
        *_forward_rows(results.get("forward_avx512_bf16"), "on a CPU with AVX512-BF16"),
    ]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return f"{table}\n![Forward passes on a CPU: FlexMoE as loaded and prepacked, and FlexOlmo]({CPU_PLOT})\n"


def _graft_rows(graft: dict[str, Any]) -> list[tuple[str, str, str]]:
    private, limit = graft["peak_private_bytes"] / 1e9, graft["private_bytes_limit"] / 1e9
    speeds, floors = graft["speed_over_copy"], graft["speed_floors"]
    of = f"graft of {graft['parameters'] / 1e9:.1f} B parameters in bf16"
    names = {
        "graft": f"{of} with its fingerprint: speed of `cp -r`",
        "graft without fingerprint": "the same without the fingerprint",
    }
    return [
        *((names[way], f"{speed:.2f}x", f"≥ {floors[way]}x") for way, speed in speeds.items()),
        ("its peak private memory", f"{private:.2f} GB", f"< {limit:.0f} GB"),
    ]


def _start_rows(start: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """No rows if it was not measured."""
    if start is None:
        return []
    of = f"`flexmoe graft` of {start['parameters'] / 1e6:.0f} M parameters, beyond"
    bars = start["bars"]["seconds_beyond"]
    return [
        (
            f"{of} {what}",
            f"{seconds:.1f} s",
            f"≤ {bars[what]} s" + ("" if seconds <= bars[what] else ", missed"),
        )
        for what, seconds in start["seconds_beyond"].items()
    ]


def _mergekit_rows(mergekit: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """No rows if it was not measured."""
    if mergekit is None:
        return []
    of = f"graft of {mergekit['parameters'] / 1e9:.1f} B parameters with two fine-tunes, against mergekit-moe"
    names = {
        "seconds": f"{of}: wall time, including start-up",
        "seconds_beyond_start_per_gigabyte": "the same without the imports, per gigabyte written",
        "peak_private_bytes": "its peak private memory",
    }
    rows = []
    for figure, name in names.items():
        ratio, bar = mergekit["ratios"][figure], mergekit["bars"].get(figure)
        wanted = "none" if bar is None else f"≤ {bar:.2f}x" + ("" if ratio <= bar else ", missed")
        rows.append((name, f"{ratio:.2f}x", wanted))
    return rows


def _training_rows(training: dict[str, Any]) -> list[tuple[str, str, str]]:
    step, state, bars = (training["step_time_ratio"], training["gradient_and_optimiser_bytes_ratio"], training["bars"])
    return [
        (
            "training step, against computing every gradient and zeroing half of them",
            f"{step:.2f}x",
            f"≤ {bars['step_time_ratio']}x",
        ),
        ("its gradient and optimizer bytes", f"{state:.2f}x", f"≤ {bars['gradient_and_optimiser_bytes_ratio']}x"),
    ]


def _loading_rows(loading: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Ratios to FlexOlmo's checkpoint as `save_pretrained` writes it."""
    size, bar = loading["bytes"]["flexmoe"] / 1e9, f"≤ {loading['bars']['seconds']}x"
    load, used = (loading["rows"][name]["ratios"]["flex_olmo"] for name in ("load", "load and forward"))
    stacked = loading["rows"]["load and forward"]["ratios"]["flex_olmo, stacked"]
    return [
        (f"loading {size:.1f} GB with 7 experts, against transformers' FlexOlmo", f"{load['seconds']:.2f}x", bar),
        ("its peak resident memory", f"{load['peak_resident_bytes']:.2f}x", bar),
        ("loading and one forward pass, which reads every page", f"{used['seconds']:.2f}x", bar),
        ("its peak resident memory", f"{used['peak_resident_bytes']:.2f}x", bar),
        ("the same, against a FlexOlmo checkpoint with stacked experts", f"{stacked['seconds']:.2f}x", "none"),
    ]


def _package_rows(packages: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """No rows if it was not measured."""
    if packages is None:
        return []
    figures, bars, size = packages["figures"], packages["bars"], packages["package_bytes"] / 1e9
    names = {
        "add_over_reading_and_hashing": (
            f"`add_expert` of {size:.1f} GB with all checks, against reading and SHA-256 of the same bytes",
            "{:.2f}x",
            "≤ {}x",
        ),
        "peak_private_over_package": ("its peak private memory, against the package", "{:.2f}x", "≤ {}x"),
        "remove_seconds": ("`remove_expert` of it", "{:.3f} s", "≤ {} s"),
    }
    rows = [
        (name, form.format(figures[key]), bar.format(bars[key]) + ("" if figures[key] <= bars[key] else ", missed"))
        for key, (name, form, bar) in names.items()
    ]
    cold = packages["add_to_memory_never_touched_over_reading_and_hashing"]
    return [*rows[:1], ("the same into memory that was never touched before", f"{cold:.2f}x", "none"), *rows[1:]]


def _import_rows(imported: dict[str, Any]) -> list[tuple[str, str, str]]:
    seconds, bar = imported["added_seconds"], imported["bars"]["added_seconds"]
    return [("time that `import flexmoe` adds to importing `AutoModelForCausalLM`", f"{seconds:.2f} s", f"≤ {bar} s")]


def _forward_rows(forward: dict[str, Any] | None, where: str) -> list[tuple[str, str, str]]:
    """As loaded, and prepacked where that was measured. No rows if nothing was measured."""
    if forward is None:
        return []
    bar = f"≥ {forward['bars']['speed_over_flex_olmo']:.0f}x"
    rows, cells = forward["rows"], []
    for name in (name for name in rows if not name.endswith(PREPACKED)):
        both = [row for row in (rows[name], rows.get(name + PREPACKED)) if row]
        ways = "" if len(both) == 1 else ", as loaded and prepacked"
        speeds = " and ".join(f"{row['speed_over_flex_olmo']:.2f}x" for row in both)
        missed = "" if all(row["passed"] for row in both) else ", missed"
        cells.append((f"forward pass {where}, {name}{ways}: speed over FlexOlmo's fastest", speeds, bar + missed))
    if memory := forward.get("memory"):
        bar = f"≥ {forward['bars']['share_of_read_bandwidth']:.0%}"
        missed = "" if memory["passed"] else ", missed"
        what = "expert layers of a prepacked model, decoding one token: share of the memory bandwidth"
        cells.append((what, f"{memory['share_of_read_bandwidth']:.0%}", bar + missed))
        step = f"{memory['share_of_the_whole_step']:.0%}"
        cells.append(("the same for the whole step, with attention, norms, head and Python", step, "none"))
    return cells


def _routing(path: Path) -> str:
    """The kernels on a GPU. Empty if they were not measured."""
    if not path.exists():
        return ""
    result = json.loads(path.read_text(encoding="utf-8"))
    versions, shapes, ceilings = result["versions"], result["shapes"], result["ceilings"]
    rows = [
        ("", "measured", "floor", "share of the floor", "thresholds"),
        ("---", "---:", "---:", "---:", "---"),
        *(_routing_row(row) for row in result["rows"]),
    ]
    wrong = [f"{tokens} tokens (wrong)" for tokens, far in result["correctness"].items() if not far["passed"]]
    missing = "".join(f"Failed: {name}.\n" for name in [*wrong, *result["failed"]])
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows) + ("\n" + missing if missing else "")
    return (
        f"On {result['device']} ({result['date']}, torch {versions['torch']}, Triton {versions['triton']}, "
        f"transformers {versions['transformers']}), hidden {shapes['hidden']}, FFN {shapes['intermediate']}, "
        f"{shapes['experts']} experts, k = {shapes['k']}, {shapes['dtype'].removeprefix('torch.')}; the floor is the "
        f"time to move each byte once, or to compute, at {ceilings['copy_gb_per_second'] / 1000:.1f} TB/s "
        f"and {ceilings['bf16_matmul_tflops']:.0f} TFLOP/s, measured in the same run:\n\n{table}\n"
        f"![Times of the block with FlexMoE's kernels and FlexOlmo's implementations]({ROUTING_PLOT})\n"
    )


def _routing_row(row: dict[str, Any]) -> tuple[str, ...]:
    thresholds = []
    for threshold in row["thresholds"]:
        goal = threshold.get("microseconds_at_most")
        text = (
            f"≤ {_microseconds(goal)}"
            if goal
            else f"{threshold['measured'] or 0:.2f}x {threshold['speed_over']} (≥ {threshold['threshold']}x)"
        )
        thresholds.append(text + ("" if threshold["met"] else ", missed"))
    times = (_microseconds(row[name]) for name in ("microseconds", "floor_us"))
    return (row["case"], *times, f"{row['share_of_floor']:.0%}", "; ".join(thresholds) or "none")


def _microseconds(value: float) -> str:
    return f"{value / 1000:.2f} ms" if value >= 1000 else f"{value:.1f} µs" if value < 100 else f"{value:.0f} µs"


def _structure(folder: Path) -> str:
    """Size of the model files and rooms of each step, before the restructuring and now."""
    before, now = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("structure_before", "structure")
    )
    figures: dict[str, Callable[[dict[str, Any]], str]] = {
        "Python files that travel with a checkpoint": lambda of: f"{of['travels']['files']}",
        "their lines": lambda of: f"{of['travels']['lines']:,}",
        "their size": lambda of: f"{of['travels']['bytes'] / 1000:.0f} kB",
        "lines of `FlexMoeBlock`": lambda of: f"{of['block']['lines']}",
        "its longest method": lambda of: f"{of['block']['longest_method']}",
        "its `forward`": lambda of: f"{of['block']['forward']}",
        "Python calls in `remove_expert`, two layers": lambda of: f"{of['remove_expert_calls']:,}",
    }
    rows = [("", "before", "after"), ("---", "---:", "---:")]
    rows += [(name, figure(before), figure(now)) for name, figure in figures.items()]
    steps = [
        ("step", "before: files", "lines", "after: files", "lines", "rooms"),
        ("---", "---:", "---:", "---:", "---:", "---"),
    ]
    for name, step in now["steps"].items():
        old = before["steps"][name]
        counts = (f"{value}" for of in (old, step) for value in (len(of["files"]), f"{of['lines']:,}"))
        steps.append((name, *counts, ", ".join(step["rooms"])))
    return "\n".join("".join(f"| {' | '.join(row)} |\n" for row in table) for table in (rows, steps))


def put(document: str, marker: str, text: str) -> str:
    """`document` with `text` between the marker's two lines."""
    pattern = rf"(<!-- {marker}: begin[^>]*-->\n).*?(<!-- {marker}: end -->)"
    return re.sub(pattern, lambda match: match[1] + text + match[2], document, flags=re.S)


def main() -> None:
    """Writes the generated blocks and draws the plots."""
    draw(ROOT / "docs")
    for name, blocks in figures(ROOT / "docs").items():
        document = (ROOT / name).read_text(encoding="utf-8")
        for marker, text in blocks.items():
            document = put(document, marker, text)
        (ROOT / name).write_text(document, encoding="utf-8")


if __name__ == "__main__":
    main()
