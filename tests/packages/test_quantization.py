"""Quantised anchors: experts are quantised, rows are not, added experts are quantised like the model; all exactly."""

import importlib.util
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from flexmoe.conversion.compose import add, compose, remove
from flexmoe.conversion.graft import graft
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.modeling.experts_flexmoe import has_quantized_weights, is_quantized
from flexmoe.testing import random_tokens, tiny_anchor, tiny_flexmoe
from flexmoe.training.experts import train_expert

NOT_INSTALLED = {
    "torchao": "pip install 'flexmoe[quantization]'",
    "bitsandbytes": "40 MB, so it is in the extra [quantization] and not in [test]",
}
TOKENS = random_tokens(2, 9)


def _torchao(name: str, **settings: Any) -> TorchAoConfig:
    import torchao.quantization as ao

    kinds = {
        "int8": lambda: ao.Int8WeightOnlyConfig(),
        "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
        "float8": lambda: ao.Float8WeightOnlyConfig(),
    }
    return TorchAoConfig(kinds[name](), **settings)


# torchao's packed int4 (Int4WeightOnlyConfig) has no CPU kernel in any of its formats; "int4" here holds 4-bit values
# in bytes.
METHODS: dict[str, Callable[[], Any]] = {
    "torchao-int8": lambda: _torchao("int8"),
    "torchao-int4": lambda: _torchao("int4"),
    "torchao-float8": lambda: _torchao("float8"),
    "bitsandbytes-int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes-nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
}


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(library) is None, reason=f"no {library}: {NOT_INSTALLED[library]}"
    )


def each_method(*names: str) -> pytest.MarkDecorator:
    chosen = names or tuple(METHODS)
    return pytest.mark.parametrize(
        "method", [pytest.param(name, marks=needs(name.split("-")[0])) for name in chosen], ids=chosen
    )


each_main_method = each_method("torchao-int8", "bitsandbytes-int8", "bitsandbytes-nf4")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An anchor in bfloat16, its graft, the package of math, and merged models: all plain, on disk."""
    folder = tmp_path_factory.mktemp("shelf")
    tiny_anchor("llama").to(torch.bfloat16).save_pretrained(folder / "anchor")
    graft(folder / "anchor", folder / "graft")
    anchor = FlexMoeForCausalLM.from_pretrained(folder / "graft").config.anchor
    everyone = tiny_flexmoe("llama", ["math", "code"], anchor=anchor, num_experts_per_tok=2).to(torch.bfloat16)
    for name in everyone.expert_names[1:]:
        everyone.save_expert(name, folder / name)
    compose(folder / "graft", [folder / "code"], folder / "public+code", public_prior=0.0, num_experts_per_tok=2)
    compose(
        folder / "graft", [folder / "code", folder / "math"], folder / "all", public_prior=0.0, num_experts_per_tok=2
    )
    return folder


def load(folder: Path, method: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=METHODS[method]())


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(TOKENS).logits


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every stored tensor by name; a quantised tensor class as the tensors that it holds."""

    def stored(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if not hasattr(tensor, "__tensor_flatten__"):
            yield name, tensor.clone()
            return
        for part in tensor.__tensor_flatten__()[0]:
            yield from stored(f"{name}.{part}", getattr(tensor, part))

    state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return dict(pair for name, value in state.items() for pair in stored(name, value))


def assert_same(model: FlexMoeForCausalLM, other: FlexMoeForCausalLM) -> None:
    ours, theirs = bits(model), bits(other)
    assert list(ours) == list(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert torch.equal(logits(model), logits(other))


@each_method()
def test_experts_are_quantised_and_rows_are_not(method, shelf):
    model, plain = load(shelf / "all", method), FlexMoeForCausalLM.from_pretrained(shelf / "all")
    for block, unquantised in zip(model.flexmoe_blocks(), plain.flexmoe_blocks(), strict=True):
        weights = [parameter for name, parameter in block.experts.named_parameters() if name.endswith(".weight")]
        assert len(weights) == 3 * 3
        assert all(map(is_quantized, weights))
        rows, same = block.router.state_dict(), unquantised.router.state_dict()
        assert all(torch.equal(rows[name], same[name]) for name in same)
        assert {row.dtype for row in rows.values()} == {torch.float32}
    assert not is_quantized(model.get_output_embeddings().weight)
    assert not torch.equal(logits(model), logits(plain))
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0.5)


@each_method()
def test_low_rank_experts_read_a_quantised_public(method, shelf, tmp_path):
    anchor = FlexMoeForCausalLM.from_pretrained(shelf / "graft").config.anchor
    records = [{"name": name, "kind": "low_rank", "rank": [3, 4], "alpha": 6.0} for name in ("math", "law")]
    plain = tiny_flexmoe("llama", records, anchor=anchor, num_experts_per_tok=2).to(torch.bfloat16)
    plain.save_pretrained(tmp_path / "both")
    plain.save_expert("law", tmp_path / "law")
    model = load(tmp_path / "both", method)
    for block in model.flexmoe_blocks():
        assert has_quantized_weights(block.experts["public"])
        assert not has_quantized_weights(block.experts["math"])
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0.5)
    plain.remove_expert("law")
    plain.save_pretrained(tmp_path / "one")
    grown = load(tmp_path / "one", method)
    grown.add_expert(tmp_path / "law")
    assert_same(grown, model)
    grown.add_expert_copy("new", rank=2)
    with torch.no_grad(), grown.only_experts("public"):
        wanted = logits(grown)
    with grown.only_experts("new"):
        torch.testing.assert_close(logits(grown), wanted, rtol=0, atol=0.1)


