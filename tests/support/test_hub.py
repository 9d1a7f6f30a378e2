"""The fake Hub, accessed only by the real client: it stores and returns files, and refuses requests like the Hub."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    ModelCard,
    create_repo,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    upload_file,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from packaging.version import Version

from tests.support.hub import Fault, HubServer, point_client_at

ALICE, BOB = "token-of-alice", "token-of-bob"
REPO = "alice/model"
BIG = "weights/model.bin"
BYTES = bytes(range(251)) * 50_000  # 12.5 MB without a period of a power of two, so a shifted part shows
FILES = {
    "config.json": b'{"a": 1}',
    "README.md": b"---\nlicense: mit\n---\n# Model\n",
    "src/one.py": b"one",
    BIG: BYTES,
}
OLD = Version(version("huggingface_hub")) < Version("2.0")
RESUMES = pytest.mark.skipif(OLD, reason="this client resumes a cut connection only when called again")
CHUNK = 10 * 1024 * 1024  # the client writes downloads in parts of this size; an incomplete part is lost


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer().running() as server:
        server.tokens.update({ALICE: "alice", BOB: "bob"})
        point_client_at(server.url, monkeypatch, token=ALICE)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server
        assert server.leaked == []


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    """Alice's client; her model has a card and a config."""
    api = HfApi()
    api.create_repo(REPO)
    operations = [CommitOperationAdd(name, FILES[name]) for name in ("config.json", "README.md")]
    api.create_commit(REPO, operations, commit_message="Card and configuration")
    return api


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(FILES, tmp_path / "folder")


def written(files: dict[str, bytes], folder: Path) -> Path:
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    return folder


def read(folder: str | Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def uploads(hub: HubServer) -> int:
    """Objects that were sent to the storage."""
    return sum(request.startswith("PUT ") and "/settings" not in request for request in hub.requests)


def push_weights(hub: HubServer, tmp_path: Path) -> None:
    hub.push_folder(REPO, written({BIG: BYTES}, tmp_path / "pushed"))


class TestUploads:
    def test_a_folder_round_trips(self, hub: HubServer, folder: Path) -> None:
        api = HfApi()
        url = api.create_repo(REPO)
        assert (str(url), url.repo_id) == (f"{hub.url}/{REPO}", REPO)
        commit = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="All of it")
        assert commit.commit_url == f"{hub.url}/{REPO}/commit/{commit.oid}"
        snapshot = Path(snapshot_download(REPO))
        assert snapshot.name == commit.oid
        downloaded = read(snapshot)
        assert b"*.safetensors filter=lfs" in downloaded.pop(".gitattributes")
        assert downloaded == FILES
        assert uploads(hub) == 1

        again = api.upload_folder(repo_id=REPO, folder_path=folder)
        assert again.oid == commit.oid  # nothing changed: no commit
        api.upload_file(path_or_fileobj=BYTES, path_in_repo="copy.bin", repo_id=REPO)
        assert uploads(hub) == 1
        assert Path(hf_hub_download(REPO, "copy.bin")).read_bytes() == BYTES

    def test_information_about_files(self, api: HfApi) -> None:
        api.upload_file(path_or_fileobj=b"weights", path_in_repo="a/b/model.safetensors", repo_id=REPO)
        facts = api.model_info(REPO, files_metadata=True)
        files = {sibling.rfilename: sibling for sibling in facts.siblings or []}
        assert files["config.json"].size == 8
        assert files["config.json"].blob_id == "4a036f56bb619924ec4189bd84ed716c766971ae"  # git hash-object's
        assert files["config.json"].lfs is None
        large = files["a/b/model.safetensors"].lfs  # by its ending, however small
        assert large is not None
        # sha256sum's
        assert large.sha256 == "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
        assert (large.size, large.pointer_size) == (7, 126)
        assert facts.card_data is not None
        assert facts.card_data.license == "mit"

    def test_trees(self, api: HfApi) -> None:
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a/b/c.txt", repo_id=REPO)
        top = {".gitattributes", "README.md", "config.json", "a"}
        assert {entry.path for entry in api.list_repo_tree(REPO)} == top
        assert {entry.path for entry in api.list_repo_tree(REPO, recursive=True)} == top | {"a/b", "a/b/c.txt"}
        assert [entry.path for entry in api.list_repo_tree(REPO, "a/b")] == ["a/b/c.txt"]
        assert [entry.path for entry in api.get_paths_info(REPO, ["a", "config.json", "no"])] == ["a", "config.json"]
        with pytest.raises(EntryNotFoundError):
            list(api.list_repo_tree(REPO, "z"))

    def test_the_storage_accepts_only_announced_objects(self, api: HfApi, hub: HubServer) -> None:
        operation = CommitOperationAdd("model.safetensors", b"weights")
        operation.upload_info.sha256 = bytes(32)
        with pytest.raises(RuntimeError, match=r"model\.safetensors") as error:
            api.create_commit(REPO, [operation], commit_message="Wrong hash")
        assert isinstance(error.value.__cause__, BadRequestError)
        assert "BadDigest" in str(error.value.__cause__)
        assert hub.repositories[REPO].objects == {}

    def test_a_commit_of_a_missing_object_is_refused(self, api: HfApi) -> None:
        operation = CommitOperationAdd("model.safetensors", b"weights")
        operation._upload_mode, operation._is_uploaded = "lfs", True
        with pytest.raises(BadRequestError, match=r"does not exist. Offending file: model.safetensors"):
            api.create_commit(REPO, [operation], commit_message="Nothing behind it")

    def test_an_outdated_parent_commit_is_refused(self, api: HfApi) -> None:
        first = api.model_info(REPO).sha
        api.upload_file(path_or_fileobj=b"2", path_in_repo="n", repo_id=REPO, parent_commit=first)
        with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
            api.upload_file(path_or_fileobj=b"3", path_in_repo="n", repo_id=REPO, parent_commit=first)

    def test_deleting(self, api: HfApi) -> None:
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a/b/c.txt", repo_id=REPO)
        api.delete_file("config.json", REPO)
        api.delete_folder("a", REPO)
        assert api.list_repo_files(REPO) == [".gitattributes", "README.md"]
        with pytest.raises(EntryNotFoundError, match="doesn't exist"):
            api.delete_file("config.json", REPO)
        api.delete_repo(REPO)
        assert not api.repo_exists(REPO)
        with pytest.raises(RepositoryNotFoundError):
            api.delete_repo(REPO)
        api.delete_repo(REPO, missing_ok=True)


