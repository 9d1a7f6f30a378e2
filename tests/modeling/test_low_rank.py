"""Low-rank experts: outputs, use of the public network, masks, packages, training, offload and adapters.

Also full experts of another width than public.
"""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

from flexmoe import expert_lora_config
from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.modeling.low_rank_flexmoe import LowRankDelta, LowRankExpert, as_out_in, matrices
from flexmoe.packages.package import ExpertPackage
from flexmoe.testing import (
    ANCHOR_CONFIGS,
    TOLERANCES,
    enable_checkpointing,
    flexmoe_from_anchor,
    random_tokens,
    tiny_anchor,
    tiny_flexmoe,
)
from tests.support.soak import soak

CLOSE = TOLERANCES[torch.float32]
# Families whose low-rank experts share public's first and last products; in others each expert runs public's forward.
SHARED = {"llama", "olmo2", "gemma2", "qwen3", "gpt_neox"}
FINGERPRINT = {"repo": "org/anchor", "revision": "abc", "fingerprint": "f" * 64, "model_type": "llama"}


def low_rank(name: str, rank: int = 3, alpha: float | None = 6.0) -> dict[str, Any]:
    """The record of a low-rank expert, with another rank in the second layer."""
    return {"name": name, "kind": "low_rank", "rank": [rank, rank + 1], "alpha": alpha}


EXPERTS = (low_rank("math"), "code", low_rank("legal", 5, None))


def tiny(family: str = "llama", experts: tuple = EXPERTS, **config: Any) -> FlexMoeForCausalLM:
    return tiny_flexmoe(family, experts, **{"num_experts_per_tok": 2, "anchor": FINGERPRINT, **config})


@torch.no_grad()
def as_full(model: FlexMoeForCausalLM) -> FlexMoeForCausalLM:
    """The same model with its low-rank experts converted to full ones."""
    config = copy.deepcopy(model.config)
    config.experts = [{"name": name, "kind": "full"} for name in model.expert_names]
    full = FlexMoeForCausalLM(config).eval()
    full.load_state_dict(dict(model.state_dict().items()), strict=False)
    for ours, theirs in zip(full.flexmoe_blocks(), model.flexmoe_blocks(), strict=True):
        for name, expert in theirs.experts.items():
            if isinstance(expert, LowRankExpert):
                state = {key: value.clone() for key, value in theirs.experts["public"].state_dict().items()}
                for path, part in matrices(theirs.experts["public"]):
                    delta = expert.get_submodule(path)
                    state[f"{path}.weight"] += as_out_in(part, delta.scale * delta.B.weight @ delta.A.weight)
                    if delta.B.bias is not None:
                        state[f"{path}.bias"] += delta.B.bias
                ours.experts[name].load_state_dict(state)
    return full


