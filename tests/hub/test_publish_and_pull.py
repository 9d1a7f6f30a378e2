"""Experts, compositions and models on the Hub, through the real client against a fake Hub on the loopback."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoModelForCausalLM

from flexmoe.admission.verification import verify
from flexmoe.conversion.compose import compose
from flexmoe.conversion.graft import graft
from flexmoe.hub.publish import PrivateTextError, plan_upload, push
from flexmoe.hub.pull import pull
from flexmoe.io.writer import source_from_tensor, write_checkpoint
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.packages.manifest import PackageError
from flexmoe.packages.package import ExpertPackage, stream_package
from flexmoe.packages.signing import keygen, sign
from flexmoe.testing import tiny_anchor
from tests.support.hub import Fault, HubServer, point_client_at
from tests.support.two_owners import write_two_owners

_numbers = itertools.count()  # transformers remembers, while it runs, what it has seen of a repository
FILES = {"README.md", "config.json", "expert.safetensors", "expert_config.json"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    write_two_owners(folder, license="apache-2.0", data_statement="Worked problems.")
    compose(folder / "grafted", [folder / "math"], folder / "merged")
    by_reference = {"public": folder / "anchor", "math": folder / "math"}
    FlexMoeForCausalLM.from_pretrained(folder / "merged").save_composition(
        folder / "composition", sources=by_reference
    )
    name_repositories(folder / "composition" / "config.json")
    return folder


def name_repositories(path: Path) -> None:
    """Replaces local folders by repositories; a push does not access them."""
    config = json.loads(path.read_text())
    pin = {"repo": "alice/part", "revision": "1" * 40}
    config["composition"] |= {"anchor": pin, "experts": {"math": pin | {"sha256": {}}}}
    path.write_text(json.dumps(config))


@pytest.fixture
def world(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A Hub where alice is logged in, and copies of the stored folders; `lab` is a namespace of this test only."""
    folder = shutil.copytree(stored, tmp_path / "world")
    with HubServer().running() as hub:
        lab = f"alice{next(_numbers)}"
        hub.tokens |= {"of-alice": lab, "of-bob": "bob"}
        point_client_at(hub.url, monkeypatch, token="of-alice")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield SimpleNamespace(hub=hub, folder=folder, lab=lab, cache=tmp_path / "cache")


def loaded(world: SimpleNamespace, name: str = "merged") -> FlexMoeForCausalLM:
    return FlexMoeForCausalLM.from_pretrained(world.folder / name)


def remote_files(world: SimpleNamespace, repo: str, branch: str = "main") -> dict[str, bytes]:
    repository = world.hub.repositories[repo]
    files = repository.commits[repository.refs[branch]].files
    return {name: file.body for name, file in files.items() if name != ".gitattributes"}


def local_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def edit_manifest(folder: Path, **values: object) -> None:
    path = folder / "expert_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