class TestRevisions:
    def test_commits_tags_and_branches(self, api: HfApi) -> None:
        first = api.model_info(REPO).sha
        assert first is not None
        assert len(first) == 40
        api.create_tag(REPO, tag="v1")
        api.create_branch(REPO, branch="try/this", revision=first)
        second = api.upload_file(
            path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO, commit_message="Empty it"
        ).oid
        on_branch = api.upload_file(
            path_or_fileobj=b"[]", path_in_repo="config.json", repo_id=REPO, revision="try/this"
        ).oid
        refs = api.list_repo_refs(REPO)
        assert {b.name: b.target_commit for b in refs.branches} == {"main": second, "try/this": on_branch}
        assert [(t.name, t.ref, t.target_commit) for t in refs.tags] == [("v1", "refs/tags/v1", first)]
        expected = {None: b"{}", "v1": FILES["config.json"], first: FILES["config.json"], "try/this": b"[]"}
        for revision, body in expected.items():
            assert Path(hf_hub_download(REPO, "config.json", revision=revision)).read_bytes() == body
        commits = api.list_repo_commits(REPO)
        assert [c.commit_id for c in commits[:2]] == [second, first]
        assert (commits[0].title, commits[0].authors, commits[-1].title) == ("Empty it", ["alice"], "initial commit")

    def test_duplicate_branches_and_tags_are_refused(self, api: HfApi) -> None:
        for kind in ("tag", "branch"):
            create = partial(getattr(api, f"create_{kind}"), REPO, **{kind: "x"})
            delete = partial(getattr(api, f"delete_{kind}"), REPO, **{kind: "x"})
            create()
            create(exist_ok=True)
            with pytest.raises(HfHubHTTPError, match="exists already"):
                create()
            delete()
            with pytest.raises(RevisionNotFoundError):
                delete()

    def test_missing_repositories_revisions_and_files(self, api: HfApi) -> None:
        with pytest.raises(RevisionNotFoundError):
            hf_hub_download(REPO, "config.json", revision="v9")
        with pytest.raises(RevisionNotFoundError):
            api.upload_file(path_or_fileobj=b"", path_in_repo="n", repo_id=REPO, revision="v9")
        with pytest.raises(EntryNotFoundError):
            hf_hub_download(REPO, "no.json")
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download("alice/nothing")
        assert not api.file_exists(REPO, "no.json")


