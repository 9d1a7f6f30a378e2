"""Faults between the Hub and its client; a test adds them to `HubServer.faults`.

Does not cover faults of the client's machine (a full disk, no permission).
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal

Kind = Literal["cut", "short", "flip", "status", "slow"]
# These apply to downloads of a stored file; the others, to every request.
OF_A_BODY: frozenset[Kind] = frozenset({"cut", "short", "flip"})


@dataclass
class Fault:
    """Applies to requests whose path matches the glob `path`, after the first `skip`, to the next `times`.

    A stored file's path ends in its name, in the Hub and in its storage: "*/model.safetensors" matches both.

    - "cut": the connection ends at the file's byte `at`, with the Content-Length of the complete file.
      With `times=None` the file is truncated, however often a client resumes.
    - "short": the file ends at byte `at`, and the Content-Length agrees.
    - "flip": byte `at` of the file has its lowest bit flipped.
    - "status": the answer is `status`, and nothing is done.
    - "slow": the answer comes after `seconds`.
    """

    path: str
    kind: Kind
    at: int = 0
    status: int = 503
    seconds: float = 0.0
    skip: int = 0
    times: int | None = 1
    matched: int = 0  # requests so far

    def applies(self, path: str, *, is_file: bool) -> bool:
        """Whether the fault applies to this request; counts the request. Call it under a lock."""
        if (self.kind in OF_A_BODY) != is_file or not fnmatch(path, self.path):
            return False
        self.matched += 1
        return self.matched > self.skip and (self.times is None or self.matched <= self.skip + self.times)
