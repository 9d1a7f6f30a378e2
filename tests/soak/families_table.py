"""Every check of every dense family, and `docs/families.md` from what came out.

Run: python tests/soak/families_table.py [--workers N]. Exits with 1 if a family fails, and leaves the table as it was.
"""

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from flexmoe.modeling import build_on_meta  # noqa: E402 - the tests are no package that is installed
from flexmoe.modeling.norms_flexmoe import norm_follows_each_ffn  # noqa: E402
from tests.families import EXCEPTIONS, HINTS, causal_lm_families, tiny_config  # noqa: E402
from tests.family_checks import CHECKS  # noqa: E402
from tests.named_models import markdown  # noqa: E402

TABLE = ROOT / "docs" / "families.md"

HEAD = """# Families

What `AutoModelForCausalLM` of transformers {transformers} knows, and whether it can be an anchor. Written by
`make families`, which grows a tiny random model of every family (its own default configuration with the sizes made
small) and runs each check below on it. `make test` runs the checks that need no files, and fails when a family neither
passes nor stands in the table of exceptions.

| check | what it means |
|---|---|
{checks}

{count} families pass all of them. *Network* is where the feed-forward network of a layer stands, then its class; *norm
after* says whether a norm takes what it returns before the residual is added, in which case the weights of the chosen
experts are not divided by their sum by default (`norm_topk_prob`).

| family | network | class | norm after | `norm_topk_prob` | checks passed |
|---|---|---|---|---|---:|
{rows}

## Models by name

Published models with an architecture of their own, and what of it is special. `make test` builds each in small with
the keys and flags of its published config.json, grafts it from files as the Hub has them, compares the logits bit for
bit, adds an expert, generates, removes it, and exports: to each format in the column with equal logits, to any other
with an error ([export.md](export.md)). The flags were written from memory and from the code of transformers, without a
look at the Hub; the last column says where the memory is weak. A repository that holds pickles only must be converted
first: the error says how.

| model | family | what is special | the same | exports | not certain |
|---|---|---|---|---|---|
{models}

## Exceptions

{exceptions_count} families are no anchors. `make test` asserts that each still fails, and in the way that the reason
says.

| family | why not |
|---|---|
{exceptions}
"""


@dataclass(frozen=True)
class Row:
    """A family, where its networks are, and the checks that failed with what they said."""

    family: str
    network: str
    network_class: str
    norm_follows: bool
    failures: dict[str, str]

    def markdown(self) -> str:
        passed = len(CHECKS) - len(self.failures)
        cells = (
            f"`{self.family}`",
            f"`{self.network}`",
            f"`{self.network_class}`",
            "yes" if self.norm_follows else "no",
            str(not self.norm_follows),
            f"{passed} of {len(CHECKS)}",
        )
        return f"| {' | '.join(cells)} |"


def examine(family: str) -> Row:
    """Runs every check of `family`."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = tiny_config(family)
    dense, sites = build_on_meta(config)
    network = sites[0].ffn(dense)
    name = type(network).__name__ if len(sites[0].attributes) == 1 else " → ".join(sites[0].attributes)
    failures = {}
    for check_name, check in CHECKS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(family, Path(folder))
            except Exception as error:
                failures[check_name] = f"{type(error).__name__}: {error}"
    place = sites[0].block.replace(".0.", ".*.")
    return Row(family, place, name, norm_follows_each_ffn(config), failures)


def table(rows: list[Row]) -> str:
    """`docs/families.md`."""
    exceptions = {family: EXCEPTIONS[family][0] for family in causal_lm_families() if family in EXCEPTIONS}
    return HEAD.format(
        transformers=transformers.__version__,
        checks="\n".join(f"| {name} | {_first_line(check.__doc__)} |" for name, check in CHECKS.items()),
        count=len(rows),
        rows="\n".join(row.markdown() for row in rows),
        models=markdown(),
        exceptions_count=len(exceptions),
        exceptions="\n".join(f"| `{family}` | {why} |" for family, why in exceptions.items()),
    )


def _first_line(docstring: str | None) -> str:
    return (docstring or "").split("\n", 1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=TABLE)
    arguments = parser.parse_args()
    anchors = [family for family in causal_lm_families() if family not in EXCEPTIONS]
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        rows = []
        for row in pool.imap(examine, anchors):
            rows.append(row)
            print(row.family, json.dumps(row.failures) if row.failures else "ok", flush=True)  # noqa: T201
    failed = [row.family for row in rows if row.failures]
    if failed:
        sys.exit(f"{len(failed)} families fail: {', '.join(failed)}")
    arguments.out.write_text(table(rows))
    summary = {
        "families": len(rows),
        "checks": list(CHECKS),
        "exceptions": sum(family in EXCEPTIONS for family in causal_lm_families()),
        "hints": len(HINTS),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "pass": len(rows) >= 66,
    }
    (ROOT / "docs" / "benchmarks" / "families.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{len(rows)} families pass; {arguments.out}")  # noqa: T201


if __name__ == "__main__":
    main()