@each_main_method
def test_a_list_of_excluded_modules_keeps_the_rows_unquantised(method, shelf):
    settings = METHODS[method]()
    field = "modules_to_not_convert" if "torchao" in method else "llm_int8_skip_modules"
    setattr(settings, field, [r".*\.experts\.public", "lm_head"])
    model = AutoModelForCausalLM.from_pretrained(shelf / "all", quantization_config=settings)
    for block in model.flexmoe_blocks():
        assert not has_quantized_weights(block.router)
        assert not has_quantized_weights(block.experts["public"])
        assert has_quantized_weights(block.experts["math"])


@each_method()
def test_public_alone_is_the_quantised_anchor(method, shelf):
    assert torch.equal(logits(load(shelf / "graft", method)), logits(load(shelf / "anchor", method)))


@each_method()
def test_an_added_expert_has_the_bits_that_it_has_in_the_checkpoint(method, shelf, tmp_path):
    model, everyone = load(shelf / "public+code", method), load(shelf / "all", method)
    assert model.add_expert(shelf / "math") == "math"
    assert_same(model, everyone)

    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(again, everyone)
    again.remove_expert("math")
    again.add_expert(shelf / "math")  # a model that was saved quantised has another quantiser object
    assert_same(again, everyone)


@each_main_method
def test_removing_and_masking_are_exact(method, shelf, tmp_path):
    model, without = load(shelf / "all", method), load(shelf / "public+code", method)
    with model.only_experts("public", "code"):
        assert torch.equal(logits(model), logits(without))
    model.remove_expert("math")
    assert_same(model, without)
    model.save_pretrained(tmp_path / "saved")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), without)


@each_main_method
def test_a_replacement_is_quantised_like_the_model(method, shelf):
    model, before = load(shelf / "all", method), load(shelf / "all", method)
    model.replace_expert("code", shelf / "math")
    assert not torch.equal(logits(model), logits(before))
    model.replace_expert("code", shelf / "code")
    assert_same(model, before)


@each_main_method
def test_a_copy_of_public_has_its_quantised_bits(method, shelf):
    model = load(shelf / "graft", method)
    anchor = logits(model)
    model.add_expert_copy("math")
    for tensors in map(bits, model.flexmoe_blocks()):
        public = {name: tensor for name, tensor in tensors.items() if name.startswith("experts.public.")}
        assert public
        for name, tensor in public.items():
            assert torch.equal(tensors[name.replace(".public.", ".math.")], tensor)
    with model.only_experts("math"):
        assert torch.equal(logits(model), anchor)


@needs("torchao")
def test_an_expert_excluded_by_name_is_not_quantised_when_added(shelf, tmp_path):
    settings = _torchao("int8", modules_to_not_convert=[r".*\.experts\.math", "lm_head"])
    model = AutoModelForCausalLM.from_pretrained(shelf / "public+code", quantization_config=settings)
    model.add_expert(shelf / "math")
    for block in model.flexmoe_blocks():
        assert not has_quantized_weights(block.experts["math"])
        assert has_quantized_weights(block.experts["code"])
    assert {p.dtype for p in model.flexmoe_blocks()[0].experts["math"].parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "saved")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), model)


@needs("torchao")
def test_a_quantiser_that_needs_calibration_data_refuses_new_experts(shelf, monkeypatch):
    model = load(shelf / "public+code", "torchao-int8")
    before = bits(model)
    monkeypatch.setattr(type(model.hf_quantizer), "requires_calibration", True)
    with pytest.raises(ValueError, match="calibration data"):
        model.add_expert(shelf / "math")
    assert model.expert_names == ["public", "code"]
    assert list(bits(model)) == list(before)


