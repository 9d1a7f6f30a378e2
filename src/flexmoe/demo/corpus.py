"""The corpus of the demo: text of several kinds, deduplicated and split by document, and the public mix.

Near-duplicates are dropped across all kinds before the documents are split (parts of one file stay together), so the
training text contains no held-out document or near-duplicate of one. The largest remaining overlap is measured at the
end and stored.

Does not cover the sources of the text (`sources`, `package_sources`), and tokenization (`anchor`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flexmoe.demo import package_sources  # noqa: F401  registers its kinds
from flexmoe.demo.near_duplicates import NEAR_DUPLICATE, drop_near_duplicates, largest_overlap
from flexmoe.demo.sources import SOURCES, Document, read_source

PUBLIC = "public"
PUBLIC_KIND, CODE = "english", "code"
OWNER_KINDS = tuple(kind for kind in SOURCES if kind != PUBLIC_KIND)


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """Sizes of the corpus in characters.

    The public mix is English text; `public_share` is the ratio of each owner's kind to it, `public_code` the ratio of
    Python source, as anchors have read it. `owner_tokens`: of each owner's text, at most so many tokens; None: all.
    """

    owners: tuple[str, ...]
    seed: int = 0
    public_characters: int = 5_200_000
    owner_characters: int = 1_250_000
    held_out_characters: int = 60_000
    public_share: float = 0.05
    public_code: float = 0.0
    owner_tokens: int | None = None

    def __post_init__(self) -> None:
        if len(set(self.owners)) != len(self.owners) or not self.owners:
            raise ValueError(f"owners must be distinct and at least one; got {list(self.owners)}")
        if unknown := [owner for owner in self.owners if owner not in OWNER_KINDS]:
            raise ValueError(f"no text for owner(s) {unknown}; the demo has text for {list(OWNER_KINDS)}")
        if not 0 <= self.public_share * len(self.owners) + self.public_code < 0.5:
            raise ValueError(
                f"public_share={self.public_share}, public_code={self.public_code}: English must be more than half of "
                "the public mix"
            )


@dataclass(frozen=True)
class Split:
    """Disjoint documents of one kind: held out for evaluation, in the public mix, private to the owner."""

    held_out: list[Document]
    public: list[Document]
    private: list[Document]


def build_corpus(settings: CorpusSettings, folder: Path, count_tokens: Callable[[str], int] | None = None) -> None:
    """Writes `public.jsonl`, `owners/<owner>.jsonl`, `held_out/<domain>.jsonl` and `mix.json` to `folder`.

    `count_tokens` is needed for `settings.owner_tokens`.

    Raises:
        ConnectionError: text of a kind must be downloaded, and cannot be.
        ValueError: this machine has too little distinct text of a kind.
    """
    kinds = without_near_duplicates(raw := _read_kinds(settings))
    share = settings.public_share * sum(len(d.text) for d in kinds[PUBLIC])
    splits = {
        kind: split_by_document(
            documents, settings.held_out_characters, None if kind == PUBLIC else int(share), settings.seed
        )
        for kind, documents in kinds.items()
        if kind in (PUBLIC, *settings.owners)
    }
    for kind, split in splits.items():
        needed = [split.public] if kind == PUBLIC else [split.private, *([split.public] if share else [])]
        if not split.held_out or not all(needed):
            raise ValueError(
                f"too little distinct text of kind {kind!r}: {sum(len(d.text) for d in kinds[kind])} characters"
            )
    if settings.owner_tokens is not None:
        assert count_tokens is not None, "the tokenizer counts them"
        for owner in settings.owners:
            splits[owner] = replace(
                splits[owner], private=first_tokens(splits[owner].private, settings.owner_tokens, count_tokens)
            )
    splits |= {kind: Split([], documents, []) for kind, documents in kinds.items() if kind not in splits}
    mix = [d for split in splits.values() for d in split.public]
    random.Random(settings.seed).shuffle(mix)

    _write(folder / "public.jsonl", mix)
    for kind, split in splits.items():
        if split.held_out:
            _write(folder / "held_out" / f"{kind}.jsonl", split.held_out)
        if split.private:
            _write(folder / "owners" / f"{kind}.jsonl", split.private)
    record = {"public_mix": _composition(splits), "kinds": _sizes(raw, kinds, splits), "overlap": _overlap(splits)}
    (folder / "mix.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _read_kinds(settings: CorpusSettings) -> dict[str, list[Document]]:
    """The documents of each kind; Python source of the public mix only if no owner has that kind."""
    raw = {PUBLIC: read_source(PUBLIC_KIND, settings.public_characters)}
    raw |= {owner: read_source(owner, settings.owner_characters) for owner in settings.owners}
    if settings.public_code and CODE not in raw:
        raw[CODE] = read_source(CODE, int(settings.public_code * settings.public_characters))
    return raw


def first_tokens(documents: Sequence[Document], tokens: int, count_tokens: Callable[[str], int]) -> list[Document]:
    """The first documents, of at most `tokens` tokens in all, and at least one."""
    kept, total = list(documents[:1]), count_tokens(documents[0].text)
    for document in documents[1:]:
        total += count_tokens(document.text)
        if total > tokens:
            break
        kept.append(document)
    return kept


def without_near_duplicates(kinds: dict[str, list[Document]]) -> dict[str, list[Document]]:
    """Drops near-duplicates of earlier documents of any kind; keeps the order."""
    labelled = [(kind, document) for kind, documents in kinds.items() for document in documents]
    kept = [labelled[i] for i in drop_near_duplicates([document.text for _, document in labelled])]
    return {kind: [document for k, document in kept if k == kind] for kind in kinds}


def split_by_document(documents: Sequence[Document], held_out: int, public: int | None, seed: int) -> Split:
    """Splits files in random order: `held_out` characters, then `public` ones (None: all), the rest is private."""
    files: dict[str, list[Document]] = {}
    for document in documents:
        files.setdefault(document.name, []).append(document)
    names = sorted(files)
    random.Random(seed).shuffle(names)
    split, taken = Split([], [], []), {"held_out": 0, "public": 0}
    for name in names:
        if taken["held_out"] < held_out:
            part = "held_out"
        elif public is None or taken["public"] < public:
            part = "public"
        else:
            split.private.extend(files[name])
            continue
        getattr(split, part).extend(files[name])
        taken[part] += sum(len(d.text) for d in files[name])
    return split


def read_texts(path: Path) -> list[str]:
    """The documents in a file of the corpus."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, documents: Sequence[Document]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # ASCII escapes, because some readers treat other characters than \n as line ends
    path.write_text("".join(json.dumps({"text": d.text, "name": d.name}) + "\n" for d in documents), encoding="utf-8")


