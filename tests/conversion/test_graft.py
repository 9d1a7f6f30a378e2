"""Grafts: the anchor's bytes under new names, a model with equal logits, and atomic outputs."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import flexmoe  # noqa: F401 - registers FlexMoE with the Auto classes
from flexmoe.conversion.graft import _sample, graft
from flexmoe.data import Documents, read_public_sample
from flexmoe.io.folders import TEMPORARY_MARK
from flexmoe.io.tensors import CheckpointFolder
from flexmoe.modeling.anchors_flexmoe import UnsupportedAnchorError
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.testing import ANCHOR_CONFIGS, random_tokens, tiny_anchor
from tests.support.hub import HubServer, point_client_at


@pytest.fixture(scope="module", params=ANCHOR_CONFIGS)
def anchor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A tiny anchor of each family, and the folder that it is saved in."""
    model, folder = tiny_anchor(request.param), tmp_path_factory.mktemp(request.param) / "anchor"
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny_anchor("llama").save_pretrained(tmp_path / "anchor")
    return tmp_path / "anchor"


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with CheckpointFolder(folder) as files:
        return {name: files.read(name) for name in files.infos}


def fingerprint_by_hand(model: PreTrainedModel) -> str:
    """The reference, computed from a model in memory: it shares no code with the graft."""
    codes = {torch.float32: "F32", torch.bfloat16: "BF16"}
    lines = []
    for name, tensor in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            shape = "[" + ",".join(str(size) for size in tensor.shape) + "]"
            digest = hashlib.sha256(bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())).hexdigest()
            lines.append(f"{name} {codes[tensor.dtype]} {shape} {digest}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


class TestEveryFamily:
    def test_bytes_are_the_anchors_and_rows_are_zero(
        self, anchor: tuple[PreTrainedModel, Path], tmp_path: Path
    ) -> None:
        model, folder = anchor
        tensors = stored(graft(folder, tmp_path / "out"))
        rows = {name: tensors.pop(name) for name in list(tensors) if ".router.public." in name}
        assert len(rows) == 2 * model.config.num_hidden_layers
        assert all(row.dtype == torch.float32 and not row.any() for row in rows.values())
        assert {tuple(row.shape) for row in rows.values()} == {(1, model.config.hidden_size), (1,)}
        state = {name: t for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys}
        back = {name.removeprefix("anchor.").replace(".experts.public.", "."): t for name, t in tensors.items()}
        assert sorted(back) == sorted(state)
        assert all(torch.equal(back[name], state[name]) for name in state)

    def test_loads_without_warnings_and_has_equal_logits(
        self, anchor: tuple[PreTrainedModel, Path], tmp_path: Path
    ) -> None:
        model, folder = anchor
        out = graft(folder, tmp_path / "out")
        grafted, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert isinstance(grafted, FlexMoeForCausalLM)
        assert {key: value for key, value in info.items() if value} == {}
        _, info = AutoModel.from_pretrained(out, output_loading_info=True)
        assert {key: value for key, value in info.items() if value} == {}
        tokens = random_tokens(2, 24)
        with torch.no_grad():
            assert torch.equal(grafted(tokens).logits, model(tokens).logits)
        head, embeddings = grafted.get_output_embeddings().weight, grafted.get_input_embeddings().weight
        assert (head.data_ptr() == embeddings.data_ptr()) == bool(model.all_tied_weights_keys)

    def test_saving_the_loaded_graft_gives_the_same_configuration(
        self, anchor: tuple[PreTrainedModel, Path], tmp_path: Path
    ) -> None:
        out = graft(anchor[1], tmp_path / "out")
        FlexMoeForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "again")
        assert config_of(tmp_path / "again") == config_of(out)

    def test_the_fingerprint_does_not_depend_on_the_files(
        self, anchor: tuple[PreTrainedModel, Path], tmp_path: Path
    ) -> None:
        model, folder = anchor
        model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
        assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
        one = config_of(graft(folder, tmp_path / "one"))["anchor"]
        many = config_of(graft(tmp_path / "sharded", tmp_path / "many"))["anchor"]
        assert one == many
        assert one == {
            "repo": None,
            "revision": None,
            "fingerprint": fingerprint_by_hand(model),
            "model_type": model.config.model_type,
            "dtype": "float32",
        }


