"""Repositories in memory: commits, branches, tags and LFS objects.

A commit holds its complete tree. Does not cover git itself (packs, merges, `refs/pr`); nothing is stored on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatch
from functools import cached_property
from typing import Literal

from tests.support.hub.answers import Refused

LFS_FROM = 10 * 1024 * 1024  # bytes; smaller files are stored in git, unless .gitattributes lists them

# Abridged from the file in a new model repository of the Hub.
GITATTRIBUTES = "".join(
    f"*{ending} filter=lfs diff=lfs merge=lfs -text\n"
    for ending in (".bin", ".gguf", ".h5", ".npz", ".onnx", ".parquet", ".pt", ".pth", ".safetensors", ".zip")
).encode()


@dataclass(frozen=True)
class File:
    """A file's bytes, and whether git stores them or an LFS pointer to them."""

    body: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.body).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """The content of the pointer that git stores for an LFS file."""
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.body)}\n".encode()
        )

    @cached_property
    def blob_id(self) -> str:
        """The git hash of the stored content."""
        content = self.pointer if self.lfs else self.body
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        """The ETag of the Hub: the SHA-256 for LFS, else git's blob id."""
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    """A tree and its history."""

    files: Mapping[str, File]
    title: str
    message: str = ""
    author: str = ""
    parent: str | None = None
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z"))


@dataclass
class Repository:
    """`commits` maps a hash to its tree, `refs` and `tags` a branch and a tag to a hash; `tokens` have access if it
    is gated.

    `name` is "owner/name", for a dataset "datasets/owner/name". `objects` are the uploaded LFS objects by SHA-256,
    whether in a commit or not.
    """

    name: str
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    gated: Literal["auto", "manual"] | bool = False
    tokens: set[str] = field(default_factory=set)

    @property
    def owner(self) -> str:
        return self.name.split("/")[-2]

    def commit(
        self,
        files: Mapping[str, File | bytes],
        branch: str = "main",
        *,
        title: str = "Upload",
        message: str = "",
        author: str = "",
    ) -> str:
        """Adds a commit with the tree `files` to `branch`; returns its hash."""
        tree = {path: self._file(path, file) for path, file in files.items()}
        self.objects |= {file.sha256: file.body for file in tree.values() if file.lfs}
        parent = self.refs.get(branch)
        described = repr((parent, title, len(self.commits), sorted((path, file.etag) for path, file in tree.items())))
        digest = hashlib.sha1(described.encode()).hexdigest()
        self.commits[digest] = Commit(tree, title, message, author, parent)
        self.refs[branch] = digest
        return digest

    def resolve(self, revision: str) -> str:
        """The commit of a branch, a tag or a full hash.

        Raises:
            Refused: 404 RevisionNotFound.
        """
        digest = self.refs.get(revision) or self.tags.get(revision) or revision
        if digest not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return digest

    def files(self, revision: str) -> Mapping[str, File]:
        return self.commits[self.resolve(revision)].files

    def history(self, revision: str) -> Iterator[tuple[str, Commit]]:
        """Commits with their hashes, the newest first."""
        digest: str | None = self.resolve(revision)
        while digest is not None:
            yield digest, self.commits[digest]
            digest = self.commits[digest].parent

    def in_lfs(self, path: str, size: int, attributes: bytes = b"") -> bool:
        """Whether a new file is stored in LFS: by its size, or by the .gitattributes of the tree."""
        patterns = [line.split()[0] for line in attributes.decode().splitlines() if "filter=lfs" in line]
        return size >= LFS_FROM or any(fnmatch(path.rsplit("/")[-1], pattern) for pattern in patterns)

    def _file(self, path: str, file: File | bytes) -> File:
        return file if isinstance(file, File) else File(file, self.in_lfs(path, len(file)))


def folders(paths: Iterable[str]) -> set[str]:
    """Every folder that contains one of `paths`, at any depth."""
    return {path.rsplit("/", depth)[0] for path in paths for depth in range(1, path.count("/") + 1)}