def _composition(splits: dict[str, Split]) -> dict[str, float]:
    sizes = {kind: sum(len(d.text) for d in split.public) for kind, split in splits.items()}
    return {("english" if kind == PUBLIC else kind): size / sum(sizes.values()) for kind, size in sizes.items()}


def _sizes(
    raw: dict[str, list[Document]], kinds: dict[str, list[Document]], splits: dict[str, Split]
) -> dict[str, dict[str, int]]:
    def characters(documents: Sequence[Document]) -> int:
        return sum(len(d.text) for d in documents)

    return {
        kind: {
            "documents": len(kinds[kind]),
            "near_duplicates_dropped": len(raw[kind]) - len(kinds[kind]),
            "held_out_documents": len(split.held_out),
            "held_out_characters": characters(split.held_out),
            "public_characters": characters(split.public),
            "private_characters": characters(split.private),
        }
        for kind, split in splits.items()
    }


def _overlap(splits: dict[str, Split]) -> dict[str, object]:
    """The largest share of the shingles of a held-out document that one training document contains."""
    held_out = [d for split in splits.values() for d in split.held_out]
    training = [d for split in splits.values() for d in (*split.public, *split.private)]
    share, i, j = largest_overlap([d.text for d in held_out], [d.text for d in training])
    if share >= NEAR_DUPLICATE:
        raise ValueError(f"held-out {held_out[i].name!r} is nearly {training[j].name!r} ({share:.0%} of its shingles)")
    return {
        "largest": share,
        "allowed_below": NEAR_DUPLICATE,
        "held_out": held_out[i].name,
        "training": training[j].name,
    }
