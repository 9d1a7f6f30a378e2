"""Licence compatibility: a table of the Hub's identifiers, and the conflicts between the parts of one model.

Sources: the Hub's list of identifiers (https://huggingface.co/docs/hub/repositories-licenses, August 2026), SPDX for
other spellings of the same licences (https://spdx.org/licenses/), GNU's and Creative Commons' lists of compatible
licences (https://www.gnu.org/licenses/license-list.html, https://creativecommons.org/compatiblelicenses).

Identifiers are compared. Licence texts, exceptions and dual licences are NOT covered, and nothing here is legal
advice: licences may conflict without a message.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from typing import Literal

Trait = Literal[
    "permissive", "weak copyleft", "copyleft", "share-alike", "terms of use", "non-commercial", "no derivatives"
]

# From the least to the most restrictive.
TRAITS: tuple[Trait, ...] = (
    "permissive",
    "weak copyleft",
    "copyleft",
    "share-alike",
    "terms of use",
    "non-commercial",
    "no derivatives",
)
RECIPROCAL = ("copyleft", "share-alike")
"""Derived work must be redistributed under the same licence, without further restrictions."""

# Of two equally restrictive ones, the first covers both: it requires more notices.
_IDENTIFIERS: dict[tuple[Trait, ...], str] = {
    ("permissive",): """
        apache-2.0 bsd-3-clause-clear bsd-3-clause bsd-2-clause bsd mit ncsa isc ecl-2.0 afl-3.0 bsl-1.0 postgresql
        openmdw-1.1 openmdw-1.0 apple-ascl cc-by-4.0 cc-by-3.0 cc-by-2.5 cc-by-2.0 odc-by etalab-2.0
        cdla-permissive-2.0 cdla-permissive-1.0 zlib unlicense wtfpl cc0-1.0 pddl""",
    ("weak copyleft",): """
        mpl-2.0 epl-2.0 epl-1.0 lgpl-3.0 lgpl-2.1 lgpl lgpl-lr ms-pl artistic-2.0 ofl-1.1 lppl-1.3c""",
    ("copyleft",): "agpl-3.0 gpl-3.0 gpl-2.0 gpl osl-3.0 eupl-1.2 eupl-1.1",
    ("share-alike",): "cc-by-sa-4.0 cc-by-sa-3.0 gfdl odbl cdla-sharing-1.0",
    ("terms of use",): """
        openrail openrail++ bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
        c-uda llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma grok2-community""",
    ("non-commercial",): """
        cc-by-nc-4.0 cc-by-nc-3.0 cc-by-nc-2.0 fair-noncommercial-research-license deepfloyd-if-license apple-amlr
        h-research intel-research""",
    ("share-alike", "non-commercial"): "cc-by-nc-sa-4.0 cc-by-nc-sa-3.0 cc-by-nc-sa-2.0",
    ("no derivatives",): "cc-by-nd-4.0",
    ("non-commercial", "no derivatives"): "cc-by-nc-nd-4.0 cc-by-nc-nd-3.0",
    (): "cc unknown other",  # the identifier does not determine the terms
}
LICENSES: dict[str, tuple[Trait, ...]] = {
    identifier: traits for traits, identifiers in _IDENTIFIERS.items() for identifier in identifiers.split()
}
"""The traits of every licence identifier of the Hub; empty if the identifier does not determine them."""

# Work under the first licence may be redistributed, as part of a larger work, under the second.
_COMPATIBLE = {
    ("gpl-3.0", "agpl-3.0"),
    ("cc-by-sa-4.0", "gpl-3.0"),
    ("cc-by-sa-3.0", "cc-by-sa-4.0"),
    ("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    ("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0"),
    ("cc-by-nc-sa-2.0", "cc-by-nc-sa-4.0"),
    ("eupl-1.1", "eupl-1.2"),
    ("eupl-1.1", "gpl-2.0"),
    ("eupl-1.1", "osl-3.0"),
    ("eupl-1.2", "gpl-2.0"),
    ("eupl-1.2", "gpl-3.0"),
    ("eupl-1.2", "agpl-3.0"),
    ("eupl-1.2", "osl-3.0"),
}
_SPDX = {  # identifiers of SPDX that differ from the Hub's in more than case
    "c-uda-1.0": "c-uda",
    "gfdl-1.1": "gfdl",
    "gfdl-1.2": "gfdl",
    "gfdl-1.3": "gfdl",
    "odbl-1.0": "odbl",
    "odc-by-1.0": "odc-by",
    "pddl-1.0": "pddl",
}


def hub_identifier(license: str) -> str:
    """The Hub's identifier of a licence in another spelling (`Apache-2.0`, `GPL-3.0-or-later`), else its text."""
    text = license.strip().lower()
    for spelling in (text, re.sub(r"-(only|or-later)$|\+$", "", text)):
        spelling = _SPDX.get(spelling, spelling)
        if spelling in LICENSES:
            return spelling
    return license