@torch.no_grad()
def logits(model: FlexMoeForCausalLM, tokens: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    return model(random_tokens(2, 9) if tokens is None else tokens, **options).logits


class TestOutputs:
    """A low-rank expert gives the outputs of the full expert with the same matrices."""

    @pytest.mark.parametrize(
        ("family", "k"),
        [
            *((family, 2) for family in ANCHOR_CONFIGS),
            *((family, k) for family in ("gpt2", "llama") for k in (1, 4)),
            *(soak(family, k) for family in ANCHOR_CONFIGS if family not in ("gpt2", "llama") for k in (1, 4)),
        ],
    )
    def test_equals_the_full_expert(self, family: str, k: int) -> None:
        model = tiny(family, num_experts_per_tok=k)
        full = as_full(model)
        shares = [model.flexmoe_blocks()[0].experts[name].structure is not None for name in ("math", "legal")]
        assert shares == [family in SHARED] * 2
        mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
        calls: list[dict[str, Any]] = [{}, {"expert_mask": mask}, {"tokens": random_tokens(1, 1)}]
        for options in calls:
            torch.testing.assert_close(logits(model, **options), logits(full, **options), **CLOSE)
        assert (logits(model) - logits(tiny(family, ()))).abs().max() > 1e-2  # the experts change the logits
        with model.only_experts("legal"), full.only_experts("legal"):
            torch.testing.assert_close(logits(model), logits(full), **CLOSE)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_error_is_that_of_a_full_expert(self, dtype: torch.dtype) -> None:
        model = tiny().to(dtype).float()  # values that both dtypes represent
        full = as_full(model)
        expected = logits(full)
        ours, theirs = ((logits(each.to(dtype)) - expected).abs().max() for each in (model, full))
        assert 0 < ours <= 1.5 * theirs

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_generation(self, family: str) -> None:
        model = tiny(family)
        full = as_full(model)
        prompt = random_tokens(2, 5)
        options = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(prompt, **options), full.generate(prompt, **options))

    def test_network_that_adds_the_residual(self) -> None:
        torch.manual_seed(0)
        bloom = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4))
        model = flexmoe_from_anchor(bloom, EXPERTS, num_experts_per_tok=2)
        torch.testing.assert_close(logits(model), logits(as_full(model)), **CLOSE)

    @pytest.mark.parametrize("family", ANCHOR_CONFIGS)
    def test_new_low_rank_expert_equals_public(self, family: str) -> None:
        model = tiny(family, ())
        before = logits(model)
        model.add_expert_copy("new", rank=4)
        with model.only_experts("new"):
            torch.testing.assert_close(logits(model), before, **CLOSE)


