"""Grafts of GGUF files, by path, folder and Hub id: transformers' logits, and the file on record."""

import hashlib
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flexmoe
from flexmoe.io.gguf import convert_gguf
from flexmoe.testing import random_tokens
from flexmoe_cli import main
from tests.support.gguf_files import VOCABULARY, write_gguf
from tests.support.hub import HubServer, point_client_at
from tests.support.soak import thinned

pytestmark = pytest.mark.filterwarnings("ignore:.* is quantised:UserWarning")


def anchor_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["anchor"]


def test_a_graft_computes_what_transformers_computes(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", "Q8_0", pre="smollm")
    (tmp_path / "public.txt").write_text("List:\n\n1. hello")
    graft = flexmoe.graft(file, tmp_path / "graft", public_data=[tmp_path / "public.txt"])
    model = AutoModelForCausalLM.from_pretrained(graft).eval()
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.bfloat16).eval()
    tokens = random_tokens(VOCABULARY, 2, 9)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, reference(tokens).logits)
    assert AutoTokenizer.from_pretrained(graft).tokenize("\n\n12") == ["ĊĊ", "1", "2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graft", "public.txt", "tiny.gguf"]


def test_the_file_is_recorded(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", "Q4_1")
    recorded = anchor_of(flexmoe.graft(file, tmp_path / "graft"))
    gguf = recorded.pop("gguf")
    assert recorded == anchor_of(flexmoe.graft(convert_gguf(file, tmp_path / "dense"), tmp_path / "other"))
    assert recorded["dtype"] == "bfloat16"
    assert (gguf["file"], gguf["sha256"]) == ("tiny.gguf", hashlib.sha256(file.read_bytes()).hexdigest())
    assert sum(gguf["types"].values()) == pytest.approx(1, abs=1e-3)
    assert gguf["types"].keys() == {"Q4_1", "F32"}


def test_a_file_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "models").mkdir()
    file = write_gguf(tmp_path / "models" / "tiny.gguf")
    assert main(["graft", str(file.parent), "--out", str(tmp_path / "graft")]) == 1
    assert "To graft tiny.gguf, give --gguf-file NAME" in " ".join(capsys.readouterr().err.split())
    assert main(["graft", str(file.parent), "--gguf-file", "tiny.gguf", "--out", str(tmp_path / "graft")]) == 0
    assert anchor_of(tmp_path / "graft")["gguf"]["file"] == "tiny.gguf"
    assert main(["graft", str(file.parent), "--gguf-file", "no.gguf", "--out", str(tmp_path / "other")]) == 1
    assert f"{file.parent} has no file no.gguf" in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer().running() as server:
        point_client_at(server.url, monkeypatch)
        yield server


def test_a_file_of_a_repository(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("a.gguf", "b.gguf"):
        write_gguf(folder / name)
    commit = hub.push_folder("lab/tiny-gguf", folder)
    recorded = anchor_of(flexmoe.graft("lab/tiny-gguf", tmp_path / "graft", gguf_file="b.gguf", revision="main"))
    assert {key: recorded["gguf"][key] for key in ("repo", "revision", "file")} == {
        "repo": "lab/tiny-gguf",
        "revision": commit,
        "file": "b.gguf",
    }
    # the repository holds no checkpoint that a composition could reference as its anchor
    assert recorded["repo"] is None


@pytest.mark.parametrize("is_fresh", thinned([False, True], [False]))
def test_the_command_shows_what_quantisation_costs(is_fresh: bool, tmp_path: Path, capfd) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", "Q4_1")
    line = ["graft", str(file), "--out", str(tmp_path / "graft")]
    if is_fresh:
        subprocess.run([sys.executable, "-m", "flexmoe", *line], check=True)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            assert main(line) == 0
    shown = " ".join(capfd.readouterr().err.split())
    assert "Warning: tiny.gguf is quantised (Q4_1: 100 % of the weights, 5 bits each" in shown
    assert "the original ones, which the file no longer holds" in shown


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", without=("blk.1.ffn_up.weight",))
    with pytest.raises(ValueError, match="missing that LlamaForCausalLM needs"):
        flexmoe.graft(file, tmp_path / "graft")
    assert list(tmp_path.iterdir()) == [file]


def test_the_output_must_not_hold_the_file(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    file = write_gguf(tmp_path / "out" / "tiny.gguf")
    with pytest.raises(ValueError, match="which is read"):
        flexmoe.graft(file, tmp_path / "out", overwrite=True)


def test_a_file_has_no_revision(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(ValueError, match="only Hub repositories have revisions"):
        flexmoe.graft(file, tmp_path / "graft", revision="main")
