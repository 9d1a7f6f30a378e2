"""Code that JSON files of a model name: found at any depth, left out of copies, FlexMoE's own kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flexmoe.foreign_code import copy_companion, foreign_code, without_foreign_code
from flexmoe.io.dense import read_dense_config
from flexmoe.meta import build_on_meta
from flexmoe.modeling.configuration_flexmoe import AUTO_MAP
from flexmoe.testing import tiny_flexmoe

EVIL = "evil/repo--modeling_evil.Evil"


@pytest.mark.parametrize(
    ("values", "named", "rest"),
    [
        ({"auto_map": dict(AUTO_MAP), "a": 1}, [], {"auto_map": dict(AUTO_MAP), "a": 1}),
        ({"auto_map": {"AutoModel": EVIL}}, ["auto_map AutoModel"], {}),
        ({"auto_map": {**AUTO_MAP, "AutoModel": EVIL}}, ["auto_map AutoModel"], {"auto_map": {
            name: value for name, value in AUTO_MAP.items() if name != "AutoModel"}}),
        ({"auto_map": {"AutoTokenizer": [EVIL, None]}}, ["auto_map AutoTokenizer"], {}),
        ({"auto_map": [EVIL]}, ["auto_map"], {}),
        ({"anchor_config": {"text_config": {"auto_map": dict(AUTO_MAP)}}}, ["auto_map"],
         {"anchor_config": {"text_config": {}}}),
        ({"list": [{"auto_map": {"AutoConfig": EVIL}}]}, ["auto_map"], {"list": [{}]}),
        ({"custom_pipelines": {"x": {"impl": "evil.Pipeline"}}}, ["custom_pipelines"], {}),
        ({"attn_implementation": "kernels-community/flash-attn"}, ["attn_implementation"], {}),
        ({"anchor_config": {"experts_implementation": {"": "evil/kernel"}}}, ["experts_implementation"],
         {"anchor_config": {}}),
        ({"attn_implementation": "eager"}, [], {"attn_implementation": "eager"}),
        ({"auto_map": None, "a": "auto_map"}, [], {"auto_map": None, "a": "auto_map"}),
    ],
)  # fmt: skip
def test_entries(values: dict[str, Any], named: list[str], rest: dict[str, Any]) -> None:
    found = foreign_code(values)
    assert [text.split(":")[0] for text in found] == named
    assert all(EVIL in text for text in found if "auto_map" in text and EVIL in json.dumps(values))
    assert without_foreign_code(values) == rest


def test_a_copy_names_no_code(tmp_path: Path) -> None:
    source, target = tmp_path / "generation_config.json", tmp_path / "copy.json"
    source.write_text('{"top_p":0.5}')
    copy_companion(source, target)
    assert target.read_bytes() == source.read_bytes()  # nothing to leave out
    source.write_text(json.dumps({"top_p": 0.5, "auto_map": {"AutoConfig": EVIL}}))
    with pytest.warns(
        UserWarning, match=f"names code of a repository, which is left out: auto_map AutoConfig: {EVIL}"
    ):
        copy_companion(source, target)
    assert json.loads(target.read_text()) == {"top_p": 0.5}


@pytest.mark.promise(
    "`from_pretrained`, `graft`", "`attn_implementation` in config.json names a kernel", "not loaded unless asked for"
)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("kind", ["graft", "anchor"])
def test_kernels_named_in_a_config_are_not_loaded(
    kind: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def record(name: str, **_: Any) -> None:
        asked.append(name)
        raise ImportError(name)

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", record)
    config: Any = tiny_flexmoe("llama").config
    values = config.to_diff_dict() if kind == "graft" else config.anchor_config.to_diff_dict()
    values["dtype"] = "float32"
    (tmp_path / "config.json").write_text(json.dumps(values | {key: "kernels-community/flash-attn"}, default=str))
    if kind == "anchor":
        build_on_meta(read_dense_config(tmp_path))
    else:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
            chosen = AutoConfig.from_pretrained(tmp_path, attn_implementation="kernels-community/other")
            with pytest.raises(ImportError, match="kernels-community/other"):
                AutoModelForCausalLM.from_config(chosen)
    assert asked == ([] if kind == "anchor" else ["kernels-community/other"])