class TestPublicNetworkIsShared:
    def test_public_is_registered_once(self) -> None:
        model = tiny()
        names = [name for name, _ in model.named_parameters(remove_duplicate=False) if ".experts.math." in name]
        parts = {".".join(name.split(".")[-3:]) for name in names}
        assert parts == {
            f"{matrix}.{side}.weight" for matrix in ("gate_proj", "up_proj", "down_proj") for side in "AB"
        }

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("how", ["in place", "as a module"])
    def test_changes_of_public_take_effect_at_once(self, family: str, how: str) -> None:
        model = tiny(family)
        before = logits(model)
        for block in model.flexmoe_blocks():
            public = block.experts["public"] if how == "in place" else copy.deepcopy(block.experts["public"])
            for parameter in public.parameters():
                parameter.data.mul_(0.5)
            block.experts["public"] = public
        with model.only_experts("math", "legal"):
            assert not torch.allclose(logits(model), before, atol=1e-2)
            torch.testing.assert_close(logits(model), logits_only(as_full(model), "math", "legal"), **CLOSE)

    def test_first_products_are_computed_once_per_token(self) -> None:
        model = tiny(experts=tuple(low_rank(name) for name in ("a", "b", "c")), num_experts_per_tok=4)
        rows: dict[str, list[int]] = {"gate_proj": [], "up_proj": [], "down_proj": []}
        public = model.flexmoe_blocks()[0].experts["public"]
        for name, counts in rows.items():
            getattr(public, name).register_forward_pre_hook(lambda _, args, counts=counts: counts.append(len(args[0])))
        logits(model)
        # a module with a hook may not be linear, so the last product is computed for each of the four experts
        assert rows == {"gate_proj": [18], "up_proj": [18], "down_proj": [18] * 4}

    def test_last_product_is_computed_once_if_it_is_linear(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny(experts=tuple(low_rank(name) for name in ("a", "b", "c")), num_experts_per_tok=4)
        public = model.flexmoe_blocks()[0].experts["public"]
        calls = []
        linear = nn.functional.linear

        def counting(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            calls.append(weight is public.down_proj.weight)
            return linear(x, weight, bias)

        monkeypatch.setattr(nn.functional, "linear", counting)
        logits(model)
        assert sum(calls) == 1

    def test_tokens_of_full_experts_do_not_run_public(self) -> None:
        model = tiny(num_experts_per_tok=1)
        for block in model.flexmoe_blocks():
            block.router["code"].bias.data.fill_(100.0)  # all tokens go to the full expert
        counts: list[int] = []
        gate = model.flexmoe_blocks()[0].experts["public"].gate_proj
        gate.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
        logits(model)
        assert counts == []

    def test_modules_with_hooks_are_called(self) -> None:
        model = tiny(num_experts_per_tok=4)
        expected = logits(model)
        block, calls = model.flexmoe_blocks()[0], []
        for name in ("public", "math"):
            block.experts[name].register_forward_hook(lambda *_, name=name: calls.append(name))
        torch.testing.assert_close(logits(model), expected, **CLOSE)
        assert calls == ["public", "math"]


@torch.no_grad()
def logits_only(model: FlexMoeForCausalLM, *names: str) -> torch.Tensor:
    with model.only_experts(*names):
        return logits(model)


class TestMasks:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_masked_expert_may_hold_nan(self, family: str) -> None:
        model = tiny(family)
        for block in model.flexmoe_blocks():
            for parameter in block.experts["legal"].parameters():
                parameter.data.fill_(float("nan"))
        mask = torch.tensor([[True, True, True, False]] * 2)
        assert logits(model, expert_mask=mask).isfinite().all()
        assert logits_only(model, "math", "code").isfinite().all()

    def test_masked_public_is_still_read(self) -> None:
        model = tiny()
        without_public = logits_only(model, "math")
        torch.testing.assert_close(without_public, logits_only(as_full(model), "math"), **CLOSE)

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_masked_equals_removed_equals_never_added(self, family: str) -> None:
        model, never = tiny(family), tiny(family, EXPERTS[:2])
        masked = logits_only(model, "public", "math", "code")
        model.remove_expert("legal")
        assert model.config.to_dict() == never.config.to_dict()
        assert list(model.state_dict()) == list(never.state_dict())
        assert torch.equal(logits(model), logits(never))
        assert torch.equal(logits(model), masked)


class TestLifecycle:
    @pytest.mark.parametrize("family", ANCHOR_CONFIGS)
    def test_package_round_trip(self, family: str, tmp_path) -> None:
        model, other = tiny(family), tiny(family, ())
        package = ExpertPackage.open(model.save_expert("math", tmp_path / "math"))
        assert (package.manifest.kind, package.manifest.rank, package.manifest.alpha) == ("low_rank", [3, 4], 6.0)
        parts = {name.rsplit(".", 2)[1] + "." + name.rsplit(".", 1)[1] for name in package.infos if ".ffn." in name}
        assert {"lora_A.weight", "lora_B.weight"} <= parts
        assert other.add_expert(package) == "math"
        record = other.config.expert_records[1]
        assert (record["kind"], record["rank"], record["alpha"]) == ("low_rank", [3, 4], 6.0)
        theirs = {name: value for name, value in model.state_dict().items() if ".math." in name}
        assert {name for name in other.state_dict() if ".math." in name} == theirs.keys()
        assert all(torch.equal(other.state_dict()[name], value) for name, value in theirs.items())
        again = other.save_expert("math", tmp_path / "again")
        assert (again / "expert.safetensors").read_bytes() == (tmp_path / "math/expert.safetensors").read_bytes()

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_save_and_load(self, family: str, tmp_path) -> None:
        model = tiny(family)
        model.save_pretrained(tmp_path)
        loaded = FlexMoeForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.expert_records == model.config.expert_records
        torch.testing.assert_close(logits(loaded), logits(model), **CLOSE)
        state = model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())

    def test_replace_a_full_expert_by_a_low_rank_one_and_rename_it(self, tmp_path) -> None:
        model = tiny()
        package = model.save_expert("math", tmp_path / "math")
        model.replace_expert("code", package)
        model.rename_expert("code", "algebra")
        assert model.expert_names == ["public", "math", "algebra", "legal"]
        assert torch.equal(logits_only(model, "algebra"), logits_only(model, "math"))
        model.replace_expert("algebra", tiny().save_expert("code", tmp_path / "code"))
        assert torch.equal(logits_only(model, "algebra"), logits_only(tiny(), "code"))

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"name": "a", "kind": "low_rank"}, "list of positive integers"),
            ({"name": "a", "kind": "low_rank", "rank": 4}, "list of positive integers"),
            ({"name": "a", "kind": "low_rank", "rank": [4, 0]}, "list of positive integers"),
            ({"name": "a", "rank": [4, 4]}, "an expert of another kind has none"),
            ({"name": "a", "kind": "low_rank", "rank": [4]}, "none for layer 1"),
            ({"name": "a", "kind": "low_rank", "rank": [4, 4], "alpha": float("nan")}, "finite number"),
            ({"name": "a", "alpha": 8.0}, "no other has one"),
            ({"name": "a", "kind": "low_rank", "rank": [4, 4], "intermediate": [8, 8]}, "no other has one"),
            ({"name": "a", "intermediate": [0, 8]}, "positive integers"),
        ],
    )
    def test_invalid_records_are_refused(self, record: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tiny(experts=(record,))

    def test_alpha_needs_a_rank(self) -> None:
        with pytest.raises(ValueError, match="pass its rank, too"):
            tiny().add_expert_copy("new", alpha=8.0)

    @pytest.mark.parametrize("rank", [0, -1, 2.0, True])
    def test_invalid_ranks_are_refused(self, rank: Any) -> None:
        model = tiny()
        with pytest.raises(ValueError, match="positive integers"):
            model.add_expert_copy("new", rank=rank)
        assert model.expert_names == ["public", "math", "code", "legal"]


class TestTraining:
    @pytest.mark.parametrize("family", ANCHOR_CONFIGS)
    def test_gradients_follow_from_those_of_the_full_expert(self, family: str) -> None:
        model = tiny(family, (low_rank("math"),))
        full = as_full(model)
        for each in (model, full):
            each.freeze_except("math")
            each(random_tokens(2, 9), labels=random_tokens(2, 9)).loss.backward()
        for ours, theirs in zip(model.flexmoe_blocks(), full.flexmoe_blocks(), strict=True):
            for path, part in matrices(theirs.experts["math"]):
                delta: Any = ours.experts["math"].get_submodule(path)
                full_grad = as_out_in(part, part.weight.grad)
                expected_a = delta.scale * delta.B.weight.T @ full_grad
                expected_b = delta.scale * full_grad @ delta.A.weight.T
                torch.testing.assert_close(delta.A.weight.grad, expected_a, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(delta.B.weight.grad, expected_b, rtol=1e-4, atol=1e-5)
                if delta.B.bias is not None:
                    torch.testing.assert_close(delta.B.bias.grad, part.bias.grad, rtol=1e-4, atol=1e-5)
            rows = (ours.router["math"].weight.grad, theirs.router["math"].weight.grad)
            torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-5)
            assert all(p.grad is None for p in ours.experts["public"].parameters())

    @pytest.mark.parametrize("receiver", ["code", "legal"], ids=["full", "low-rank"])
    @pytest.mark.parametrize("name", ["math", "public"])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_expert_without_tokens_has_gradients(self, family: str, name: str, receiver: str) -> None:
        model = tiny(family, num_experts_per_tok=1)
        model.freeze_except(name)
        for block in model.flexmoe_blocks():
            block.router[receiver].bias.data.fill_(100.0)  # gets all tokens
        model(random_tokens(2, 9), labels=random_tokens(2, 9)).loss.backward()
        is_used = name == "public" and receiver == "legal"  # the low-rank expert computes with public's matrices
        for block in model.flexmoe_blocks():
            gradients = [p.grad for p in block.experts[name].parameters()]
            assert all(gradient is not None for gradient in gradients)
            assert any(gradient.any() for gradient in gradients) == is_used

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("k", [1, 2, 4])
    def test_under_autocast(self, family: str, k: int) -> None:
        model = tiny(family, num_experts_per_tok=k)
        model.freeze_except("math")
        expected = model(random_tokens(2, 9), labels=random_tokens(2, 9)).loss
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(random_tokens(2, 9), labels=random_tokens(2, 9)).loss
        loss.backward()
        torch.testing.assert_close(loss.float(), expected, rtol=2e-2, atol=0)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert trained
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)

    def test_with_gradient_checkpointing(self) -> None:
        gradients = []
        for checkpointed in (False, True):
            model = tiny()
            model.freeze_except("math", "legal")
            if checkpointed:
                enable_checkpointing(model)
            model(random_tokens(2, 9), labels=random_tokens(2, 9)).loss.backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        for without, with_checkpointing in zip(*gradients, strict=True):
            torch.testing.assert_close(with_checkpointing, without, **CLOSE)


