"""What can go wrong between a Hub and its client; a test puts faults into `HubServer.faults`.

Does not cover faults of the client's own machine (a full disk, no permission).
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal

Kind = Literal["cut", "short", "flip", "status", "slow"]
# These meet downloads of a stored file; the others, every request.
OF_A_BODY: frozenset[Kind] = frozenset({"cut", "short", "flip"})


@dataclass
class Fault:
    """Meets requests whose path matches the glob `path`: the first `skip` of them pass, the next `times` do not.

    A stored file's path ends in its name, in the Hub and in its storage: "*/model.safetensors" matches both.

    - "cut": the connection ends at the file's byte `at`, the Content-Length being the whole file's.
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
    met: int = 0  # how many requests matched so far

    def meets(self, path: str, *, is_file: bool) -> bool:
        """Whether this request is one of those; counts it. Call it under a lock."""
        if (self.kind in OF_A_BODY) != is_file or not fnmatch(path, self.path):
            return False
        self.met += 1
        return self.met > self.skip and (self.times is None or self.met <= self.skip + self.times)
