"""Dense fine-tunes as experts: their bytes are kept, and shared tensors change on request only."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from flexmoe.conversion.graft import graft
from flexmoe.io.tensors import CheckpointFolder
from flexmoe.modeling.anchors_flexmoe import find_ffn_sites
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.testing import ANCHOR_CONFIGS, TOLERANCES, random_tokens, realigned, tiny_anchor
from tests.support.soak import thinned

Change = Callable[[PreTrainedModel], None]
TOKENS = random_tokens(2, 9)


@torch.no_grad()
def other_networks(model: PreTrainedModel, seed: int) -> None:
    torch.manual_seed(seed)
    for site in find_ffn_sites(model):
        for parameter in site.ffn(model).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@torch.no_grad()
def other_embeddings(model: PreTrainedModel) -> None:
    model.get_input_embeddings().weight.add_(1.0)


def saved(folder: Path, family: str = "llama", *changes: Change, dtype: torch.dtype = torch.float32) -> Path:
    model = tiny_anchor(family)
    for change in changes:
        change(model)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture
def anchor(tmp_path: Path) -> Path:
    return saved(tmp_path / "anchor")


def tune(folder: Path, *changes: Change, seed: int = 1, family: str = "llama") -> Path:
    return saved(folder, family, lambda model: other_networks(model, seed), *changes)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with CheckpointFolder(folder) as files:
        return {name: files.read(name) for name in files.infos}


@pytest.mark.parametrize("family", thinned(ANCHOR_CONFIGS, ["gpt2", "phi3", "gemma2"]))
@torch.no_grad()
def test_each_expert_computes_what_its_fine_tune_computes(family: str, tmp_path: Path) -> None:
    experts = {name: tune(tmp_path / name, seed=seed, family=family) for seed, name in enumerate(("math", "code"), 1)}
    out = graft(saved(tmp_path / "anchor", family), tmp_path / "out", experts)
    model = realigned(FlexMoeForCausalLM.from_pretrained(out))
    assert model.expert_names == ["public", "math", "code"]
    for name, folder in {"public": tmp_path / "anchor", **experts}.items():
        dense = realigned(AutoModelForCausalLM.from_pretrained(folder))
        with model.only_experts(name):
            assert torch.equal(model(TOKENS, num_experts_per_tok=1).logits, dense(TOKENS).logits), name
    rows = [tensor for name, tensor in model.state_dict().items() if ".router." in name]
    assert len(rows) == 2 * 3 * len(model.flexmoe_blocks())
    assert not any(row.any() for row in rows)


def test_without_fine_tunes_nothing_changes(anchor: Path, tmp_path: Path) -> None:
    plain, empty = graft(anchor, tmp_path / "plain"), graft(anchor, tmp_path / "empty", {})
    for file in plain.iterdir():
        assert file.read_bytes() == (empty / file.name).read_bytes(), file.name


def test_shared_tensors_must_equal_the_anchors(anchor: Path, tmp_path: Path) -> None:
    math = tune(tmp_path / "math", other_embeddings)
    with pytest.raises(ValueError, match=r"outside of its feed-forward networks, in 1 of \d+ tensors: model\.embed_t"):
        graft(anchor, tmp_path / "out", {"math": math})
    assert not (tmp_path / "out").exists()


def test_the_anchors_shared_tensors_are_kept_on_request(anchor: Path, tmp_path: Path) -> None:
    math = tune(tmp_path / "math", other_embeddings)
    out = stored(graft(anchor, tmp_path / "out", {"math": math}, shared="anchor"))
    assert torch.equal(out["anchor.model.embed_tokens.weight"], stored(anchor)["model.embed_tokens.weight"])
    theirs = stored(math)["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(out["anchor.model.layers.0.mlp.experts.math.up_proj.weight"], theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_tensors_are_averaged_on_request(tmp_path: Path, dtype: torch.dtype) -> None:
    def wilder(model: PreTrainedModel) -> None:
        for name, parameter in model.named_parameters():
            if ".mlp." not in name:
                parameter.data.add_(torch.randn_like(parameter))

    folders = [
        saved(tmp_path / "anchor", dtype=dtype),
        saved(tmp_path / "math", "llama", wilder, dtype=dtype),
        saved(tmp_path / "code", "llama", wilder, dtype=dtype),
    ]
    out = graft(folders[0], tmp_path / "out", {"math": folders[1], "code": folders[2]}, shared="average")
    tensors, (anchor, *tunes) = stored(out), map(stored, folders)
    for name, value in anchor.items():
        if ".mlp." in name:
            assert torch.equal(tensors["anchor." + name.replace(".mlp.", ".mlp.experts.public.")], value)
        else:
            mean = torch.stack([value, *(tune[name] for tune in tunes)]).double().mean(0)
            torch.testing.assert_close(tensors["anchor." + name].double(), mean, **TOLERANCES[dtype])
    records = [
        json.loads((folder / "config.json").read_text())["anchor"]
        for folder in (out, graft(folders[0], tmp_path / "plain"))
    ]
    assert records[0]["fingerprint"] != records[1]["fingerprint"]


def test_another_architecture(anchor: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", "qwen3")
    with pytest.raises(
        ValueError, match=r"math=.*is not a fine-tune.*loads as Qwen3ForCausalLM .*the anchor as LlamaForCausalLM"
    ):
        graft(anchor, tmp_path / "out", {"math": other})


def test_another_norm(anchor: Path, tmp_path: Path) -> None:
    other = tune(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"configurations differ in rms_norm_eps \(0\.001, the anchor's is 1e-06\)"):
        graft(anchor, tmp_path / "out", {"math": other})


@torch.no_grad()
def test_another_vocabulary_with_the_anchors_shared_tensors(anchor: Path, tmp_path: Path) -> None:
    def longer(model: PreTrainedModel) -> None:
        model.resize_token_embeddings(120)
        model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}

    math = tune(tmp_path / "math", longer)
    with pytest.raises(ValueError, match=r"rope_parameters .*vocab_size \(120, the anchor's is 99\).*--shared anchor"):
        graft(anchor, tmp_path / "out", {"math": math})
    model = FlexMoeForCausalLM.from_pretrained(graft(anchor, tmp_path / "out", {"math": math}, shared="anchor"))
    assert (model.config.vocab_size, model(TOKENS).logits.shape[-1]) == (99, 99)
    theirs = stored(math)["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(model.state_dict()["anchor.model.layers.1.mlp.experts.math.down_proj.weight"], theirs)


@pytest.mark.parametrize(("field", "value"), [("intermediate_size", 48), ("rms_norm_eps", 0.5)])
def test_ffns_and_norms_must_match_with_the_anchors_shared_tensors(
    anchor: Path, tmp_path: Path, field: str, value: float
) -> None:
    other = ANCHOR_CONFIGS["llama"]()
    setattr(other, field, value)
    AutoModelForCausalLM.from_config(other).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"configurations differ in {field} \({value},.*trained with them\.$"):
        graft(anchor, tmp_path / "out", {"math": tmp_path / "other"}, shared="anchor")


def test_another_dtype(anchor: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=re.escape("from_pretrained(folder, dtype=...)")):
        graft(anchor, tmp_path / "out", {"math": other})


def test_mixed_dtypes(tmp_path: Path) -> None:
    def mixed(folder: Path) -> Path:
        tensors = {name: t.bfloat16() if ".mlp." in name else t for name, t in stored(folder).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    anchor, alike = mixed(saved(tmp_path / "anchor")), mixed(tune(tmp_path / "alike"))
    tensors = stored(graft(anchor, tmp_path / "out", {"math": alike}))
    assert {t.dtype for name, t in tensors.items() if ".experts." in name} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"is not stored like .*F32 .*the anchor's is BF16"):
        graft(anchor, tmp_path / "none", {"math": tune(tmp_path / "other")})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite(number: float, dtype: torch.dtype, tmp_path: Path) -> None:
    def broken(model: PreTrainedModel) -> None:
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = number

    anchor, math = saved(tmp_path / "anchor", dtype=dtype), tune(tmp_path / "math", broken)
    saved(math, "llama", broken, dtype=dtype)
    with pytest.raises(ValueError, match=r"math \(math\): tensor 'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN"):
        graft(anchor, tmp_path / "out", {"math": math})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anchor", "math"]


def test_large_values_are_accepted(tmp_path: Path) -> None:
    def large(model: PreTrainedModel) -> None:
        model.model.layers[0].mlp.up_proj.weight.data.fill_(3e38)  # their sum is infinite

    anchor, math = saved(tmp_path / "anchor"), saved(tmp_path / "math", "llama", large)
    assert graft(anchor, tmp_path / "out", {"math": math}).is_dir()


def test_a_mean_that_is_not_finite(anchor: Path, tmp_path: Path) -> None:
    def broken(model: PreTrainedModel) -> None:
        model.model.norm.weight.data[0] = float("nan")

    math = tune(tmp_path / "math", broken)
    with pytest.raises(ValueError, match=r"mean of 'model\.norm\.weight' .* --shared anchor"):
        graft(anchor, tmp_path / "out", {"math": math}, shared="average")
    assert graft(anchor, tmp_path / "out", {"math": math}, shared="anchor").is_dir()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"experts": {"public": "x"}}, "is the anchor's own network"),
        ({"experts": {"Math!": "x"}}, "Math!"),
        ({"experts": {"math": Path("/nowhere")}}, "nowhere"),
        ({"shared": "mean"}, "shared='mean': must be one of anchor, average"),
    ],
)
def test_invalid_arguments(anchor: Path, tmp_path: Path, arguments: dict[str, object], error: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        graft(anchor, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_the_output_must_not_contain_a_fine_tune(anchor: Path, tmp_path: Path) -> None:
    math = tune(tmp_path / "math")
    with pytest.raises(ValueError, match="math"):
        graft(anchor, math, {"math": math}, overwrite=True)
    assert stored(math)
