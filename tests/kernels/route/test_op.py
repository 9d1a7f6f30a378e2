"""The operator of the router: the reference's values and gradients, torch.compile, fakes, autocast, and refusals.

On a CPU. What the kernel computes is in `test_kernel.py`.
"""

import pytest
import torch

from flexmoe.kernels.operators import NAMESPACE
from flexmoe.kernels.route import op, reference
from flexmoe.kernels.route.op import route
from flexmoe.kernels.route.reference import Routing
from flexmoe.testing import TOLERANCES
from tests.kernels.route.inputs import arguments, draw, require_grad

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64

ROUTES = [
    # tokens, experts, k, mask, dtype of x, renormalize
    (5, 3, 2, "random", F32, True),
    (5, 3, 2, "evidence", BF16, False),
    (1, 1, 4, "no offset", F32, False),
    (0, 3, 2, "no offset", F32, True),
    (4, 7, 5, "fewer than k", F32, False),
]
each_route = pytest.mark.parametrize("case", ROUTES, ids=lambda case: "-".join(map(str, case)))


def of(case):
    tokens, experts, k, mask, dtype, renormalize = case
    inputs = draw(tokens, experts, k, 8, mask, x_dtype=dtype)
    return inputs.x, inputs.rows, inputs.biases, inputs.offset, k, renormalize


@each_route
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_reference_runs_on_a_cpu(case, mode):
    args = of(case)
    before = [t.clone() for t in (args[0], *args[1])]
    with mode():
        ours = route(*args)
    assert type(ours) is Routing
    for a, b in zip(ours, reference.route(*args), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
        assert a.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(before, (args[0], *args[1]), strict=True))


def test_results_share_no_memory_with_arguments():
    x, rows, biases, offset = arguments(experts=1, mask="evidence")
    routing = route(x, rows, biases, offset, 1, False)
    addresses = [t.untyped_storage().data_ptr() for t in (x, *rows, *biases, offset, *routing)]
    assert len(set(addresses)) == len(addresses)


WHICH = [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]


@each_route
@pytest.mark.parametrize("which", WHICH)
def test_gradients_equal_those_of_autograd_through_the_reference(case, which):
    """For every input, from any of the results; some inputs need no gradient."""
    gradients = []
    for function in (route, reference.route):
        x, rows, biases, offset, k, renormalize = of(case)
        leaves = [t for t in (x, *rows[1:], *biases[:1], offset) if t is not None]
        require_grad(*leaves)
        results = function(x, rows, biases, offset, k, renormalize)
        assert not results.top_ids_TK.requires_grad
        generator = torch.Generator().manual_seed(1)
        loss = 0.0
        for result, wanted in zip(results, which, strict=False):
            d_result = torch.randn(result.shape, generator=generator)
            loss = loss + (result.masked_fill(result.isinf(), 0.0) * d_result).sum() * wanted
        loss.backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **TOLERANCES[ours.dtype])


@pytest.mark.parametrize("renormalize", [True, False])
def test_gradcheck(renormalize):
    # Everything is computed in float32, so steps are a hundredth: its rounding is then 1e-5 of a difference, and the
    # third derivative of a softmax 1e-4. Logits are 1 apart, so that no step changes the top k.
    x = torch.eye(3, 8, dtype=F64) * 2
    rows = [torch.full((1, 8), float(e), dtype=F64) / 2 for e in range(4)]
    biases = [torch.zeros(1, dtype=F64) for _ in rows]
    offset = torch.zeros(3, 4, dtype=F64)
    require_grad(x, *rows, *biases, offset)

    def results(x, offset, *parameters):
        return route(x, parameters[:4], parameters[4:], offset.float(), 2, renormalize)[:3]

    assert torch.autograd.gradcheck(results, (x, offset, *rows, *biases), eps=1e-2, atol=1e-3, rtol=1e-3)


@each_route
def test_opcheck(case):
    args = of(case)
    require_grad(args[0], *args[1], *args[2])
    torch.library.opcheck(op.ROUTE, args, rtol=1e-5, atol=1e-5)


