"""Downloads from and uploads to the Hugging Face Hub, and checks of access to a repository.

The only module of FlexMoE that opens a network connection, always through `huggingface_hub`, so that its tokens,
cache, resumed downloads and HF_HUB_OFFLINE apply. Does not cover validating downloads (`flexmoe.io.tensors`,
`flexmoe.packages.package`) or selecting the files to upload (`flexmoe.hub.publish`).
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import logging

from flexmoe.io.hub_ids import HUB_ID

# Weights as safetensors under the names that transformers and FlexMoE write, and all files of `flexmoe.companions`:
# tokenizer, chat templates, licence and terms, in the spellings that repositories have. Excluded: pickles, code,
# second copies of the weights (`consolidated.safetensors`, `original/`, ONNX, GGUF).
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
    "*.spm",
    "*.bpe",
    "*.codes",
    "*.tokenizer",
    "tokenizer.model.*",
    "README.md",
    *("LICEN[CS]E*", "[Ll]icen[cs]e*", "NOTICE*", "[Nn]otice*", "COPYING*", "TERMS*", "[Tt]erms*", "USE_POLICY*"),
    *("*_LICEN[CS]E*", "*[Uu]se_[Pp]olicy*", "*[Tt]erms_of_[Uu]se*"),
    "model.sig",
)
NEVER_DOWNLOADED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.py", "original/*", "onnx/*", "openvino/*")

ATTEMPTS = 3  # of a download whose connection breaks; complete files are kept in between


@dataclass(frozen=True)
class ResolvedFolder:
    """A local folder, with the Hub repository and commit hash if it was downloaded."""

    path: Path
    repo: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Wanted:
    """A source to resolve, for `HubAccess.resolve_all`.

    Attributes:
        source: a folder or a Hub id.
        revision: of a Hub repository.
        patterns: files of a repository to download.
        is_repo: `source` is a Hub id, even if a folder of that name exists.
        owned: its owner may withdraw it, so access is checked even if it is in the cache.
    """

    source: str | Path
    revision: str | None = None
    patterns: Sequence[str] = DOWNLOADED
    is_repo: bool = False
    owned: bool = False


@dataclass(frozen=True)
class Pushed:
    """The result of an upload: the commit `revision` of `repo`, its page `url`, and the pull request, if any."""

    repo: str
    revision: str
    url: str
    pull_request: str | None = None


def resolve_folder(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    allow_patterns: Sequence[str] | None = None,
    is_repo: bool = False,
) -> ResolvedFolder:
    """The folder `source` if it exists, else the Hub repository of that id, downloaded into the cache.

    Args:
        source: a folder, or a Hub id ("owner/name", or a bare "name"). A `Path` is never interpreted as a Hub id.
        revision: branch, tag or commit of a Hub repository; None is its main branch.
        allow_patterns: files to download instead of `DOWNLOADED`; pickles and code are always excluded.
        is_repo: `source` is a Hub id, even if a folder of that name exists.

    Raises:
        FileNotFoundError: neither a folder nor a repository (or revision) visible to this account; or it is not cached
            in offline mode.
        NotADirectoryError: `source` is a file.
        PermissionError: the repository is gated or restricted, and this account has no access.
        ConnectionError: the Hub cannot be reached and not everything is cached, or it returned a server error.
        ValueError: `revision` given for a folder.
    """
    path = Path(source).expanduser()
    if is_repo and not (isinstance(source, str) and HUB_ID.fullmatch(source)):
        raise FileNotFoundError(f"{source!r} is not the id of a Hub repository")
    if not is_repo and path.is_dir():
        if revision is not None:
            raise ValueError(
                f"{path} is a folder, and only Hub repositories have revisions: leave out revision={revision!r}"
            )
        return ResolvedFolder(path)
    if not is_repo and path.exists():
        raise NotADirectoryError(f"{path} is a file; expected a folder, or the id of a Hub repository")
    if not is_repo and not is_hub_id(source):
        raise FileNotFoundError(
            f"no folder {path}; expected one, or the id of a Hub repository such as 'allenai/OLMo-2-0425-1B'"
        )
    repo = str(source)
    with _as_builtin_errors(repo, revision, token=token, offline=local_files_only or is_offline_mode()):
        snapshot = _download(
            repo,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            allow_patterns=list(DOWNLOADED if allow_patterns is None else allow_patterns),
            ignore_patterns=list(NEVER_DOWNLOADED),
        )
    return ResolvedFolder(Path(snapshot), repo=repo, revision=Path(snapshot).name)


def _download(repo: str, **options: Any) -> str:
    """`snapshot_download`, resumed if the connection breaks: not every version does so itself."""
    for _ in range(ATTEMPTS - 1):
        try:
            return snapshot_download(repo, **options)
        except Exception as error:
            if not _is_transport_error(error):
                raise
    return snapshot_download(repo, **options)


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """Whether `source` is a Hub id rather than a folder: text of the form "owner/name" without such a folder."""
    return isinstance(source, str) and bool(HUB_ID.fullmatch(source)) and not Path(source).expanduser().is_dir()


@dataclass(frozen=True)
class HubAccess:
    """Options for accessing the Hub, as in `resolve_folder`."""

    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False

    def resolve(
        self, source: str | Path, revision: str | None = None, *, owned: bool = False, **options: Any
    ) -> ResolvedFolder:
        """The folder of `source`, downloaded if necessary.

        Args:
            owned: its owner may withdraw it: access is checked even if it is in the cache.
            options: `allow_patterns` and `is_repo` of `resolve_folder`.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError, ValueError: as `resolve_folder` and `check_access`.
        """
        if owned and (options.get("is_repo") or is_hub_id(source)):
            self.check_access(str(source))
        return resolve_folder(source, revision=revision, **vars(self), **options)

    def resolve_all(self, wanted: Mapping[str, Wanted]) -> dict[str, ResolvedFolder | OSError]:
        """Resolves several sources concurrently, with a progress bar.

        Returns:
            By the keys of `wanted`, the folder, or the error that `resolve` raised.
        """

        def resolve_one(part: Wanted) -> ResolvedFolder | OSError:
            try:
                return self.resolve(
                    part.source,
                    part.revision,
                    owned=part.owned,
                    allow_patterns=part.patterns,
                    is_repo=part.is_repo,
                )
            except OSError as error:
                return error

        remote = sum(part.is_repo or is_hub_id(part.source) for part in wanted.values())
        pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="flexmoe-pull")
        try:
            jobs = {key: pool.submit(resolve_one, part) for key, part in wanted.items()}
            disable = None if remote > 1 else True  # None disables the bar if the output is not a terminal
            bar = logging.tqdm(jobs.items(), desc="Downloading the parts of a model", disable=disable)
            return {key: job.result() for key, job in bar}
        finally:
            pool.shutdown(cancel_futures=True)

    def check_access(self, repo: str) -> None:
        """Checks with the Hub that this account has access to a repository now, regardless of the cache.

        Skipped in offline mode (HF_HUB_OFFLINE, `local_files_only`). If the Hub cannot be reached, a warning is
        issued.

        Raises:
            FileNotFoundError: there is no such repository (any more), or it is private.
            PermissionError: it is gated or restricted, and this account has no access.
        """
        if self.local_files_only or is_offline_mode():
            return
        try:
            with _as_builtin_errors(repo, None, token=self.token):
                HfApi(token=self.token).auth_check(repo)
        except ConnectionError as error:
            warnings.warn(
                f"Could not check whether the owner of {repo!r} has withdrawn it: {error}. The cached copy is used.",
                stacklevel=2,
            )


def push_files(
    files: Mapping[str, Path],
    repo: str,
    *,
    outdated: Callable[[Sequence[str]], Sequence[str]] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str,
    commit_description: str | None = None,
) -> Pushed:
    """Uploads files as one commit to a model repository, which is created if necessary.

    Args:
        files: by their paths in the repository, the files to upload; nothing else is read.
        outdated: called with the file names at the top level of the repository; returns those that the same commit
            deletes unless they are in `files`, e.g. shards of an older version.
        private: visibility of a new repository; None is the account's default.
        revision: the branch, created if necessary; None is the main branch.
        create_pr: open a pull request instead.

    Raises:
        PermissionError: no token, or this account has no write access.
        FileNotFoundError: there is no such user or organisation.
        ValueError: `repo` is not a Hub id.
        ConnectionError: the Hub cannot be reached, or returned a server error.
    """
    check_pushable(repo)
    api = HfApi(token=token)
    with _as_builtin_errors(repo, revision, writing=True):
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        present = (
            [name for name in api.list_repo_files(repo, revision=revision) if "/" not in name] if outdated else []
        )
        deleted = [name for name in outdated(present) if name not in files] if outdated else []
        operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in deleted]
        operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
        commit = api.create_commit(
            repo,
            operations,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
        )
    return Pushed(repo, commit.oid, f"{api.endpoint}/{repo}", commit.pr_url)


def check_pushable(repo: str) -> None:
    """Checks, before anything is written or sent, that `repo` can be pushed to.

    Raises:
        ValueError: it is not a Hub id.
        ConnectionError: HF_HUB_OFFLINE is set.
    """
    if not HUB_ID.fullmatch(repo):
        raise ValueError(f"{repo!r} is not a Hub id; expected one such as 'my-organisation/math-expert'.")
    if is_offline_mode():
        raise ConnectionError(f"Nothing can be pushed to {repo!r} while HF_HUB_OFFLINE is set: unset it.")


@contextmanager
def _as_builtin_errors(
    repo: str,
    revision: str | None,
    *,
    token: str | bool | None = None,
    writing: bool = False,
    offline: bool = False,
) -> Iterator[None]:
    """Turns `huggingface_hub`'s errors into built-in ones with one sentence: what failed, and what to do."""
    try:
        yield
    except GatedRepoError as error:  # subclasses before their bases
        raise PermissionError(
            f"the Hub repository {repo!r} is gated: ask for access on its page, {HfApi().endpoint}/{repo}, then "
            "log in (`hf auth login`) or pass a token"
        ) from error
    except RepositoryNotFoundError as error:
        raise (_not_writable(repo) if writing else _no_repository(repo, token)) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"the Hub repository {repo!r} has no revision {revision!r} (a branch, tag or commit)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise _not_cached(repo, error, offline) from error
    except HFValidationError as error:
        raise FileNotFoundError(f"{repo!r} is neither a local folder nor a valid Hub id: {error}") from error
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"there is no token for {repo!r}: log in (`hf auth login`) or pass one") from error
    except OfflineModeIsEnabled as error:
        raise ConnectionError(f"{repo!r} cannot be downloaded while HF_HUB_OFFLINE is set") from error
    except (EntryNotFoundError, HfHubHTTPError) as error:
        raise _rejected(repo, error, writing) from error
    except Exception as error:
        if not _is_transport_error(error):
            raise
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise ConnectionError(
            f"the connection to the Hub failed or broke off at {repo!r} ({type(error).__name__}: {reason}); try "
            "again: complete files are kept"
        ) from error


