"""Which files belong to a package, a composition and a model; the rest stays on the machine. No model is built."""

import ast
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from flexmoe.companions import companions, is_companion, is_terms
from flexmoe.hub.client import DOWNLOADED, NEVER_DOWNLOADED
from flexmoe.hub.contents import CODE_FILES, composition_files, model_files, package_files
from flexmoe.hub.publish import plan_upload
from flexmoe.io.writer import source_from_tensor, write_checkpoint
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.packages.manifest import ExpertManifest, PackageError
from flexmoe.packages.package import ExpertPackage, write_package
from flexmoe.tokenization import TOKENIZER_FILES, is_tokenizer_file

ROWS = {f"anchor.model.layers.0.mlp.router.{name}.weight": torch.ones(1, 4) for name in ("public", "math")}
CONFIG: dict[str, Any] = {"model_type": "flexmoe", "experts": [{"name": "public"}, {"name": "math"}]}
STRAY = (  # files that people have beside a model, and names made to look like parts of one
    *("model-with-math.safetensors", "model-00001-of-00002.safetensors", "model.old.safetensors"),
    *("expert-old.safetensors", "adapter_model.safetensors", "optimizer.safetensors", "pytorch_model.bin"),
    *("model.safetensors.index.json", "old.safetensors.index.json", "optimizer.pt", "x.spm", "y.gguf"),
    *("evil_flexmoe.py", "modeling.py", "train.py", "setup.cfg", "requirements.txt", "trainer_state.json"),
    *("notes.txt", "corpus.txt", "train.jsonl", "scores.json", "public_sample.jsonl.bak", "vocabulary.json"),
    *("tokenizer-notes.txt", "tokenizer_corpus.jsonl", "vocab.notes.txt", "chat_template.bak", "chat_templates.json"),
    *("config.json.bak", "README-old.md", "LICENSE.pem", "LICENSE.pkl", "LICENSE.json", "preprocessor_config.json"),
    *(".env", ".config.json", ".netrc", "me.pem", "key.key", "model.sig", "expert_config.json.bak"),
)
COMPANIONS = (
    *("generation_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/rag.jinja"),
    *("chat_template_tools.jinja", "chat_template.default.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "qwen.tiktoken", "LICENSE", "LICENSE-APACHE-2.0.txt", "USE_POLICY.md", "NOTICE"),
    *("TERMS_OF_USE.md", "COPYING", "licence.md", "Notice.md"),
)


def write(folder: Path, names: tuple[str, ...], text: str = "{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(ROWS, folder / "model.safetensors", metadata={"format": "pt"})
    write(folder, ("config.json",), json.dumps(CONFIG))
    write(folder, ("README.md",), "A model.")
    return folder


@pytest.fixture
def package(tmp_path: Path) -> Path:
    tensors = [("layers.0.ffn.up.weight", torch.ones(2, 4)), ("layers.0.router.weight", torch.ones(1, 4))]
    tensors += [("layers.0.router.bias", torch.ones(1))]
    anchor = {"repo": None, "revision": None, "fingerprint": "0" * 64, "model_type": "llama"}
    ffn = {"class": "Mlp", "hidden": 4, "intermediate": 2}
    manifest = ExpertManifest(name="math", layers=[0], ffn=ffn, dtype="float32", anchor=anchor)
    return write_package(tmp_path / "package", manifest, tensors)


def composition(folder: Path, rows: bytes | None) -> dict[str, Any]:
    digest = None if rows is None else hashlib.sha256(rows).hexdigest()
    part = {"repo": "alice/part", "revision": "1" * 40}
    values = {"anchor": part, "experts": {"math": part | {"sha256": {}}}, "router_sha256": digest, "format_version": 1}
    config = CONFIG | {"composition": values}
    (folder / "config.json").write_text(json.dumps(config))
    return config


class TestModels:
    @pytest.mark.promise(
        "`push`",
        "a model folder with older weights, indexes, code, notes, corpora and keys in it",
        "exactly the files of the model are sent; the others are listed",
    )
    @pytest.mark.parametrize("name", STRAY)
    def test_a_stray_file_stays(self, model: Path, name: str) -> None:
        before = {file.name for file in plan_upload(model).files}
        (model / name).write_bytes(b"private")
        plan = plan_upload(model)
        assert {file.name for file in plan.files} == before
        assert plan.left_out == (name,)
        assert name not in model_files(model, CONFIG)

    def test_all_files_of_a_model(self, model: Path) -> None:
        write(model, (*COMPANIONS, *STRAY))
        files = model_files(model, CONFIG)
        assert files.keys() == {"config.json", "README.md", "model.safetensors", *COMPANIONS}
        assert all(path.is_file() for path in files.values())

    @pytest.mark.promise("`push`", "several sets of weights in a folder", "those that transformers loads")
    def test_the_index_names_the_weights(self, model: Path) -> None:
        (model / "model.safetensors").unlink()
        sources = [source_from_tensor(name, row) for name, row in ROWS.items()]
        shards = write_checkpoint(model, sources, max_shard_size=16).files
        assert len(shards) == 2
        save_file(ROWS, model / "model-00003-of-00003.safetensors")
        expected = {"config.json", "README.md", "model.safetensors.index.json", *shards}
        assert model_files(model, CONFIG).keys() == expected
        save_file(ROWS, model / "model.safetensors")  # which transformers prefers
        assert model_files(model, CONFIG).keys() == {"config.json", "README.md", "model.safetensors"}

    @pytest.mark.promise(
        "`push`", "weights with tensors of an expert that the config does not list", "refused with the name"
    )
    def test_weights_of_an_expert_that_the_config_does_not_list(self, model: Path) -> None:
        old = {"anchor.model.layers.0.mlp.experts.old.up_proj.weight": torch.ones(2)}
        save_file(ROWS | old, model / "model.safetensors")
        with pytest.raises(ValueError, match=r"a tensor of the expert 'old', which config\.json does not list"):
            plan_upload(model)

    @pytest.mark.promise("`push`", "a file that is a link out of the folder", "refused")
    @pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "model.safetensors", "config.json", "README.md"])
    def test_a_link_out_of_the_folder(self, model: Path, name: str) -> None:
        outside = model.parent / "outside"
        if (model / name).exists():
            shutil.move(model / name, outside)
        else:
            outside.write_text("{}")
        (model / name).symlink_to(outside)
        with pytest.raises(ValueError, match="is a link that leads out of the folder"):
            plan_upload(model)

    def test_a_folder_of_templates_that_is_a_link(self, model: Path) -> None:
        (model.parent / "outside").mkdir()
        write(model.parent / "outside", ("key.jinja",))
        (model / "additional_chat_templates").symlink_to(model.parent / "outside")
        assert "additional_chat_templates" in plan_upload(model).left_out

    @pytest.mark.promise("`push`", "`auto_map` of another repository in a JSON file", "refused with the entries")
    @pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
    def test_code_of_others(self, model: Path, file: str) -> None:
        values = json.loads((model / file).read_text()) if (model / file).exists() else {}
        (model / file).write_text(json.dumps({**values, "auto_map": {"AutoModel": "evil/repo--x.Y"}}))
        with pytest.raises(ValueError, match=f"{file} names code of others .auto_map AutoModel: evil/repo--x.Y"):
            plan_upload(model)

    @pytest.mark.promise(
        "`push`", "changed or foreign `*_flexmoe.py` in the folder", "the code of the installed version is sent"
    )
    def test_code_is_that_of_this_version(self, model: Path) -> None:
        FlexMoeForCausalLM.save_code(model)
        assert {path.name for path in model.glob("*_flexmoe.py")} == CODE_FILES.keys()
        assert plan_upload(model).left_out == ()
        (model / "modeling_flexmoe.py").write_text("import os")
        plan = plan_upload(model)
        assert plan.left_out == ("modeling_flexmoe.py",)
        (sent,) = (file for file in plan.files if file.name == "modeling_flexmoe.py")
        assert sent.path.read_bytes() != b"import os"
        assert sent.sha256 == hashlib.sha256(sent.path.read_bytes()).hexdigest()

    def test_private_text_in_any_file(self, model: Path) -> None:
        write(model, ("tokenizer.json",), '{"added_tokens": [{"content": "jane@hospital.example.org"}]}')
        write(model, ("additional_chat_templates/rag.jinja",), "{# /srv/prompts/rag #}")
        save_file(ROWS, model / "model.safetensors", metadata={"host": "~/runs/3"})
        found = {found.file: found.kind for found in plan_upload(model).discoveries}
        assert found == {
            "tokenizer.json": "an e-mail address",
            "additional_chat_templates/rag.jinja": "a local path",
            "model.safetensors": "a local path",
        }


