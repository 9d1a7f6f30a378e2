"""The cards in full: facts, scores and routing statistics through the Jinja templates beside this file.

What strangers wrote gets into a card as text: front matter goes through `ModelCardData` and a YAML writer, and the
templates' filters take from everything else what Markdown and HTML would make of it (`one_line` says what that is).

Not here: escaping (`flexmoe.modeling.cards_flexmoe`), where facts come from, which licences go together (`licenses`),
files (`flexmoe.cards`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

from huggingface_hub.repocard_data import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flexmoe.model_cards.licenses import LICENSES, hub_identifier, license_conflicts, most_restrictive
from flexmoe.modeling.cards_flexmoe import one_line, other_license, plain_line, shortened, table_cell

ANCHOR = "the anchor"
"""What the anchor is called among the parts whose licences are compared."""

MIXED = "those-of-its-parts"
"""Name of the licence of a whole for which nobody has given one, and which the parts' licences do not tell."""

_TEMPLATES = {"expert": "expert.md.jinja", "composition": "composition.md.jinja", "model": "model.md.jinja"}
_METRICS = {"loss": "Loss per token (nats)", "perplexity": "Perplexity per token"}
_MOST_SETTINGS = 60

_OPENING = re.compile(r"^([0-9]*)([-+=#>.)])")  # what makes a heading, a list or a rule of a line


def render(
    kind: str,
    facts: Mapping[str, Any],
    *,
    evaluation: Mapping[str, Mapping[str, Any]] | None = None,
    routing: Mapping[str, Mapping[str, Any]] | None = None,
    license: str | None = None,
    name: str | None = None,
) -> str:
    """The text of a card.

    Args:
        kind: "expert", "composition" or "model".
        facts: as `flexmoe.modeling.cards_flexmoe` makes them for that kind.
        evaluation: `loss`, `perplexity`, `tokens` and `documents` by domain; they also become the `model-index` of
            the front matter, which the Hub shows.
        routing: by text, `tokens` and the experts' `share` of the routing weight and `chosen_share`.
        license: of the whole, where it is known. By default what the parts' licences tell (`whole_license`).
        name: what the `model-index` calls the model.

    Raises:
        ValueError: there is no such kind of card.
    """
    if kind not in _TEMPLATES:
        raise ValueError(f"There is no card of a {kind!r}; there are those of {', '.join(_TEMPLATES)}.")
    scores = {plain_line(domain): score for domain, score in (evaluation or {}).items()}
    if kind == "expert":
        said, conflicts = facts["license"], []
    else:
        said, conflicts = license or whole_license(facts), facts_conflicts(facts, license)
    title = plain_line(name or facts.get("name") or "flexmoe")
    values = {
        **facts,
        "front_matter": _front_matter(facts["metadata"], said, title, scores),
        "kind_of_expert": facts.get("kind"),
        "whole_license": said,
        "license_given": license is not None,
        "conflicts": conflicts,
        "scores": scores,
        "routing": routing or {},
    }
    return _environment().get_template(_TEMPLATES[kind]).render(values).rstrip() + "\n"


def facts_conflicts(facts: Mapping[str, Any], license: str | None = None) -> list[str]:
    """What does not go together in a composition or model, as `license_conflicts` says it; `license`: the whole's.

    Where nothing is recorded of the anchor's licence, it is left out: that is the rule, and the card says so.
    """
    return license_conflicts(_parts(facts), license)


def whole_license(facts: Mapping[str, Any]) -> str | None:
    """The licence that a composition or model could have, if the licences of its anchor and its experts tell one."""
    parts = _parts(facts)
    found = most_restrictive(list(parts.values())) if ANCHOR in parts else None
    return found if found and not license_conflicts(parts, found) else None


def _parts(facts: Mapping[str, Any]) -> dict[str, str | None]:
    anchor = {ANCHOR: facts["anchor"]["license"]} if facts["anchor"]["license"] else {}
    return anchor | {expert["name"]: expert["license"] for expert in facts["experts"]}


def _front_matter(
    metadata: Mapping[str, Any], license: str | None, name: str, scores: Mapping[str, Mapping[str, Any]]
) -> str:
    fields = {key: value for key, value in metadata.items() if not key.startswith("license")}
    is_expert = "flexmoe-expert" in metadata["tags"]
    if license or not is_expert:
        fields |= _license_fields(license or MIXED)
    results = [result for domain, score in scores.items() for result in _results(domain, score)]
    if results:
        fields |= {"model_name": name, "eval_results": results}
    return ModelCardData(**fields).to_yaml()


def _license_fields(license: str) -> dict[str, str]:
    """The Hub's own identifier, which the table knows from a name that only looks like one; or "other" and a name."""
    identifier = hub_identifier(license)
    return {"license": identifier} if identifier in LICENSES else other_license(license)


def _results(domain: str, score: Mapping[str, Any]) -> list[EvalResult]:
    """A domain's entries of the model-index. "text" is what `datasets` calls local text: no data set of the Hub."""
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
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML: the filters escape
    )
    filters: dict[str, Callable[..., Any]] = {
        "cell": table_cell,
        "code": _code,
        "number": _number,
        "percent": _percent,
        "quote": _quote,
        "sentence": one_line,
        "settings": _settings,
        "span": _span,
    }
    environment.filters |= filters
    return environment


def _code(value: Any) -> str:
    """A value as code, in a table too; nothing where it is None."""
    text = shortened(plain_line(value)).replace("`", "'").replace("|", "¦")  # in code nothing can be escaped
    return f"`{text}`" if text else ""


def _quote(text: str) -> str:
    """Somebody's own words, of any length, as a quotation: no line of them can begin anything."""
    lines = [one_line(line) for line in text.strip().splitlines()]
    return "\n".join(f"> {_OPENING.sub(_shielded, line)}".rstrip() for line in lines)


def _shielded(match: re.Match[str]) -> str:
    return f"{match[1]}\\{match[2]}"


def _number(value: Any, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if _is_number(value) else ""


def _percent(value: Any) -> str:
    return f"{value:.1%}" if _is_number(value) else ""


def _span(values: Any) -> str:
    """`8`, or `8 to 16` of a list."""
    numbers = values if isinstance(values, Sequence) else [values]
    least, greatest = min(numbers), max(numbers)
    return str(least) if least == greatest else f"{least} to {greatest}"


def _settings(values: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What a trainer told of a training, nested values by dotted names, as (name, value)."""
    found: list[tuple[str, str]] = []
    waiting: list[tuple[str, Any]] = list((values or {}).items())
    while waiting and len(found) < _MOST_SETTINGS:
        key, value = waiting.pop(0)
        if isinstance(value, Mapping):
            waiting = [(f"{key}.{inner}", held) for inner, held in value.items()] + waiting
        elif value is not None:
            found.append((key, str(value)))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


__all__ = ["ANCHOR", "MIXED", "facts_conflicts", "render", "whole_license"]
