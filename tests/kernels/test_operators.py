"""What the operators share: their namespace, the limits of the kernels, and that a CPU needs no Triton."""

import json
import subprocess
import sys

import pytest
import torch

from flexmoe.kernels.experts.op import MIX
from flexmoe.kernels.low_rank.op import MIX_LOW_RANK
from flexmoe.kernels.operators import check_kernel_limits
from flexmoe.kernels.route.op import ROUTE

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


def test_operators_are_in_the_namespace_flexmoe():
    assert torch.ops.flexmoe.route.default is ROUTE
    assert torch.ops.flexmoe.mix.default is MIX
    assert torch.ops.flexmoe.mix_low_rank.default is MIX_LOW_RANK


@pytest.mark.parametrize(
    ("words", "experts", "sizes", "dtype"),
    [("65 experts", 65, 8, F32), ("multiples of 8", 3, 12, F32), ("not torch.float64", 3, 8, F64)],
)
def test_limits_of_the_kernels(words, experts, sizes, dtype):
    check_kernel_limits(64, {"hidden": 8}, F32, BF16)
    with pytest.raises((ValueError, TypeError), match=words):
        check_kernel_limits(experts, {"hidden": sizes}, dtype)


WITHOUT_TRITON = """
import json, sys, torch
sys.modules["triton"] = None  # importing it fails
from flexmoe.kernels.experts.op import mix
from flexmoe.kernels.experts.reference import ExpertTensors
from flexmoe.kernels.pointers import update_pointers
from flexmoe.kernels.route.op import route
x = torch.ones(2, 8, requires_grad=True)
routing = route(x, [torch.ones(1, 8)], [torch.ones(1)], None, 1, True)
routing.logits_TE.sum().backward()
with torch.no_grad():
    mixed = mix(x, routing, ExpertTensors([torch.ones(8, 8)], [torch.ones(8, 8)]))
update_pointers({1: 2})
kernels = [name for name in sys.modules if name.startswith("flexmoe.kernels.") and "kernel" in name.split(".")[-1]]
print(json.dumps([mixed.isfinite().all().item(), x.grad[0].tolist(), kernels]))
"""


def test_a_cpu_needs_no_triton():
    command = [sys.executable, "-c", WITHOUT_TRITON]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(ran.stdout) == [True, [1.0] * 8, []]
