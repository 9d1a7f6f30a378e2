"""The corpus: no held-out text, or a near-duplicate of it, is in the training text; shares of the public mix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexmoe.demo import corpus
from flexmoe.demo.corpus import (
    CorpusSettings,
    build_corpus,
    first_tokens,
    read_texts,
    split_by_document,
    without_near_duplicates,
)
from flexmoe.demo.near_duplicates import drop_near_duplicates, largest_overlap, overlaps, shingles
from flexmoe.demo.sources import Document, _character_entry, _header_body, read_source, without_examples
from flexmoe.demo.worked_problems import TOPICS, worked_problems


def words(prefix: str, count: int) -> str:
    return " ".join(f"{prefix}{i}" for i in range(count))


def test_near_duplicate_is_dropped_across_kinds() -> None:
    original = words("a", 100)
    edited = original.replace("a50", "changed")
    kinds = {
        "public": [Document("one", original), Document("two", words("b", 100))],
        "math": [Document("copy", edited), Document("three", words("c", 100))],
    }
    kept = without_near_duplicates(kinds)
    assert [d.name for d in kept["public"]] == ["one", "two"]
    assert [d.name for d in kept["math"]] == ["three"]


def test_excerpt_is_a_near_duplicate_and_a_shared_phrase_is_not() -> None:
    long = words("w", 200)
    excerpt = " ".join(long.split()[50:80])
    phrase = " ".join([*long.split()[:10], *words("other", 60).split()])
    assert overlaps([shingles(excerpt)], [shingles(long)])[0, 0] == 1.0
    assert drop_near_duplicates([long, excerpt, phrase]) == [0, 2]


def test_overlap_is_a_share_of_the_smaller_document() -> None:
    left, right = words("x", 24), " ".join([*words("x", 14).split(), *words("y", 30).split()])
    share, i, j = largest_overlap([left], [right])  # 20 shingles against 40; the first ten are shared
    assert (share, i, j) == (0.5, 0, 0)


def test_parts_of_a_file_stay_in_one_split() -> None:
    documents = [Document(f"file{i // 3}", f"part {i} " * 20) for i in range(60)]
    split = split_by_document(documents, held_out=2_000, public=2_000, seed=1)
    parts = [{d.name for d in part} for part in (split.held_out, split.public, split.private)]
    assert all(parts)
    assert sum(map(len, parts)) == len(set().union(*parts)) == 20
    assert split != split_by_document(documents, held_out=2_000, public=2_000, seed=2)


def test_corpus_on_this_machine(tmp_path: Path) -> None:
    settings = CorpusSettings(
        owners=("math", "cpp"), public_characters=80_000, owner_characters=30_000, held_out_characters=4_000
    )
    build_corpus(settings, tmp_path)
    record = json.loads((tmp_path / "mix.json").read_text())
    held_out = [t for path in (tmp_path / "held_out").iterdir() for t in read_texts(path)]
    trained = [t for path in (tmp_path / "owners").iterdir() for t in read_texts(path)]
    trained += read_texts(tmp_path / "public.jsonl")
    share, _, _ = largest_overlap(held_out, trained)
    assert share == pytest.approx(record["overlap"]["largest"])
    assert share < record["overlap"]["allowed_below"]
    assert not set(held_out) & set(trained)
    assert sum(record["public_mix"].values()) == pytest.approx(1)
    assert 0.01 < record["public_mix"]["math"] < 0.1


def test_owners_of_a_real_anchor_get_some_tokens_and_the_mix_has_code(tmp_path: Path) -> None:
    settings = CorpusSettings(
        owners=("math", "unicode"),
        public_characters=20_000,
        owner_characters=16_000,
        held_out_characters=3_000,
        public_share=0.0,
        public_code=0.2,
        owner_tokens=900,
    )
    build_corpus(settings, tmp_path, lambda text: len(text) // 4)
    mix = json.loads((tmp_path / "mix.json").read_text())["public_mix"]
    assert mix["math"] == mix["unicode"] == 0
    assert 0.1 < mix["code"] < 0.4
    for owner in settings.owners:
        sizes = [len(text) // 4 for text in read_texts(tmp_path / "owners" / f"{owner}.jsonl")]
        assert 450 < sum(sizes) <= 900
    assert sorted(path.stem for path in (tmp_path / "held_out").iterdir()) == ["math", "public", "unicode"]
    assert sorted(path.stem for path in (tmp_path / "owners").iterdir()) == ["math", "unicode"]


def test_an_owner_has_at_least_one_document() -> None:
    documents = [Document(str(i), "x" * 100) for i in range(3)]
    assert first_tokens(documents, 10, len) == documents[:1]
    assert first_tokens(documents, 200, len) == documents[:2]


def test_remaining_near_duplicate_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "without_near_duplicates", lambda kinds: kinds)
    text = words("same", 90)
    monkeypatch.setattr(corpus, "read_source", lambda kind, _: [Document(f"{kind}{i}", text) for i in range(20)])
    with pytest.raises(ValueError, match="is nearly"):
        build_corpus(CorpusSettings(owners=("math",), held_out_characters=600), tmp_path)


def test_too_little_text_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "read_source", lambda kind, _: [Document(kind, words(kind, 90))])
    with pytest.raises(ValueError, match="too little distinct text"):
        build_corpus(CorpusSettings(owners=("math",)), tmp_path)


def test_worked_problems_are_deterministic_and_valid() -> None:
    sheets = worked_problems(60, seed=5)
    assert sheets == worked_problems(60, seed=5)
    assert sheets != worked_problems(60, seed=6)
    assert len(set(sheets)) == 60
    assert len(TOPICS) >= 15
    assert not [sheet for sheet in sheets if "zoo" in sheet or "nan" in sheet.split()]


def test_examples_are_removed_from_documentation() -> None:
    text = "Adds numbers.\n\n>>> add(1, 2)\n3\n\n```python\nadd(1, 2)\n```\n![badge](x.svg)\nMore words."
    assert "add(1" not in without_examples(text)
    assert "badge" not in without_examples(text)
    assert without_examples(text).startswith("Adds numbers.")
    assert without_examples(text).endswith("More words.")


def test_license_is_removed_from_headers() -> None:
    text = "// Copyright\n// All rights reserved.\n\n#pragma once\n// a comment that stays\nint f();\n"
    assert _header_body(text).startswith("#pragma once\n// a comment that stays")


def test_character_entries_come_from_the_unicode_database() -> None:
    documents = read_source("unicode", 20_000)
    lines = [line for document in documents for line in document.text.splitlines()]
    assert all(line.startswith("U+") and ": " in line for line in lines)
    assert len(set(lines)) == len(lines)  # no character is in two documents
    assert _character_entry("Ä") == (
        "U+00C4 Ä LATIN CAPITAL LETTER A WITH DIAERESIS: uppercase letter, L, from U+0041 U+0308, lowercase U+00E4"
    )
    assert _character_entry("½").endswith("value 0.5")


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="no text of kind 'poetry'"):
        read_source("poetry", 1_000)
