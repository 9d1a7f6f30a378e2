"""Untrusted JSON: invalid text is refused, and so is text that is much more expensive to read than to write.

Does not cover which keys are allowed (`tests/packages/test_package.py`, `tests/io/test_tensors.py`).
"""

import copy
import json
import time

import pytest

from flexmoe.io.strict_json import MAX_JSON_DEPTH, MAX_JSON_PARTS, parse_json_object


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b'{"a": NaN}', "not a JSON number"),
        (b'{"a": 1e999}', "not valid JSON"),
        (rb'{"a": "\ud800"}', "surrogates"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"a": "\xff"}', "codec can't decode"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": ' + b"-9" * 51 + b"}", "not valid JSON"),
        (b'{"a": ' + b"9" * 101 + b"}", "an integer of 101 digits; at most 100 are read"),
        (b"[" * 100_000, "nested too deep"),
        (b"[]", "expected a JSON object, found list"),
        (b'{"a": 1, "a": 2}', "key 'a' is given twice"),
    ],
)
def test_invalid_json_is_refused(text: bytes, fault: str) -> None:
    with pytest.raises(ValueError, match=fault) as caught:
        parse_json_object(text, "here")
    assert str(caught.value).startswith("here: ")


@pytest.mark.parametrize("opening", ['{"a":', "["])
@pytest.mark.parametrize("depth", [*range(MAX_JSON_DEPTH - 2, MAX_JSON_DEPTH + 2), 300, 490, 600, 990, 5_000, 100_000])
def test_the_depth_is_bounded_far_below_what_copies_and_writers_take(opening: str, depth: int) -> None:
    closing = "}" if opening.startswith("{") else "]"
    text = '{"a":' + opening * (depth - 1) + "0" + closing * (depth - 1) + "}"
    if depth > MAX_JSON_DEPTH:
        with pytest.raises(ValueError, match=r"^here: the JSON is nested too deep: at most 32 levels are read"):
            parse_json_object(text.encode(), "here")
        return
    value = parse_json_object(text.encode(), "here")
    for _ in range(8):  # as a part of other files
        value = {"part": [value]}
    assert json.loads(json.dumps(copy.deepcopy(value), indent=2)) == value


def test_the_depth_of_a_format_may_be_smaller() -> None:
    assert parse_json_object(b'{"a": [[0]]}', "here", max_depth=3) == {"a": [[0]]}
    with pytest.raises(ValueError, match="at most 2 levels"):
        parse_json_object(b'{"a": [[0]]}', "here", max_depth=2)
    assert parse_json_object(b'{"a": 0}', "here", max_depth=1) == {"a": 0}


def test_the_number_by_which_tokenizers_say_no_limit_is_read() -> None:
    assert parse_json_object(b'{"model_max_length": 1000000000000000019884624838656}', "here") == {
        "model_max_length": 1000000000000000019884624838656
    }


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
