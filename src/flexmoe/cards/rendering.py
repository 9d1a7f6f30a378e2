"""Renders model cards: facts, scores and routing statistics, with the Jinja templates in `flexmoe.model_cards`.

Front matter is written by `ModelCardData` as YAML; every other untrusted value goes through a filter of
`flexmoe.cards.markdown`.

Does not cover where facts come from (`flexmoe.cards.facts`), which licences are compatible (`flexmoe.cards.licenses`),
or files (`flexmoe.card_files`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

from huggingface_hub.repocard_data import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flexmoe import model_cards
from flexmoe.cards.licenses import license_conflicts, license_fields, most_restrictive
from flexmoe.cards.markdown import code, one_line, plain_line, quote, table_cell

ANCHOR = "the anchor"
"""The anchor's name among the parts whose licences are compared."""

MIXED = "those-of-its-parts"
"""Name of the licence of a model without a given one, if the licences of its parts determine none."""

_TEMPLATES = {"expert": "expert.md.jinja", "composition": "composition.md.jinja", "model": "model.md.jinja"}
_METRICS = {"loss": "Loss per token (nats)", "perplexity": "Perplexity per token"}
_MAX_SETTINGS = 60


def render(
    kind: str,
    facts: Mapping[str, Any],
    *,
    evaluation: Mapping[str, Mapping[str, Any]] | None = None,
    routing: Mapping[str, Mapping[str, Any]] | None = None,
    license: str | None = None,
    name: str | None = None,
) -> str:
    """The text of a model card.

    Args:
        kind: "expert", "composition" or "model".
        facts: as made by `flexmoe.cards.facts` for that kind.
        evaluation: `loss`, `perplexity`, `tokens` and `documents` by domain; they also become the `model-index` of
            the front matter, which the Hub shows.
        routing: `tokens` and the experts' `share` of the routing weight and `chosen_share`, by name of the text.
        license: of the composition or model, where it is known; by default `combined_license`.
        name: of the model in the `model-index`.

    Raises:
        ValueError: there is no such kind of card.
    """
    if kind not in _TEMPLATES:
        raise ValueError(f"There is no card of a {kind!r}; there are those of {', '.join(_TEMPLATES)}.")
    scores = {plain_line(domain): score for domain, score in (evaluation or {}).items()}
    shown, conflicts = facts.get("license"), []
    if kind != "expert":
        shown, conflicts = license or combined_license(facts), conflicts_of(facts, license)
    title = plain_line(name or facts.get("name") or "flexmoe")
    values = {
        **facts,
        "front_matter": _front_matter(facts["metadata"], shown, title, scores),
        "kind_of_expert": facts.get("kind"),
        "model_license": shown,
        "license_given": license is not None,
        "conflicts": conflicts,
        "scores": scores,
        "routing": routing or {},
    }
    return _environment().get_template(_TEMPLATES[kind]).render(values).rstrip() + "\n"


def conflicts_of(facts: Mapping[str, Any], license: str | None = None) -> list[str]:
    """The licence conflicts in a composition or model, as sentences (`license_conflicts`).

    An anchor whose licence is not recorded is left out; the card mentions that.

    Args:
        license: of the model.
    """
    return license_conflicts(_licenses_of_parts(facts), license)


def combined_license(facts: Mapping[str, Any]) -> str | None:
    """The licence that a composition or model could have, if the licences of its anchor and experts determine one."""
    parts = _licenses_of_parts(facts)
    found = most_restrictive(list(parts.values())) if ANCHOR in parts else None
    return found if found and not license_conflicts(parts, found) else None


def _licenses_of_parts(facts: Mapping[str, Any]) -> dict[str, str | None]:
    anchor = {ANCHOR: facts["anchor"]["license"]} if facts["anchor"]["license"] else {}
    return anchor | {expert["name"]: expert["license"] for expert in facts["experts"]}


def _front_matter(
    metadata: Mapping[str, Any], license: str | None, name: str, scores: Mapping[str, Mapping[str, Any]]
) -> str:
    fields = dict(metadata)
    if license or "flexmoe-expert" not in metadata["tags"]:
        fields |= license_fields(license or MIXED)
    results = [result for domain, score in scores.items() for result in _results(domain, score)]
    if results:
        fields |= {"model_name": name, "eval_results": results}
    return ModelCardData(**fields).to_yaml()


def _results(domain: str, score: Mapping[str, Any]) -> list[EvalResult]:
    """A domain's entries in the model-index. The dataset type "text" is that of local text files in `datasets`."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=domain,
            dataset_config=domain,
            dataset_args={key: score[key] for key in ("tokens", "documents") if key in score},
            metric_type=metric,
            metric_name=title,
            metric_value=round(float(score[metric]), 4),
        )
        for metric, title in _METRICS.items()
        if _is_number(score.get(metric))
    ]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(str(model_cards.__file__)).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML: the filters escape
    )
    filters: dict[str, Callable[..., Any]] = {
        "cell": table_cell,
        "code": code,
        "number": _number,
        "percent": _percent,
        "quote": quote,
        "sentence": one_line,
        "settings": _settings,
        "span": _span,
    }
    environment.filters |= filters
    return environment


def _number(value: Any, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if _is_number(value) else ""


def _percent(value: Any) -> str:
    return f"{value:.1%}" if _is_number(value) else ""


def _span(values: Any) -> str:
    """`8`, or `8 to 16` for a list."""
    numbers = values if isinstance(values, Sequence) else [values]
    least, greatest = min(numbers), max(numbers)
    return str(least) if least == greatest else f"{least} to {greatest}"


def _settings(values: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The settings of a training as (name, value), nested ones with dotted names."""
    found: list[tuple[str, str]] = []
    waiting: list[tuple[str, Any]] = list((values or {}).items())
    while waiting and len(found) < _MAX_SETTINGS:
        key, value = waiting.pop(0)
        if isinstance(value, Mapping):
            waiting = [(f"{key}.{inner}", held) for inner, held in value.items()] + waiting
        elif value is not None:
            found.append((key, str(value)))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


__all__ = ["ANCHOR", "MIXED", "combined_license", "conflicts_of", "render"]
