"""The routers of other work that `make routers` compares with, against their sources."""

import sys
from pathlib import Path

import pytest
import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import ArrowConfig
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
try:
    from router_baselines import BASELINES, LayerInputs, changes, chosen_losses, ridge_gate, top_k_logits
finally:
    sys.path.pop(0)

T, H, OUT, RANK = 12, 16, 10, 4
OWNERS = ("math", "code", "law", "music")


def factors(seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Adapters B [OUT, R], A [R, H] whose first singular value is well above the others."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([4.0, 1.0, 0.5, 0.25])
    found = {}
    for owner in OWNERS:
        left, right = (torch.linalg.qr(torch.randn(n, RANK, generator=generator)).Q for n in (OUT, H))
        found[owner] = (left * sizes, right.T.contiguous())
    return found


def inputs() -> LayerInputs:
    generator = torch.Generator().manual_seed(1)
    states = {name: torch.randn(T, H, generator=generator) + i for i, name in enumerate(("public", *OWNERS))}
    return LayerInputs(states, {owner: B @ A for owner, (B, A) in factors().items()})


def test_arrow_is_what_peft_computes():
    config = ArrowConfig(top_k=3, rng_seed=0)
    config.task_adapter_names, config.gks_adapter_names = list(OWNERS), []
    layer = ArrowLoraLinearLayer(H, config)
    lora_A, lora_B = nn.ModuleDict(), nn.ModuleDict()
    for owner, (B, A) in factors().items():
        lora_A[owner], lora_B[owner] = nn.Linear(H, RANK, bias=False), nn.Linear(RANK, OUT, bias=False)
        lora_A[owner].weight.data, lora_B[owner].weight.data = A, B
    layer.build_prototypes(lora_A, lora_B)
    x_TH = torch.randn(T, H, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs = layer(x_TH[None], lora_A, lora_B, nn.Identity(), dict.fromkeys(OWNERS, 1.0))[0]
    arrow = BASELINES["Arrow"]
    weights_TE = top_k_logits(arrow.fit(inputs())(x_TH), arrow.top_k).softmax(-1)
    outputs_TEO = torch.stack([x_TH @ matrix_OH.T for matrix_OH in inputs().differences.values()], 1)
    assert torch.allclose((weights_TE[..., None] * outputs_TEO).sum(1), theirs, atol=1e-5)


def test_dume_is_ridge_regression_with_columns_of_length_one():
    states = list(inputs().states.values())
    weight_HM, bias_M = ridge_gate(states, penalty=0.01)
    x = torch.nn.functional.pad(torch.cat(states).double(), (0, 1), value=1.0)
    labels = torch.eye(len(states), dtype=torch.float64).repeat_interleave(T, 0)
    # ridge regression is least squares with rows of the penalty's root below
    rows = torch.cat([x, 0.1 * torch.eye(H + 1, dtype=torch.float64)])
    solution = torch.linalg.lstsq(rows, torch.nn.functional.pad(labels, (0, 0, 0, H + 1))).solution
    length_M = solution[:-1].norm(dim=0)
    assert torch.allclose(weight_HM.double(), solution[:-1] / length_M, atol=1e-5)
    assert torch.allclose(bias_M.double(), solution[-1] / length_M, atol=1e-5)


def test_spectr_takes_the_length_of_the_adapters_output():
    x_TH = torch.randn(T, H, generator=torch.Generator().manual_seed(2))
    spectr = BASELINES["SpectR"].fit(inputs())(x_TH)
    for e, (B, A) in enumerate(factors().values()):
        right = torch.linalg.svd(B @ A, full_matrices=False)
        scaled_rows = right.S[:, None] * right.Vh  # the source's A, after its change of basis
        assert torch.allclose(spectr[:, e], (x_TH @ scaled_rows.T).norm(dim=1), atol=1e-4)


def test_seqr_is_standardised_on_each_owners_own_text():
    found = BASELINES["SEQR"].fit(inputs())
    for e, owner in enumerate(OWNERS):
        own_T = found(inputs().states[owner])[:, e]
        assert own_T.mean().item() == pytest.approx(0, abs=1e-5)
        assert own_T.std().item() == pytest.approx(1, rel=1e-5)


def test_a_baseline_takes_as_many_experts_as_it_says():
    x_TH = torch.randn(T, H, generator=torch.Generator().manual_seed(2))
    for each in BASELINES.values():
        logits = top_k_logits(each.fit(inputs())(x_TH), each.top_k)
        assert logits.shape == (T, len(OWNERS) + each.with_public)
        assert (logits.isfinite().sum(1) == each.top_k).all()


def test_changes_are_lengths():
    x_TH, identity = torch.tensor([[3.0, 4.0]]), torch.eye(2)
    assert changes(x_TH, [identity, 2 * identity]).tolist() == [[5.0, 10.0]]


def test_a_choice_counts_from_the_token_after_those_that_were_read():
    losses_MNL = torch.stack([torch.zeros(2, 5), torch.ones(2, 5)])
    found = chosen_losses(losses_MNL, torch.tensor([1, 0]), read=3)
    assert found.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]
