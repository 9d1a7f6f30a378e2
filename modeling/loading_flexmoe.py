"""Whether a checkpoint held everybody whom its config names, and nobody else, whole and in the right shapes.

transformers fills what it misses with random numbers and drops what it does not know, with a line in its log: for a
model of named owners both are errors. Does not cover reading the files, which is transformers' own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_EXPERT_TENSOR = re.compile(r"\.(?:experts|router)\.(?P<name>[a-z][a-z0-9_-]*)\.")


def check_everyone_is_there(names: Sequence[str], info: Mapping[str, Any], ignore_mismatched_sizes: bool) -> None:
    """Checks what transformers says of a checkpoint that it loaded into a model of the experts `names`.

    Args:
        names: the experts that the config names.
        info: the loading info: `missing_keys`, `unexpected_keys`, `mismatched_keys` (name, shape there, shape here).
        ignore_mismatched_sizes: accept other shapes, outside of experts and their rows.

    Raises:
        ValueError: config and tensors disagree about who is there, or a tensor of an expert has another shape.
        RuntimeError: another tensor has another shape, and `ignore_mismatched_sizes` is False.
    """
    without = _owners(info["missing_keys"]) & set(names)
    strangers = _owners(info["unexpected_keys"]) - set(names)
    if without:
        example = sorted(key for key in info["missing_keys"] if _owners([key]) & without)[0]
        raise ValueError(
            f"The checkpoint lacks tensors of the expert(s) {sorted(without)}, which its config names: for example "
            f"{example!r}. It is incomplete, or its config.json belongs to another model."
        )
    if strangers:
        raise ValueError(
            f"The checkpoint holds tensors of {sorted(strangers)}, which its config does not name: it names "
            f"{list(names)}. Its config.json belongs to another model, or was edited: remove experts with "
            "`flexmoe remove`."
        )
    _check_shapes(sorted(info["mismatched_keys"]), ignore_mismatched_sizes)


def _check_shapes(mismatched: Sequence[tuple[str, Sequence[int], Sequence[int]]], ignore: bool) -> None:
    of_experts = [entry for entry in mismatched if _owners([entry[0]])]
    if of_experts:
        raise ValueError(
            f"The checkpoint's {_shapes(of_experts)}. An expert is loaded whole or not at all, also with "
            "ignore_mismatched_sizes: its config.json belongs to another model."
        )
    if mismatched and not ignore:
        raise RuntimeError(
            f"The checkpoint's {_shapes(mismatched)}. Its config.json belongs to another model; "
            "ignore_mismatched_sizes=True starts these tensors at random."
        )


def _shapes(mismatched: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> str:
    name, theirs, ours = mismatched[0]
    more = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
    return f"{name!r} has shape {list(theirs)}, the config says {list(ours)}{more}"


def _owners(keys: Iterable[str]) -> set[str]:
    return {match["name"] for key in keys if (match := _EXPERT_TENSOR.search(key))}


__all__ = ["check_everyone_is_there"]
