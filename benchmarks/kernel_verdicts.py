"""Whether the rows of `bench_kernels.py` meet their thresholds, and where "auto" may use the kernels.

Ratios are asserted on compute capability 9.0, microseconds on an H200.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kernel_cases import BEST, LOOP, Case

RATIOS_ON, GOALS_ON = (9, 0), "H200"
AT_LEAST = 0.95  # times the speed of modules: minimum for "auto" to use the kernels


def with_verdict(row: Mapping[str, Any], case: Case, device: str, capability: Sequence[int]) -> dict[str, Any]:
    """The row with its thresholds, whether each is met, and whether it is asserted on this device.

    `passed` is None if nothing is asserted.
    """
    others = row["others"]
    best = [others[name]["ratio"] for name in ("grouped_mm", LOOP) if name in others]
    ratios = {name: other["ratio"] for name, other in others.items()} | ({BEST: min(best)} if len(best) == 2 else {})
    thresholds = [
        {
            "speed_over": name,
            "threshold": threshold,
            "measured": ratios.get(name),
            "met": ratios.get(name, 0.0) >= threshold,
            "asserted": tuple(capability) == RATIOS_ON,
        }
        for name, threshold in case.ratios.items()
    ]
    if case.goal_us is not None:
        thresholds.append(
            {
                "microseconds_at_most": case.goal_us,
                "measured": row["microseconds"],
                "met": row["microseconds"] <= case.goal_us,
                "asserted": GOALS_ON in device and not case.stretch,
            }
        )
    asserted = [threshold["met"] for threshold in thresholds if threshold["asserted"]]
    return {**row, "thresholds": thresholds, "passed": all(asserted) if asserted else None}


def missed(result: Mapping[str, Any]) -> list[str]:
    """The asserted requirements that are not met."""
    wrong = [f"wrong with {tokens} tokens" for tokens, errors in result["correctness"].items() if not errors["passed"]]
    return wrong + [row["case"] for row in result["rows"] if row["passed"] is False] + list(result["failed"])


def ranges(sweep: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, tuple[int, int] | None]:
    """By dtype: the longest range of token counts in which kernels are at least `AT_LEAST` as fast as modules."""
    found: dict[str, tuple[int, int] | None] = {}
    for dtype, counts in sweep.items():
        best: list[int] = []
        current: list[int] = []
        for tokens, figures in counts.items():
            current = [*current, int(tokens)] if figures["ratio"] >= AT_LEAST else []
            best = max(best, current, key=len)
        found[dtype] = (best[0], best[-1]) if best else None
    return found


def entry(found: Mapping[str, tuple[int, int] | None], capability: Sequence[int]) -> str:
    """The line for `MEASURED` in flexmoe/kernels/dispatch.py."""
    dtypes = ", ".join(f"{dtype}: {bounds}" for dtype, bounds in found.items() if bounds is not None)
    return f"({capability[0]}, {capability[1]}): {{{dtypes}}},"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per case."""
    lines = [f"{'case':20} {'us':>9} {'floor':>9} {'share':>6} {'goal':>8}  thresholds"]
    for row in rows:
        thresholds = row["thresholds"]
        goal = next((t["microseconds_at_most"] for t in thresholds if "microseconds_at_most" in t), None)
        texts = [
            f"{t['speed_over']} {t['measured'] or 0:.2f}x >= {t['threshold']}{'' if t['met'] else ' MISSED'}"
            for t in thresholds
            if "speed_over" in t
        ]
        is_late = any(not t["met"] for t in thresholds if "microseconds_at_most" in t)
        lines.append(
            f"{row['case']:20} {row['microseconds']:9.1f} {row['floor_us']:9.1f} {row['share_of_floor']:6.0%} "
            f"{'' if goal is None else f'{goal:.0f}':>7}{'!' if is_late else ' '}  {'; '.join(texts)}"
        )
    return "\n".join(lines)


__all__ = ["AT_LEAST", "GOALS_ON", "RATIOS_ON", "entry", "missed", "ranges", "table", "with_verdict"]
