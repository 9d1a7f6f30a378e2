"""Gates from prompts: each mode computed by hand, and its inputs, in several families."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

from flexmoe.io.dense import DenseCheckpoint
from flexmoe.routers.prompt_gates import GATE_MODES, Prompts, check_gate_mode, gate_mode, make_gates
from flexmoe.testing import tiny_anchor
from tests.support.letters import letter_tokenizer

# Prompts of equal length, so there is no padding and each can be run alone.
EXPERTS = [Prompts(["abc", "xyz"], ["one", "two", "nil"]), Prompts(["def"])]


@pytest.fixture(scope="module", params=["llama", "gpt2", "olmo2", "gemma2"])
def anchor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DenseCheckpoint:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_anchor(request.param).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return DenseCheckpoint(folder)


def vectors(mode: str, *arguments: object) -> torch.Tensor:
    return GATE_MODES[mode].vectors(*arguments)


class TestModes:
    """x [1 layer, 2 prompts, 3 tokens, width 2]; the first prompt is one token shorter, so its first is padding."""

    X = torch.tensor([[[[9.0, 9.0], [1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [2.0, 0.0], [5.0, 8.0]]]])
    MASK = torch.tensor([[0, 1, 1], [1, 1, 1]])

    @pytest.mark.parametrize("mode", ["hidden", "hidden_last"])
    def test_the_last_token(self, mode: str) -> None:
        assert vectors(mode, self.X, self.MASK).tolist() == [[4.0, 6.0]]

    def test_the_mean_includes_padding(self) -> None:
        expected = torch.tensor([[(13 / 3 + 7 / 3) / 2, (15 / 3 + 9 / 3) / 2]])
        torch.testing.assert_close(vectors("hidden_avg", self.X, self.MASK), expected)

    def test_the_sum_of_embeddings_excludes_padding(self) -> None:
        total = torch.tensor([[11.0, 15.0]])
        torch.testing.assert_close(vectors("cheap_embed", self.X, self.MASK), total / math.hypot(11, 15))

    def test_random_gates_depend_on_the_seed(self) -> None:
        def drawn(mode: str, seed: int) -> torch.Tensor:
            return vectors(mode, (2, 3, 4096), torch.Generator().manual_seed(seed))

        for mode in ("random", "uniform_random"):
            assert torch.equal(drawn(mode, 1), drawn(mode, 1))
            assert not torch.equal(drawn(mode, 1), drawn(mode, 2))
        torch.manual_seed(1)
        assert torch.equal(drawn("random", 1), torch.randn(2, 3, 4096))
        uniform = drawn("uniform_random", 1)
        assert uniform.abs().max() <= 1 / 64
        assert uniform.abs().max() > 0.999 / 64
        assert (uniform < 0).any()

    def test_names_are_unique(self) -> None:
        with pytest.raises(ValueError, match="'hidden' is registered already"):
            gate_mode("hidden", needs="states")(lambda x, mask: x)


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm(dim=-1, keepdim=True)


@torch.no_grad()
@pytest.mark.parametrize(("mode", "place"), [("hidden", [-1]), ("hidden_avg", [0, 1, 2, 3])])
def test_states_are_the_inputs_of_the_layers(anchor: DenseCheckpoint, mode: str, place: list[int]) -> None:
    """Compares with the mean over single prompts, each after `<s>`, of the bfloat16 model's hidden states."""
    tokenizer = letter_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(anchor.folder, dtype=torch.bfloat16)

    def mean(prompts: list[str]) -> torch.Tensor:
        states = []
        for prompt in prompts:
            ids = tokenizer("<s>" + prompt, add_special_tokens=False, return_tensors="pt").input_ids
            assert ids[0, 0] == 1
            assert ids.shape == (1, 4)
            layers = model(ids, output_hidden_states=True).hidden_states[:-1]
            states.append(torch.stack([layer[0, place].float().mean(0) for layer in layers]))
        return torch.stack(states).mean(0)

    gates = make_gates(GATE_MODES[mode], EXPERTS, anchor, seed=0)
    assert gates.shape == (2, 2, 32)
    first = unit(mean(["abc", "xyz"]) - mean(["one", "two", "nil"]))
    torch.testing.assert_close(gates[:, 0].float(), first, rtol=0, atol=0.03)  # a difference in bfloat16
    torch.testing.assert_close(gates[:, 1].float(), unit(mean(["def"])), rtol=0, atol=0.005)
    assert (gates[0, 0] - gates[1, 0]).abs().max() > 0.04, "each layer has its own"


def test_embeddings_are_read_from_the_file(anchor: DenseCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexmoe.routers.prompt_gates.load_dense", lambda *_: pytest.fail("no model is needed"))
    table = AutoModelForCausalLM.from_pretrained(anchor.folder).get_input_embeddings().weight.detach()
    letters = letter_tokenizer().get_vocab()

    def direction(*prompts: str) -> torch.Tensor:
        ids = [1 if letter == "^" else letters[letter] for letter in "".join(prompts)]
        return unit(table[ids].sum(0))

    gates = make_gates(GATE_MODES["cheap_embed"], [Prompts(["abc", "z"], ["no"]), Prompts(["def"])], anchor, seed=0)
    first = unit(direction("^abc", "^z") - direction("^no"))
    for layer in range(2):
        torch.testing.assert_close(gates[layer], torch.stack([first, direction("^def")]))


@pytest.mark.parametrize("width", [16, 64])
def test_embeddings_of_another_width_than_the_layers(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = OPTConfig(
        vocab_size=99,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=width,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    check_gate_mode(GATE_MODES["hidden"], model)
    check_gate_mode(GATE_MODES["random"], model)
    refusal = rf"cheap_embed .* {width} values per token .*layers have 32.*Set gate_mode: hidden"
    with pytest.raises(ValueError, match=refusal):
        check_gate_mode(GATE_MODES["cheap_embed"], model)


def test_a_family_without_hidden_states(anchor: DenseCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(torch.nn.Module):
        device, base_model = torch.device("cpu"), property(lambda self: self)

        def forward(self, **_: object) -> object:
            return type("Outputs", (), {"hidden_states": None})

    monkeypatch.setattr("flexmoe.routers.prompt_gates.load_dense", lambda *_: Silent())
    with pytest.raises(ValueError, match=r"returns 0 hidden states for its 2 layers of width 32.*cheap_embed"):
        make_gates(GATE_MODES["hidden"], EXPERTS, anchor, seed=0)
