"""Compression with the owner's text: the metric of the loss, the ranks it gives, and the package."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexmoe.conversion import loss_metric
from flexmoe.conversion.graft import graft
from flexmoe.conversion.loss_metric import Metric, Root, loss_metrics
from flexmoe.conversion.low_rank import _ranks_by_gain, compress
from flexmoe.data import Documents
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.packages.package import ExpertPackage
from flexmoe.testing import perturb_expert, tiny_anchor
from flexmoe_cli import main

HIDDEN, INTERMEDIATE, RANK = 32, 64, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """anchor/ and grafted/ with a tokenizer of letters, the full package math/, own.jsonl."""
    root = tmp_path_factory.mktemp("world")
    letters = {letter: i for i, letter in enumerate(["<pad>", "<bos>", "<eos>", *"0123456789+= "])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tiny_anchor("olmo2").save_pretrained(root / "anchor")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(root / "anchor")
    graft(root / "anchor", root / "grafted")
    model = FlexMoeForCausalLM.from_pretrained(root / "grafted")
    model.add_expert_copy("math")
    perturb_expert(model, "math")
    model.save_expert("math", root / "math")
    chance = random.Random(0)
    lines = ["".join(chance.choices("0123456789+= ", k=60)) for _ in range(8)]
    (root / "own.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return root


def weights(package: Path) -> dict[str, torch.Tensor]:
    return load_file(package / "expert.safetensors")


def product(package: Path, matrix: str) -> torch.Tensor:
    tensors = weights(package)
    return tensors[f"{matrix}.lora_B.weight"] @ tensors[f"{matrix}.lora_A.weight"]


@pytest.mark.parametrize("is_diagonal", [True, False])
def test_the_truncated_svd_is_the_best_one_in_the_metric(is_diagonal):
    generator = torch.Generator().manual_seed(0)
    x_TI, g_TO, delta_OI = (torch.randn(*size, generator=generator) for size in ((50, 6), (50, 5), (5, 6)))
    x_TI[:, 0] *= 10.0
    moments = [values.T @ values for values in (g_TO, x_TI)]
    metric = Metric(*(Root.of(moment.diag() if is_diagonal else moment) for moment in moments))
    left, values, right = torch.linalg.svd(metric.weigh(delta_OI), full_matrices=False)
    b_OR, a_RI = metric.unweigh(left * values, right)
    torch.testing.assert_close(b_OR @ a_RI, delta_OI, rtol=1e-3, atol=1e-4)

    def change(approximation: torch.Tensor) -> float:
        """The mean square of `g . E x` over independent x and g."""
        error = delta_OI - approximation
        if is_diagonal:
            return float((moments[0].diag()[:, None] * error.square() * moments[1].diag()).sum())
        return float(torch.trace(moments[0] @ error @ moments[1] @ error.T))

    plain_left, plain_values, plain_right = torch.linalg.svd(delta_OI, full_matrices=False)
    for rank in (1, 2, 3):
        ours = change(b_OR[:, :rank] @ a_RI[:rank])
        assert ours < change(plain_left[:, :rank] * plain_values[:rank] @ plain_right[:rank])
        assert ours == pytest.approx(float(values[rank:].square().sum()), rel=1e-2)


def test_no_direction_is_lost_where_a_moment_is_zero():
    for moment in (torch.zeros(3), torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 0.0, 2.0]))):
        root = Root.of(moment)
        assert torch.isfinite(root.inverse).all()
        assert torch.isfinite(root.value).all()


@pytest.mark.parametrize(
    ("gains", "costs", "rank", "ranks"),
    [
        ([[9, 8, 7, 6], [5, 1, 1, 1]], [10, 10], 2, [3, 1]),
        ([[9, 1, 1, 1], [9, 5, 4, 1]], [10, 10], 2, [1, 3]),
        ([[9, 8, 8, 8], [9, 9, 9, 9]], [10, 30], 2, [4, 1]),  # a rank of the second layer costs three times as much
        ([[0, 0], [0, 0]], [10, 10], 1, [1, 1]),
    ],
)
def test_ranks_by_gain(gains, costs, rank, ranks):
    layers = [(torch.tensor(gain, dtype=torch.float64), cost) for gain, cost in zip(gains, costs, strict=True)]
    assert _ranks_by_gain(layers, rank) == ranks


@pytest.mark.parametrize("complete", [0, 2048])
def test_moments_of_each_matrix(world, monkeypatch, complete):
    monkeypatch.setattr(loss_metric, "COMPLETE", complete)
    metrics = loss_metrics(world / "grafted", ExpertPackage.open(world / "math"), Documents([world / "own.jsonl"]))
    assert len(metrics) == 2 * 3
    inner = (INTERMEDIATE, INTERMEDIATE) if complete else (INTERMEDIATE,)
    for (_, path), metric in metrics.items():
        sizes = (metric.output.value.shape, metric.input.value.shape)
        assert sizes == (((HIDDEN, HIDDEN), inner) if path == "down_proj" else (inner, (HIDDEN, HIDDEN)))
        assert metric.output.value.std() > 0, "gradients were seen"


def test_compression_with_text(world, tmp_path):
    options = {"anchor": world / "grafted", "data": [world / "own.jsonl"]}
    layers = compress(world / "math", tmp_path / "low", rank=RANK, **options)
    assert sum(layer.rank for layer in layers) == 2 * RANK
    manifest = ExpertPackage.open(tmp_path / "low").manifest
    assert manifest.rank == [layer.rank for layer in layers]
    compress(world / "math", tmp_path / "plain", anchor=world / "grafted", rank=manifest.rank)
    matrix = "layers.0.ffn.up_proj"
    assert not torch.allclose(product(tmp_path / "low", matrix), product(tmp_path / "plain", matrix), atol=1e-3)
    compress(world / "math", tmp_path / "all", rank=[HIDDEN, HIDDEN], **options)
    public = FlexMoeForCausalLM.from_pretrained(world / "grafted").flexmoe_blocks()[0].experts["public"]
    difference = weights(world / "math")[f"{matrix}.weight"] - public.up_proj.weight.detach()
    torch.testing.assert_close(product(tmp_path / "all", matrix), difference, rtol=0, atol=1e-3)


def test_the_command(world, tmp_path, capsys):
    line = ["compress", str(world / "math"), "--rank", "3", "--data", str(world / "own.jsonl")]
    assert main([*line, "--anchor", str(world / "grafted"), "--out", str(tmp_path / "low"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(layer["rank"] for layer in found["layers_kept"]) == 6
    assert main([*line, "--anchor", str(world / "anchor"), "--out", str(tmp_path / "other")]) == 1
    assert "is a dense model" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