class TestPublicSample:
    def record(self, folder: Path, name: str, text: bytes, sha256: str | None = None) -> dict[str, Any]:
        (folder / name).write_bytes(text)
        config = CONFIG | {"public_sample": {"file": name, "sha256": sha256 or hashlib.sha256(text).hexdigest()}}
        (folder / "config.json").write_text(json.dumps(config))
        return config

    def test_only_the_recorded_file(self, model: Path) -> None:
        config = self.record(model, "public_sample.jsonl", b'{"text": "Write to jane@example.org"}\n')
        write(model, ("private_sample.jsonl",))
        assert companions(model, config["public_sample"]).keys() == {"public_sample.jsonl"}
        assert plan_upload(model).discoveries == ()  # public text names people

    @pytest.mark.parametrize("name", [".secret.jsonl", "me.pem", "config.json", "notes.txt"])
    def test_other_names(self, model: Path, name: str) -> None:
        config = json.loads((model / "config.json").read_text())
        config["public_sample"] = {"file": name, "sha256": "0" * 64}
        assert companions(model, config["public_sample"]) == {}

    def test_another_file_than_the_recorded_one(self, model: Path) -> None:
        config = self.record(model, "public_sample.jsonl", b"other", "0" * 64)
        with pytest.raises(ValueError, match="the file was changed"):
            companions(model, config["public_sample"])

    def test_a_secret_in_it(self, model: Path) -> None:
        self.record(model, "public_sample.jsonl", b'{"text": "-----BEGIN PRIVATE KEY-----\\nMII"}\n')
        assert [found.kind for found in plan_upload(model).discoveries] == ["a private key"]