class TestPush:
    def test_from_a_live_model_and_back_into_another(self, world: SimpleNamespace) -> None:
        model, repo = loaded(world), f"{world.lab}/math"
        pushed = model.push_expert_to_hub("math", repo, version="1.1.0")
        assert (pushed.repo, pushed.url) == (repo, f"{world.hub.url}/{repo}")
        assert remote_files(world, repo).keys() == FILES
        assert model.config.expert_records[1]["source"] == {"repo": repo, "revision": pushed.revision}
        assert model.config.expert_records[1]["version"] == "1.1.0"
        other = loaded(world, "grafted")
        assert other.add_expert(repo) == "math"
        # the complete record is equal, and so is every tensor of the expert
        assert other.config.expert_records[1] == model.config.expert_records[1]
        assert_same_expert(model, other)

    def test_of_a_folder_uploads_only_the_files_of_the_package(self, world: SimpleNamespace) -> None:
        folder = world.folder / "math"
        (folder / "problems.jsonl").write_text('{"text": "confidential"}')
        (folder / ".env").write_text("HF_TOKEN=hf_x")
        (folder / "LICENSE").write_text("Apache")
        plan = plan_upload(folder)
        assert {file.name for file in plan.files} == FILES | {"LICENSE"}
        assert plan.left_out == (".env", "problems.jsonl")
        assert not world.hub.requests
        push(folder, f"{world.lab}/math")
        sent = {name: data for name, data in local_files(folder).items() if name in FILES | {"LICENSE"}}
        assert remote_files(world, f"{world.lab}/math") == sent

    def test_a_new_version_replaces_the_old_one_in_one_commit(
        self, world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package, repo = ExpertPackage.open(world.folder / "math"), f"{world.lab}/math"
        with monkeypatch.context() as patched:
            patched.setattr(
                "flexmoe.packages.package.write_checkpoint",
                lambda *args, **options: write_checkpoint(*args, **options, max_shard_size=10_000),
            )
            sources = [source_from_tensor(name, tensor) for name, tensor in package.tensors()]
            sharded = stream_package(world.folder / "sharded", package.manifest, sources)
        first = push(sharded, repo)
        assert len(remote_files(world, repo)) > 5
        second = push(world.folder / "math", repo)
        assert remote_files(world, repo).keys() == FILES
        assert world.hub.repositories[repo].commits[second.revision].parent == first.revision
        model = loaded(world, "grafted")
        assert model.add_expert(repo, name="old", revision=first.revision) == "old"

    def test_to_a_branch_and_with_a_tag(self, world: SimpleNamespace) -> None:
        repo = f"{world.lab}/math"
        push(world.folder / "math", repo)
        pushed = push(world.folder / "code", repo, revision="next", commit_message="Try this")
        assert world.hub.repositories[repo].commits[pushed.revision].title == "Try this"
        HfApi().create_tag(repo, tag="v2", revision="next")
        model = loaded(world, "grafted")
        assert [model.add_expert(repo), model.add_expert(repo, revision="v2")] == ["math", "code"]
        assert model.config.expert_records[2]["source"]["revision"] == pushed.revision

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("Write to jane.doe@hospital.example.org", "an e-mail address"),
            ("trained with hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345", "an access token"),
            ("key AKIAIOSFODNN7EXAMPLE", "an access token"),
            ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
            ("from /home/jane/records/2024.jsonl", "a local path"),
            (r"from C:\Users\jane\records", "a local path"),
        ],
    )
    @pytest.mark.parametrize("file", ["README.md", "expert_config.json"])
    def test_private_text_is_not_pushed(self, world: SimpleNamespace, text: str, kind: str, file: str) -> None:
        folder = world.folder / "math"
        if file == "README.md":
            (folder / file).write_text((folder / file).read_text() + "\n" + text)
        else:
            edit_manifest(folder, data_statement=text)
        (found,) = plan_upload(folder).discoveries
        assert (found.kind, found.file) == (kind, file)
        with pytest.raises(PrivateTextError, match=f"{file}, line {found.line}: {kind}"):
            push(folder, f"{world.lab}/math")
        assert not world.hub.requests
        push(folder, f"{world.lab}/math", allow_private_text=True)
        assert text.split("\\")[0] in remote_files(world, f"{world.lab}/math")[file].decode()

    @pytest.mark.parametrize(
        "file", ["config.json", "generation_config.json", "tokenizer_config.json", "LICENSE.md", "chat_template.jinja"]
    )
    def test_short_texts_beside_a_model_are_scanned(self, world: SimpleNamespace, file: str) -> None:
        path = world.folder / "merged" / file
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**values, "note": "ask jane@hospital.example.org"}))
        (found,) = plan_upload(world.folder / "merged").discoveries
        assert (found.kind, found.file) == ("an e-mail address", file)

    def test_tokens_are_not_repeated(self, world: SimpleNamespace) -> None:
        secret = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"
        edit_manifest(world.folder / "math", data_statement=secret)
        assert secret not in str(plan_upload(world.folder / "math").discoveries)

    def test_cards_that_flexmoe_writes_have_no_private_text(self, world: SimpleNamespace) -> None:
        for name in ("math", "merged"):
            assert not plan_upload(world.folder / name).discoveries

    def test_a_damaged_package_is_not_pushed(self, world: SimpleNamespace) -> None:
        weights = world.folder / "math" / "expert.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
        with pytest.raises(PackageError, match="SHA-256"):
            push(world.folder / "math", f"{world.lab}/math")
        assert not world.hub.requests

    def test_pushes_that_are_refused(self, world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        package = world.folder / "math"
        cases: list[tuple[dict[str, object], str, type[Exception], str]] = [
            ({}, "bob/math", PermissionError, "may not write to 'bob/math'"),
            ({"token": "of-nobody"}, f"{world.lab}/x", PermissionError, "hf auth login"),
            ({"token": False}, f"{world.lab}/x", PermissionError, "hf auth login"),
            ({}, "no id at all", ValueError, "is not a Hub id"),
        ]
        for options, repo, kind, words in cases:
            with pytest.raises(kind, match=words):
                push(package, repo, **options)
        assert not world.hub.repositories
        with pytest.raises(FileNotFoundError, match="no folder"):
            push(world.folder / "nothing", f"{world.lab}/x")
        with pytest.raises(ValueError, match="holds a 'llama' model"):
            push(world.folder / "anchor", f"{world.lab}/x")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
            push(package, f"{world.lab}/x")

    def test_a_hub_that_is_down(self, world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        point_client_at("http://127.0.0.1:9", monkeypatch, token="of-alice")
        with pytest.raises(ConnectionError, match="the connection to the Hub failed"):
            push(world.folder / "math", f"{world.lab}/math")


def assert_same_expert(one: FlexMoeForCausalLM, other: FlexMoeForCausalLM, name: str = "math") -> None:
    first = {key: value for key, value in one.state_dict().items() if f".{name}." in key}
    second = other.state_dict()
    assert first
    assert all(torch.equal(value, second[key]) for key, value in first.items())


class TestAddFromTheHub:
    @pytest.fixture
    def repo(self, world: SimpleNamespace) -> str:
        push(world.folder / "math", f"{world.lab}/math")
        return f"{world.lab}/math"

    def refuse(self, world: SimpleNamespace, repo: str, kind: type[Exception], words: str, **options: object) -> None:
        """`add_expert` fails, and the model is unchanged."""
        model = loaded(world)
        before, config = model.state_dict(), model.config.to_dict()
        with pytest.raises(kind, match=words):
            model.add_expert(repo, name="other", **options)
        after = model.state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(value, after[key]) for key, value in before.items())
        assert model.config.to_dict() == config

    def test_a_private_repository(self, world: SimpleNamespace) -> None:
        repo = f"{world.lab}/private"
        push(world.folder / "math", repo, private=True)
        assert world.hub.repositories[repo].private
        self.refuse(world, repo, FileNotFoundError, "that this account can see", token="of-bob")
        assert loaded(world, "grafted").add_expert(repo, token="of-alice") == "math"

    def test_a_gated_repository(self, world: SimpleNamespace, repo: str) -> None:
        world.hub.repositories[repo].gated = "manual"
        words = f"is gated: ask for access on its page, {world.hub.url}/{repo}"
        self.refuse(world, repo, PermissionError, words, token="of-bob")
        world.hub.repositories[repo].tokens.add("of-bob")
        assert loaded(world, "grafted").add_expert(repo, token="of-bob") == "math"

    def test_repositories_without_a_package(self, world: SimpleNamespace) -> None:
        HfApi().create_repo(f"{world.lab}/texts", repo_type="dataset")
        world.hub.push_folder(f"{world.lab}/dense", world.folder / "anchor")
        world.hub.push_folder(f"{world.lab}/pickle", write(world.folder / "pickle", {"model.bin": b"x"}))
        self.refuse(world, f"{world.lab}/nothing", FileNotFoundError, "neither a local folder nor a Hub repository")
        self.refuse(world, f"{world.lab}/texts", FileNotFoundError, "is a dataset on the Hub")
        self.refuse(world, f"{world.lab}/dense", FileNotFoundError, f"'{world.lab}/dense' is not an expert package")
        self.refuse(world, f"{world.lab}/pickle", FileNotFoundError, "is not an expert package")
        assert not [request for request in world.hub.requests if request.endswith("model.safetensors")]

    def test_an_expert_for_another_anchor(self, world: SimpleNamespace, tmp_path: Path) -> None:
        tiny_anchor("llama", seed=1).save_pretrained(tmp_path / "anchor")
        model = FlexMoeForCausalLM.from_pretrained(graft(tmp_path / "anchor", tmp_path / "grafted"))
        theirs = model.config.anchor["fingerprint"]
        model.add_expert_copy("math")
        model.push_expert_to_hub("math", f"{world.lab}/other")
        ours = loaded(world).config.anchor["fingerprint"]
        self.refuse(world, f"{world.lab}/other", ValueError, f"(?s)another anchor.*{theirs}.*{ours}")

    def test_a_broken_connection_is_resumed(self, world: SimpleNamespace, repo: str) -> None:
        world.hub.faults.append(Fault("*/expert.safetensors", "cut", at=20_000))
        model = loaded(world, "grafted")
        assert model.add_expert(repo) == "math"
        assert_same_expert(model, loaded(world))
        assert world.hub.faults[0].matched > 1

    @pytest.mark.parametrize(
        ("fault", "kind", "words"),
        [
            (Fault("*/expert.safetensors", "flip", at=30_000), PackageError, "SHA-256"),
            (Fault("*/expert.safetensors", "cut", at=20_000, times=None), ConnectionError, "broke off at 'alice"),
            (Fault("*/expert.safetensors", "short", at=20_000, times=None), ConnectionError, "broke off at 'alice"),
            (Fault("*/auth-check", "status", status=503, times=None), None, ""),
        ],
        ids=lambda value: value.kind if isinstance(value, Fault) else "",
    )
    def test_faults_during_the_download(
        self, world: SimpleNamespace, repo: str, fault: Fault, kind: type[Exception] | None, words: str
    ) -> None:
        world.hub.faults.append(fault)
        if kind is not None:
            self.refuse(world, repo, kind, words)
            return
        with pytest.warns(UserWarning, match="Could not check whether the owner of .* has withdrawn it"):
            assert loaded(world, "grafted").add_expert(repo) == "math"

    def test_offline_from_the_cache(self, world: SimpleNamespace, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refuse(world, repo, FileNotFoundError, "local cache", local_files_only=True)
        loaded(world, "grafted").add_expert(repo)
        requests = len(world.hub.requests)
        assert loaded(world, "grafted").add_expert(repo, local_files_only=True) == "math"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert loaded(world, "grafted").add_expert(repo) == "math"
        assert len(world.hub.requests) == requests

    def test_a_withdrawn_expert_is_not_taken_from_the_cache(self, world: SimpleNamespace, repo: str) -> None:
        loaded(world, "grafted").add_expert(repo)
        HfApi().delete_repo(repo)
        self.refuse(world, repo, FileNotFoundError, f"{repo}.*neither a local folder nor a Hub repository")


class TestSelectedFiles:
    """Which files are selected is tested in `test_contents.py`; here, that they and no others are sent and pulled."""

    @pytest.mark.parametrize("kind", ["merged", "composition", "math"])
    def test_stray_files_stay_on_the_machine(self, world: SimpleNamespace, kind: str) -> None:
        folder, repo = world.folder / kind, f"{world.lab}/{kind}"
        expected = {file.name for file in plan_upload(folder).files}
        strays = ("expert-old.safetensors", "model-with-math.safetensors", "evil_flexmoe.py", "notes.txt", ".env")
        for name in strays:
            (folder / name).write_bytes(b"private")
        push(folder, repo)
        assert remote_files(world, repo).keys() == expected
        for name in strays:
            HfApi().upload_file(path_or_fileobj=b"private", path_in_repo=name, repo_id=repo)
        pulled = {path.name for path in pull(repo, world.folder / "pulled").iterdir()}
        assert pulled == {name for name in expected if not name.endswith(".py")}

    def test_all_is_one_commit(self, world: SimpleNamespace) -> None:
        repo = f"{world.lab}/model"
        templates = world.folder / "merged" / "additional_chat_templates"
        templates.mkdir()
        (templates / "rag.jinja").write_text("{{ messages }}")
        push(world.folder / "merged", repo)
        assert "additional_chat_templates/rag.jinja" in remote_files(world, repo)
        assert len(world.hub.repositories[repo].commits) == 2  # with the initial one

    @pytest.mark.promise(
        "`pull`", "a model whose JSON files name code of others", "pulled without these entries, with a warning"
    )
    def test_a_pulled_model_names_no_code_of_others(self, world: SimpleNamespace) -> None:
        folder, evil = world.folder / "merged", "evil/repo--x.Y"
        config = json.loads((folder / "config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [evil, None]}}))
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": evil}}))
        world.hub.push_folder(f"{world.lab}/evil", folder)
        with pytest.warns(UserWarning, match=evil) as warned:
            pulled = pull(f"{world.lab}/evil", world.folder / "pulled")
        assert len([warning for warning in warned if evil in str(warning.message)]) >= 2
        assert not [path.name for path in pulled.iterdir() if evil in path.read_bytes().decode(errors="replace")]

    def test_a_package_that_names_code_is_not_pulled(self, world: SimpleNamespace) -> None:
        values = {"model_type": "flexmoe_expert", "auto_map": {"AutoConfig": "evil/repo--x.Y"}}
        (world.folder / "math" / "config.json").write_text(json.dumps(values))
        world.hub.push_folder(f"{world.lab}/evil", world.folder / "math")
        with pytest.raises(
            PackageError, match=r"config\.json names code of others .auto_map AutoConfig: evil/repo--x.Y"
        ):
            pull(f"{world.lab}/evil", world.folder / "pulled")
        assert not (world.folder / "pulled").exists()

    def test_private_text_may_be_allowed_by_file(self, world: SimpleNamespace) -> None:
        folder, repo = world.folder / "merged", f"{world.lab}/model"
        (folder / "USE_POLICY.md").write_text("Report to policy@example.org")
        (folder / "LICENSE").write_text("Ask jane@hospital.example.org")
        with pytest.raises(PrivateTextError, match="LICENSE") as caught:
            push(folder, repo, allow_private_text=["USE_POLICY.md"])
        assert "USE_POLICY" not in str(caught.value)
        with pytest.raises(ValueError, match="'LICENCE', which is not among the files"):
            push(folder, repo, allow_private_text=["LICENCE"])
        with pytest.raises(TypeError, match="expected a boolean or a list of file names"):
            push(folder, repo, allow_private_text="LICENSE")
        assert not world.hub.requests
        push(folder, repo, allow_private_text=["USE_POLICY.md", "LICENSE"])


class TestOutdatedFiles:
    """A push deletes files of an older version or of another kind, and keeps files that are not FlexMoE's."""

    @pytest.mark.parametrize("new", ["math", "composition", "merged"])
    @pytest.mark.parametrize("old", ["math", "composition", "merged"])
    def test_files_of_another_kind_are_deleted(self, world: SimpleNamespace, old: str, new: str) -> None:
        repo = f"{world.lab}/mixed"
        if old == "composition":
            (world.folder / old / "tokenizer.json").write_text("{}")
        push(world.folder / old, repo)
        push(world.folder / new, repo)
        assert remote_files(world, repo).keys() == {file.name for file in plan_upload(world.folder / new).files}
        assert len(world.hub.repositories[repo].commits) == 2 + (old != new)  # with the initial one

    @pytest.mark.parametrize("new", ["math", "composition", "merged"])
    def test_other_files_are_kept(self, world: SimpleNamespace, new: str) -> None:
        repo = f"{world.lab}/{new}"
        push(world.folder / new, repo)
        others = {
            *("experts/other.safetensors", "expert-drafts/x.safetensors", "model/x_flexmoe.py"),
            *("notes.txt", "scores.json", "LICENSE", "plots.png", "onnx/model.safetensors"),
        }
        for path in others:
            HfApi().upload_file(path_or_fileobj=b"keep", path_in_repo=path, repo_id=repo)
        push(world.folder / ("merged" if new == "math" else "math"), repo)
        push(world.folder / new, repo)
        assert others <= remote_files(world, repo).keys()

    def test_a_repository_that_was_not_flexmoes_keeps_its_files(self, world: SimpleNamespace) -> None:
        repo = f"{world.lab}/dense"
        world.hub.push_folder(repo, world.folder / "anchor")
        before = remote_files(world, repo).keys()
        push(world.folder / "math", repo)
        assert remote_files(world, repo).keys() == before | FILES

    def test_file_names_are_not_patterns(self, world: SimpleNamespace) -> None:
        repo = f"{world.lab}/math"
        push(world.folder / "math", repo)
        for path in ("expert[1-9].safetensors", "expert-drafts/2.safetensors"):
            HfApi().upload_file(path_or_fileobj=b"x", path_in_repo=path, repo_id=repo)
        push(world.folder / "math", repo)
        assert remote_files(world, repo).keys() == FILES | {"expert-drafts/2.safetensors"}

    def test_a_push_to_another_branch(self, world: SimpleNamespace) -> None:
        repo = f"{world.lab}/math"
        push(world.folder / "merged", repo)
        main = remote_files(world, repo)
        push(world.folder / "math", repo, revision="next")
        assert remote_files(world, repo, "next").keys() == FILES
        assert remote_files(world, repo) == main


class TestModels:
    @pytest.mark.parametrize(
        ("repo", "options", "kind", "words"),
        [
            ("a/b/c", {}, ValueError, "'a/b/c' is not a Hub id"),
            ("a/b--c", {}, ValueError, "'a/b--c' is not a Hub id"),
            ("a/b", {"commit_msg": "x"}, TypeError, "commit_msg"),
            ("a/b", {"by_reference": True, "tags": ["x"]}, ValueError, r"tags=\['x'\]"),
            ("a/b", {"sharded": True}, RuntimeError, "save_pretrained on every rank, then push that folder"),
        ],
    )
    def test_invalid_arguments_are_refused_before_anything_is_written(
        self,
        world: SimpleNamespace,
        monkeypatch: pytest.MonkeyPatch,
        repo: str,
        options: dict[str, object],
        kind: type[Exception],
        words: str,
    ) -> None:
        model = loaded(world)
        for name in ("save_pretrained", "save_composition", "save_expert"):
            monkeypatch.setattr(model, name, lambda *_, **__: pytest.fail("it was saved"))
        if options.pop("sharded", False):
            monkeypatch.setattr("flexmoe.hub.model.is_sharded", lambda _: True)
        with pytest.raises(kind, match=words):
            model.push_to_hub(repo, **options)
        if words.endswith("is not a Hub id"):
            with pytest.raises(kind, match=words):
                model.push_expert_to_hub("math", repo)
        assert not world.hub.requests

    def test_commit_message_and_description(self, world: SimpleNamespace) -> None:
        repo = f"{world.lab}/model"
        pushed = loaded(world).push_to_hub(repo, commit_message="One", commit_description="Why", private=True)
        repository = world.hub.repositories[repo]
        commit = repository.commits[pushed.revision]
        assert (commit.title, commit.message, repository.private) == ("One", "Why", True)

    def test_merged(self, world: SimpleNamespace) -> None:
        model, repo = loaded(world), f"{world.lab}/model"
        pushed = model.push_to_hub(repo, tags=["arithmetic"])
        files = remote_files(world, repo)
        assert {"README.md", "config.json", "model.safetensors", "modeling_flexmoe.py"} <= files.keys()
        card = files["README.md"].decode()
        assert [text for text in ("- arithmetic", "- flexmoe", "| `math` |", "apache-2.0") if text not in card] == []
        again = AutoModelForCausalLM.from_pretrained(repo, revision=pushed.revision)
        assert_same_expert(model, again)

    def test_by_reference(self, world: SimpleNamespace) -> None:
        lab = world.lab
        world.hub.push_folder(f"{lab}/anchor", world.folder / "anchor")
        model = FlexMoeForCausalLM.from_pretrained(graft(f"{lab}/anchor", world.folder / "of-the-hub"))
        model.add_expert(world.folder / "math")
        with pytest.raises(ValueError, match=r"No source is recorded for \['math'\]"):
            model.push_to_hub(f"{lab}/composition", by_reference=True)
        sources = {"math": world.folder / "math"}
        with pytest.raises(ValueError, match=r"refers to local folders \(math in"):
            model.push_to_hub(f"{lab}/composition", by_reference=True, sources=sources)
        assert f"{lab}/composition" not in world.hub.repositories
        model.push_expert_to_hub("math", f"{lab}/math")
        model.push_to_hub(f"{lab}/composition", by_reference=True)
        files = remote_files(world, f"{lab}/composition")
        assert not [name for name in files if name.endswith(".safetensors")]
        assert sum(len(data) for name, data in files.items() if not name.endswith(".py")) < 20_000
        assert_same_expert(model, AutoModelForCausalLM.from_pretrained(f"{lab}/composition"))


class TestPull:
    def test_a_withdrawn_package_is_not_taken_from_the_cache(self, world: SimpleNamespace) -> None:
        pushed = push(world.folder / "math", f"{world.lab}/math")
        pull(f"{world.lab}/math", world.folder / "first")
        HfApi().delete_repo(f"{world.lab}/math")
        for options in ({}, {"revision": pushed.revision}):
            with pytest.raises(FileNotFoundError, match=f"{world.lab}/math"):
                pull(f"{world.lab}/math", world.folder / "second", **options)
        with pytest.raises(FileNotFoundError, match=f"{world.lab}/math"):
            verify(f"{world.lab}/math", world.folder / "merged")

    def test_a_repository_that_is_not_flexmoes(self, world: SimpleNamespace) -> None:
        world.hub.push_folder(f"{world.lab}/dense", world.folder / "anchor")
        with pytest.raises(ValueError, match=r"its model_type is 'llama'.*hf download"):
            pull(f"{world.lab}/dense", world.folder / "pulled")
        assert not [request for request in world.hub.requests if request.endswith("model.safetensors")]

    def test_a_composition_that_refers_to_local_folders(self, world: SimpleNamespace) -> None:
        model = loaded(world)
        sources = {"public": world.folder / "anchor", "math": world.folder / "math"}
        world.hub.push_folder(f"{world.lab}/evil", model.save_composition(world.folder / "evil", sources=sources))
        with pytest.raises(ValueError, match="refers to local folders"):
            pull(f"{world.lab}/evil", world.folder / "pulled")
        with pytest.raises(ValueError, match=r"only (name|refer to) repositories"):
            verify(world.folder / "code", f"{world.lab}/evil")
        assert not (world.folder / "pulled").exists()

    def test_a_signature_is_valid_despite_other_files_in_the_cache(self, world: SimpleNamespace) -> None:
        keys, repo = keygen(world.folder / "key"), f"{world.lab}/math"
        sign(world.folder / "math", keys.private)
        push(world.folder / "math", repo)
        HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="eval_results.json", repo_id=repo)
        policy = world.folder / "policy.json"
        rules = [{"pattern": repo, "allowed_signers": [keys.public.name]}]
        policy.write_text(json.dumps({"format_version": 1, "rules": rules}))
        snapshot_download(repo)  # all of it, by another program
        assert (pull(repo, world.folder / "pulled", policy=policy) / "model.sig").exists()
        assert loaded(world, "grafted").add_expert(repo, policy=policy) == "math"

    def test_a_pulled_package_has_the_original_bytes(self, world: SimpleNamespace) -> None:
        repo = f"{world.lab}/math"
        pushed = push(world.folder / "math", repo)
        progress: list[int] = []
        folder = pull(repo, world.folder / "pulled", progress=progress.append)
        assert local_files(folder) == local_files(world.folder / "math")
        assert sum(progress) == sum(info.nbytes for info in ExpertPackage.open(folder).infos.values())
        push(world.folder / "code", repo)
        again = pull(repo, world.folder / "again", revision=pushed.revision)
        assert local_files(again) == local_files(folder)
        with pytest.raises(FileExistsError, match="--overwrite"):
            pull(repo, folder)
        assert local_files(pull(repo, folder, overwrite=True)) == local_files(world.folder / "code")

    def test_a_merged_model(self, world: SimpleNamespace) -> None:
        push(world.folder / "merged", f"{world.lab}/model")
        folder = pull(f"{world.lab}/model", world.folder / "pulled")
        assert_same_expert(loaded(world), FlexMoeForCausalLM.from_pretrained(folder))

    @pytest.mark.parametrize("break_it", [
        lambda world, repo: world.hub.faults.append(Fault("*/expert.safetensors", "flip", at=30_000)),
        lambda world, repo: HfApi().delete_repo(repo),
    ])  # fmt: skip
    def test_a_failed_pull_leaves_nothing(
        self, world: SimpleNamespace, break_it: Callable[[SimpleNamespace, str], object]
    ) -> None:
        push(world.folder / "math", f"{world.lab}/math")
        before = set(world.folder.iterdir())
        break_it(world, f"{world.lab}/math")
        with pytest.raises((PackageError, FileNotFoundError)):
            pull(f"{world.lab}/math", world.folder / "pulled")
        assert set(world.folder.iterdir()) == before


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder
