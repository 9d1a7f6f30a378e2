"""Licences that go together and those that do not, by literal tables."""

import pytest

from flexmoe.model_cards.licenses import LICENSES, TRAITS, hub_identifier, license_conflicts, most_restrictive


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        ({}, None),
        ({"a": "mit", "b": "apache-2.0", "c": "cc0-1.0"}, None),
        ({"a": "mit", "b": "Apache-2.0"}, "gpl-3.0"),
        ({"a": "cc-by-nc-4.0"}, None),
        ({"a": "cc-by-nc-4.0", "b": "mit"}, "cc-by-nc-4.0"),
        ({"a": "cc-by-nc-4.0", "b": "mit"}, "cc-by-nc-sa-4.0"),
        ({"a": "cc-by-nc-4.0", "b": "fair-noncommercial-research-license"}, None),
        ({"a": "cc-by-nc-4.0", "b": "our own terms"}, None),  # what those allow, nobody here can tell
        ({"a": "gpl-3.0", "b": "GPL-3.0-or-later", "c": "mit"}, "gpl-3.0"),
        ({"a": "gpl-3.0", "b": "agpl-3.0"}, "agpl-3.0"),
        ({"a": "cc-by-sa-3.0", "b": "cc-by-sa-4.0"}, "cc-by-sa-4.0"),
        ({"a": "mpl-2.0", "b": "lgpl-3.0"}, "apache-2.0"),
        ({"a": "llama3.1", "b": "mit"}, "llama3.1"),
        ({"a": "llama3.1", "b": "gemma"}, None),
    ],
)
def test_what_goes_together(parts: dict[str, str], whole: str | None) -> None:
    assert license_conflicts(parts, whole) == []


@pytest.mark.parametrize(
    ("parts", "whole", "named"),
    [
        ({"a": "cc-by-nc-4.0", "b": "mit"}, "apache-2.0", ["a (cc-by-nc-4.0)", "commercial", "whole (apache-2.0)"]),
        ({"a": "cc-by-nc-4.0", "b": "mit"}, None, ["a (cc-by-nc-4.0)", "commercial", "b (mit)"]),
        ({"a": "CC-BY-NC-4.0"}, "MIT", ["a (cc-by-nc-4.0)", "commercial", "whole (mit)"]),
        ({"a": "cc-by-nd-4.0"}, None, ["a (cc-by-nd-4.0)", "only as it is"]),
        ({"a": "cc-by-nd-4.0"}, "cc-by-nd-4.0", ["a (cc-by-nd-4.0)", "only as it is"]),
        ({"a": "gpl-2.0", "b": "gpl-3.0"}, None, ["a (gpl-2.0)", "b (gpl-3.0)", "its own licence"]),
        ({"a": "gpl-3.0", "b": "cc-by-sa-3.0"}, None, ["a (gpl-3.0)", "b (cc-by-sa-3.0)", "its own licence"]),
        ({"a": "gpl-3.0"}, "mit", ["a (gpl-3.0)", "the whole is mit"]),
        ({"a": "agpl-3.0"}, "gpl-3.0", ["a (agpl-3.0)", "the whole is gpl-3.0"]),  # it goes the other way only
        ({"a": "cc-by-sa-4.0", "b": "openrail++"}, None, ["a (cc-by-sa-4.0)", "b (openrail++)", "restrictions"]),
        ({"a": "gemma"}, "apache-2.0", ["a (gemma)", "terms of use", "apache-2.0"]),
        ({"a": None}, None, ["a names no licence"]),
        ({"a": ""}, "mit", ["a names no licence"]),
    ],
)
def test_each_clash_is_one_sentence_that_names_both(
    parts: dict[str, str | None], whole: str | None, named: list[str]
) -> None:
    (sentence,) = license_conflicts(parts, whole)
    assert all(word in sentence for word in named), sentence
    assert sentence.endswith(".")


def test_clashes_come_in_the_order_of_the_parts() -> None:
    found = license_conflicts({"b": None, "a": "cc-by-nc-nd-4.0", "c": "gpl-3.0"}, "mit")
    assert [sentence.split()[0] for sentence in found] == ["b", "a", "a", "c"]


@pytest.mark.parametrize(
    ("licenses", "whole"),
    [
        (["mit"], "mit"),
        (["mit", "apache-2.0", "cc0-1.0"], "apache-2.0"),
        (["Apache-2.0", "apache-2.0"], "apache-2.0"),
        (["mit", "cc-by-nc-4.0", "gpl-3.0"], "cc-by-nc-4.0"),
        (["cc-by-nc-4.0", "cc-by-nc-sa-4.0"], "cc-by-nc-sa-4.0"),
        (["mit", "llama3"], "llama3"),
        (["gpl-2.0", "gpl-3.0"], None),  # alike in what they ask, and not the same
        (["mit", None], None),
        (["mit", "our own terms"], None),
        (["mit", "other"], None),
        ([], None),
    ],
)
def test_the_most_restrictive(licenses: list[str | None], whole: str | None) -> None:
    assert most_restrictive(licenses) == whole


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
def test_spellings_of_spdx(spelt: str, identifier: str) -> None:
    assert hub_identifier(spelt) == identifier


def test_the_table_holds_each_identifier_of_the_hub_once() -> None:
    assert len(LICENSES) == 83
    assert {trait for held in LICENSES.values() for trait in held} == set(TRAITS)