class TestAccess:
    def test_a_repository_is_created_once_in_ones_own_namespace(self, api: HfApi, hub: HubServer) -> None:
        with pytest.raises(HfHubHTTPError, match="409"):
            api.create_repo(REPO)
        assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
        assert create_repo("mine").repo_id == "alice/mine"  # the function delegates to `hf_api.api`
        assert upload_file(path_or_fileobj=b"1", path_in_repo="n", repo_id="alice/mine").startswith(hub.url)
        assert api.whoami()["name"] == "alice"

    def test_datasets_and_models_are_separate(self, api: HfApi) -> None:
        api.create_repo("alice/data", repo_type="dataset")
        api.upload_file(path_or_fileobj=b"1", path_in_repo="n", repo_id="alice/data", repo_type="dataset")
        assert Path(hf_hub_download("alice/data", "n", repo_type="dataset")).read_bytes() == b"1"
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download("alice/data")
        with pytest.raises(RepositoryNotFoundError):
            api.repo_info(REPO, repo_type="dataset")

    @pytest.mark.parametrize(
        "write",
        [
            lambda api: api.upload_file(path_or_fileobj=b"1", path_in_repo="n", repo_id=REPO),
            lambda api: api.create_tag(REPO, tag="v1"),
            lambda api: api.create_branch(REPO, branch="b"),
            lambda api: api.update_repo_settings(REPO, private=True),
            lambda api: api.delete_repo(REPO),
            lambda api: api.auth_check(REPO, write=True),
            lambda api: api.create_repo("alice/other"),
        ],
        ids=["upload", "tag", "branch", "settings", "delete", "auth_check", "create"],
    )
    @pytest.mark.parametrize(("token", "status"), [(False, 401), ("nonsense", 401), (BOB, 403)])
    def test_other_users_cannot_write(
        self, api: HfApi, hub: HubServer, write: Callable[[HfApi], object], token: str | bool, status: int
    ) -> None:
        before = dict(hub.repositories[REPO].refs)
        with pytest.raises(HfHubHTTPError) as error:
            write(HfApi(token=token))
        assert error.value.response.status_code == status
        assert list(hub.repositories) == [REPO]
        assert hub.repositories[REPO].refs == before
        assert not hub.repositories[REPO].private

    def test_a_private_repository_is_not_found_by_others(self, api: HfApi) -> None:
        api.update_repo_settings(REPO, private=True)
        api.create_repo("alice/secret", private=True)
        for repo in (REPO, "alice/secret"):
            assert api.model_info(repo).private
            for token in (BOB, False):
                with pytest.raises(RepositoryNotFoundError):
                    snapshot_download(repo, token=token)
                with pytest.raises(RepositoryNotFoundError):
                    api.auth_check(repo, token=token)
        assert Path(hf_hub_download(REPO, "config.json")).read_bytes() == FILES["config.json"]

    def test_a_gated_repository_shows_its_information_but_no_files(
        self, api: HfApi, hub: HubServer, tmp_path: Path
    ) -> None:
        api.update_repo_settings(REPO, gated="auto")
        for token in (BOB, False):
            assert api.model_info(REPO, token=token).gated == "auto"
            assert "config.json" in api.list_repo_files(REPO, token=token)
            with pytest.raises(GatedRepoError):
                hf_hub_download(REPO, "config.json", token=token, cache_dir=tmp_path / "bob")
            with pytest.raises(GatedRepoError):
                api.auth_check(REPO, token=token)
        hub.repositories[REPO].tokens.add(BOB)
        api.auth_check(REPO, token=BOB)
        hf_hub_download(REPO, "config.json", token=BOB, cache_dir=tmp_path / "bob")
        api.update_repo_settings(REPO, gated=False)
        api.auth_check(REPO, token=False)

    def test_the_storage_needs_a_signature_of_the_hub(self, hub: HubServer, tmp_path: Path) -> None:
        push_weights(hub, tmp_path)
        location = get_hf_file_metadata(hf_hub_url(REPO, BIG)).location
        assert location.startswith(hub.storage_url)
        answers = {url: get_session().get(url) for url in (location, location.partition("?")[0], location + "0")}
        assert [answer.status_code for answer in answers.values()] == [200, 403, 403]
        assert answers[location].content == BYTES