def test_offload_by_layer_works_and_offload_by_network_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = logits(tiny())
    by_layer = accelerate.cpu_offload(tiny(), execution_device=torch.device("cpu"))
    torch.testing.assert_close(logits(by_layer), expected, **CLOSE)
    by_network = accelerate.cpu_offload(
        tiny(), execution_device=torch.device("cpu"), preload_module_classes=["LlamaMLP"]
    )
    with pytest.raises(ValueError, match="without preload_module_classes"):
        logits(by_network)


class TestAdapters:
    peft = pytest.importorskip("peft")

    def test_adapter_on_public_changes_low_rank_experts(self) -> None:
        model = tiny(experts=(low_rank("math"),))
        before = logits_only(model, "math")
        adapted = self.peft.get_peft_model(model, expert_lora_config(model, "public", r=2, init_lora_weights=False))
        with model.only_experts("math"), torch.no_grad():
            assert not torch.allclose(adapted(random_tokens(2, 9)).logits, before, atol=1e-3)
            with adapted.disable_adapter():
                torch.testing.assert_close(adapted(random_tokens(2, 9)).logits, before, **CLOSE)

    def test_peft_does_not_treat_the_factors_as_its_own_adapter(self) -> None:
        model = tiny(experts=(low_rank("math"), "code"))
        adapted = self.peft.get_peft_model(model, expert_lora_config(model, "code", r=2))
        trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        assert trained
        assert all(".experts.code." in name for name in trained)
        saved = self.peft.get_peft_model_state_dict(adapted)
        assert saved
        assert not any(".math." in name for name in saved)

    def test_all_linear_does_not_target_the_factors(self) -> None:
        model = tiny(experts=(low_rank("math"),))
        config = self.peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        with pytest.warns(UserWarning, match="several owners|owners at once"):
            adapted = self.peft.get_peft_model(model, config)
        trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        assert any(".experts.public." in name for name in trained)
        assert not any(".experts.math." in name for name in trained)

    def test_adapter_on_a_low_rank_expert_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"math.*adapters of the public network already.*densify"):
            expert_lora_config(tiny(), "math")


