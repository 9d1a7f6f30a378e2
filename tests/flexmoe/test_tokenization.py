"""A checkpoint reads text as its anchor does, although `AutoTokenizer` chooses a class by model_type, too."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, GPT2Tokenizer

import flexmoe
from flexmoe import tokenization
from flexmoe.modeling import FlexMoeConfig
from flexmoe.testing import tiny_anchor
from flexmoe.tokenization import (
    PROBE,
    TokenizerError,
    copy_tokenizer,
    differs_from_anchor,
    first_difference,
    load_tokenizer,
    read_tokenizer,
)
from tests.support import tokenizer_files
from tests.support.tokenizer_files import tokenizer_json, write_tokenizer

NAMED = [
    ("olmo2", "byte level", "GPT2Tokenizer"),
    ("olmo3", "byte level", "GPT2Tokenizer"),
    ("granite", "byte level", "GPT2Tokenizer"),
    ("stablelm", "byte level", "GPTNeoXTokenizer"),
    ("qwen2", "byte level", "LlamaTokenizerFast"),
    ("llama", "byte level", "PreTrainedTokenizerFast"),
    ("gpt2", "byte level", None),
    ("mistral", "metaspace", "LlamaTokenizer"),
    ("phi3", "metaspace", "LlamaTokenizer"),
    ("gemma2", "metaspace", "GemmaTokenizerFast"),
    ("xglm", "unigram", "XGLMTokenizer"),
]
"""Pairs that real checkpoints have, and one in every so many of all that there are; `tests/soak` tries all."""
SAMPLE = [case for case in itertools.islice(tokenizer_files.cases(every=False), 0, None, 23) if case not in NAMED]
UNREADABLE = (
    ImportError,
    TypeError,
    AttributeError,
    ValueError,
    UnboundLocalError,
)  # raised by transformers for files of another kind


def grafted(anchor: Path, family: str) -> Path:
    """A FlexMoE checkpoint without weights that has the tokenizer of `anchor`."""
    folder = anchor.parent / "graft"
    folder.mkdir()
    config = FlexMoeConfig(anchor_config=AutoConfig.from_pretrained(anchor))
    copy_tokenizer(anchor, folder, config)
    config.save_pretrained(folder)
    return folder


@pytest.mark.promise(
    "`AutoTokenizer`",
    "a graft of any family with any tokenizer class",
    "the anchor's ids",
)
@pytest.mark.parametrize(("family", "kind", "declared"), NAMED + SAMPLE)
def test_a_graft_reads_the_tokens_of_its_anchor(tmp_path: Path, family: str, kind: str, declared: str | None) -> None:
    write_tokenizer(tmp_path / "anchor", family, kind, declared)
    try:
        expected = AutoTokenizer.from_pretrained(tmp_path / "anchor")
    except UNREADABLE:
        with pytest.raises(TokenizerError, match="cannot be read"):
            grafted(tmp_path / "anchor", family)
        return
    folder = grafted(tmp_path / "anchor", family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (*PROBE, "".join(PROBE)):
        assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert type(tokenizer) is type(expected)
    assert differs_from_anchor(folder) is None


@pytest.fixture(scope="module")
def anchor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OLMo-2 anchor that names a class which its family does not use."""
    folder = tmp_path_factory.mktemp("tokenization") / "anchor"
    model = tiny_anchor("olmo2")
    tokenizer = tokenizer_json("byte level")
    model.resize_token_embeddings(Tokenizer.from_str(tokenizer).get_vocab_size())
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}')
    return folder


def copy_of(folder: Path, to: Path, **tokenizer_config: Any) -> Path:
    shutil.copytree(folder, to)
    path = to / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | tokenizer_config))
    return to