def _not_writable(repo: str) -> PermissionError:
    return PermissionError(
        f"the Hub has no repository {repo!r} that this account may write to: check the name and the organisation, and "
        "log in (`hf auth login`) with a token that has write access"
    )


def _no_repository(repo: str, token: str | bool | None) -> FileNotFoundError:
    """The error for an id that is not a model repository visible to this account."""
    for kind in ("dataset", "space"):
        try:
            HfApi(token=token).repo_info(repo, repo_type=kind)
        except Exception:  # of any kind: the query only improves the message
            continue
        return FileNotFoundError(f"{repo!r} is a {kind} on the Hub; expected a model repository")
    return FileNotFoundError(
        f"{repo!r} is neither a local folder nor a Hub repository that this account can see; "
        "check the spelling, or log in (`hf auth login`) if it is private"
    )


def _not_cached(repo: str, error: Exception, offline: bool) -> OSError:
    """The error for a repository that is not completely cached: offline mode, or the Hub cannot be reached."""
    if offline:
        return FileNotFoundError(
            f"{repo!r} is not a local folder, and the Hub repository of that name is not (completely) in the local "
            "cache in offline mode (HF_HUB_OFFLINE, local_files_only): go online once, or pass a folder"
        )
    cause = error.__cause__ or error
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return ConnectionError(
        f"the Hub cannot be reached for {repo!r}, which is not a local folder and not (completely) in the local cache "
        f"({reason}); try again later, or pass a folder"
    )


def _rejected(repo: str, error: Exception, writing: bool) -> OSError:
    """The error for an HTTP error that has no class of its own."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) and writing:
        return PermissionError(
            f"this account may not write to {repo!r} on the Hub (status {status}): log in (`hf auth login`) with a "
            "token that has write access, or choose a repository of your own"
        )
    if status in (401, 403):
        return PermissionError(
            f"this account has no access to {repo!r} on the Hub (status {status}): access may have been restricted, "
            "or the token is invalid (`hf auth login`)"
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    action = "accept" if writing else "provide"
    return ConnectionError(f"the Hub did not {action} {repo!r} ({reason}); try again later")


def _is_transport_error(error: Exception) -> bool:
    """Whether the connection failed: an error of the HTTP library, whose name differs between versions, or a truncated
    file."""
    if type(error) is OSError and "Consistency check failed" in str(error):
        return True
    return any(base.__name__ == "TransportError" for base in type(error).__mro__)


__all__ = [
    "DOWNLOADED",
    "NEVER_DOWNLOADED",
    "HubAccess",
    "Pushed",
    "ResolvedFolder",
    "Wanted",
    "check_pushable",
    "is_hub_id",
    "push_files",
    "resolve_folder",
]
