"""Checks of names and files before the library is imported, which takes seconds: a misspelt path is refused at once.

The files are checked by the library's own modules, those that need only the standard library; they are loaded without
their package, whose import brings torch. The library repeats all checks, so these need not be complete. Does not cover
models on the Hub.
"""

import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

EXPERT_NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")


def check_data(
    data: Iterable[Sequence[str | Path]],
    text_column: str | None = None,
    text_template: str | None = None,
    skip_empty: bool = False,
) -> None:
    """Checks that files exist and begin as their names say, and that tables have the columns.

    Args:
        data: lists of files, as in `flexmoe.data.Documents`.
        text_column, text_template, skip_empty: as there.

    Raises:
        FileNotFoundError, TypeError, ValueError: as there.
    """
    documents = _light_module("data", "documents")
    read = [
        documents.Documents(files, column=text_column, template=text_template, skip_empty=skip_empty) for files in data
    ]
    documents.check_template_is_used(read)
    for one in read:
        one.check()


def check_training(grafted: str, name: str, out: Path, overwrite: bool) -> None:
    """Checks the expert's name, the model's folder and the output folder.

    Raises:
        FileExistsError, FileNotFoundError, NotADirectoryError, ValueError: one of them cannot be used.
    """
    if not EXPERT_NAME.fullmatch(name):
        raise ValueError(
            f"--name {name!r} is not an expert name: lower-case letters and digits, in parts joined by '-' or '_', "
            "beginning with a letter, for example 'math' or 'code-2'."
        )
    _light_module("io", "folders").check_new_folder(out, overwrite)
    folder = Path(grafted).expanduser()
    if not folder.exists() and (grafted.startswith((".", "/", "~")) or grafted.count("/") > 1):
        raise FileNotFoundError(f"{grafted}: no such folder. Give a model that `flexmoe graft` wrote, or a Hub id.")
    if (folder / "config.json").is_file() and name in (taken := _expert_names(folder / "config.json")):
        raise ValueError(f"The name {name!r} is taken: {folder} has {', '.join(taken)}. Choose another.")


def _expert_names(config: Path) -> list[str]:
    """The names of the experts; of a configuration that cannot be read, none: the library says why."""
    try:
        experts = json.loads(config.read_bytes()).get("experts") or []
        return [expert if isinstance(expert, str) else expert["name"] for expert in experts]
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return []


def _light_module(part: str, module: str) -> Any:
    """The module `flexmoe.<part>.<module>`, without importing `flexmoe` and `flexmoe.<part>`."""
    package = f"flexmoe_cli._{part}"
    if package not in sys.modules:
        spec = importlib.util.find_spec("flexmoe")
        assert spec is not None
        stub = ModuleType(package)
        stub.__path__ = [os.path.join(folder, part) for folder in spec.submodule_search_locations or ()]
        sys.modules[package] = stub
    return importlib.import_module(f"{package}.{module}")
