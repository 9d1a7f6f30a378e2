"""Loss per token and perplexity, compared with a loop over the definition, for all kinds of input."""

import json
import math
from pathlib import Path

import pytest
import torch

from flexmoe.evaluation import TOKEN_LOSS, evaluate, token_losses
from flexmoe.testing import random_tokens, tiny_anchor, tiny_flexmoe
from tests.support.letters import letter_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return letter_tokenizer()


@pytest.fixture(scope="module")
def anchor():
    return tiny_anchor("llama")


@pytest.fixture(scope="module")
def flexmoe():
    return tiny_flexmoe("llama", ["math", "code"])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat\n<|endofdocument|>\na dog ran off with the ball")
    return path


def one_by_one(model, tokens: list[int]) -> list[float]:
    """The definition: minus the logarithm of the probability of each token, given all before it."""
    losses = []
    for end in range(1, len(tokens)):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[:end]])).logits[0, -1].double()
        losses.append(-torch.log_softmax(logits, -1)[tokens[end]].item())
    return losses


def test_token_losses_equal_the_definition(anchor) -> None:
    ids = random_tokens(3, 9)
    losses = token_losses(anchor, ids, batch_size=2)
    assert losses.shape == (3, 8)
    assert losses.dtype == torch.float32
    expected = torch.tensor([one_by_one(anchor, row.tolist()) for row in ids])
    torch.testing.assert_close(losses, expected.float(), rtol=1e-4, atol=1e-4)


def test_token_losses_restore_the_mode(anchor) -> None:
    anchor.train()
    token_losses(anchor, random_tokens(1, 4))
    assert anchor.training
    anchor.eval()
    token_losses(anchor, random_tokens(1, 4))
    assert not anchor.training


def test_token_losses_pass_arguments_to_the_forward(flexmoe) -> None:
    ids = random_tokens(2, 12)
    all_experts, one = token_losses(flexmoe, ids), token_losses(flexmoe, ids, num_experts_per_tok=1)
    assert not torch.equal(all_experts, one)


@pytest.mark.parametrize("shape", [(4,), (2, 1), (1, 2, 3)])
def test_token_losses_refuse_other_shapes(anchor, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"input_ids must be \[sequences, at least 2 tokens\]"):
        token_losses(anchor, torch.zeros(shape, dtype=torch.long))


def test_every_token_is_scored_once_whatever_the_sequence_length(anchor, tokenizer, text: Path) -> None:
    tokens = tokenizer("the cat sat on the mat\n")["input_ids"] + [2]
    tokens += tokenizer("a dog ran off with the ball")["input_ids"] + [2]
    for length in (7, 8, 100):
        score = evaluate(anchor, {"animals": [text]}, tokenizer=tokenizer, sequence_length=length, batch_size=2)[
            "animals"
        ]
        assert abs(score.tokens - (len(tokens) - 1)) <= 1  # the last end-of-sequence token may be left out
        assert score.documents == 2
    expected = one_by_one(anchor, tokens)[: score.tokens]  # 100: all of the text in one sequence
    assert score.loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.loss))


def test_domains_are_scored_separately(anchor, tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aaaa aaaa")
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "zz yy xx"}) + "\n")
    both = evaluate(
        anchor,
        {"a": [tmp_path / "a.txt"], "b": [tmp_path / "b.jsonl", tmp_path / "b.jsonl"]},
        tokenizer=tokenizer,
        text_column="body",
    )
    alone = evaluate(anchor, {"a": [tmp_path / "a.txt"]}, tokenizer=tokenizer)
    assert list(both) == ["a", "b"]
    assert both["a"] == alone["a"]
    assert both["b"].documents == 2


def test_experts_and_k(anchor, flexmoe, tokenizer, text: Path) -> None:
    def loss(model, **options) -> float:
        return evaluate(model, {"x": [text]}, tokenizer=tokenizer, **options)["x"].loss

    assert loss(flexmoe, experts=["public"]) == pytest.approx(loss(anchor), rel=1e-6)
    losses = {loss(flexmoe), loss(flexmoe, experts=["public", "math"]), loss(flexmoe, num_experts_per_tok=1)}
    assert len(losses) == 3


def test_from_a_folder(anchor, tokenizer, text: Path, tmp_path: Path) -> None:
    anchor.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    scores = evaluate(tmp_path / "model", {"x": [text]})
    assert scores == evaluate(anchor, {"x": [text]}, tokenizer=tokenizer)
    assert scores["x"].to_dict().keys() == {"loss", "perplexity", "tokens", "documents"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": ["math"]}, "dense llama model"),
        ({"num_experts_per_tok": 2}, "dense llama model"),
        ({"sequence_length": 129}, "from 2 to 128"),
        ({"sequence_length": 1}, "from 2 to 128"),
        ({"batch_size": 0}, "at least 1"),
        ({"tokenizer": None}, "give one with tokenizer="),
    ],
)
def test_invalid_options(anchor, tokenizer, text: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(anchor, {"x": [text]}, **{"tokenizer": tokenizer, **options})


def test_no_domain_is_an_error(anchor, tokenizer) -> None:
    with pytest.raises(ValueError, match="No domain"):
        evaluate(anchor, {}, tokenizer=tokenizer)


def test_a_loss_that_is_not_finite_is_an_error(tokenizer, text: Path) -> None:
    broken = tiny_anchor("llama")
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss on 'x' is not finite"):
        evaluate(broken, {"x": [text]}, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def metric():
    """The `evaluate` module, loaded without FlexMoE."""
    import evaluate as hf_evaluate

    return hf_evaluate.load(str(TOKEN_LOSS))


class TestMetric:
    def test_all_tokens_have_equal_weight(self, metric) -> None:
        metric.add_batch(predictions=[[-0.5, -1.5], []])
        metric.add(prediction=[-1.0])
        assert metric.compute() == {"loss": 1.0, "perplexity": math.e, "tokens": 3}

    def test_overflowing_perplexity_is_infinite(self, metric) -> None:
        assert metric.compute(predictions=[[-1000.0]]) == {"loss": 1000.0, "perplexity": math.inf, "tokens": 1}

    @pytest.mark.parametrize("predictions", [[[]], [[0.5]], [[-1.0], [float("nan")]]])
    def test_invalid_log_probabilities(self, metric, predictions) -> None:
        with pytest.raises(ValueError, match="predictions"):
            metric.compute(predictions=predictions)
