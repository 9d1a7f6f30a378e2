"""Preparation of the text of a run, and what its user is told about it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from flexmoe.data import Documents, split_documents
from flexmoe.training.messages import (
    MEASURED_STEPS,
    Interruptible,
    TimeEstimate,
    TrainingInterrupted,
    duration,
    losses,
    steps_summary,
    text_summary,
)
from flexmoe.training.resume import seal_checkpoint
from flexmoe.training.text import FEW_TOKENS, TrainingText, pack_text, read_sides
from tests.support.letters import letter_tokenizer

READ = {"validation_fraction": 0.2, "seed": 3, "vocab_size": 99}


def prepare_text(sides, tokenizer, **changes) -> TrainingText:
    read = read_sides(sides, tokenizer, **{**READ, **changes})
    return pack_text(read, sequence_length=8, validation_tokens=16, seed=3)


@pytest.fixture
def own(tmp_path: Path) -> Documents:
    rows = [{"text": chr(97 + i % 26) * (9 + i)} for i in range(20)] + [{"text": None}, {"text": " "}, {"text": "\n"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Documents([tmp_path / "own.jsonl"], skip_empty=True)


def test_both_sides_are_split_and_counted(own):
    text = prepare_text({"own": own, "public": ["p" * 30, "q" * 30]}, letter_tokenizer())
    training, held = split_documents(list(own), 0.2, seed=3)
    counts = text.counts["own"]
    assert (counts.documents, counts.held_out, counts.blank, counts.skipped) == (20, len(held), 2, 1)
    assert counts.tokens == sum(len(document) + 1 for document in training)
    assert counts.held_out_tokens == sum(len(document) + 1 for document in held)
    assert text.own.sequences.shape == (counts.tokens // 8, 8)
    assert text.validation["own"].shape == (2, 8), "validation_tokens is a maximum"
    letters = letter_tokenizer().decode(text.own.sequences.flatten().tolist()).replace(" ", "")
    assert letters.startswith(training[0])
    assert not text.own.documents, "the texts are not kept"
    kept = prepare_text({"own": own}, letter_tokenizer(), keep_documents=True)
    assert kept.own.documents == training
    assert (kept.public, list(kept.validation)) == (None, ["own"])


def test_digests_tell_changed_documents_from_a_changed_tokenizer(own, tmp_path):
    def digests(documents, tokenizer) -> tuple[str, str]:
        text = prepare_text({"own": documents}, tokenizer)
        return text.sha256, text.tokens_sha256

    other = letter_tokenizer()
    other.add_tokens(["aaa"])
    one, same, retokenized, edited = (
        digests(own, letter_tokenizer()),
        digests(list(own), letter_tokenizer()),
        digests(own, other),
        digests([*own, "one more"], letter_tokenizer()),
    )
    assert one == same
    assert (retokenized[0] == one[0], retokenized[1] == one[1]) == (True, False)
    assert (edited[0] == one[0], edited[1] == one[1]) == (False, False)


def test_a_single_public_document_is_not_split(own):
    text = prepare_text({"own": own, "public": ["p" * 30] * 3}, letter_tokenizer())
    assert list(text.validation) == ["own"]
    with pytest.raises(ValueError, match=r"The own text: 1 distinct document"):
        prepare_text({"own": ["o" * 30] * 3}, letter_tokenizer())


@pytest.mark.parametrize(
    ("documents", "changes", "message"),
    [
        (["a" * 3, "b" * 3], {}, r"own training text \(validation_fraction=0\.2\): 1 document\(s\) with 4 tokens"),
        (["a" * 30, "b" * 3], {"seed": 1}, r"own validation text .* with 4 tokens in all"),
        (["a" * 30, "b" * 30], {"vocab_size": 4}, "The own text: Document 2 holds the token 'b' with the id 4"),
    ],
)
def test_text_that_cannot_be_used(documents, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare_text({"own": documents}, letter_tokenizer(), **changes)


@pytest.mark.promise("`train`", "little own text", "a warning")
def test_little_text_is_warned_of():
    documents = ["a" * 99] * (FEW_TOKENS // 100)
    enough = prepare_text({"own": documents}, letter_tokenizer(), validation_fraction=0)
    assert enough.few() is None
    little = prepare_text({"own": documents[1:]}, letter_tokenizer(), validation_fraction=0)
    assert "The own text is small: 19,900 tokens" in (little.few() or "")


def test_the_summary(own):
    text = prepare_text({"own": own, "public": ["p" * 30, "q" * 30]}, letter_tokenizer())
    first, second = text_summary(text)
    assert first == (
        "Own text: 20 documents, 390 tokens; held out for validation: 4 documents, "
        f"{text.counts['own'].held_out_tokens} tokens; dropped: 2 blank document(s) and 1 row(s) without text."
    )
    assert second.startswith("Public text: 2 documents, 62 tokens;")
    assert second.endswith("dropped: nothing.")
    line = steps_summary(text, steps=100, sequences_per_step=10, public_sequences=400, resumed_at=20)
    assert line.startswith("Training: 100 steps of 10 sequences of 8 tokens; 4,800 own tokens (")
    assert line.endswith(" and 3,200 public ones. Resuming after step 20.")


def test_the_losses_are_one_line():
    report = {"validation_loss": {"own": {"before": 2.5, "after": 2.25}, "public": {"before": 2, "after": 2.125}}}
    assert losses(report).endswith("before -> after: own 2.5000 -> 2.2500, public 2.0000 -> 2.1250.")
    assert losses({"validation_loss": {}}) == "No text was held out, so no loss was measured."


def test_the_duration_is_estimated_once_from_measured_steps(monkeypatch):
    shown: list[str] = []
    now = iter([100.0, 100.0 + 2.5 * MEASURED_STEPS])
    monkeypatch.setattr("flexmoe.training.messages.time.monotonic", lambda: next(now))
    estimate = TimeEstimate(shown.append)
    for step in range(1, 20):
        state = SimpleNamespace(global_step=step + 50, max_steps=151, is_world_process_zero=True)
        estimate.on_step_end(None, state, None)
    assert len(shown) == 1
    assert shown[0].startswith("Expected: 4 min for the remaining 96 steps, at 2.5 s per step")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (100, "2 min"), (3600 * 3.5, "3 h 30 min"), (5399, "1 h 30 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_an_interruption_tells_what_is_kept(tmp_path):
    state = SimpleNamespace(global_step=7, max_steps=1000)
    with pytest.raises(TrainingInterrupted, match=r"before its first step\. No checkpoint .*save_steps=100"):
        interrupt(tmp_path, None)
    (tmp_path / "checkpoint-5").mkdir()
    seal_checkpoint(tmp_path / "checkpoint-5")
    with pytest.raises(KeyboardInterrupt, match=r"after step 7 of 1,000\. The checkpoint of step 5 is kept in"):
        interrupt(tmp_path, SimpleNamespace(state=state))
    with pytest.raises(OSError, match="full"), Interruptible(tmp_path, 100):
        raise OSError("full")


def interrupt(work: Path, trainer: object) -> None:
    with Interruptible(work, 100) as run:
        run.trainer = trainer
        raise KeyboardInterrupt