@each_main_method
def test_the_anchor_keeps_the_fingerprint_of_the_unquantised_one(method, shelf, tmp_path, caplog):
    model = load(shelf / "all", method)
    anchor = dict(model.config.anchor)
    assert len(anchor["fingerprint"]) == 64
    with caplog.at_level(logging.WARNING, logger="flexmoe"):
        model.save_pretrained(tmp_path / "saved")
    assert caplog.messages == []
    assert model.config.anchor == anchor
    assert FlexMoeForCausalLM.from_pretrained(tmp_path / "saved").config.anchor == anchor


@each_main_method
def test_a_quantised_expert_is_not_saved_as_a_package(method, shelf, tmp_path):
    model = load(shelf / "all", method)
    with pytest.raises(ValueError, match="'math' is quantised"):
        model.save_expert("math", tmp_path / "package")
    assert not (tmp_path / "package").exists()


@each_main_method
def test_lora_on_one_expert_of_a_quantised_model(method, shelf):
    peft = pytest.importorskip("peft")
    model = load(shelf / "all", method)
    plain = logits(model)
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=r".*\.experts\.math\..*_proj", init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    assert not torch.equal(logits(adapted), plain)
    with model.only_experts("public", "code"):
        masked = logits(adapted)
    assert torch.equal(masked, logits(load(shelf / "public+code", method)))

    adapted.train()
    adapted(TOKENS).logits.float().square().mean().backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert len(trained) == 2 * 3 * 2  # layers, projections, A and B
    assert all(".experts.math." in name and ".lora_" in name for name in trained)


@each_main_method
def test_an_adapted_expert_that_no_token_reaches_stays_in_the_graph(method, shelf):
    peft = pytest.importorskip("peft")
    model = load(shelf / "all", method)
    for block in model.flexmoe_blocks():
        block.router["math"].bias.data.fill_(-1e4)
    settings = peft.LoraConfig(r=4, target_modules=r".*\.experts\.math\..*_proj", init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    tokens = []
    for block in model.flexmoe_blocks():
        block.experts["math"].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[:-1].numel()))
    assert adapted(TOKENS).logits.isfinite().all()
    assert tokens == [1, 1]  # not zero: a kernel of bitsandbytes crashes on no tokens on some CPUs
    adapted.train()
    adapted(TOKENS).logits.float().square().mean().backward()
    gradients = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(gradients) == 2 * 3 * 2
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@needs("torchao")
def test_a_quantiser_without_effect_warns(tmp_path, caplog):
    tiny_flexmoe("gpt2", ["math"]).save_pretrained(tmp_path / "gpt2")
    with caplog.at_level(logging.WARNING, logger="flexmoe"):
        model = load(tmp_path / "gpt2", "torchao-int8")
    assert not has_quantized_weights(model)
    assert "quantised no weight" in caplog.text
    assert "Conv1D" in caplog.text


@needs("bitsandbytes")
def test_conv1d_is_quantised_by_bitsandbytes(tmp_path):
    model = tiny_flexmoe("gpt2", ["math", "code"])
    model.save_expert("math", tmp_path / "math")
    model.save_pretrained(tmp_path / "gpt2")
    everyone, model = (load(tmp_path / "gpt2", "bitsandbytes-int8") for _ in range(2))
    model.remove_expert("code")
    everyone.remove_expert("math")
    everyone.add_expert(tmp_path / "math")
    everyone.remove_expert("code")
    assert has_quantized_weights(model.flexmoe_blocks()[0].experts["math"])
    assert_same(everyone, model)


@needs("torchao")
def test_commands_on_folders_refuse_quantised_ones(shelf, tmp_path):
    load(shelf / "all", "torchao-int8").save_pretrained(tmp_path / "all")
    load(shelf / "graft", "torchao-int8").save_pretrained(tmp_path / "graft")
    load(shelf / "anchor", "torchao-int8").save_pretrained(tmp_path / "anchor")
    out = tmp_path / "out"
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n' * 9)
    for change in (
        lambda: remove(tmp_path / "all", "math", out),
        lambda: add(tmp_path / "graft", shelf / "math", out),
        lambda: compose(tmp_path / "graft", [shelf / "math"], out),
        lambda: graft(tmp_path / "anchor", out),
        lambda: train_expert(tmp_path / "graft", name="math", data=[tmp_path / "data.jsonl"], out=out),
    ):
        with pytest.raises(ValueError, match=r"is quantised \(torchao\)"):
            change()
        assert not out.exists()