class TestFaults:
    @RESUMES
    def test_a_cut_connection_is_resumed(self, hub: HubServer, tmp_path: Path) -> None:
        push_weights(hub, tmp_path)
        hub.faults.append(Fault("*/model.bin", "cut", at=CHUNK + 1000))
        assert Path(hf_hub_download(REPO, BIG)).read_bytes() == BYTES
        assert hub.ranges == [f"bytes={CHUNK}-"]

    @RESUMES
    def test_the_second_download_is_cut(self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        push_weights(hub, tmp_path)
        hub.faults.append(Fault("*/model.bin", "cut", at=5, skip=1))
        for cache in ("one", "two"):
            assert Path(hf_hub_download(REPO, BIG, cache_dir=tmp_path / cache)).read_bytes() == BYTES
        assert sum("/model.bin" in request and request.startswith("GET") for request in hub.requests) == 3

    @RESUMES
    def test_a_file_that_is_always_cut(self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        push_weights(hub, tmp_path)
        hub.faults.append(Fault("*/model.bin", "cut", at=CHUNK, times=None))
        with pytest.raises(Exception, match=r"incomplete message body|peer closed"):
            hf_hub_download(REPO, BIG)
        assert set(hub.ranges) == {f"bytes={CHUNK}-"}

    @pytest.mark.parametrize(
        ("requested", "status", "body", "content_range"),
        [
            ("bytes=0-1", 206, b'{"', "bytes 0-1/8"),
            ("bytes=5-", 206, b" 1}", "bytes 5-7/8"),
            ("bytes=-2", 206, b"1}", "bytes 6-7/8"),
            ("bytes=6-99", 206, b"1}", "bytes 6-7/8"),
            ("bytes=8-", 416, b"", "bytes */8"),
        ],
    )
    def test_ranges(self, api: HfApi, requested: str, status: int, body: bytes, content_range: str) -> None:
        answer = get_session().get(hf_hub_url(REPO, "config.json"), headers={"Range": requested})
        assert (answer.status_code, answer.content, answer.headers["Content-Range"]) == (status, body, content_range)

    def test_a_short_file_is_detected(self, hub: HubServer, tmp_path: Path) -> None:
        push_weights(hub, tmp_path)
        hub.faults.append(Fault("*/model.bin", "short", at=1000))
        with pytest.raises(OSError, match="should be of size 12550000 but has size 1000"):
            hf_hub_download(REPO, BIG)
        assert Path(hf_hub_download(REPO, BIG)).read_bytes() == BYTES

    @pytest.mark.parametrize("name", ["config.json", "weights/model.bin"])
    def test_a_flipped_byte_is_not_detected_by_the_client(self, hub: HubServer, tmp_path: Path, name: str) -> None:
        body = FILES[name]
        hub.push_folder(REPO, written({name: body}, tmp_path / "pushed"))
        hub.faults.append(Fault(f"*/{name}", "flip", at=3))
        wrong = Path(hf_hub_download(REPO, name)).read_bytes()
        assert wrong == body[:3] + bytes([body[3] ^ 1]) + body[4:]

    @pytest.mark.parametrize("status", [500, 503])
    def test_a_hub_that_is_down(
        self, api: HfApi, hub: HubServer, status: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        hub.faults.append(Fault("*/resolve/*", "status", status=status, times=None))
        with pytest.raises(LocalEntryNotFoundError) as error:
            hf_hub_download(REPO, "config.json")
        assert str(status) in str(error.value.__cause__)
        hub.faults[0] = Fault("*/resolve/*", "status", status=status)  # once: the client retries
        assert Path(hf_hub_download(REPO, "config.json")).read_bytes() == FILES["config.json"]

    def test_a_slow_hub(self, api: HfApi, hub: HubServer) -> None:
        hub.faults.append(Fault(f"/api/models/{REPO}", "slow", seconds=0.5))
        with pytest.raises(Exception, match="timed out"):
            api.model_info(REPO, timeout=0.05)


EVALUATION = {
    "task": {"type": "text-generation"},
    "dataset": {"type": "lab/text", "name": "Text"},
    "metrics": [{"type": "perplexity", "value": 3.2}],
}
GOOD = """
license: apache-2.0
language: [en, de]
library_name: transformers
base_model: [lab/anchor, gpt2]
base_model_relation: adapter
datasets: [lab/text]
tags: [a, b]
a_key_of_our_own: {any: thing}
model-index:
- name: model
  results:
  - task: {type: text-generation}
    dataset: {type: lab/text, name: Text, config: all}
    metrics: [{type: perplexity, value: 3.2, verified: false}]
"""


def index(**changes: object) -> str:
    """A model-index whose one result has other values at some keys; None removes a key."""
    result = {key: value for key, value in {**EVALUATION, **changes}.items() if value is not None}
    return f"model-index: {[{'name': 'model', 'results': [result]}]}"


class RawCard(ModelCard):
    """A card with exactly this text, which `ModelCard` would correct or refuse."""

    def __init__(self, content: str) -> None:
        self.raw = content

    def __str__(self) -> str:
        return self.raw


class TestCards:
    @pytest.mark.skipif(OLD, reason="this client validates at huggingface.co, whatever HF_ENDPOINT says")
    def test_a_valid_card_is_accepted(self, api: HfApi) -> None:
        good = ModelCard(f"---{GOOD}---\n# Title\n")
        good.push_to_hub(REPO)
        assert ModelCard.load(REPO).data.to_dict() == good.data.to_dict()

    @pytest.mark.parametrize(
        ("block", "error"),
        [
            ("license: [mit", "Invalid YAML in README.md"),
            ("only words", "The YAML metadata of your README.md is invalid."),
            ("- a\n- b", '"value" must be of type object'),
            ("license: my-own", r'"license" must be one of \[apache-2.0, mit, '),
            ("license: Apache-2.0", '"license" must be one of'),
            ("license: [mit, x]", r'"license\[1\]" must be one of'),
            ("license: other\nlicense_name: [a]", '"license_name" must be a string'),
            ("base_model: /data/anchor", '"base_model" with value "/data/anchor" is not valid. Use a model id'),
            ("base_model: [lab/a, a b]", r'"base_model\[1\]" with value "a b" is not valid'),
            ("base_model: lab--a", '"base_model" with value'),
            ("base_model_relation: child", '"base_model_relation" must be one of'),
            ("datasets: [/var/images]", r'"datasets\[0\]" with value "/var/images" is not valid'),
            ("language: english", '"language" with value "english" is not valid'),
            ("tags: one", '"tags" must be an array'),
            ("tags: [1]", r'"tags\[0\]" must be a string'),
            ("model-index: {}", '"model-index" must be an array'),
            ("model-index: [{name: model}]", r'"model-index\[0\].results" is required'),
            (index(metrics=None), r'"model-index\[0\].results\[0\].metrics" is required'),
            (index(metrics={}), r'"model-index\[0\].results\[0\].metrics" must be an array'),
            (index(metrics=[{"type": "f1"}]), r'results\[0\].metrics\[0\].value" is required'),
            (index(task={}), r'results\[0\].task.type" is required'),
            (index(dataset={"type": "a", "name": "b", "config": 1}), r'results\[0\].dataset.config" must be a string'),
        ],
    )
    def test_an_invalid_card_is_refused(self, api: HfApi, block: str, error: str) -> None:
        before = api.model_info(REPO).sha
        content = f"---\n{block}\n---\n# Title\n"
        if not OLD:
            with pytest.raises(ValueError, match=f"^- Error: .*{error}"):
                RawCard(content).validate()
        with pytest.raises(ValueError, match=f"Invalid metadata in README.md.*\n- .*{error}"):
            api.upload_file(path_or_fileobj=content.encode(), path_in_repo="README.md", repo_id=REPO)
        assert api.model_info(REPO).sha == before

    def test_a_commit_without_prior_validation(self, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(api, "_validate_yaml", lambda *_, **__: None)
        with pytest.raises(BadRequestError, match='"license" must be one of'):
            api.upload_file(path_or_fileobj=b"---\nlicense: x\n---\n", path_in_repo="README.md", repo_id=REPO)

    @pytest.mark.parametrize(
        ("content", "warning"),
        [
            ("# No block\n", "empty or missing yaml metadata"),
            ("---\nlicense: mit\n---oops\n", "empty or missing yaml metadata"),
            ("---\nlicense: other\n---\n", "license_name"),
        ],
    )
    def test_a_warning_does_not_refuse(self, api: HfApi, content: str, warning: str) -> None:
        with pytest.warns(UserWarning, match=warning):
            api.upload_file(path_or_fileobj=content.encode(), path_in_repo="README.md", repo_id=REPO)
        assert Path(hf_hub_download(REPO, "README.md")).read_text() == content


def test_the_environment_of_a_fresh_process(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, "from outside")
    environment = hub.environment(tmp_path)
    assert "from outside" not in environment.values()
    assert (environment["HF_ENDPOINT"], environment["HF_HOME"]) == (hub.url, str(tmp_path))


def test_the_command_in_a_fresh_process(hub: HubServer, tmp_path: Path) -> None:
    """Slow: starts `hf` twice."""
    sent = written({"config.json": b"{}", "model.safetensors": b"weights"}, tmp_path / "sent")
    environment = hub.environment(tmp_path / "home", token=ALICE)
    for arguments in (["upload", REPO, str(sent)], ["download", REPO, "--local-dir", str(tmp_path / "came")]):
        command = [str(Path(sys.executable).with_name("hf")), *arguments]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
    came = read(tmp_path / "came")
    assert {name: body for name, body in came.items() if not name.startswith((".cache/", ".git"))} == read(sent)
    assert uploads(hub) == 1