def traits(license: str | None) -> tuple[Trait, ...]:
    """The traits of a licence; empty if there is none, or it is not in the table."""
    return LICENSES.get(hub_identifier(license), ()) if license else ()


def license_fields(license: str) -> dict[str, str]:
    """The front matter of a card for a licence: the Hub's identifier, or "other" and a `license_name`.

    Source: https://hf.co/docs/hub/model-cards
    """
    identifier = hub_identifier(license)
    if identifier in LICENSES:
        return {"license": identifier}
    slug = re.sub(r"[^a-z0-9.]+", "-", license.lower()).strip("-")[:96]
    return {"license": "other", "license_name": slug or "other"}


def license_conflicts(parts: Mapping[str, str | None], model: str | None = None) -> list[str]:
    """The conflicts between licences, one sentence each, in the order of the parts.

    Args:
        parts: the licence of each part by its name; None or empty if unknown.
        model: the licence of the complete model; None if not chosen yet.
    """
    given = {name: hub_identifier(license) for name, license in parts.items() if license}
    found: list[str] = []
    for name in parts:
        if name not in given:
            found.append(f"{name} has no licence, so only its owner may modify or redistribute it.")
            continue
        found += _conflicts_with_model(name, given[name], model and hub_identifier(model))
        if model is None:
            found += _commercial_conflicts(name, given)
    for (one, first), (other, second) in combinations(given.items(), 2):
        found += _conflicts_between(one, first, other, second)
    return found


def most_restrictive(licenses: Collection[str | None]) -> str | None:
    """The most restrictive of these licences, which a model made of all parts could have.

    None if it is not determined: one is missing or not in the table, or two are equally restrictive and different.
    """
    known = {hub_identifier(license): traits(license) for license in licenses if license}
    if not known or None in licenses or "" in licenses or not all(known.values()):
        return None
    weight = {name: sum(1 << TRAITS.index(trait) for trait in held) for name, held in known.items()}
    most = [name for name, value in weight.items() if value == max(weight.values())]
    if len(most) == 1:
        return most[0]
    return min(most, key=list(LICENSES).index) if max(weight.values()) == 1 else None


def _conflicts_with_model(name: str, license: str, model: str | None) -> Iterator[str]:
    held, of_model = traits(license), traits(model)
    if "no derivatives" in held:
        yield f"{name} ({license}) may only be redistributed unmodified, not as a part of a model."
    if model is None or model == license or (license, model) in _COMPATIBLE:
        return
    if "non-commercial" in held and of_model and "non-commercial" not in of_model:
        yield f"{name} ({license}) forbids commercial use, which the licence of the model ({model}) allows."
    if any(trait in held for trait in RECIPROCAL):
        yield f"{name} ({license}) must be redistributed under its own licence; that of the model is {model}."
    if "terms of use" in held:
        yield f"{name} ({license}) has terms of use that must be passed on; the licence of the model is {model}."


def _commercial_conflicts(name: str, given: Mapping[str, str]) -> Iterator[str]:
    if "non-commercial" not in traits(given[name]):
        return
    others = [
        f"{other} ({license})"
        for other, license in given.items()
        if traits(license) and "non-commercial" not in traits(license)
    ]
    if others:
        yield (
            f"{name} ({given[name]}) forbids commercial use, which the licences of {', '.join(others)} allow: the "
            "model cannot be used commercially."
        )


def _conflicts_between(one: str, first: str, other: str, second: str) -> Iterator[str]:
    if first == second or {(first, second), (second, first)} & _COMPATIBLE:
        return
    reciprocal = [any(trait in traits(license) for trait in RECIPROCAL) for license in (first, second)]
    if all(reciprocal):
        yield (
            f"{one} ({first}) and {other} ({second}) must each be redistributed under its own licence, and a model "
            "has only one."
        )
        return
    for is_reciprocal, (strict, license), (limited, terms) in (
        (reciprocal[0], (one, first), (other, second)),
        (reciprocal[1], (other, second), (one, first)),
    ):
        if is_reciprocal and "terms of use" in traits(terms):
            yield f"{strict} ({license}) allows no further restrictions, and {limited} ({terms}) has terms of use."


__all__ = [
    "LICENSES",
    "RECIPROCAL",
    "TRAITS",
    "Trait",
    "hub_identifier",
    "license_conflicts",
    "license_fields",
    "most_restrictive",
    "traits",
]