class TestWhatIsWritten:
    @pytest.mark.promise(
        "`AutoTokenizer`",
        "`compose`, `add`, `remove`, `export`, `import_flex_olmo`",
        "the anchor's ids, or refused",
    )
    def test_graft_compose_and_exports(self, anchor: Path, tmp_path: Path) -> None:
        expected = AutoTokenizer.from_pretrained(anchor)
        assert first_difference(expected, GPT2Tokenizer.from_pretrained(anchor)) is not None
        graft = flexmoe.graft(anchor, tmp_path / "graft", experts={"math": anchor, "code": anchor})
        folders = [
            graft,
            flexmoe.remove(graft, "code", tmp_path / "removed"),
            flexmoe.export(graft, tmp_path / "dense", to="dense", expert="public"),
            native := flexmoe.export(graft, tmp_path / "native", to="flex_olmo"),
            flexmoe.import_flex_olmo(native, tmp_path / "imported", names=["public", "math", "code"]) / "model",
        ]
        for folder in folders:
            assert first_difference(expected, AutoTokenizer.from_pretrained(folder)) is None, folder

    def test_it_is_read_once_for_the_check_and_the_copy(
        self, anchor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        graft = flexmoe.graft(anchor, tmp_path / "graft", experts={"math": anchor})
        read = []
        monkeypatch.setattr(
            tokenization,
            "read_tokenizer",
            lambda folder, *args, **kwargs: read.append(folder) or read_tokenizer(folder, *args, **kwargs),
        )
        flexmoe.remove(graft, "math", tmp_path / "removed")
        assert read == [graft, graft]  # of the model's class and of its anchor's
        read.clear()
        flexmoe.export(graft, tmp_path / "dense", to="dense", expert="public")
        assert read[:2] == [graft, graft]
        assert len(read) == 3  # and what was written, for a model of another class

    def test_files_keep_their_bytes_where_nothing_has_to_change(self, anchor: Path, tmp_path: Path) -> None:
        model = copy_of(anchor, tmp_path / "model", tokenizer_class="TokenizersBackend")
        graft = flexmoe.graft(model, tmp_path / "graft")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (graft / name).read_bytes() == (model / name).read_bytes()

    def test_a_class_that_reads_otherwise_is_replaced_or_refused(
        self, anchor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        results = iter(["a text", None, "a text", "a text"])
        monkeypatch.setattr(tokenization, "first_difference", lambda one, other: next(results))
        (tmp_path / "saved").mkdir()
        config = FlexMoeConfig(anchor_config=AutoConfig.from_pretrained(anchor))
        copy_tokenizer(anchor, tmp_path / "saved", config)
        assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["tokenizer_class"] == (
            "TokenizersBackend"
        )
        with pytest.raises(TokenizerError, match="would read other tokens in 'a text' as part of a flexmoe model"):
            flexmoe.graft(anchor, tmp_path / "graft")
        assert not (tmp_path / "graft").exists()


class TestWhatIsRefused:
    def test_code_of_a_repository(self, anchor: Path, tmp_path: Path) -> None:
        named = {"AutoTokenizer": ["other/repo--tokens.OtherTokenizer", None]}
        model = copy_of(anchor, tmp_path / "model", auto_map=named)
        with pytest.warns(UserWarning, match=r"left out, .*: .*other/repo--tokens\.OtherTokenizer"):
            graft = flexmoe.graft(model, tmp_path / "graft")
        assert "auto_map" not in json.loads((graft / "tokenizer_config.json").read_text())
        without_code = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        assert first_difference(without_code, AutoTokenizer.from_pretrained(graft)) is None

    def test_files_that_cannot_be_read(self, anchor: Path, tmp_path: Path) -> None:
        model = copy_of(anchor, tmp_path / "model")
        (model / "tokenizer.json").write_text("{}")
        with pytest.raises(TokenizerError, match=r"model cannot be read .* remove them to go on without a tokenizer"):
            flexmoe.graft(model, tmp_path / "graft")

    def test_links_out_of_the_folder(self, anchor: Path, tmp_path: Path) -> None:
        model = copy_of(anchor, tmp_path / "model")
        (tmp_path / "key").write_text("secret")
        for name in ("vocab.json", "LICENSE"):
            (model / name).symlink_to(tmp_path / "key")
            with pytest.raises(ValueError, match="a link that leads out of the folder"):
                flexmoe.graft(model, tmp_path / "graft")
            (model / name).unlink()

    def test_a_folder_without_a_tokenizer(self, tmp_path: Path) -> None:
        tiny_anchor("olmo2").save_pretrained(tmp_path / "model")
        graft = flexmoe.graft(tmp_path / "model", tmp_path / "graft")
        assert not list(graft.glob("tokenizer*"))


class TestOldCheckpoints:
    """FlexMoE did not store the class before: their tokenizer is that of the declared class."""

    @pytest.fixture(scope="class")
    def old(self, anchor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("old")
        graft = flexmoe.graft(anchor, folder / "graft", experts={"math": anchor})
        return copy_of(graft, folder / "old", tokenizer_class="GPT2Tokenizer")

    @pytest.mark.promise(
        "`flexmoe` commands",
        "a checkpoint of before whose tokenizer differs",
        "a warning that says how to mend it",
    )
    def test_loading_one_warns(self, old: Path) -> None:
        with pytest.warns(UserWarning, match=r"GPT2Tokenizer, its anchor's as TokenizersBackend.*tokenizer_class"):
            load_tokenizer(old)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_tokenizer(old.parent / "graft")

    @pytest.mark.parametrize("command", ["remove", "export"])
    def test_others_are_not_made_from_one(self, old: Path, tmp_path: Path, command: str) -> None:
        run = {
            "remove": lambda: flexmoe.remove(old, "math", tmp_path / "out"),
            "export": lambda: flexmoe.export(old, tmp_path / "out", to="dense", expert="public"),
        }[command]
        with pytest.raises(TokenizerError, match="read other tokens in"):
            run()
        assert not (tmp_path / "out").exists()


@pytest.mark.promise(
    "`graft`",
    "a tokenizer with more tokens than embeddings",
    "a warning that names them",
)
def test_tokens_without_an_embedding_are_named(anchor: Path, tmp_path: Path) -> None:
    model = copy_of(anchor, tmp_path / "model")
    tokenizer = read_tokenizer(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<note>"]})
    tokenizer.save_pretrained(model)
    with pytest.warns(UserWarning, match=r"1 token\(s\) without an embedding, as the model has [0-9]+ rows: '<note>'"):
        flexmoe.graft(model, tmp_path / "graft")
