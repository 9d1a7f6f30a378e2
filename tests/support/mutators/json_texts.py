"""Invalid JSON, JSON that is expensive to parse, and values of wrong types.

Does not cover false values of the right type (`manifests`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.mutators.packages import MANIFEST, MayPass, manifest_of, write_manifest

MANY = 10_000_000  # repetitions of three bytes: under the 32 MiB that JSON may have


def nested(depth: int, chance: random.Random) -> bytes:
    return chance.choice([b"[" * depth + b"]" * depth, b'{"a":' * depth + b"0" + b"}" * depth])


def depths(chance: random.Random) -> int:
    near_the_limits, near_the_librarys = chance.randrange(8, 48), chance.randrange(250, 500)
    return chance.choice(
        [near_the_limits, near_the_limits, chance.randrange(100, 1200), near_the_librarys, 5_000, 100_000, 1_000_000]
    )


HOSTILE_TEXTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    # changes of the text of a JSON object
    "NaN": lambda text, _: text[:-1] + b',"x":NaN}',
    "Infinity": lambda text, _: text[:-1] + b',"x":[-Infinity]}',
    "1e999": lambda text, _: text[:-1] + b',"x":1e999}',
    "a huge integer": lambda text, _: text[:-1] + b',"x":' + b"9" * 100_000 + b"}",
    "a large integer": lambda text, _: text[:-1] + b',"x":' + b"9" * 4_000 + b"}",
    "a lone surrogate": lambda text, _: text[:-1] + rb',"\ud800":1}',
    "a lone surrogate as a value": lambda text, _: text[:-1] + rb',"x":"\udfff"}',
    "a byte order mark": lambda text, _: b"\xef\xbb\xbf" + text,
    "UTF-16": lambda text, _: text.decode().encode("utf-16"),
    "not UTF-8": lambda text, chance: text[:-1] + b',"' + bytes([chance.randrange(128, 256)]) + b'":1}',
    "overlong UTF-8": lambda text, _: text[:-1] + b',"\xc0\xaf":1}',
    "no object": lambda text, chance: chance.choice([b"[]", b"[" + text + b"]", b'"x"', b"null", b"1", b"true"]),
    "nothing": lambda text, chance: chance.choice([b"", b" ", b"\0", b"{", b"{}", b"}"]),
    "two objects": lambda text, _: text + text,
    "a comment": lambda text, _: text[:-1] + b"/* x */}",
    "a comma at the end": lambda text, _: text[:-1] + b",}",
    "single quotes": lambda text, _: text.replace(b'"', b"'"),
    "control characters": lambda text, chance: text[:-1] + b',"' + bytes([chance.randrange(32)]) + b'":1}',
    "an unknown key": lambda text, _: text[:-1] + b',"__proto__":{}}',
    "an unknown long key": lambda text, _: text[:-1] + b',"' + b"x" * 1_000_000 + b'":{}}',
    "a key with escape sequences": lambda text, _: text[:-1] + rb',"\u001b[2J\r\nok\u202e":{}}',
    "a key twice": lambda text, _: text[:-1] + b"," + text[1:],
    "a long key twice": lambda text, _: text[:-1] + (b',"' + b"k" * 1_000_000 + b'":1') * 2 + b"}",
}

BIG_VALUES: dict[str, Callable[[], bytes]] = {
    "empty lists": lambda: b"[" + b"[]," * MANY + b"[]]",
    "empty objects": lambda: b"[" + b"{}," * MANY + b"{}]",
    "zeros": lambda: b"[" + b"0," * MANY + b"0]",
    "numbers": lambda: b"[" + b"1.5," * (MANY // 2) + b"1.5]",
    "spaces": lambda: b" " * (3 * MANY) + b"0",
    "a long text": lambda: b'"' + b"x" * (3 * MANY) + b'"',
    "keys, the last one twice": lambda: (
        b"{" + b",".join(b'"%d":0' % i for i in range(MANY // 5)) + b',"%d":0}' % (MANY // 5 - 1)
    ),
    "a long number": lambda: b"9" * (3 * MANY),
}


def hostile_json(folder: Path, chance: random.Random) -> str:
    what = chance.choice(list(HOSTILE_TEXTS))
    text = (folder / MANIFEST).read_bytes().strip()
    (folder / MANIFEST).write_bytes(HOSTILE_TEXTS[what](text, chance))
    return what


def nested_json(folder: Path, chance: random.Random) -> str:
    key, depth = chance.choice([*manifest_of(folder), "unknown", *["training"] * 6]), depths(chance)
    values = {**manifest_of(folder), key: "DEEP"}
    (folder / MANIFEST).write_bytes(json.dumps(values).encode().replace(b'"DEEP"', nested(depth, chance)))
    # "training" may be an object of any depth that the reader accepts
    text = f"{key}, {depth} deep"
    return MayPass(text) if key == "training" else text


def big_json(folder: Path, chance: random.Random) -> str:
    key, what = chance.choice([*manifest_of(folder), "unknown"]), chance.choice(list(BIG_VALUES))
    text = json.dumps({**manifest_of(folder), key: "BIG"}).encode()
    (folder / MANIFEST).write_bytes(text.replace(b'"BIG"', BIG_VALUES[what]()))
    text = f"{key}: {what}"
    is_text = key in ("license", "data_statement") and what == "a long text"
    return MayPass(text) if is_text else text


def long_texts(folder: Path, chance: random.Random) -> str:
    """Texts around the limits of the format, in characters of one to four bytes; all others must be refused."""
    values = manifest_of(folder)
    key = chance.choice(["license", "data_statement", "training", "version", "dtype", "class", "model_type"])
    length = chance.choice([1, 63, 64, 65, 199, 201, 1000, 1001, 5000, 10_000, 10_001, 70_000, 300_000, 900_000])
    text = chance.choice("x\u00e9\u4e2d\U0001f600") * (length if length < 200_000 else length // 4)
    if key == "training":
        values["training"] = chance.choice([{"notes": text}, {text: 1}, {"log": [text] * 3}, {"log": [0] * length}])
    else:
        holder = {"class": values["ffn"], "model_type": values["anchor"]}.get(key, values)
        holder[key] = text
    write_manifest(folder, values)
    return MayPass(f"{key} of {length} characters {text[0]!r}")


def wrong_types(folder: Path, chance: random.Random) -> str:
    """A value of another type for a key of the manifest, or for one within."""
    values = manifest_of(folder)
    holder: Any = values
    keys: list[Any] = []
    while not keys or (isinstance(holder, dict | list) and holder and chance.random() < 0.6):
        keys.append(chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder))))
        parent, holder = holder, holder[keys[-1]]
    wrong: list[Any] = [None, True, False, -1, 0, 1.5, 2**31 - 1, 2**31, 2**63, 10**300, -(10**300), 1e308, 5e-324]
    wrong += ["", "x", "\0", "\x1b[2J\r\n", "\U0001f600" * 1000, "x" * 100_000, [], [[]], {}, {"": ""}, [None] * 1000]
    value = parent[keys[-1]] = chance.choice([entry for entry in wrong if repr(entry) != repr(holder)])
    write_manifest(folder, values)
    return MayPass(f"{'.'.join(map(str, keys))} is {value!r:.40}")


def missing_key(folder: Path, chance: random.Random) -> str:
    values = manifest_of(folder)
    key = chance.choice(list(values))
    del values[key]
    write_manifest(folder, values)
    return MayPass(key)
