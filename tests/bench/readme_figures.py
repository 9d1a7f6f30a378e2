"""The figures of the README, written from the results that `make results` and `make bench` leave in `docs/`.

Run as a script it puts them between the README's markers; the test-suite asserts that they are there unchanged.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def figures(docs: Path) -> dict[str, str]:
    """Marker -> Markdown, ending in a line end."""
    return {
        "results": _results(json.loads((docs / "results.json").read_text())),
        "benchmarks": _benchmarks(docs / "benchmarks"),
    }


def _results(result: dict[str, Any]) -> str:
    domains, owners, systems = result["domains"], result["owners"], result["systems"]
    names = ["anchor", *(f"two-expert-{owner}" for owner in owners), "soup", "composed", "true-domain", "opted-out"]
    lines = [f"| system | {' | '.join(domains)} | mean |", f"|---|{'---:|' * (len(domains) + 1)}"]
    for name in names:
        cells = [f"{systems[name]['loss'][domain]:.3f}" for domain in domains]
        bold = "**" if name == "composed" else ""
        lines.append(f"| {bold}{name}{bold} | {' | '.join(cells)} | {systems[name]['mean']:.3f} |")
    kept = ", ".join(f"{owner} {result['kept'][owner]:.0%}" for owner in owners)
    public = sum(result["public_change"]) / len(result["public_change"])
    paper = result["trained"]["paper's recipe"]["composed"]
    exact = sum(verdict["state_dict_equal"] and verdict["logits_equal"] for verdict in result["opt_out"])
    above = systems["composed"]["mean"] / systems["true-domain"]["mean"] - 1
    lines += [
        "",
        f"Of what its expert gains alone, each owner keeps: {kept}. Loss on public text changes by {public:+.1%}. The "
        f"composed model is {above:.1%} above the ceiling `true-domain`, where an oracle sends each text to its owner's "
        f"own two-expert model; the paper's recipe, trained with the same tokens, reaches a mean of "
        f"{sum(paper.values()) / len(paper):.3f}. `opted-out` is the composed model after {result['opt_out'][0]['owner']} "
        f"left, equal to one that never met it in {exact} of {len(result['opt_out'])} runs.",
    ]
    return "\n".join(lines) + "\n"


def _benchmarks(folder: Path) -> str:
    graft, training = (json.loads((folder / name).read_text()) for name in ("graft.json", "training.json"))
    return (
        "\n".join(
            [
                "| | measured | bar |",
                "|---|---:|---:|",
                f"| graft of {graft['parameters'] / 1e9:.1f} B parameters in bf16, fingerprint included: speed of `cp -r` | "
                f"{graft['speed_over_copy']:.2f}x | ≥ {graft['speed_floor']}x |",
                f"| its peak private memory | {graft['peak_private_bytes'] / 1e9:.2f} GB | "
                f"< {graft['private_bytes_limit'] / 1e9:.0f} GB |",
                "| a training step, against computing every gradient and zeroing half | "
                f"{training['step_time_ratio']:.2f}x | ≤ {training['bars']['step_time_ratio']}x |",
                "| its gradient and optimiser bytes | "
                f"{training['gradient_and_optimiser_bytes_ratio']:.2f}x | "
                f"≤ {training['bars']['gradient_and_optimiser_bytes_ratio']}x |",
            ]
        )
        + "\n"
    )


def put(readme: str, marker: str, text: str) -> str:
    """`readme` with `text` between the marker's two lines."""
    pattern = rf"(<!-- {marker}: begin[^>]*-->\n).*?(<!-- {marker}: end -->)"
    return re.sub(pattern, lambda match: match[1] + text + match[2], readme, flags=re.S)


def main() -> None:
    """Writes the figures into the README."""
    path = ROOT / "README.md"
    readme = path.read_text()
    for marker, text in figures(ROOT / "docs").items():
        readme = put(readme, marker, text)
    path.write_text(readme)


if __name__ == "__main__":
    main()
