"""The JSON schema of an expert package's manifest, `expert_config.json`, format version 1, and its validation.

`docs/expert-package.schema.json` is the same schema for other programs. Does not cover rules that relate several keys,
or reserved names (`flexmoe.packages.manifest`).

Source: https://json-schema.org/draft/2020-12
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from flexmoe.modeling.configuration_flexmoe import MOST_DECAYS

FORMAT_VERSION = 1
KINDS = ("full", "low_rank")

_END = r"$(?!\n)"  # Python's `$` also matches before a final newline
_DIGEST = {"type": "string", "pattern": f"^[0-9a-f]{{64}}{_END}"}
_SIZE = {"type": "integer", "minimum": 1, "maximum": (1 << 31) - 1}
_TOKENS = {**_SIZE, "maximum": 1 << 24}  # far above any vocabulary or context
_LAYERS = 10_000  # far above any model; bounds the cost of a list in an untrusted file
_HIDDEN = {**_SIZE, "maximum": 1 << 20}  # far above any model; bounds the router rows, which are read before all else


def _sizes(*types: str) -> dict[str, Any]:
    return {"type": ["array", *types], "maxItems": _LAYERS, "minItems": 1, "items": _SIZE}


SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$id": f"urn:flexmoe:expert-package:{FORMAT_VERSION}",
    "title": "Manifest of a FlexMoE expert package",
    "type": "object",
    # in this order: of several errors, an unknown key is reported first
    "additionalProperties": False,
    "required": ["format_version", "name", "version", "kind", "layers", "ffn", "dtype", "anchor", "sha256"],
    "properties": {
        "format_version": {"description": f"{FORMAT_VERSION}", "const": FORMAT_VERSION},
        "name": {"description": "text", "type": "string"},
        "version": {"description": "text, 1 to 64 characters", "type": "string", "minLength": 1, "maxLength": 64},
        "kind": {"description": f"one of {', '.join(KINDS)}", "enum": list(KINDS)},
        "rank": {"description": "a list of positive integers, one per layer", **_sizes("null")},
        "alpha": {
            "description": "a finite number, at most a million in size",
            "type": ["number", "null"],
            "minimum": -1e6,
            "maximum": 1e6,
        },
        "evidence": {
            "description": "an object with tokens and window (positive integers, at most 16,777,216), decays (1 to "
            f"{MOST_DECAYS} numbers between 0 and 1), and numbers or text on how its table was made",
            "type": ["object", "null"],
            "required": ["tokens", "decays", "window"],
            "maxProperties": 32,
            "propertyNames": {"maxLength": 64},
            "properties": {
                "tokens": _TOKENS,
                "window": _TOKENS,
                "decays": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": MOST_DECAYS,
                    "items": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                },
            },
            "additionalProperties": {"type": ["number", "string", "null"], "maxLength": 200},
        },
        "layers": {
            "description": "an ascending list of layer numbers, at least one",
            "type": "array",
            "maxItems": _LAYERS,
            "minItems": 1,
            "items": {"type": "integer", "minimum": 0, "maximum": 999_999},
        },
        "ffn": {
            "description": "an object with class (text), hidden and intermediate (positive integers, or a list of "
            "them; hidden at most 1,048,576)",
            "type": "object",
            "additionalProperties": False,
            "required": ["class", "hidden", "intermediate"],
            "properties": {
                "class": {"type": "string", "maxLength": 200},
                "hidden": _HIDDEN,
                "intermediate": {"anyOf": [_SIZE, _sizes()]},
            },
        },
        "dtype": {"description": "text such as 'bfloat16', or 'mixed'", "type": "string", "maxLength": 64},
        "anchor": {
            "description": "an object with model_type (text), repo and revision (text or null) and fingerprint "
            "(SHA-256 hex, or null)",
            "type": "object",
            "additionalProperties": False,
            "required": ["repo", "revision", "fingerprint", "model_type"],
            "properties": {
                "repo": {"type": ["string", "null"], "maxLength": 1000},
                "revision": {"type": ["string", "null"], "maxLength": 1000},
                "fingerprint": {"anyOf": [_DIGEST, {"type": "null"}]},
                "model_type": {"type": "string", "maxLength": 200},
            },
        },
        "training": {"description": "an object", "type": ["object", "null"]},
        "license": {
            "description": "text of at most 1,000 characters, the name of a licence",
            "type": ["string", "null"],
            "maxLength": 1000,
        },
        "data_statement": {
            "description": "text of at most 10,000 characters",
            "type": ["string", "null"],
            "maxLength": 10_000,
        },
        "sha256": {
            "description": "an object from expert*.safetensors file names to SHA-256 in hex, at least one",
            "type": "object",
            "minProperties": 1,
            "maxProperties": 99_999,
            "propertyNames": {"pattern": rf"^expert(-[0-9]{{5}}-of-[0-9]{{5}})?\.safetensors{_END}"},
            "additionalProperties": _DIGEST,
        },
    },
}
"""The `description` of a key is used in error messages: what it must be."""


def first_error(values: Mapping[str, Any]) -> str | None:
    """The first error in a manifest, as the end of a sentence that begins with its file; None if it is valid.

    Raises:
        ImportError: `jsonschema` is not installed.
    """
    error = next(_validator().iter_errors(values), None)
    if error is None:
        return None
    known = SCHEMA["properties"]
    if not error.absolute_path:
        if unknown := sorted(set(values) - set(known)):
            return f"unknown key {unknown[0][:200]!r}; known are {', '.join(known)}."
        missing = next(key for key in SCHEMA["required"] if key not in values)
        return f"the key {missing!r} is missing."
    key = error.absolute_path[0]
    return f"key {key!r} must be {known[key]['description']}; it is {str(values[key])[:200]!r}."


@lru_cache(maxsize=1)
def _validator() -> Any:
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.validators import extend
    except ImportError as error:
        raise ImportError("Expert packages are validated with jsonschema: pip install jsonschema.") from error

    def is_integer(checker: Any, value: Any) -> bool:
        return type(value) is int  # JSON schema also accepts 1.0, which is not a valid size

    types = Draft202012Validator.TYPE_CHECKER.redefine("integer", is_integer)
    return extend(Draft202012Validator, type_checker=types)(SCHEMA)


__all__ = ["FORMAT_VERSION", "KINDS", "SCHEMA", "first_error"]
