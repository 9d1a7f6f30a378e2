"""Compatible and conflicting licences, by literal tables."""

import pytest

from flexmoe.cards.licenses import (
    LICENSES,
    TRAITS,
    hub_identifier,
    license_conflicts,
    license_fields,
    most_restrictive,
)


@pytest.mark.parametrize(
    ("parts", "model"),
    [
        ({}, None),
        ({"a": "mit", "b": "apache-2.0", "c": "cc0-1.0"}, None),
        ({"a": "mit", "b": "Apache-2.0"}, "gpl-3.0"),
        ({"a": "cc-by-nc-4.0"}, None),
        ({"a": "cc-by-nc-4.0", "b": "mit"}, "cc-by-nc-4.0"),
        ({"a": "cc-by-nc-4.0", "b": "mit"}, "cc-by-nc-sa-4.0"),
        ({"a": "cc-by-nc-4.0", "b": "fair-noncommercial-research-license"}, None),
        ({"a": "cc-by-nc-4.0", "b": "our own terms"}, None),  # unknown terms
        ({"a": "gpl-3.0", "b": "GPL-3.0-or-later", "c": "mit"}, "gpl-3.0"),
        ({"a": "gpl-3.0", "b": "agpl-3.0"}, "agpl-3.0"),
        ({"a": "cc-by-sa-3.0", "b": "cc-by-sa-4.0"}, "cc-by-sa-4.0"),
        ({"a": "mpl-2.0", "b": "lgpl-3.0"}, "apache-2.0"),
        ({"a": "llama3.1", "b": "mit"}, "llama3.1"),
        ({"a": "llama3.1", "b": "gemma"}, None),
    ],
)
def test_compatible_licences(parts: dict[str, str], model: str | None) -> None:
    assert license_conflicts(parts, model) == []


@pytest.mark.parametrize(
    ("parts", "model", "named"),
    [
        ({"a": "cc-by-nc-4.0", "b": "mit"}, "apache-2.0", ["a (cc-by-nc-4.0)", "commercial", "model (apache-2.0)"]),
        ({"a": "cc-by-nc-4.0", "b": "mit"}, None, ["a (cc-by-nc-4.0)", "commercial", "b (mit)"]),
        ({"a": "CC-BY-NC-4.0"}, "MIT", ["a (cc-by-nc-4.0)", "commercial", "model (mit)"]),
        ({"a": "cc-by-nd-4.0"}, None, ["a (cc-by-nd-4.0)", "unmodified"]),
        ({"a": "cc-by-nd-4.0"}, "cc-by-nd-4.0", ["a (cc-by-nd-4.0)", "unmodified"]),
        ({"a": "gpl-2.0", "b": "gpl-3.0"}, None, ["a (gpl-2.0)", "b (gpl-3.0)", "its own licence"]),
        ({"a": "gpl-3.0", "b": "cc-by-sa-3.0"}, None, ["a (gpl-3.0)", "b (cc-by-sa-3.0)", "its own licence"]),
        ({"a": "gpl-3.0"}, "mit", ["a (gpl-3.0)", "the model is mit"]),
        (
            {"a": "agpl-3.0"},
            "gpl-3.0",
            ["a (agpl-3.0)", "the model is gpl-3.0"],
        ),  # compatible in the other direction only
        ({"a": "cc-by-sa-4.0", "b": "openrail++"}, None, ["a (cc-by-sa-4.0)", "b (openrail++)", "restrictions"]),
        ({"a": "gemma"}, "apache-2.0", ["a (gemma)", "terms of use", "apache-2.0"]),
        ({"a": None}, None, ["a has no licence"]),
        ({"a": ""}, "mit", ["a has no licence"]),
    ],
)
def test_each_conflict_is_one_sentence_with_both_licences(
    parts: dict[str, str | None], model: str | None, named: list[str]
) -> None:
    (sentence,) = license_conflicts(parts, model)
    assert all(word in sentence for word in named), sentence
    assert sentence.endswith(".")


def test_conflicts_are_in_the_order_of_the_parts() -> None:
    found = license_conflicts({"b": None, "a": "cc-by-nc-nd-4.0", "c": "gpl-3.0"}, "mit")
    assert [sentence.split()[0] for sentence in found] == ["b", "a", "a", "c"]


@pytest.mark.parametrize(
    ("licenses", "model"),
    [
        (["mit"], "mit"),
        (["mit", "apache-2.0", "cc0-1.0"], "apache-2.0"),
        (["Apache-2.0", "apache-2.0"], "apache-2.0"),
        (["mit", "cc-by-nc-4.0", "gpl-3.0"], "cc-by-nc-4.0"),
        (["cc-by-nc-4.0", "cc-by-nc-sa-4.0"], "cc-by-nc-sa-4.0"),
        (["mit", "llama3"], "llama3"),
        (["gpl-2.0", "gpl-3.0"], None),  # equally restrictive, and different
        (["mit", None], None),
        (["mit", "our own terms"], None),
        (["mit", "other"], None),
        ([], None),
    ],
)
def test_the_most_restrictive(licenses: list[str | None], model: str | None) -> None:
    assert most_restrictive(licenses) == model


@pytest.mark.parametrize(
    ("spelt", "identifier"),
    [
        ("MIT", "mit"),
        (" Apache-2.0 ", "apache-2.0"),
        ("GPL-3.0-only", "gpl-3.0"),
        ("LGPL-2.1+", "lgpl-2.1"),
        ("OpenRAIL++", "openrail++"),
        ("ODbL-1.0", "odbl"),
        ("GFDL-1.3-or-later", "gfdl"),
        ("MIT OR Apache-2.0", "MIT OR Apache-2.0"),
    ],
)
def test_spdx_identifiers(spelt: str, identifier: str) -> None:
    assert hub_identifier(spelt) == identifier


@pytest.mark.parametrize(
    ("license", "fields"),
    [
        ("MIT", {"license": "mit"}),
        ("GPL-3.0-or-later", {"license": "gpl-3.0"}),
        ("Our terms: ask!", {"license": "other", "license_name": "our-terms-ask"}),
        ("!", {"license": "other", "license_name": "other"}),
    ],
)
def test_the_front_matter_of_a_licence(license: str, fields: dict[str, str]) -> None:
    assert license_fields(license) == fields


def test_the_table_holds_each_identifier_of_the_hub_once() -> None:
    assert len(LICENSES) == 83
    assert {trait for held in LICENSES.values() for trait in held} == set(TRAITS)
