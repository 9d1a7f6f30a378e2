"""Plans, compared with published figures, real models, and the FLOPs that PyTorch counts."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import FlexOlmoConfig, LlamaConfig, Olmo2Config

import flexmoe
from flexmoe.modeling import PUBLIC, FlexMoeConfig, FlexMoeForCausalLM, UnsupportedAnchorError
from flexmoe.planning.gpus import GPUS
from flexmoe.planning.plan import plan
from flexmoe.testing import ANCHOR_CONFIGS, random_tokens, tiny_anchor, tiny_flexmoe
from flexmoe_cli import main
from tests.support.families import tiny_config

OWNERS = ["math", "code", "law"]
FAMILIES = ["llama", "gpt2", "phi3", "gpt_neox"]


@pytest.fixture(scope="module")
def olmo2_7b() -> Olmo2Config:
    """The anchor's config of the published FlexOlmo models."""
    return Olmo2Config(
        vocab_size=100352,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        tie_word_embeddings=False,
    )


def billions(count: int, digits: int) -> str:
    return f"{count / 1e9:.{digits}f}"


class TestPublishedFigures:
    def test_flexolmo_with_7_experts(self, olmo2_7b) -> None:
        planned = plan(olmo2_7b)
        assert (planned.experts, planned.k) == (7, 5)
        assert billions(planned.parameters.total, 2) == "33.27"
        assert billions(planned.parameters.per_expert, 2) == "4.33"
        assert billions(planned.package_bytes, 2) == "8.66"

    def test_flexolmo_with_8_experts_of_which_4_are_active(self, olmo2_7b) -> None:
        planned = plan(olmo2_7b, experts=8, k=4)
        assert billions(planned.parameters.total, 1) == "37.6"
        assert billions(planned.parameters.active, 1) == "20.3"

    def test_flexmore_with_rank_64(self, olmo2_7b) -> None:
        planned = plan(olmo2_7b, rank=64)
        rows_and_biases = 32 * 4097
        assert planned.parameters.per_expert == 32 * 3 * 64 * (4096 + 11008) + rows_and_biases
        assert billions(planned.package_bytes, 2) == "0.19"

    def test_the_anchor_is_olmo2_7b(self, olmo2_7b) -> None:
        assert billions(plan(olmo2_7b).parameters.anchor, 1) == "7.3"


