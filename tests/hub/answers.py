"""A request that was understood as HTTP, and what can be answered to it.

Does not cover the connection: `tests.hub.server` reads the one and writes the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import Any


@dataclass(frozen=True)
class Request:
    """`user` is who the token belongs to, None without one; `args` are what the route's pattern found in `path`."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Message
    body: bytes
    token: str = ""
    user: str | None = None
    args: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def asks(self, name: str) -> bool:
        """Whether the query says `name` is wanted."""
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")


@dataclass(frozen=True)
class Answer:
    """`body` as it goes out; `file` says that it is a stored file's, which ranges and faults apply to."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    file: bool = False


class Refused(Exception):
    """An answer of 4xx, its reason in the headers that the Hub uses."""

    def __init__(self, status: int, message: str, code: str = "", *, extra: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.extra = status, code, dict(extra or {})
        self.headers: dict[str, str] = {}

    def answer(self) -> Answer:
        headers = {"X-Error-Message": str(self).replace("\n", " "), **self.headers}
        if self.code:
            headers["X-Error-Code"] = self.code
        return as_json({"error": str(self), **self.extra}, self.status, headers)


def as_json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})
