"""Reading, splitting and packing text."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexmoe.data import END_OF_DOCUMENT, pack, read_documents, read_public_sample, split_documents


@pytest.fixture(scope="module")
def digits():
    """A tokenizer whose token of "7" is 7 and whose end-of-sequence token is 10."""
    words = {str(number): number for number in range(10)} | {"<eos>": 10}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", model_max_length=4)


def write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_tables_give_a_document_per_row(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"body": f"text {i}", "n": i} for i in range(1500)] + [{"body": " \n", "n": 0}]
    file = write_rows(tmp_path / f"rows.{suffix}", rows)
    assert read_documents([file], column="body") == [f"text {i}" for i in range(1500)]
    written = [
        path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size
    ]  # `datasets` leaves an empty lock
    assert written == [file], "the text was copied elsewhere"


def test_text_files_are_split_at_separator_lines_only(tmp_path):
    whole = tmp_path / "whole.md"
    whole.write_text("one\n\ntwo\n")
    several = tmp_path / "several.txt"
    several.write_text(f"a\nb\n{END_OF_DOCUMENT}\n\n{END_OF_DOCUMENT}\nc {END_OF_DOCUMENT}\n", encoding="utf-8")
    assert read_documents([several, whole]) == ["a\nb\n", f"c {END_OF_DOCUMENT}\n", "one\n\ntwo\n"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_missing_column(tmp_path, suffix):
    file = write_rows(tmp_path / f"rows.{suffix}", [{"body": "x", "title": "y"}])
    with pytest.raises(ValueError, match=r"no column 'text'. Its columns: body, title"):
        read_documents([file])


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("row", [{"body": None, "n": 0}, {"n": 0}])
def test_a_row_without_text_is_an_error(tmp_path, suffix, row):
    file = write_rows(tmp_path / f"rows.{suffix}", [{"body": f"text {i}", "n": i} for i in range(1200)] + [row])
    with pytest.raises(ValueError, match="row 1201 has no text in column 'body'"):
        read_documents([file], column="body")


@pytest.mark.parametrize("name", ["notes[1].jsonl", "a*b.parquet", "what?.json", "[x]/rows.jsonl"])
def test_paths_are_not_patterns(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write_rows(tmp_path / f"aXb{Path(name).suffix}", [{"text": "another file"}])
    file = write_rows(tmp_path / name, [{"text": "this file"}])
    assert read_documents([file]) == ["this file"]


def test_invalid_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        read_documents([tmp_path / "absent.txt"])
    (tmp_path / "data.csv").write_text("text\nx\n")
    with pytest.raises(ValueError, match=r"end in \.txt, \.md"):
        read_documents([tmp_path / "data.csv"])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty data set"):
        read_documents([tmp_path / "empty.jsonl"])
    (tmp_path / "broken.jsonl").write_text('{"text": "ok"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"broken.jsonl: cannot be read as jsonl"):
        read_documents([tmp_path / "broken.jsonl"])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_documents([tmp_path / "latin.txt"])
    numbers = write_rows(tmp_path / "numbers.jsonl", [{"text": 3}])
    with pytest.raises(TypeError, match="holds int values"):
        read_documents([numbers])
    with pytest.raises(TypeError, match="a list"):
        read_documents(str(numbers))


def test_split_is_by_document_and_keeps_copies_together():
    documents = [f"document {i % 40}" for i in range(100)]
    training, validation = split_documents(documents, 0.1, seed=3)
    assert sorted(training + validation) == sorted(documents)
    assert not set(training) & set(validation)
    assert len(set(validation)) == 4
    assert set(split_documents(documents[::-1], 0.1, seed=3)[1]) == set(validation), "depends on the order"
    assert set(split_documents(documents, 0.1, seed=4)[1]) != set(validation), "does not depend on the seed"
    assert split_documents(documents, 0.0, seed=3) == (documents, [])
    assert split_documents(["a", "b"], 0.99, seed=0)[0], "nothing left to train on"
    with pytest.raises(ValueError, match="1 distinct document"):
        split_documents(["same", "same"], 0.05, seed=0)
    with pytest.raises(ValueError, match="below 1"):
        split_documents(documents, 1.0, seed=0)


def test_pack_puts_eos_after_each_document_and_drops_the_tail(digits):
    packed = pack(["1 2 3", "4", "5 6 7 8 9"], digits, 5)
    assert packed.dtype == torch.int64
    assert packed.tolist() == [[1, 2, 3, 10, 4], [10, 5, 6, 7, 8]]
    assert pack(["1"] * 2500, digits, 2).tolist() == [[1, 10]] * 2500
    with pytest.raises(ValueError, match=r"2 document\(s\) with 4 tokens in all: less than one sequence of 8"):
        pack(["1", "2"], digits, 8)


def test_a_changed_public_sample_is_refused(tmp_path):
    content = (
        json.dumps({"text": "one\u2028two"}, ensure_ascii=False) + "\n" + json.dumps({"text": "three"}) + "\n"
    ).encode()
    (tmp_path / "public_sample.jsonl").write_bytes(content)
    record = {"file": "public_sample.jsonl", "sha256": hashlib.sha256(content).hexdigest()}
    assert read_public_sample(tmp_path, record) == ["one\u2028two", "three"]
    (tmp_path / "public_sample.jsonl").write_bytes(content.replace(b"three", b"threE"))
    with pytest.raises(ValueError, match="the file was changed"):
        read_public_sample(tmp_path, record)
    with pytest.raises(ValueError, match="No public sample is stored"):
        read_public_sample(tmp_path, None)


def test_a_config_cannot_name_files_outside_its_folder(tmp_path):
    content = b'{"text": "private"}\n'
    (tmp_path / "model").mkdir()
    (tmp_path / "outside.jsonl").write_bytes(content)
    for name in ("../outside.jsonl", str(tmp_path / "outside.jsonl"), "..\\outside.jsonl", "..", "", None):
        record = {"file": name, "sha256": hashlib.sha256(content).hexdigest()}
        with pytest.raises(ValueError, match="not a plain file name"):
            read_public_sample(tmp_path / "model", record)
