"""Code that the JSON files of a model name: what FlexMoE writes names FlexMoE's own code, or none.

With `trust_remote_code=True`, the Auto classes and pipelines run the code that `auto_map` and `custom_pipelines` name,
also of another repository. A Hub id as the implementation of attention or experts names a kernel, which is code, too.

Does not cover Python files (`flexmoe.hub.contents` lists those that are FlexMoE's), or reading a config
(`flexmoe.modeling.configuration_flexmoe`).
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexmoe.io.strict_json import json_text, read_json_object
from flexmoe.modeling.configuration_flexmoe import AUTO_MAP

MAY_NAME_CODE = frozenset({"config.json", "generation_config.json", "tokenizer_config.json"})
"""The files of a model that transformers reads such names from."""

_CODE = frozenset({"auto_map", "custom_pipelines"})
_KERNELS = frozenset(f"{start}{part}_implementation" for start in ("", "_") for part in ("attn", "experts"))


def foreign_code(values: Any) -> list[str]:
    """The entries of a JSON file that name code, except FlexMoE's own, each as "key: what it names"."""
    return [f"{key}: {value}" for key, value, _, _ in _entries(values)]


def without_foreign_code(values: Any) -> Any:
    """`values` without the entries that `foreign_code` lists; changed in place, and returned."""
    for _, _, holder, key in list(_entries(values)):
        holder.pop(key, None)
        if holder is values.get("auto_map") and not holder:
            del values["auto_map"]
    return values


def copy_companion(source: Path, target: Path) -> None:
    """Copies a file of a model, without the code that it names; warns of what is left out.

    Raises:
        ValueError: the file may name code, and is not a JSON object.
    """
    if source.name not in MAY_NAME_CODE or not (named := foreign_code(values := read_json_object(source))):
        shutil.copyfile(source, target)
        return
    warnings.warn(f"{source} names code of a repository, which is left out: {'; '.join(named)}.", stacklevel=5)
    target.write_text(json_text(without_foreign_code(values)), encoding="utf-8")


def _entries(values: Any) -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """(key, what it names, the object that holds it, its key there) of each entry that names code."""
    pending = [(values, True)]
    while pending:
        value, is_top = pending.pop()
        if isinstance(value, list):
            pending += [(item, False) for item in value]
        if not isinstance(value, dict):
            continue
        for key, item in value.items():
            if key == "auto_map" and is_top and isinstance(item, dict):
                for name, reference in item.items():
                    if AUTO_MAP.get(name) != reference:
                        yield f"auto_map {name}", _text(reference), item, name
            elif (key in _CODE and item) or (key in _KERNELS and "/" in _text(item)):
                yield key, _text(item), value, key
            else:
                pending.append((item, False))


def _text(value: Any) -> str:
    return str(value)[:200]


__all__ = ["MAY_NAME_CODE", "copy_companion", "foreign_code", "without_foreign_code"]
