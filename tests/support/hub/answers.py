"""Parsed HTTP requests, and answers to them.

Does not cover the connection (`tests.support.hub.server`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import Any


@dataclass(frozen=True)
class Request:
    """`user` is the owner of the token, None without one; `args` are the groups of the route's pattern in `path`."""

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

    def has_flag(self, name: str) -> bool:
        """Whether the query sets the flag `name`."""
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")


@dataclass(frozen=True)
class Answer:
    """`body` is sent unchanged; `file` marks a stored file, to which ranges and faults apply."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    file: bool = False


class Refused(Exception):
    """A 4xx answer, with its reason in the Hub's headers."""

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
