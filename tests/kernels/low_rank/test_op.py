"""The operator of low-rank experts: the reference's values, fakes, and refusals. The kernel is in `test_kernel.py`."""

import copy
import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flexmoe.kernels.experts.reference import ExpertTensors
from flexmoe.kernels.low_rank import op, reference
from flexmoe.kernels.low_rank.op import mix_low_rank
from flexmoe.testing import TOLERANCES
from tests.kernels.low_rank.layers import clean_layer


def test_all_arguments_reach_the_kernel(layer, monkeypatch):
    given = []
    monkeypatch.setattr(op, "MIX_LOW_RANK", lambda *args: given.append(args))
    mix_low_rank(layer.x_TH, layer.weights_TM, layer.experts)
    assert torch.equal(op._mix_low_rank_cuda(*given[0]), layer.clean_TH)


def test_the_reference_runs_on_a_cpu(layer):
    on_cpu = [tensor.cpu() for tensor in (layer.x_TH, layer.weights_TM)]
    experts = cpu_experts()
    y_TH = mix_low_rank(*on_cpu, experts)
    assert torch.equal(y_TH, reference.mix_low_rank(*on_cpu, experts))
    torch.testing.assert_close(y_TH, layer.clean_TH.cpu(), **TOLERANCES[torch.float32])
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = mix_low_rank(torch.empty(5, 24), torch.empty(5, 4), experts)
    assert (fake.shape, fake.dtype, fake.stride()) == (y_TH.shape, y_TH.dtype, y_TH.stride())


def cpu_experts():
    def to_cpu(of):
        return ExpertTensors(
            **{key: v if key == "activation" else [t.cpu() for t in v] for key, v in vars(of).items()}
        )

    experts = clean_layer().experts
    parts = {name: to_cpu(getattr(experts, name)) for name in ("public", "a", "b")}
    return dataclasses.replace(copy.deepcopy(experts), **parts)


@pytest.mark.parametrize("which", ["x", "weights", "a", "b", "public"])
def test_a_gradient_is_refused(which):
    experts = copy.deepcopy(cpu_experts())
    x_TH, weights_TM = torch.ones(2, 24), torch.ones(2, 4)
    tensors = {"x": x_TH, "weights": weights_TM, "a": experts.a.up[1], "b": experts.b.down_bias[0]}
    {**tensors, "public": experts.public.gate[0]}[which].requires_grad_()
    with pytest.raises(RuntimeError, match=r"mix_low_rank\(\) has no gradient.*experts_implementation='eager'"):
        mix_low_rank(x_TH, weights_TM, experts)
    with torch.no_grad():
        assert mix_low_rank(x_TH, weights_TM, experts).isfinite().all()


BAD = {
    "65 tokens": lambda x, w, experts: (x.new_zeros(65, 24), w.new_zeros(65, 4), experts),
    r"weights_TM is \[2, 3\], must be \[2, 4\]": lambda x, w, experts: (x, w[:, :3], experts),
    "weights_TM is torch.float64": lambda x, w, experts: (x, w.double(), experts),
    "public_column is 4": lambda x, w, experts: (x, w, changed(experts, public_column=4)),
    "1 public networks and 0 low-rank": lambda x, w, experts: (x, w, changed(experts, scales=[], public_column=None)),
    "3 of `a.gate`, must be 2": lambda x, w, experts: (x, w, changed(experts, scales=[1.0, 2.0])),
    "0 of `b.up_bias`, must be 3": lambda x, w, experts: (x, w, changed(experts, "b", up_bias=[])),
    r"b.down\[0\] is \[40, 16\], must be \[24, 16\]": lambda x, w, e: (x, w, changed(e, "b", down=e.b.up)),
    r"a.up\[0\] is torch.bfloat16": lambda x, w, e: (x, w, changed(e, "a", up=[t.bfloat16() for t in e.a.up])),
    r"Ranks are \[0, 0, 0\]": lambda x, w, e: (x, w, changed(e, "a", up=[t[:0] for t in e.a.up])),
}


def changed(experts, part=None, **fields):
    if part is not None:
        fields = {part: dataclasses.replace(getattr(experts, part), **fields)}
    return dataclasses.replace(experts, **fields)


@pytest.mark.parametrize("words", BAD)
def test_errors_name_the_mismatch(words):
    with pytest.raises((ValueError, TypeError), match=words):
        mix_low_rank(*BAD[words](torch.ones(2, 24), torch.ones(2, 4), cpu_experts()))
