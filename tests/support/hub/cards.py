"""Validation of cards: the YAML front matter of a README.md.

The rules are those that the Hub documents (hf.co/docs/hub/model-cards, /repositories-licenses, and modelcard.md of
huggingface/hub-docs) or was observed to apply, with its messages. Keys without a rule are accepted, as by the Hub.
Does not cover keys of Spaces, whether a model or dataset exists, or the Hub's list of pipeline tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

BLOCK = re.compile(r"^\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")

# As the Hub listed them in May 2026, in huggingface/huggingface_hub#4218.
LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma
    unknown other
"""

REPOSITORY_ID = r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?"
LANGUAGE = r"[a-z]{2,3}|code|multilingual"


@dataclass(frozen=True)
class OneOf:
    """A string of a list."""

    choices: tuple[str, ...]


@dataclass(frozen=True)
class Like:
    """A string that matches a pattern, and advice if it does not."""

    pattern: str
    advice: str


@dataclass(frozen=True)
class OneOrMore:
    """A value of this rule, or a list of such values."""

    rule: Any


@dataclass
class Verdict:
    """A card with errors is refused; warnings are reported."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


# A rule is a type, one of the classes above, [a rule for each item], or {key: rule}; "!" marks a required key.
EVALUATION = {
    "task!": {"type!": str, "name": str},
    "dataset!": {"type!": str, "name!": str, "config": str, "split": str, "revision": str},
    "metrics!": [{"type!": str, "value!": object, "name": str, "config": str, "verified": bool}],
}
DATASETS = OneOrMore(Like(REPOSITORY_ID, "If possible, use a dataset id from https://hf.co/datasets."))
EVERY_CARD = {
    "license": OneOrMore(OneOf(tuple(LICENSES.split()))),
    "license_name": str,
    "license_link": str,
    "language": OneOrMore(Like(LANGUAGE, "It must be an ISO 639-1, 639-2 or 639-3 code (two/three letters).")),
    "tags": [str],
}
MODEL_CARD = {
    **EVERY_CARD,
    "base_model": OneOrMore(Like(REPOSITORY_ID, "Use a model id from https://hf.co/models.")),
    "base_model_relation": OneOf(("finetune", "adapter", "quantized", "merge")),
    "datasets": DATASETS,
    "library_name": str,
    "pipeline_tag": str,
    "metrics": [str],
    "model-index": [{"name!": str, "results!": [EVALUATION]}],
}


def check(content: str, repo_type: str) -> Verdict:
    """The result of POST /api/validate-yaml for a README.md in a "model", "dataset" or "space"."""
    block = BLOCK.match(content)
    if block is None:
        return Verdict(warnings=["empty or missing yaml metadata in repo card"])
    try:
        read = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return Verdict([f"Invalid YAML in README.md: {error}"])
    if isinstance(read, list):
        return Verdict(['"value" must be of type object'])
    if not isinstance(read, dict):
        return Verdict(["The YAML metadata of your README.md is invalid."])
    verdict = Verdict(list(_problems(read, MODEL_CARD if repo_type == "model" else EVERY_CARD, "")))
    if read.get("license") == "other" and "license_name" not in read:
        verdict.warnings.append('"license" is other: please set a name for it in "license_name"')
    return verdict


def metadata(content: str) -> dict[str, Any]:
    """The front matter of a valid card; empty without one."""
    block = BLOCK.match(content)
    return (yaml.safe_load(block[1]) or {}) if block else {}


def _problems(value: Any, rule: Any, where: str) -> Iterator[str]:
    """The errors of the value at `where`, with the Hub's messages."""
    if isinstance(rule, OneOrMore):
        yield from _problems(value, [rule.rule] if isinstance(value, list) else rule.rule, where)
    elif isinstance(rule, OneOf):
        if value not in rule.choices:
            yield f'"{where}" must be one of [{", ".join(rule.choices)}]'
    elif isinstance(rule, Like):
        if not isinstance(value, str) or not re.fullmatch(rule.pattern, value):
            yield f'"{where}" with value "{value}" is not valid. {rule.advice}'
    elif isinstance(rule, list):
        yield from _problems_of_items(value, rule[0], where)
    elif isinstance(rule, dict):
        yield from _problems_of_keys(value, rule, where)
    elif not isinstance(value, rule):
        yield f'"{where}" must be a {"boolean" if rule is bool else "string"}'


def _problems_of_items(value: Any, rule: Any, where: str) -> Iterator[str]:
    if not isinstance(value, list):
        yield f'"{where}" must be an array'
        return
    for index, item in enumerate(value):
        yield from _problems(item, rule, f"{where}[{index}]")


def _problems_of_keys(value: Any, rules: dict[str, Any], where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f'"{where}" must be of type object'
        return
    for name, rule in rules.items():
        key = name.rstrip("!")
        path = f"{where}.{key}" if where else key
        if key in value:
            yield from _problems(value[key], rule, path)
        elif name.endswith("!"):
            yield f'"{path}" is required'
