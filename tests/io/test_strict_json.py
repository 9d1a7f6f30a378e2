"""Untrusted JSON: invalid text is refused, and so is text that is much more expensive to read than to write.

Does not cover which keys are allowed (`tests/packages/test_package.py`, `tests/io/test_tensors.py`).
"""

import time

import pytest

from flexmoe.io.strict_json import MAX_JSON_PARTS, parse_json_object


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b'{"a": NaN}', "not a JSON number"),
        (b'{"a": 1e999}', "not valid JSON"),
        (rb'{"a": "\ud800"}', "surrogates"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"a": "\xff"}', "codec can't decode"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b"[]", "expected a JSON object, found list"),
        (b'{"a": 1, "a": 2}', "key 'a' is given twice"),
    ],
)
def test_invalid_json_is_refused(text: bytes, fault: str) -> None:
    with pytest.raises(ValueError, match=fault) as caught:
        parse_json_object(text, "here")
    assert str(caught.value).startswith("here: ")


@pytest.mark.parametrize("part", [b"[],", b"{},", b"0,"])
def test_parts_are_counted_before_they_are_parsed(part: bytes) -> None:
    with pytest.raises(ValueError, match="at most 1,000,000 are read"):
        parse_json_object(b'{"a": [' + part * MAX_JSON_PARTS + b"0]}", "here")


def test_the_maximum_number_of_parts_is_accepted() -> None:
    assert (
        len(parse_json_object(b'{"a": [' + b"0," * (MAX_JSON_PARTS - 2) + b"0]}", "here")["a"]) == MAX_JSON_PARTS - 1
    )


def test_a_duplicate_among_many_keys_is_found_in_linear_time() -> None:
    keys = b",".join(b'"%d":0' % number for number in range(200_000))
    begin = time.monotonic()
    with pytest.raises(ValueError, match="key '199999' is given twice"):
        parse_json_object(b"{" + keys + b',"199999":0}', "here")
    assert time.monotonic() - begin < 20  # seconds; comparing all pairs would take half an hour


def test_a_long_key_is_shortened_in_the_message() -> None:
    with pytest.raises(ValueError, match="is given twice") as caught:
        parse_json_object(b"{" + b",".join([b'"' + b"k" * 1_000_000 + b'":0'] * 2) + b"}", "here")
    assert len(str(caught.value)) < 300
