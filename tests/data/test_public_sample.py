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


@pytest.mark.promise(
    "`train`, `verify`",
    "a public sample with a line that is not a text, or nested too deep",
    "refused with the file and the line",
)
@pytest.mark.parametrize(
    ("line", "error", "fault"),
    [
        (b"[" * 100_000, ValueError, r"public\.jsonl: .* \(line 2 is not a JSON object: .* nested too deep"),
        (b'{"text": ', ValueError, r"public\.jsonl: .* \(line 2 is not a JSON object: Expecting value"),
        (b"3", ValueError, "line 2 is a int"),
        (b'{"text": 3}', TypeError, r"public\.jsonl: .* holds int values \(row 2\)"),
        (b'{"body": "x"}', TypeError, r"public\.jsonl: .* holds NoneType values \(row 2\)"),
        (b'{"text": "\\ud83d"}', ValueError, "row 2 holds half of a surrogate pair"),
        (b'{"text": "\xff"}', ValueError, r"public\.jsonl: not UTF-8 text"),
    ],
)
def test_damaged_lines(tmp_path, line, error, fault):
    content = b'{"text": "one"}\n' + line + b"\n"
    (tmp_path / "public.jsonl").write_bytes(content)
    record = {"file": "public.jsonl", "sha256": hashlib.sha256(content).hexdigest()}
    with pytest.raises(error, match=fault):
        read_public_sample(tmp_path, record)


def test_a_config_cannot_name_files_outside_its_folder(tmp_path):
    content = b'{"text": "private"}\n'
    (tmp_path / "model").mkdir()
    (tmp_path / "outside.jsonl").write_bytes(content)
    for name in ("../outside.jsonl", str(tmp_path / "outside.jsonl"), "..\\outside.jsonl", "..", "", None):
        record = {"file": name, "sha256": hashlib.sha256(content).hexdigest()}
        with pytest.raises(ValueError, match="not a plain file name"):
            read_public_sample(tmp_path / "model", record)
