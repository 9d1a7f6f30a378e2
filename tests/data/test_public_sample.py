"""The public sample of a grafted model."""

import hashlib
import json

import pytest

from flexmoe.data import read_public_sample


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
