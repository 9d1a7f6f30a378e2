"""`experts_implementation`, as in transformers: each name takes effect or is refused, and it is not saved."""

import copy
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.modeling.configuration_flexmoe import EXPERTS_FORWARDS
from flexmoe.testing import TOLERANCES, random_tokens, tiny_flexmoe
from tests.support.soak import thinned

# transformers' own implementations, which need stacked experts, and values of other arguments.
UNSUPPORTED = ["grouped_mm", "batched_mm", "sonicmoe", "deepgemm", "deepgemm_megamoe", "triton", "sdpa", ""]
SUPPORTED = ["eager", "auto", "flexmoe_cpu", "flexmoe_triton", "flexmoe_training"]


@pytest.fixture
def folder(tmp_path):
    tiny_flexmoe("olmo2", ("math", "code")).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def ran(monkeypatch):
    """Lists the implementations that run."""
    names = []
    for name in SUPPORTED:
        own = EXPERTS_FORWARDS[name]

        def recording(*args, own=own, name=name):
            names.append(name)
            return own(*args)

        monkeypatch.setitem(EXPERTS_FORWARDS, name, recording)
    return names


@torch.no_grad()
def logits(model, *shape):
    return model(random_tokens(*(shape or (2, 9)))).logits


@pytest.mark.parametrize("name", SUPPORTED)
def test_from_pretrained_and_set_experts_implementation(folder, ran, name):
    loaded = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=name)
    assert loaded.get_experts_implementation() == {"": name}
    set_later = AutoModelForCausalLM.from_pretrained(folder)
    assert set_later.get_experts_implementation() == {"": "auto"}
    set_later.set_experts_implementation(name)
    for model in (loaded, set_later):
        ran.clear()
        logits(model)
        assert ran == [name] * len(model.flexmoe_blocks())


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("shape", [(2, 9), (1, 1)])
def test_all_implementations_give_the_logits_of_eager(folder, name, shape):
    eager = logits(FlexMoeForCausalLM.from_pretrained(folder, experts_implementation="eager"), *shape)
    other = logits(FlexMoeForCausalLM.from_pretrained(folder, experts_implementation=name), *shape)
    torch.testing.assert_close(other, eager, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_names_are_refused_with_the_list(folder, name):
    message = re.escape(f"is not available for FlexMoE: use one of {SUPPORTED}")
    model = FlexMoeForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        FlexMoeForCausalLM.from_pretrained(folder, experts_implementation=name)
    with pytest.raises(ValueError, match=message):
        FlexMoeConfig.from_pretrained(folder, experts_implementation=name)
    with pytest.raises(ValueError, match=message):
        model.set_experts_implementation(name)
    with pytest.raises(ValueError, match=message):
        model.config._experts_implementation = name
    assert model.get_experts_implementation() == {"": "auto"}


def test_dictionary_form_leaves_the_anchor_alone(folder):
    model = FlexMoeForCausalLM.from_pretrained(folder, experts_implementation={"": "eager"})
    assert model.get_experts_implementation() == {"": "eager"}
    before = model.config.anchor_config._experts_implementation
    model.set_experts_implementation({"": "flexmoe_cpu"})
    assert model.config._experts_implementation == "flexmoe_cpu"
    assert model.config.anchor_config._experts_implementation == before
    model.set_experts_implementation({})  # changes nothing, as in transformers
    assert model.config._experts_implementation == "flexmoe_cpu"


def test_implementation_is_copied_and_not_saved(folder, tmp_path):
    model = FlexMoeForCausalLM.from_pretrained(folder, experts_implementation="eager")
    assert copy.deepcopy(model).config._experts_implementation == "eager"
    model.save_pretrained(tmp_path / "again")
    assert "implementation" not in (tmp_path / "again" / "config.json").read_text()
    assert FlexMoeForCausalLM.from_pretrained(tmp_path / "again").config._experts_implementation == "auto"


def test_generate_uses_the_implementation(folder, ran):
    model = FlexMoeForCausalLM.from_pretrained(folder, experts_implementation="eager")
    model.generate(random_tokens(1, 4), max_new_tokens=3, do_sample=False)
    assert set(ran) == {"eager"}


@pytest.mark.parametrize("name", thinned(SUPPORTED, ["auto"]))
def test_compiled_models_use_the_implementation(folder, ran, name):
    """`tests/kernels/test_forward.py` compiles "flexmoe_triton" too."""
    model = FlexMoeForCausalLM.from_pretrained(folder, experts_implementation=name)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    result = logits(compiled)
    assert set(ran) == {name}
    torch.testing.assert_close(result, logits(model), **TOLERANCES[torch.float32])