def test_names_without_the_base_models_prefix(tmp_path: Path) -> None:
    model = tiny_anchor("gpt2")
    model.save_pretrained(tmp_path / "whole")
    model.transformer.save_pretrained(tmp_path / "base")  # as on the Hub: "h.0.mlp.c_fc.weight", and no head
    assert "h.0.mlp.c_fc.weight" in load_file(tmp_path / "base" / "model.safetensors")
    whole, base = graft(tmp_path / "whole", tmp_path / "a"), graft(tmp_path / "base", tmp_path / "b")
    assert (whole / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert config_of(whole)["anchor"] == config_of(base)["anchor"]


def test_one_byte_changes_the_fingerprint(llama: Path, tmp_path: Path) -> None:
    before = config_of(graft(llama, tmp_path / "before"))["anchor"]["fingerprint"]
    with open(llama / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert config_of(graft(llama, tmp_path / "after"))["anchor"]["fingerprint"] != before


def test_without_a_fingerprint(llama: Path, tmp_path: Path) -> None:
    with_it, without = graft(llama, tmp_path / "with"), graft(llama, tmp_path / "without", fingerprint=False)
    assert config_of(without)["anchor"]["fingerprint"] is None
    assert (with_it / "model.safetensors").read_bytes() == (without / "model.safetensors").read_bytes()


def test_sharded_output(llama: Path, tmp_path: Path) -> None:
    out = graft(llama, tmp_path / "out", max_shard_size=40_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(set(index["weight_map"].values())) == shards
    single = graft(llama, tmp_path / "single")
    assert {name: tensor.tolist() for name, tensor in stored(out).items()} == {
        name: tensor.tolist() for name, tensor in stored(single).items()
    }
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("stored_dtype", [torch.bfloat16, torch.float16])
def test_the_anchors_precision_is_kept(stored_dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_anchor("qwen3").to(stored_dtype).save_pretrained(tmp_path / "anchor")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "anchor"
    )  # unlike `.to()`, this does not round the rotary frequencies
    out = graft(tmp_path / "anchor", tmp_path / "out")
    grafted = AutoModelForCausalLM.from_pretrained(out)
    assert config_of(out)["dtype"] == config_of(out)["anchor"]["dtype"] == str(stored_dtype).removeprefix("torch.")
    tokens = random_tokens(2, 16)
    with torch.no_grad():
        assert torch.equal(grafted(tokens).logits, model(tokens).logits)


def test_mixed_dtypes_are_kept(llama: Path, tmp_path: Path) -> None:
    tensors = {
        name: tensor if "norm" in name else tensor.bfloat16()
        for name, tensor in load_file(llama / "model.safetensors").items()
    }
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    config = config_of(llama)
    del config["dtype"]  # then transformers uses the tensors' dtype
    (llama / "config.json").write_text(json.dumps(config))
    out = graft(llama, tmp_path / "out")
    written = {name.removeprefix("anchor.").replace(".experts.public.", "."): t for name, t in stored(out).items()}
    assert {t.dtype for t in tensors.values()} == {torch.float32, torch.bfloat16}
    assert all(written[name].dtype == t.dtype and torch.equal(written[name], t) for name, t in tensors.items())
    assert config_of(out)["anchor"]["dtype"] == "mixed"
    tokens = random_tokens(2, 16)
    grafted, anchor = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, llama))
    with torch.no_grad():
        assert torch.equal(grafted(tokens).logits, anchor(tokens).logits)


def test_values_of_the_anchor_are_not_checked(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.embed_tokens.weight"][0] = float("nan")  # a row that no token uses
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    grafted = AutoModelForCausalLM.from_pretrained(graft(llama, tmp_path / "out"))
    with torch.no_grad():
        assert grafted(random_tokens(2, 16)).logits.isfinite().all()


def test_settings_reach_the_configuration(llama: Path, tmp_path: Path) -> None:
    plain = config_of(graft(llama, tmp_path / "plain"))
    assert (plain["norm_topk_prob"], plain["num_experts_per_tok"]) == (True, 4)  # Llama: no norm follows its FFN
    assert plain["experts"] == [{"name": "public", "kind": "full"}]
    chosen = config_of(graft(llama, tmp_path / "chosen", norm_topk_prob=False, num_experts_per_tok=2))
    assert (chosen["norm_topk_prob"], chosen["num_experts_per_tok"]) == (False, 2)


def test_only_tokenizer_generation_settings_and_licence_are_copied(llama: Path, tmp_path: Path) -> None:
    vocabulary = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="[UNK]", eos_token="two")
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(llama)
    (llama / "LICENSE.txt").write_text("do as you like")
    (llama / "generation_config.json").write_text('{"temperature": 0.25}')
    for name in ("README.md", "modeling_other.py", "optimizer.bin", "trainer_state.json", "consolidated.safetensors"):
        (llama / name).write_text("not this")
    out = graft(llama, tmp_path / "out")
    assert {path.name for path in out.iterdir() if not path.name.endswith("_flexmoe.py")} == {
        "config.json", "model.safetensors", "generation_config.json", "LICENSE.txt",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer.get_vocab()
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.temperature == 0.25


class TestPublicSample:
    DOCUMENTS = tuple(f"document {number}: " + "naïve text, line\none " * (number % 7) for number in range(60))

    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        path = tmp_path / "public.jsonl"
        path.write_text(
            "".join(json.dumps({"body": document}) + "\n" for document in (*self.DOCUMENTS, self.DOCUMENTS[0]))
        )
        return path

    def test_holds_complete_documents_within_its_size(self, llama: Path, data: Path, tmp_path: Path) -> None:
        out = graft(llama, tmp_path / "out", public_data=[data], public_sample_bytes=3000, text_column="body")
        record = config_of(out)["public_sample"]
        content = (out / record["file"]).read_bytes()
        assert 2500 < len(content) <= 3000
        assert (record["bytes"], record["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        documents = read_public_sample(out, record)
        assert len(documents) == len(set(documents)) == record["documents"]
        assert set(documents) < set(self.DOCUMENTS)

    def test_depends_on_the_seed_only(self, llama: Path, data: Path, tmp_path: Path) -> None:
        other = tmp_path / "reversed.jsonl"
        other.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))

        def sample(name: str, file: Path, seed: int) -> bytes:
            options = {"public_data": [file], "public_sample_bytes": 3000, "text_column": "body"}
            return (graft(llama, tmp_path / name, seed=seed, **options) / "public_sample.jsonl").read_bytes()

        assert sample("a", data, 0) == sample("b", other, 0) != sample("c", data, 1)

    def test_is_that_of_all_documents_sorted_by_their_hash(self, data: Path) -> None:
        def order(document: str) -> bytes:
            return hashlib.sha256(f"public sample 7\n{document}".encode()).digest()

        expected, room = [], 3000
        for document in sorted(self.DOCUMENTS, key=order):
            line = json.dumps({"text": document}, ensure_ascii=False) + "\n"
            if len(line.encode()) <= room:
                expected.append(line)
                room -= len(line.encode())
        assert 5 < len(expected) < len(self.DOCUMENTS)
        assert _sample(Documents([data], column="body"), 3000, seed=7) == expected

    def test_does_not_hold_all_text(self, tmp_path: Path) -> None:
        with (tmp_path / "large.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": f"{number} " * 2000}) + "\n" for number in range(1000, 2000))
        documents = Documents([tmp_path / "large.jsonl"])
        tracemalloc.start()
        try:
            sample = _sample(documents, 50_000, seed=0)
            assert len(sample) == 4
            assert tracemalloc.get_traced_memory()[1] < 2_000_000  # of 10 MB
        finally:
            tracemalloc.stop()

    def test_a_template_without_a_table(self, llama: Path, tmp_path: Path) -> None:
        (tmp_path / "public.txt").write_text("text")
        with pytest.raises(ValueError, match=r"text_template\) is for .* no table among the data: .*public\.txt"):
            graft(llama, tmp_path / "out", public_data=[tmp_path / "public.txt"], text_template="{title}")
        assert not (tmp_path / "out").exists()

    def test_rows_without_text_are_counted_once(self, llama: Path, tmp_path: Path) -> None:
        (tmp_path / "public.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
        with pytest.warns(UserWarning, match=r"public\.jsonl: 1 row\(s\) without text were skipped") as caught:
            graft(llama, tmp_path / "out", public_data=[tmp_path / "public.jsonl"], skip_empty=True)
        assert len(caught) == 1

    def test_a_document_that_does_not_fit_is_an_error_before_anything_is_written(
        self, llama: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "big.txt").write_text("word " * 1000)
        with pytest.raises(ValueError, match="None of the 1 public documents fits"):
            graft(llama, tmp_path / "out", public_data=[tmp_path / "big.txt"], public_sample_bytes=1000)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["anchor", "big.txt"]

    def test_without_public_data(self, llama: Path, tmp_path: Path) -> None:
        out = graft(llama, tmp_path / "out")
        assert config_of(out).get("public_sample") is None
        assert not (out / "public_sample.jsonl").exists()


class TestErrors:
    def test_no_such_anchor(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no folder"):
            graft(tmp_path / "missing", tmp_path / "out")

    def test_an_existing_output_needs_overwrite(self, llama: Path, tmp_path: Path) -> None:
        out = graft(llama, tmp_path / "out")
        (out / "mine.txt").write_text("kept")
        with pytest.raises(FileExistsError, match="--overwrite"):
            graft(llama, out)
        assert (out / "mine.txt").read_text() == "kept"
        assert not (graft(llama, out, overwrite=True) / "mine.txt").exists()

    @pytest.mark.parametrize("place", ["anchor", "."])
    def test_the_anchor_is_never_overwritten(self, place: str, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="which is read"):
            graft(llama, tmp_path / place, overwrite=True)
        assert (llama / "config.json").exists()

    def test_the_public_data_is_never_overwritten(self, llama: Path, tmp_path: Path) -> None:
        text = tmp_path / "data" / "public.txt"
        text.parent.mkdir()
        text.write_text("the only copy")
        with pytest.raises(ValueError, match=r"public\.txt, which is read"):
            graft(llama, text.parent, public_data=[text], overwrite=True)
        assert text.read_text() == "the only copy"

    def test_one_file_instead_of_a_list(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="a list of them"):
            graft(llama, tmp_path / "out", public_data=tmp_path / "public.txt")  # type: ignore[arg-type]

    def test_a_graft_is_not_an_anchor(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedAnchorError, match="FlexMoE already"):
            graft(graft(llama, tmp_path / "out"), tmp_path / "again")

    def test_a_failure_leaves_no_output(self, llama: Path, tmp_path: Path) -> None:
        tensors = load_file(llama / "model.safetensors")
        save_file({**tensors, "model.extra": torch.ones(1)}, llama / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"model\.extra"):
            graft(llama, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["anchor"]


KILLED = """
import os, signal, sys
from flexmoe.conversion.graft import graft
written = 0
def progress(count):
    global written
    written += count
    if written > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
graft(sys.argv[1], sys.argv[2], progress=progress)
"""


@pytest.mark.soak  # a process of its own; `tests/modeling/test_kills.py` kills `graft` in processes that are forked
def test_a_kill_leaves_no_loadable_output(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    half = (llama / "model.safetensors").stat().st_size // 2
    done = subprocess.run([sys.executable, "-c", KILLED, str(llama), str(out), str(half)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    (stray,) = [path for path in tmp_path.iterdir() if path.name != "anchor"]
    assert stray.name.startswith(f".out{TEMPORARY_MARK}")
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(stray)
    with pytest.warns(UserWarning, match=stray.name):
        graft(llama, out)
    AutoModelForCausalLM.from_pretrained(out)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer().running() as server:
        point_client_at(server.url, monkeypatch)
        yield server


def test_an_anchor_from_the_hub_is_recorded_with_its_commit(hub: HubServer, llama: Path, tmp_path: Path) -> None:
    commit = hub.push_folder("lab/tiny-llama", llama)
    local = graft(llama, tmp_path / "local")
    shutil.rmtree(llama)
    out = graft("lab/tiny-llama", tmp_path / "out", revision="main")
    assert (out / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()
    assert config_of(out)["anchor"] == {**config_of(local)["anchor"], "repo": "lab/tiny-llama", "revision": commit}
    assert not any(path.is_symlink() for path in out.rglob("*"))
