"""Strict JSON from untrusted files: bounded in size, depth and digits, no repeated keys, no NaN.

Does not cover which keys a file may have: each format checks its own.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from flexmoe.io.folders import read_regular_file
from flexmoe.io.lfs import refuse_pointer

MAX_JSON_BYTES = 32 << 20  # the largest open checkpoints need 1 MiB
# Commas and opening brackets, eight for a tensor: an empty list of 3 bytes takes 64 bytes in memory.
MAX_JSON_PARTS = 1_000_000
MAX_JSON_DEPTH = 32
"""Objects and lists within each other; configs of models have up to 8. `copy.deepcopy` and `json.dumps` reach some 300
to 500, so what is read can be copied and written again, also as a part of another file."""
_MAX_DIGITS = 100  # of an integer: tokenizers write "no limit" as one of 31
_MAX_KEY_SHOWN = 200  # characters of a key in an error message


def parse_json_object(data: bytes, where: str, *, max_depth: int = MAX_JSON_DEPTH) -> dict[str, Any]:
    """Parses `data` (UTF-8 JSON) into a dictionary; `where` names the file in error messages.

    Args:
        max_depth: of objects and lists within each other, the outermost included.

    Raises:
        ValueError: not UTF-8, not JSON (a Git LFS pointer is named as such), not an object, more than `MAX_JSON_PARTS`
            parts, a duplicate key, NaN or an infinity, an integer of more than 100 digits, nested deeper than
            `max_depth`, or text that UTF-8 cannot encode (lone surrogates).
    """
    refuse_pointer(data, where)
    if (parts := sum(map(data.count, (b",", b"[", b"{")))) > MAX_JSON_PARTS:
        raise ValueError(f"{where}: JSON of about {parts:,} parts; at most {MAX_JSON_PARTS:,} are read.")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_int=_parse_integer,
        )
        check_depth(value, max_depth)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")  # also finds 1e999, which parses to inf
    except (RecursionError, JsonDepthError):
        raise ValueError(f"{where}: the JSON is nested too deep: at most {max_depth} levels are read.") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(value).__name__}.")
    return value


def read_json_object(path: str | Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads the JSON object in the regular file `path`, of at most `max_bytes`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a regular file, too large, or not strict JSON (see `parse_json_object`).
    """
    return parse_json_object(read_regular_file(path, max_bytes=max_bytes), str(path))


class JsonDepthError(ValueError):
    """Objects and lists are nested too deep."""


def check_depth(value: Any, max_depth: int = MAX_JSON_DEPTH) -> None:
    """Raises JsonDepthError if objects and lists in `value` are nested deeper than `max_depth`."""
    level = [value] if isinstance(value, dict | list | tuple) else []
    for _ in range(max_depth):
        held = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in held if isinstance(child, dict | list | tuple)]
        if not level:
            return
    raise JsonDepthError(f"nested deeper than {max_depth} levels")


def json_text(value: dict[str, Any]) -> str:
    """The text of a JSON file as FlexMoE writes it: indented by two spaces, in key order, with a final newline.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        duplicate, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {duplicate[:_MAX_KEY_SHOWN]!r} is given twice")
    return result


def _parse_integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text):,} digits; at most {_MAX_DIGITS} are read")
    return int(text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


__all__ = [
    "MAX_JSON_BYTES",
    "MAX_JSON_DEPTH",
    "JsonDepthError",
    "check_depth",
    "json_text",
    "parse_json_object",
    "read_json_object",
]