def test_a_compiled_router_trains():
    def loss(x, rows, biases, offset):
        routing = route(x, rows, biases, offset, 2, True)
        return routing.weights_TE.square().sum() + routing.top_weights_TK[:, 0].sum()

    torch.compiler.reset()
    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")):
        x, rows, biases, offset = arguments(6)
        require_grad(x, *rows, *biases)
        function(x, rows, biases, offset).backward()
        gradients.append([x.grad, *(row.grad for row in rows), *(bias.grad for bias in biases)])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCES[F32])


def test_autocast_does_not_change_gradients():
    x, rows, biases, offset = arguments(5)
    results = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_(), *(row.clone().requires_grad_() for row in rows)]
        with torch.autocast("cpu", BF16, enabled=enabled):
            routing = route(leaves[0], leaves[1:], biases, offset, 2, True)
            routing.weights_TE[:, 0].sum().backward()
        results.append([*routing, *(leaf.grad for leaf in leaves)])
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_second_derivative_is_refused():
    x, *rest = arguments()
    require_grad(x)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(route(x, *rest, 2, True).weights_TE[0, 0], x, create_graph=True)


BAD = {
    "flatten": lambda x, rows, biases, offset: (x[None], rows, biases, offset),
    "floating": lambda x, rows, biases, offset: (x.int(), rows, biases, offset),
    "3 rows and 2 biases": lambda x, rows, biases, offset: (x, rows, biases[:2], offset),
    "0 rows": lambda x, rows, biases, offset: (x, [], [], offset),
    r"rows\[1\] is \[1, 7\]": lambda x, rows, biases, offset: (x, [rows[0], rows[1][:, :7], rows[2]], biases, offset),
    r"rows\[2\] is torch.float16": lambda x, rows, biases, offset: (x, [*rows[:2], rows[2].half()], biases, offset),
    r"biases\[0\] is \[\]": lambda x, rows, biases, offset: (x, rows, [biases[0][0], *biases[1:]], offset),
    r"offset_TE is \[5, 2\]": lambda x, rows, biases, offset: (x, rows, biases, offset[:, :2]),
    "offset_TE is torch.float64": lambda x, rows, biases, offset: (x, rows, biases, offset.double()),
    "on meta": lambda x, rows, biases, offset: (x, rows, biases, offset.to("meta")),
    "only floating": lambda x, rows, biases, offset: (x, [r.int() for r in rows], [b.int() for b in biases], offset),
}


@pytest.mark.parametrize("words", BAD)
def test_errors_name_the_mismatch(words):
    with pytest.raises((ValueError, TypeError), match=words):
        route(*BAD[words](*arguments()), 2, True)


def test_k_must_be_positive():
    with pytest.raises(ValueError, match="k is 0"):
        route(*arguments(), 0, True)


@pytest.fixture
def kernels_on_cpu():
    """Replaces the CPU implementations by those for CUDA; the kernels then run in Triton's interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, and cannot read the CPU's memory")
    library = torch.library.Library(NAMESPACE, "IMPL")
    for name, function in (("route", op._route_cuda), ("route_backward", op._backward_cuda)):
        library.impl(name, function, "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@each_route
def test_the_kernel_behind_the_operator(case, kernels_on_cpu):
    x, rows, biases, offset, k, renormalize = of(case)
    leaves = [t for t in (x, *rows, *biases, offset) if t is not None]
    require_grad(*leaves)
    ours, theirs = (f(x, rows, biases, offset, k, renormalize) for f in (route, reference.route))
    gradients = []
    for routing in (ours, theirs):
        loss = routing.weights_TE.square().sum() + routing.top_weights_TK.sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    for a, b in zip((*ours, *gradients[0]), (*theirs, *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCES[b.dtype if b.is_floating_point() else F32])
    assert ours.logits_TE.grad_fn.name() != theirs.logits_TE.grad_fn.name()
