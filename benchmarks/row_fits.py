"""Router rows of a whole anchor: the time to fit them, against another checkout, on the same states.

    python benchmarks/row_fits.py --other CHECKOUT --anchor GRAFTED --own TEXT --public TEXT [--tokens 40000]

`flexmoe train` reads the states of a group of layers (`collect_states`), then fits the row of each layer. Here both
checkouts fit the row of a layer one after the other, so that other load affects both. The bars: the fits are three
times as fast, and the rows' logits are equal to four decimals of the largest. The results are written to
docs/benchmarks/row_fits.json after each layer; layers in that file are not repeated.

Does not cover reading the states, which is one forward pass of the anchor in both (its seconds are reported).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from checkouts import commit_of
from machine import machine

from flexmoe.data import pack
from flexmoe.demo.corpus import read_texts
from flexmoe.demo.scoring import load
from flexmoe.routers import rows
from flexmoe.routers.hidden_states import STATES_BYTES, collect_states
from flexmoe.tokenization import load_tokenizer

RESULT = Path(__file__).parents[1] / "docs" / "benchmarks" / "row_fits.json"
SEQUENCE = 256
FASTER, DECIMALS = 3.0, 4


def rows_of(checkout: Path) -> ModuleType:
    """The module `flexmoe.routers.rows` of another checkout; it imports torch only."""
    spec = importlib.util.spec_from_file_location("other_rows", checkout / "src/flexmoe/routers/rows.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def fit(
    module: ModuleType, own_TH: torch.Tensor, public_TH: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, float]:
    """The row [H] and the seconds."""
    start = time.perf_counter()
    options |= {"hidden_size": own_TH.shape[1], "bias": False, "generator": torch.Generator()}
    row = module.log_odds(own_TH, public_TH, **options)
    return row.weight, time.perf_counter() - start


def compare(
    layer: int, other: ModuleType, states: tuple[torch.Tensor, torch.Tensor], start: rows.Logits | None
) -> tuple[dict[str, Any], rows.Logits]:
    """Fits the layer's row with both modules, in alternating order; this checkout's starts from the logits of the
    layer before, as in training. Also returns its own logits."""
    own_TH, public_TH = states
    options: dict[str, Any] = {rows.__name__: {"start": start}, other.__name__: {}}
    order = (rows, other) if layer % 2 else (other, rows)
    found = {module.__name__: fit(module, own_TH, public_TH, **options[module.__name__]) for module in order}
    ours, theirs = found[rows.__name__], found[other.__name__]
    states_TH = torch.cat([own_TH[::8], public_TH[::8]])
    logits_T, expected_T = states_TH @ ours[0], states_TH @ theirs[0]
    difference = ((logits_T - expected_T).abs().max() / expected_T.abs().max()).item()
    record = {"layer": layer, "seconds": ours[1], "other_seconds": theirs[1], "difference": difference}
    return record, (own_TH @ ours[0], public_TH @ ours[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--anchor", type=Path, required=True)
    parser.add_argument("--own", type=Path, required=True)
    parser.add_argument("--public", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()

    model, tokenizer, other = load(arguments.anchor), load_tokenizer(arguments.anchor), rows_of(arguments.other)
    config = model.config.get_text_config()
    sequences = -(-arguments.tokens // SEQUENCE)
    sides = [
        pack(read_texts(file), tokenizer, SEQUENCE, vocab_size=config.vocab_size)[:sequences]
        for file in (arguments.own, arguments.public)
    ]
    shortest = min(side.numel() for side in sides)
    assert shortest >= arguments.tokens, f"{shortest:,} tokens on a side, {arguments.tokens:,} wanted"
    result = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {"layers": []}
    done = {record["layer"] for record in result["layers"]}
    left = torch.tensor([layer for layer in range(config.num_hidden_layers) if layer not in done])
    start: rows.Logits | None = None
    per_layer = 2 * arguments.tokens * config.hidden_size * model.dtype.itemsize
    for group in left.split(max(1, STATES_BYTES // per_layer)) if len(left) else ():
        began = time.perf_counter()
        own, public = (collect_states(model, side, group.tolist(), arguments.tokens) for side in sides)
        reading = time.perf_counter() - began
        for layer in group.tolist():
            record, start = compare(layer, other, (own.pop(layer), public.pop(layer)), start)
            result["layers"].append(record | {"group_reading_seconds": round(reading, 1)})
            sys.stderr.write(f"{record}\n")
            arguments.out.write_text(json.dumps(result | machine(), indent=2) + "\n", encoding="utf-8")
    layers = result["layers"]
    totals = {name: sum(record[name] for record in layers) for name in ("seconds", "other_seconds")}
    summary = {
        "tokens_per_side": arguments.tokens,
        "other": commit_of(arguments.other),
        "faster": round(totals["other_seconds"] / totals["seconds"], 2),
        "median_faster": round(statistics.median(r["other_seconds"] / r["seconds"] for r in layers), 2),
        "largest_difference": max(record["difference"] for record in layers),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    arguments.out.write_text(
        json.dumps({**result, **machine(), **totals, **summary}, indent=2) + "\n", encoding="utf-8"
    )
    sys.stderr.write(f"{totals | summary}\n")
    return 0 if summary["faster"] >= FASTER and summary["largest_difference"] < 10**-DECIMALS else 1


if __name__ == "__main__":
    sys.exit(main())