@pytest.mark.parametrize("family", FAMILIES)
class TestAgainstAModel:
    def test_parameters_and_bytes(self, family: str) -> None:
        model = tiny_flexmoe(family, OWNERS)
        planned = plan(ANCHOR_CONFIGS[family](), experts=4, k=2)
        math = sum(p.numel() for name, p in model.named_parameters() if ".math." in name)
        idle = sum(p.numel() for name, p in model.named_parameters() if ".experts.code." in name)
        assert planned.parameters.total == model.num_parameters()
        assert planned.parameters.anchor == tiny_anchor(family).num_parameters()
        assert planned.parameters.per_expert == math
        assert planned.parameters.active == model.num_parameters() - 2 * idle
        assert planned.serving["float32"].model_bytes == sum(p.nbytes for p in model.parameters())

    def test_a_package(self, family: str, tmp_path: Path) -> None:
        tiny_flexmoe(family, OWNERS).save_expert("math", tmp_path / "math")
        found = flexmoe.inspect(tmp_path / "math")
        planned = plan(ANCHOR_CONFIGS[family](), dtype="float32")
        assert (planned.parameters.per_expert, planned.package_bytes) == (found["parameters"], found["bytes"])

    def test_low_rank(self, family: str) -> None:
        network = tiny_flexmoe(family).flexmoe_blocks()[0].experts[PUBLIC]
        linear = [(module.weight.shape, module.bias) for module in network.modules() if hasattr(module, "weight")]
        per_layer = sum(3 * sum(shape) + (0 if bias is None else bias.numel()) for shape, bias in linear)
        planned = plan(ANCHOR_CONFIGS[family](), experts=4, k=2, rank=3).parameters
        rows = 2 * 33
        assert planned.per_expert == 2 * per_layer + rows
        assert planned.total == planned.anchor + rows + 3 * planned.per_expert
        assert planned.active == planned.anchor + 4 * rows + 2 * 2 * per_layer

    def test_training_flops(self, family: str) -> None:
        """All FLOPs that PyTorch counts, without the input gradients of the first layer's matrices."""
        model = tiny_flexmoe(family, ["math"], num_experts_per_tok=2, output_router_logits=False)
        model.set_attn_implementation("eager")  # its products are bmm, which the plan does not cover
        model.freeze_except("math")
        model.train()
        tokens = random_tokens(1, 16)
        with FlopCounterMode(display=False) as counter:
            model(tokens, labels=tokens).loss.backward()
        counts = counter.get_flop_counts()["Global"]
        linear = sum(count for op, count in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
        first = model.flexmoe_blocks()[0].experts["math"]
        takes_input = sum(p.numel() for name, p in first.named_parameters() if p.dim() > 1 and not _is_last(name))
        training = plan(ANCHOR_CONFIGS[family]()).training
        per_token = training.forward_flops + training.activation_gradient_flops + training.weight_gradient_flops
        assert linear == 16 * (per_token - 2 * takes_input)


def _is_last(name: str) -> bool:
    return name.split(".")[0] in ("down_proj", "c_proj", "dense_4h_to_h")


@pytest.mark.parametrize("family", ["bloom", "cohere", "falcon", "gemma3n_text", "mpt", "opt", "stablelm", "xglm"])
def test_networks_of_other_shapes(family: str) -> None:
    """FFNs without a module of their own, biases, norms within, tied heads, layers of different widths."""
    config = tiny_config(family)
    with torch.device("meta"):
        model = FlexMoeForCausalLM(FlexMoeConfig(anchor_config=config, experts=[PUBLIC, *OWNERS]))
    math = sum(p.numel() for name, p in model.named_parameters() if ".math." in name)
    found = plan(config, experts=4).parameters
    assert (found.total, found.per_expert) == (model.num_parameters(), math)
    assert plan(config, experts=4, rank=2).parameters.per_expert < math


class TestTraining:
    def test_tokens_are_compute_optimal_unless_given(self, olmo2_7b) -> None:
        optimal = plan(olmo2_7b).training
        assert optimal.tokens == optimal.compute_optimal_tokens == 20 * optimal.trained_parameters
        given = plan(olmo2_7b, tokens_per_expert=50e9).training
        assert (given.tokens, given.compute_optimal_tokens) == (50_000_000_000, optimal.tokens)
        assert given.flops / given.tokens == pytest.approx(optimal.flops / optimal.tokens)

    def test_gpu_hours(self, olmo2_7b) -> None:
        training = plan(olmo2_7b, tokens_per_expert=50e9, gpu="a100", mfu=0.5).training
        assert training.gpu_hours == pytest.approx(training.flops / (312e12 * 0.5) / 3600)

    def test_memory(self, olmo2_7b) -> None:
        planned = plan(olmo2_7b, gpu="h100")
        training = planned.training
        rows = 32 * 4097
        assert training.frozen_bytes == 2 * planned.parameters.anchor + 4 * rows
        assert training.trained_bytes == 16 * planned.parameters.per_expert
        assert training.memory_bytes == training.frozen_bytes + training.trained_bytes
        assert training.gpus == 2, "84 GB in 72"
        assert plan(olmo2_7b, rank=64, gpu="rtx4090").training.gpus == 1


class TestServing:
    def test_dtypes(self, olmo2_7b) -> None:
        planned = plan(olmo2_7b)
        rows, tables, norms = 7 * 32 * 4097, 2 * 100352 * 4096, 32 * 4 * 4096 + 4096
        plain = planned.parameters.total - rows
        found = {dtype: cost.model_bytes for dtype, cost in planned.serving.items()}
        assert found == {
            "float32": 4 * plain + 4 * rows,
            "bfloat16": 2 * plain + 4 * rows,
            "int8": plain + (tables + norms) + 4 * rows,
        }

    def test_latency_is_bounded_by_the_weights_read(self, olmo2_7b) -> None:
        planned = plan(olmo2_7b, gpu="h200")
        cost = planned.serving["bfloat16"]
        looked_up, rows = 100352 * 4096, 7 * 32 * 4097
        assert cost.bytes_per_token == 2 * (planned.parameters.active - looked_up) + 2 * rows
        assert cost.seconds_per_token == pytest.approx(cost.bytes_per_token / 4.8e12)
        assert cost.tokens_per_second == pytest.approx(1 / cost.seconds_per_token)

    def test_tied_heads_count_as_read(self) -> None:
        tied, untied = (LlamaConfig(**TINY, tie_word_embeddings=tie) for tie in (True, False))
        assert plan(tied).parameters.anchor == plan(untied).parameters.anchor - 99 * 32
        assert plan(tied).serving["int8"].bytes_per_token == plan(untied).serving["int8"].bytes_per_token

    def test_gpus(self, olmo2_7b) -> None:
        found = {name: plan(olmo2_7b, gpu=name).serving["bfloat16"].gpus for name in ("h200", "h100", "rtx4090")}
        assert found == {"h200": 1, "h100": 1, "rtx4090": 4}


TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


class TestSources:
    def test_a_folder_with_a_config_only(self, tmp_path: Path) -> None:
        config = ANCHOR_CONFIGS["llama"]()
        config.save_pretrained(tmp_path)
        from_folder = plan(tmp_path).to_dict()
        assert from_folder.pop("anchor") == str(tmp_path)
        from_config = plan(config).to_dict()
        assert from_config.pop("anchor") == "LlamaConfig"
        assert from_folder == from_config
        assert json.loads(json.dumps(from_folder)) == from_folder

    def test_experts_and_k_of_a_flexmoe_model(self, tmp_path: Path) -> None:
        model = tiny_flexmoe("llama", OWNERS, num_experts_per_tok=2)
        model.config.save_pretrained(tmp_path)
        planned = plan(tmp_path)
        assert (planned.experts, planned.k, planned.model_type) == (4, 2, "llama")
        assert planned.parameters.total == model.num_parameters()
        assert (plan(tmp_path, experts=8, k=3).experts, plan(tmp_path, experts=8, k=3).k) == (8, 3)
        assert plan(tmp_path, experts=1).k == 1

    def test_a_grafted_anchor_is_planned_for_as_the_dense_one(self, tmp_path: Path) -> None:
        tiny_flexmoe("llama", []).config.save_pretrained(tmp_path)
        planned = plan(tmp_path)
        assert (planned.experts, planned.k) == (7, 5)
        assert plan(tmp_path, experts=1).experts == 1

    def test_rank_of_a_flexmoe_model(self) -> None:
        def of(*ranks: list[int] | None) -> FlexMoeConfig:
            kinds = [{"kind": "full"} if rank is None else {"kind": "low_rank", "rank": rank} for rank in ranks]
            owners = [{"name": name, **kind} for name, kind in zip(OWNERS, kinds, strict=False)]
            return FlexMoeConfig(anchor_config=ANCHOR_CONFIGS["llama"](), experts=[PUBLIC, *owners])

        assert plan(of([4, 4], [4, 4])).rank == 4
        assert plan(of([4, 4], [4, 4]), rank=8).rank == 8
        assert plan(of(None, None)).rank is None
        assert plan(of()).experts == 7
        with pytest.raises(ValueError, match="have several sizes"):
            plan(of([4, 4], [4, 8]))
        with pytest.raises(ValueError, match="have several sizes"):
            plan(of(None, [8, 8]))
        with pytest.raises(ValueError, match="have several sizes"):
            plan(of([4, 8]))


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"experts": 3, "k": 4}, ValueError, "k=4 experts per token, but there are 3 experts"),
            ({"experts": 0}, ValueError, "experts must be at least 1; got 0"),
            ({"experts": 2.0}, TypeError, "experts must be an integer"),
            ({"k": True}, TypeError, "k must be an integer"),
            ({"rank": 0}, ValueError, "rank must be at least 1"),
            ({"rank": 33}, ValueError, r"rank=33 .* model.layers.0: gate_proj.weight is \[64, 32\]. .* at most 32"),
            ({"tokens_per_expert": 0}, ValueError, "tokens_per_expert=0"),
            ({"tokens_per_expert": float("nan")}, ValueError, "tokens_per_expert=nan"),
            ({"dtype": "int8"}, ValueError, "must be 'float32' or 'bfloat16'"),
            ({"mfu": 40}, ValueError, "above 0 and at most 1"),
            ({"gpu": "tpu"}, ValueError, "known: b200, h200, .*gpu_tflops="),
            ({"gpu": "tpu", "gpu_tflops": 100.0}, ValueError, "'tpu' is unknown"),
            ({"gpu_memory_gb": -1.0}, ValueError, "gpu_memory_gb=-1.0"),
        ],
    )
    def test_messages(self, options: dict, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            plan(ANCHOR_CONFIGS["llama"](), **options)

    def test_a_mixture_is_not_an_anchor(self) -> None:
        with pytest.raises(UnsupportedAnchorError, match="mixture of experts already"):
            plan(FlexOlmoConfig(**TINY, num_experts=4, pad_token_id=0, bos_token_id=1, eos_token_id=2))

    def test_a_folder_without_a_config(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no config\.json"):
            plan(tmp_path)
        with pytest.raises(FileNotFoundError):
            plan(tmp_path / "nowhere")


class TestGpus:
    def test_other_gpus(self) -> None:
        config = ANCHOR_CONFIGS["llama"]()
        planned = plan(config, gpu="mine", gpu_tflops=100, gpu_memory_gb=24, gpu_bandwidth_tb=0.5)
        assert (planned.gpu.name, planned.gpu.tflops) == ("mine", 100)
        assert plan(config, gpu="H100", gpu_memory_gb=94).gpu.memory_gb == 94
        assert plan(config, gpu="H100", gpu_memory_gb=94).gpu.tflops == GPUS["h100"].tflops


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    config = FlexMoeConfig(anchor_config=ANCHOR_CONFIGS["gpt2"](), experts=[PUBLIC, "math"], num_experts_per_tok=2)
    config.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--rank", "4", "--tokens-per-expert", "50e9"]) == 0
    printed = capsys.readouterr().out
    for words in ("2 with public, 2 per token; low-rank experts of rank 4", "h200", "50 B", "GPU hours", "int8"):
        assert words in printed
    assert main(["plan", str(tmp_path), "--gpu", "none"]) == 1
    assert "known: b200" in capsys.readouterr().err


def test_no_weights_are_allocated(olmo2_7b, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a FlexMoE was built")

    monkeypatch.setattr(FlexMoeForCausalLM, "__init__", refuse)
    assert flexmoe.plan(olmo2_7b).parameters.total > 33e9