class TestOtherWidths:
    """Full experts may be narrower or wider than public."""

    @staticmethod
    def package(width: int, tmp_path, family: str = "llama"):
        """A model without experts, a model with an expert of this width, and the package of that expert."""
        config = ANCHOR_CONFIGS[family]()
        record = {"name": "math", "intermediate": [width, width]}
        model = tiny_flexmoe(family, (), anchor=FINGERPRINT)
        source = FlexMoeForCausalLM(
            FlexMoeConfig(anchor_config=config, experts=["public", record], anchor=FINGERPRINT)
        )
        randomize_expert(source)
        return model, source.eval(), source.save_expert("math", tmp_path / f"math-{width}")

    @pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
    @pytest.mark.parametrize("width", [24, 160])
    def test_add_save_load_remove(self, family: str, width: int, tmp_path) -> None:
        model, source, folder = self.package(width, tmp_path, family)
        manifest = ExpertPackage.open(folder).manifest
        assert manifest.ffn["intermediate"] == [width, width]
        before = logits(model)
        model.add_expert(folder)
        assert model.config.expert_records[1]["intermediate"] == [width, width]
        sizes = {tuple(p.shape) for p in model.flexmoe_blocks()[1].experts["math"].parameters() if p.dim() == 2}
        assert all(width in shape or 2 * width in shape for shape in sizes)
        assert torch.equal(logits_only(model, "math"), expert_alone(source, model))
        model.save_pretrained(tmp_path / "model")
        loaded = FlexMoeForCausalLM.from_pretrained(tmp_path / "model")
        torch.testing.assert_close(logits(loaded), logits(model), **CLOSE)
        again = loaded.save_expert("math", tmp_path / "again")
        assert (again / "expert.safetensors").read_bytes() == (folder / "expert.safetensors").read_bytes()
        model.remove_expert("math")
        assert torch.equal(logits(model), before)

    @pytest.mark.parametrize("family", ["llama", "phi3"])
    def test_other_width_needs_a_public_width_unlike_the_hidden_size(self, family: str) -> None:
        config = ANCHOR_CONFIGS[family]()
        config.intermediate_size = config.hidden_size
        record = {"name": "math", "intermediate": [24, 24]}
        with pytest.raises(ValueError, match="cannot be told apart"):
            FlexMoeForCausalLM(FlexMoeConfig(anchor_config=config, experts=["public", record]))

    def test_expert_as_wide_as_the_hidden_size(self, tmp_path) -> None:
        model, _, folder = self.package(32, tmp_path, "phi3")
        assert ExpertPackage.open(folder).manifest.ffn["intermediate"] == [32, 32]
        assert model.add_expert(folder) == "math"

    def test_new_expert_is_initialized(self) -> None:
        record = {"name": "math", "intermediate": [24, 24]}
        model = FlexMoeForCausalLM(FlexMoeConfig(anchor_config=ANCHOR_CONFIGS["llama"](), experts=["public", record]))
        for block in model.flexmoe_blocks():
            for parameter in block.experts["math"].parameters():
                assert 0.01 < parameter.std() < 0.03  # as the anchor's class initializes it

    def test_narrow_expert_equals_one_padded_with_zeros(self, tmp_path) -> None:
        _, _, folder = self.package(24, tmp_path)
        narrow, padded = tiny_flexmoe("llama", (), anchor=FINGERPRINT), tiny_flexmoe("llama", (), anchor=FINGERPRINT)
        narrow.add_expert(folder)
        padded.add_expert_copy("math")
        for ours, theirs in zip(padded.flexmoe_blocks(), narrow.flexmoe_blocks(), strict=True):
            for key, value in theirs.experts["math"].state_dict().items():
                wide = ours.experts["math"].state_dict()[key].zero_()
                wide[: value.shape[0], : value.shape[1]] = value
            ours.router["math"].load_state_dict(theirs.router["math"].state_dict())
        torch.testing.assert_close(logits(narrow), logits(padded), **CLOSE)


def randomize_expert(model: FlexMoeForCausalLM) -> None:
    generator = torch.Generator().manual_seed(5)
    for block in model.flexmoe_blocks():
        for parameter in (*block.experts["math"].parameters(), *block.router["math"].parameters()):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def expert_alone(source: FlexMoeForCausalLM, model: FlexMoeForCausalLM) -> torch.Tensor:
    """The logits of the expert of `source` on the anchor of `model`."""
    anchor = {name: value for name, value in model.state_dict().items() if ".math." not in name}
    source.load_state_dict(anchor, strict=False)
    return logits_only(source, "math")


def test_deltas_are_initialized_to_zero() -> None:
    config = FlexMoeConfig(anchor_config=tiny_anchor("llama").config, experts=["public", low_rank("math")])
    deltas = [part for part in FlexMoeForCausalLM(config).modules() if isinstance(part, LowRankDelta)]
    assert len(deltas) == 6
    assert all(delta.A.weight.any() and not delta.B.weight.any() for delta in deltas)
