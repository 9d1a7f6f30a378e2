"""A captured forward pass: what it refuses, and when. A fake replaces CUDA; tests/kernels runs on a GPU."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from flexmoe import CapturedForward
from flexmoe.kernels import forward as kernels_forward
from flexmoe.modeling.masking_flexmoe import is_capturing
from flexmoe.testing import perturb_expert, random_tokens, tiny_flexmoe

OWNERS = ("math", "code")


class FakeGraph:
    """Replaces `torch.cuda.CUDAGraph`, and counts its replays."""

    replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def model(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph: contextlib.nullcontext(),
        "CUDAGraph": FakeGraph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    model = tiny_flexmoe("olmo2", OWNERS)
    model.set_experts_implementation("flexmoe_triton")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    return model


def captured(model) -> CapturedForward:
    mask = torch.ones(2, 3, dtype=torch.bool)
    return CapturedForward(model, input_ids=random_tokens(2, 1), expert_mask=mask, use_cache=False)


def test_inputs_are_copied_in_and_the_output_stays_in_place(model):
    forward = captured(model)
    first = forward(input_ids=random_tokens(2, 1) + 1)
    assert torch.equal(forward._inputs["input_ids"], random_tokens(2, 1) + 1)
    mask = torch.tensor([[True, False, True]] * 2)
    assert forward(expert_mask=mask) is first
    assert torch.equal(forward._inputs["expert_mask"], mask)
    assert forward._graph.replays == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": torch.zeros(2, 2, dtype=torch.long)}, r"input_ids is \[2, 2\] of torch.int64; .* \[2, 1\]"),
        ({"input_ids": torch.zeros(2, 1)}, r"input_ids is \[2, 1\] of torch.float32; .* torch.int64"),
        ({"position_ids": torch.zeros(2, 1)}, r"position_ids is \[2, 1\] of torch.float32; .* with NoneType"),
        ({"use_cache": True}, "use_cache is bool"),
    ],
)
def test_inputs_of_another_shape_are_refused(model, given, message):
    forward = captured(model)
    with pytest.raises(ValueError, match=message):
        forward(**given)
    assert not forward._graph.replays


CHANGES = {
    "removed": lambda model: model.remove_expert("code"),
    "added": lambda model: model.add_expert_copy("new"),
    "cast": lambda model: model.to(torch.bfloat16),
    "switched off": lambda model: model.set_active_experts(["public", "math"]),
    "other k": lambda model: setattr(model.config, "num_experts_per_tok", 1),
    "removed and added": lambda model: (model.remove_expert("math"), model.add_expert_copy("math")),
    "moved": lambda model: move(model.get_input_embeddings().weight),
}


def move(parameter) -> None:
    """As `to` does from one device to another and back."""
    parameter.data = parameter.detach().clone()


@pytest.mark.parametrize("change", CHANGES)
def test_it_refuses_to_run_after_a_change(model, change):
    forward = captured(model)
    CHANGES[change](model)
    with pytest.raises(RuntimeError, match=r"not those that this graph was captured with .* capture it again"):
        forward()
    assert not forward._graph.replays


def test_it_follows_an_expert_that_is_replaced_by_the_same_shapes(model, tmp_path):
    forward = captured(model)
    perturb_expert(model, "math", seed=3)
    model.save_expert("math", tmp_path / "math")
    model.replace_expert("code", tmp_path / "math", verify=False)
    model.rename_expert("math", "sums")
    forward()
    assert forward._graph.replays == 1


def test_the_warm_up_runs_all_experts(model, monkeypatch):
    """One that the mask excludes everywhere would otherwise have no table yet when the graph is captured."""
    seen = []
    choose_path = kernels_forward.choose_path
    monkeypatch.setattr(
        kernels_forward,
        "choose_path",
        lambda block, names, *rest: seen.append((names, is_capturing())) or choose_path(block, names, *rest),
    )
    mask = torch.tensor([[True, True, False]] * 2)
    CapturedForward(model, input_ids=random_tokens(2, 1), expert_mask=mask, use_cache=False)
    assert seen[0] == (("public", "math"), False)
    assert {names for names, capturing in seen if capturing} == {("public", *OWNERS)}


def test_capturing_adds_nothing_to_a_cache(model):
    """The tokens of the warm-up are taken back; the captured pass itself does not run."""
    tokens = random_tokens(2, 6)
    cache = StaticCache(config=model.config, max_cache_len=8)
    alone = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad():
        for some in (cache, alone):
            model(tokens[:, :4], past_key_values=some)
        forward = CapturedForward(model, input_ids=tokens[:, 4:5], past_key_values=cache)
        assert [int(layer.cumulative_length) for layer in cache.layers] == [5] * len(cache.layers)
        for layer in cache.layers:  # nothing runs in a capture, except in this fake one
            layer.cumulative_length.fill_(4)
        first = model(tokens[:, 4:5], past_key_values=cache).logits
        torch.testing.assert_close(first, model(tokens[:, 4:5], past_key_values=alone).logits)
    assert forward._graph.replays == 0


@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
def test_a_cache_that_grows_or_slides_is_refused(model, family):
    cache = DynamicCache()
    if family == "gemma2":
        cache = StaticCache(config=tiny_flexmoe("gemma2").config, max_cache_len=8)
    with pytest.raises(ValueError, match="grows, or has layers with a sliding window"):
        CapturedForward(model, input_ids=random_tokens(2, 1), past_key_values=cache)


def test_low_rank_experts_are_captured_if_a_kernel_runs_them(model):
    """Modules would have the addresses of their weights in the graph, and read freed memory after a replacement."""
    low_rank = tiny_flexmoe("olmo2", ({"name": "thin", "kind": "low_rank", "rank": [8, 8]},))
    low_rank.set_experts_implementation("flexmoe_triton")
    assert CapturedForward(low_rank, input_ids=random_tokens(2, 32), use_cache=False)
    with pytest.raises(ValueError, match=r"run as PyTorch modules: the operator takes at most 64 tokens\. What"):
        CapturedForward(low_rank, input_ids=random_tokens(2, 33), use_cache=False)


def test_models_that_cannot_be_captured(model, monkeypatch):
    with pytest.raises(ValueError, match=r"this model is in training mode: call eval\(\)"):
        captured(model.train())
    model.eval()
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match=r"experts_implementation is 'eager'\. What cannot .*reduce-overhead"):
        captured(model)
    monkeypatch.setattr(type(model), "device", torch.device("cpu"))
    with pytest.raises(ValueError, match="for models on CUDA; this one is on cpu"):
        captured(model)
