"""Which licences go together: a table of the Hub's identifiers, and what of it clashes in one model.

Sources: the Hub's list of identifiers (https://huggingface.co/docs/hub/repositories-licenses, August 2026), SPDX for
other spellings of the same licences (https://spdx.org/licenses/), GNU's and Creative Commons' own lists of what is
compatible (https://www.gnu.org/licenses/license-list.html, https://creativecommons.org/compatiblelicenses).

It compares identifiers. It does NOT read licences, know of exceptions or second licences, or give legal advice: what
it is silent about may still clash.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from typing import Literal

Trait = Literal[
    "permissive", "weak copyleft", "copyleft", "share-alike", "terms of use", "non-commercial", "no derivatives"
]

# From what asks for least to what asks for most.
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
"""What is made of it must be passed on under the same licence, without further restrictions."""

# Of two that ask for equally much, the first stands for both: it asks for more notices.
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
    (): "cc unknown other",  # what they allow, the identifier does not say
}
LICENSES: dict[str, tuple[Trait, ...]] = {
    identifier: traits for traits, identifiers in _IDENTIFIERS.items() for identifier in identifiers.split()
}
"""Every licence that the Hub has an identifier for, and what it is. Empty: nobody can tell from the identifier."""

# Work under the first may be passed on, in a whole, under the second.
_PASSES_INTO = {
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
_SPDX = {  # where SPDX and the Hub spell more than the case otherwise
    "c-uda-1.0": "c-uda",
    "gfdl-1.1": "gfdl",
    "gfdl-1.2": "gfdl",
    "gfdl-1.3": "gfdl",
    "odbl-1.0": "odbl",
    "odc-by-1.0": "odc-by",
    "pddl-1.0": "pddl",
}


def hub_identifier(license: str) -> str:
    """The Hub's identifier for a licence that is spelt otherwise (`Apache-2.0`, `GPL-3.0-or-later`), else its text."""
    text = license.strip().lower()
    for spelling in (text, re.sub(r"-(only|or-later)$|\+$", "", text)):
        spelling = _SPDX.get(spelling, spelling)
        if spelling in LICENSES:
            return spelling
    return license


def traits(license: str | None) -> tuple[Trait, ...]:
    """What a licence is; empty if it is none, or one that the table does not know."""
    return LICENSES.get(hub_identifier(license), ()) if license else ()


def license_conflicts(parts: Mapping[str, str | None], whole: str | None = None) -> list[str]:
    """What does not go together, one sentence for each fault, in the order of the parts.

    Args:
        parts: the licence of each part by its name; None or empty where none is given.
        whole: the licence that the whole is to have; None while nobody has said.
    """
    given = {name: hub_identifier(license) for name, license in parts.items() if license}
    found: list[str] = []
    for name in parts:
        if name not in given:
            found.append(f"{name} names no licence, so nobody but its owner may change it or pass it on.")
            continue
        found += _against_the_whole(name, given[name], whole and hub_identifier(whole))
        if whole is None:
            found += _commercial_others(name, given)
    for (one, first), (other, second) in combinations(given.items(), 2):
        found += _between(one, first, other, second)
    return found


def most_restrictive(licenses: Collection[str | None]) -> str | None:
    """The licence among these that a whole of them could have: the one that asks for most.

    None if that cannot be told: one is missing or unknown to the table, or two ask for equally much, differently.
    """
    known = {hub_identifier(license): traits(license) for license in licenses if license}
    if not known or None in licenses or "" in licenses or not all(known.values()):
        return None
    weight = {name: sum(1 << TRAITS.index(trait) for trait in held) for name, held in known.items()}
    most = [name for name, value in weight.items() if value == max(weight.values())]
    if len(most) == 1:
        return most[0]
    return min(most, key=list(LICENSES).index) if max(weight.values()) == 1 else None


def _against_the_whole(name: str, license: str, whole: str | None) -> Iterator[str]:
    held, of_whole = traits(license), traits(whole)
    if "no derivatives" in held:
        yield f"{name} ({license}) may be passed on only as it is, and a model that it is a part of is something else."
    if whole is None or whole == license or (license, whole) in _PASSES_INTO:
        return
    if "non-commercial" in held and of_whole and "non-commercial" not in of_whole:
        yield f"{name} ({license}) forbids commercial use, which the licence of the whole ({whole}) allows."
    if any(trait in held for trait in RECIPROCAL):
        yield f"{name} ({license}) must be passed on under its own licence; that of the whole is {whole}."
    if "terms of use" in held:
        yield f"{name} ({license}) has terms of use that must be passed on; the licence of the whole is {whole}."


def _commercial_others(name: str, given: Mapping[str, str]) -> Iterator[str]:
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
            "whole can be used for no commercial purpose."
        )


def _between(one: str, first: str, other: str, second: str) -> Iterator[str]:
    if first == second or {(first, second), (second, first)} & _PASSES_INTO:
        return
    reciprocal = [any(trait in traits(license) for trait in RECIPROCAL) for license in (first, second)]
    if all(reciprocal):
        yield (
            f"{one} ({first}) and {other} ({second}) must each be passed on under its own licence, and one model has "
            "only one."
        )
        return
    for is_reciprocal, (strict, license), (bound, terms) in (
        (reciprocal[0], (one, first), (other, second)),
        (reciprocal[1], (other, second), (one, first)),
    ):
        if is_reciprocal and "terms of use" in traits(terms):
            yield f"{strict} ({license}) allows no further restrictions, and {bound} ({terms}) has terms of use."


__all__ = [
    "LICENSES",
    "RECIPROCAL",
    "TRAITS",
    "Trait",
    "hub_identifier",
    "license_conflicts",
    "most_restrictive",
    "traits",
]