class TestCompositions:
    @pytest.mark.parametrize("rows", [None, b"rows"])
    def test_files(self, model: Path, rows: bytes | None) -> None:
        config = composition(model, rows)
        (model / "router.safetensors").write_bytes(b"rows")
        write(model, COMPANIONS)
        files = composition_files(model, config).keys()
        assert files == {"config.json", "README.md", *COMPANIONS} | (set() if rows is None else {"router.safetensors"})

    def test_other_rows_than_the_recorded_ones(self, model: Path) -> None:
        config = composition(model, b"rows")
        (model / "router.safetensors").write_bytes(b"others")
        with pytest.raises(ValueError, match=r"the router file recorded in config\.json has .* the file was changed"):
            composition_files(model, config)


class TestPackages:
    FILES = ("README.md", "config.json", "expert.safetensors", "expert_config.json")

    @pytest.mark.parametrize("name", [name for name in STRAY if name != "model.sig"])
    def test_a_stray_file_stays(self, package: Path, name: str) -> None:
        (package / name).write_bytes(b"private")
        plan = plan_upload(package)
        assert tuple(file.name for file in plan.files) == self.FILES
        assert plan.left_out == (name,)

    def test_licence_and_signature(self, package: Path) -> None:
        write(package, ("LICENSE", "model.sig", "USE_POLICY.md", "tokenizer.json", "modeling_flexmoe.py"))
        assert set(package_files(ExpertPackage.open(package))) == {*self.FILES, "LICENSE", "model.sig"}

    @pytest.mark.parametrize("weight_map", [{"a": "expert.safetensors"}, {"a": "expert-old.safetensors"}, []])
    def test_an_index_of_other_files(self, package: Path, weight_map: Any) -> None:
        write(package, ("expert.safetensors.index.json",), json.dumps({"weight_map": weight_map}))
        assert set(package_files(ExpertPackage.open(package))) == set(self.FILES)

    @pytest.mark.parametrize("name", ["expert-old.safetensors", "LICENSE.key"])
    def test_files_that_may_be_signed(self, package: Path, name: str) -> None:
        write(package, ("model.sig", name))
        with pytest.raises(PackageError, match=f"is signed, and '{name}' is not a file of the package"):
            plan_upload(package)

    def test_a_link_out_of_the_folder(self, package: Path) -> None:
        (package.parent / "key").write_text("x")
        (package / "LICENSE").symlink_to(package.parent / "key")
        with pytest.raises(PackageError, match="leads out of the folder"):
            plan_upload(package)

    def test_code_of_others(self, package: Path) -> None:
        write(package, ("config.json",), '{"model_type": "flexmoe_expert", "auto_map": {"AutoConfig": "evil/x--y.Z"}}')
        with pytest.raises(ValueError, match=r"config\.json names code of others"):
            plan_upload(package)


def test_the_files_of_every_tokenizer_of_transformers() -> None:
    named = re.compile(r"^VOCAB_FILES_NAMES\s*=\s*(\{.*?\})", re.MULTILINE | re.DOTALL)
    sources = Path(transformers.__file__).parent.glob("models/*/tokenization_*.py")
    found = [match for path in sources for match in named.findall(path.read_text(encoding="utf-8"))]
    names = {name for text in found for name in ast.literal_eval(text).values()}
    assert len(names) > 20
    assert [name for name in sorted(names) if not is_tokenizer_file(name)] == []


def test_all_of_them_are_downloaded_and_none_of_the_others() -> None:
    named = [*COMPANIONS, *TOKENIZER_FILES]
    assert all(is_companion(name) for name in named)
    assert not any(is_companion(name) for name in STRAY)
    downloaded = filter_repo_objects(named, allow_patterns=DOWNLOADED, ignore_patterns=NEVER_DOWNLOADED)
    assert list(downloaded) == named


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("LICENSE", True), ("LICENCE.md", True), ("license.txt", True), ("LICENSE-MIT", True), ("NOTICE.txt", True),
     ("USE_POLICY.md", True), ("TERMS_OF_USE.md", True), ("COPYING", True), ("LICENSE_llama-3.1.txt", True),
     ("MODEL_LICENSE", True), ("Acceptable_Use_Policy.txt", True), ("LICENSE.LLAMA3", True), ("COPYING.LESSER", True),
     ("LICENSES.md", True), ("LICENSES.zip", False), ("LICENSE.safetensors", False), ("terms.key", False),
     ("LICENSE.key", False), ("LICENSE.py", False), ("terms.json", False),
     ("MYLICENSE", False), ("LICENSE.txt.bak", False), ("LICENSE notes", False)],
)  # fmt: skip
def test_names_of_terms(name: str, is_one: bool) -> None:
    assert is_terms(name) is is_one
