"""Where a folder comes from: a path on this machine, or a repository on the Hugging Face Hub.

The only module of FlexMoE that opens a network connection, and always through `huggingface_hub`. It does not look into
what it fetched (`tensors_flexmoe` and `packages_flexmoe` validate), and it does not upload.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# Weights as safetensors under the names that transformers and FlexMoE write, and everything a tokenizer is made of.
# Not asked for: pickles, code, second copies of the weights (`consolidated.safetensors`, `original/`, ONNX, GGUF).
DOWNLOADED = (
    "model*.safetensors",
    "expert*.safetensors",
    "adapter_model.safetensors",
    "router.safetensors",
    "*.json",
    "*.jsonl",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "README.md",
    "LICENSE*",
)
NEVER_DOWNLOADED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.py", "original/*", "onnx/*", "openvino/*")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ResolvedFolder:
    """A folder that can be read now, and the Hub repository and commit hash that it came from, if it did."""

    path: Path
    repo: str | None = None
    revision: str | None = None


def resolve_folder(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    allow_patterns: Sequence[str] | None = None,
) -> ResolvedFolder:
    """The folder that `source` names: itself if it exists, else the Hub repository of that id, fetched into the cache.

    Args:
        source: a folder, or a Hub id ("owner/name", or a bare "name"). A `Path` is never taken for a Hub id.
        revision: branch, tag or commit of a Hub repository; None is its main branch.
        allow_patterns: files to fetch instead of `DOWNLOADED`; pickles and code stay out whatever it says.

    Raises:
        FileNotFoundError: neither a folder nor a repository (or revision) that this account can see; or not cached,
            while offline.
        NotADirectoryError: `source` is a file.
        PermissionError: the repository is gated and this account has not been let in.
        ConnectionError: the Hub answered with a fault of its own.
        ValueError: `revision` given for a folder.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"{path} is a folder, and only Hub repositories have revisions: leave out revision={revision!r}"
            )
        return ResolvedFolder(path)
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; expected a folder, or the id of a Hub repository")
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise FileNotFoundError(
            f"no folder {path}; expected one, or the id of a Hub repository such as 'allenai/OLMo-2-0425-1B'"
        )
    with _plain_errors(source, revision):
        snapshot = snapshot_download(
            source,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            allow_patterns=list(DOWNLOADED if allow_patterns is None else allow_patterns),
            ignore_patterns=list(NEVER_DOWNLOADED),
        )
    return ResolvedFolder(Path(snapshot), repo=source, revision=Path(snapshot).name)


@contextmanager
def _plain_errors(repo: str, revision: str | None) -> Iterator[None]:
    """`huggingface_hub`'s errors as one sentence each: what, and the way out. Subclasses come before their bases."""
    try:
        yield
    except GatedRepoError as error:
        raise PermissionError(
            f"the Hub repository {repo!r} is gated: ask for access on its page, then log in (`hf auth login`) "
            "or pass a token"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo!r} is neither a folder here nor a Hub repository that this account can see; "
            "check the spelling, or log in (`hf auth login`) if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"the Hub repository {repo!r} has no revision {revision!r} (a branch, tag or commit)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo!r} is not a folder here, and the Hub repository of that name is not (wholly) in the local cache "
            "while the Hub cannot be reached or is switched off (HF_HUB_OFFLINE, local_files_only): "
            "go online once, or give a folder"
        ) from error
    except HFValidationError as error:
        raise FileNotFoundError(f"{repo!r} is neither a folder here nor a valid Hub id: {error}") from error
    except (EntryNotFoundError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(
            f"the Hub did not hand out {repo!r} ({reason}); try again later, or give a folder"
        ) from error


__all__ = ["DOWNLOADED", "NEVER_DOWNLOADED", "ResolvedFolder", "resolve_folder"]
