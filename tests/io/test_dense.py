"""Tensors of a checkpoint get the names under which transformers loads them, or it is refused with the reason."""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OlmoHybridConfig, PreTrainedModel

from flexmoe.io.dense import CheckpointNamesError, DenseCheckpoint, load_causal_lm
from flexmoe.modeling.anchors_flexmoe import UnsupportedAnchorError
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.testing import ANCHOR_CONFIGS, tiny_anchor, tiny_flexmoe

Tensors = dict[str, torch.Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], Tensors | None]) -> Path:
    """Replaces the tensors of a single-file checkpoint."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, **values: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def saved(family: str, folder: Path, **options: object) -> tuple[PreTrainedModel, Path]:
    model = tiny_anchor(family)
    model.save_pretrained(folder, **options)
    return model, folder


@pytest.mark.parametrize("is_sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("family", ANCHOR_CONFIGS)
def test_every_tensor_has_its_name_in_the_state_dict(family: str, is_sharded: bool, tmp_path: Path) -> None:
    model, folder = saved(family, tmp_path, max_shard_size="10KB" if is_sharded else "5GB")
    assert (len(list(folder.glob("*.safetensors"))) > 1) == is_sharded
    dense = DenseCheckpoint(folder)
    state = model.state_dict()
    assert list(dense.stored) == [name for name in state if name not in model.all_tied_weights_keys]
    for name, stored in dense.stored.items():
        assert torch.equal(dense.files.read(stored), state[name]), name
    assert (dense.dtype, dense.load_dtype) == ("float32", "float32")


def test_names_of_a_base_model_get_its_prefix(tmp_path: Path) -> None:
    model = tiny_anchor("gpt2")
    model.transformer.save_pretrained(tmp_path)
    dense = DenseCheckpoint(tmp_path)
    assert dense.stored["transformer.h.0.mlp.c_fc.weight"] == "h.0.mlp.c_fc.weight"
    assert dense.stored["transformer.wte.weight"] == "wte.weight"


def test_renamings_of_a_family_apply(tmp_path: Path) -> None:
    _, folder = saved("gpt_neox", tmp_path)
    assert DenseCheckpoint(folder).stored["lm_head.weight"] == "embed_out.weight"


def test_a_tied_head_that_is_stored_twice_counts_once(tmp_path: Path) -> None:
    _, folder = saved("gemma2", tmp_path)
    plain = DenseCheckpoint(folder).stored
    rewrite(folder, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert DenseCheckpoint(folder).stored == plain


def test_a_tied_head_that_is_stored_alone_gets_the_name_of_the_embeddings(tmp_path: Path) -> None:
    _, folder = saved("gemma2", tmp_path)
    rewrite(
        folder, lambda t: {("lm_head" if "embed" in k else k.removesuffix(".weight")) + ".weight": t[k] for k in t}
    )
    dense = DenseCheckpoint(folder)
    assert dense.stored["model.embed_tokens.weight"] == "lm_head.weight"
    assert "lm_head.weight" not in dense.stored


def test_tied_tensors_that_differ_are_refused(tmp_path: Path) -> None:
    _, folder = saved("gemma2", tmp_path)
    rewrite(folder, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1})
    with pytest.raises(CheckpointNamesError, match=r"ties lm_head.weight to .*both are stored and differ"):
        DenseCheckpoint(folder)


def test_tensors_that_transformers_ignores_are_left_out(tmp_path: Path) -> None:
    _, folder = saved("llama", tmp_path)
    plain = DenseCheckpoint(folder).stored
    rewrite(folder, lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert DenseCheckpoint(folder).stored == plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {**t, "model.layers.0.adapter.weight": torch.ones(1)},
            "does not have: model.layers.0.adapter.weight",
        ),
        (lambda t: {k: v for k, v in t.items() if "norm" not in k}, r"5 tensor\(s\) missing .*model.norm.weight"),
        (lambda t: {**t, "model.norm.weight": torch.ones(31)}, r"model.norm.weight \[31\] \(expected \[32\]\)"),
        (lambda t: {**t, "norm.weight": torch.ones(32)}, r"stored twice: .*\(both model.norm.weight\)"),
    ],
    ids=["unknown", "missing", "shape", "twice"],
)
def test_wrong_tensors_are_listed(change: Callable[[Tensors], Tensors], message: str, tmp_path: Path) -> None:
    _, folder = saved("llama", tmp_path)
    with pytest.raises(CheckpointNamesError, match=message):
        DenseCheckpoint(rewrite(folder, change))


def test_unused_tensors_are_refused_and_the_conversion_works(tmp_path: Path) -> None:
    _, folder = saved("gpt2", tmp_path / "old")
    plain = DenseCheckpoint(folder).stored
    rewrite(folder, lambda t: {**t, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)})
    with pytest.raises(CheckpointNamesError, match=r"masked_bias\. If they are unused .*save_original_format=False"):
        DenseCheckpoint(folder)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "new", save_original_format=False)
    assert DenseCheckpoint(tmp_path / "new").stored == plain


OTHER_PREFIXES = {
    "llama": ("model.", "model.language_model."),
    "gemma2": ("", "language_model."),  # with a tied head
    "gpt2": ("transformer.", "model.text_model."),
    "qwen3": ("model.layers.", "decoder.blocks."),
}


@pytest.mark.promise(
    "`graft`",
    "a checkpoint under another prefix",
    "refused with a `key_mapping` that works",
)
@pytest.mark.parametrize("family", OTHER_PREFIXES)
def test_another_prefix_is_refused_and_the_advice_works(family: str, tmp_path: Path) -> None:
    model, folder = saved(family, tmp_path / "old")
    ours, theirs = OTHER_PREFIXES[family]
    rewrite(folder, lambda t: {theirs + n.removeprefix(ours) if n.startswith(ours) else n: t[n] for n in t})
    with pytest.raises(CheckpointNamesError, match=r"random values\. They are stored under other names") as refusal:
        DenseCheckpoint(folder)
    (options,) = re.findall(r"from_pretrained\(folder, key_mapping=(\{.*?\})\)", str(refusal.value))
    converted = AutoModelForCausalLM.from_pretrained(folder, key_mapping=ast.literal_eval(options))
    converted.save_pretrained(tmp_path / "new", save_original_format=False)
    dense = DenseCheckpoint(tmp_path / "new")
    for name, stored in dense.stored.items():
        assert torch.equal(dense.files.read(stored), model.state_dict()[name]), name


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"model.{name[::-1]}",
        lambda name: name.replace("norm.weight", "vision.norm.weight"),  # another part has a tensor of that name
        lambda name: name.replace("model.norm.", "visual.norm.").replace("lm_head.", "visual.head."),
    ],
    ids=["unknown names", "other norms", "other parts"],
)
def test_missing_tensors_are_never_converted_to_random_ones(change: Callable[[str], str], tmp_path: Path) -> None:
    _, folder = saved("llama", tmp_path)
    rewrite(folder, lambda t: {change(name): tensor for name, tensor in t.items()} | {"visual.patch": torch.ones(1)})
    with pytest.raises(CheckpointNamesError, match=r"random values\. Check that model_type") as refusal:
        DenseCheckpoint(folder)
    assert "from_pretrained" not in str(refusal.value)


@pytest.mark.promise(
    "`graft`, `evaluate`, `train`, `verify`",
    "a checkpoint whose tensors transformers would fill with random values",
    "refused with their names",
)
def test_a_load_that_fills_tensors_with_random_values_is_refused(tmp_path: Path) -> None:
    model, folder = saved("llama", tmp_path)
    loaded = load_causal_lm(folder)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    rewrite(folder, lambda t: {name: t[name] for name in t if name != "model.norm.weight"})
    with pytest.raises(CheckpointNamesError, match=r"1 tensor\(s\) missing .*model.norm.weight.*random values"):
        load_causal_lm(folder)


def test_a_flexmoe_that_lacks_a_tensor_of_its_anchor_is_refused(tmp_path: Path) -> None:
    tiny_flexmoe("llama", ["math"]).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {name: t[name] for name in t if name != "anchor.model.norm.weight"})
    with pytest.raises(CheckpointNamesError, match=r"1 tensor\(s\) missing .*anchor.model.norm.weight.*random values"):
        load_causal_lm(tmp_path, FlexMoeForCausalLM)


def test_the_library_loads_models_by_it_alone() -> None:
    root = Path(__file__).resolve().parents[2]
    paths = [path for folder in ("src", "conversion") for path in (root / folder).rglob("*.py")]
    calls = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and re.search(r"\w+ForCausalLM\.from_pretrained$", ast.unparse(node.func))
    ]
    other = {"src/flexmoe/io/gguf.py"}  # a GGUF file, which `load_causal_lm` does not read
    assert {call.partition(":")[0] for call in calls} == other


def test_a_checkpoint_that_is_computed_at_load_is_refused_and_the_conversion_works(tmp_path: Path) -> None:
    config = OlmoHybridConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=16, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointNamesError, match=r"q_conv1d.weight.*save_original_format=False"):
        DenseCheckpoint(tmp_path / "theirs")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    native.save_pretrained(tmp_path / "native", save_original_format=False)
    assert list(DenseCheckpoint(tmp_path / "native").stored) == list(model.state_dict())


def test_the_dtype_of_a_mixed_checkpoint(tmp_path: Path) -> None:
    _, folder = saved("llama", tmp_path)
    rewrite(folder, lambda t: {k: v if "norm" in k else v.bfloat16() for k, v in t.items()})
    assert DenseCheckpoint(folder).dtype == "mixed"
    assert DenseCheckpoint(edit_config(folder, dtype=None)).load_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("bert", {"intermediate_size": 48}, "with a feed-forward network in each"),
        ("t5", {"d_model": 32}, "T5Config|encoder-decoder"),
        ("mixtral", {"intermediate_size": 48, "num_local_experts": 2}, "mixture of experts already"),
        ("flexmoe", {}, "FlexMoE already"),
        ("no_such_family", {}, "no model_type 'no_such_family'"),
    ],
)
def test_models_that_cannot_be_anchors_are_refused_with_the_reason(
    model_type: str, options: dict[str, int], reason: str, tmp_path: Path
) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **sizes, **options}))
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedAnchorError, match=reason):
        DenseCheckpoint(tmp_path)


def test_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    _, folder = saved("llama", tmp_path)
    edit_config(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedAnchorError, match=r"quantised \(fp8\)"):
        DenseCheckpoint(folder)


def test_a_pickle_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model, folder = saved("llama", tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        DenseCheckpoint(folder)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        DenseCheckpoint(tmp_path)
