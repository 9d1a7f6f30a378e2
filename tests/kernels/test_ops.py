"""The operators: the reference's values, gradients, what torch.compile and fakes see, refusals, and who registers.

On a CPU. What the kernels compute is in `test_route.py` and its neighbours.
"""

import importlib
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flexmoe.modeling import ops_flexmoe as ops
from flexmoe.modeling import routing_flexmoe as reference
from flexmoe.modeling.routing_flexmoe import ExpertTensors, Routing
from flexmoe.testing import TOLERANCES
from tests.kernels.router_inputs import draw

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


def arguments(tokens=5, experts=3, k=2, hidden=8, mask="random", **kwargs):
    inputs = draw(tokens, experts, k, hidden, mask, **kwargs)
    return inputs.x, inputs.rows, inputs.biases, inputs.offset


def some_experts(n=3, hidden=8, gated=True, biased=False, dtype=F32, activation="silu"):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return (torch.randn(shape, generator=generator) / 3).to(dtype)

    widths = [8 * (1 + e % 2) for e in range(n)]
    return ExpertTensors(
        up=[drawn(width, hidden) for width in widths],
        down=[drawn(hidden, width) for width in widths],
        gate=[drawn(width, hidden) for width in widths] if gated else (),
        up_bias=[drawn(width) for width in widths] if biased else (),
        gate_bias=[drawn(width) for width in widths] if biased and gated else (),
        down_bias=[drawn(hidden) for _ in widths] if biased else (),
        activation=activation,
    )


def mix_arguments(x, routing, experts):
    lists = (experts.gate, experts.up, experts.down, experts.gate_bias, experts.up_bias, experts.down_bias)
    return (x, *routing[1:], *(list(tensors) for tensors in lists), experts.activation)


def require(*tensors):
    for tensor in tensors:
        tensor.requires_grad_()


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
    return (*arguments(tokens, experts, k, mask=mask, x_dtype=dtype), k, renormalize)


@each_route
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_route_on_a_cpu_is_the_reference(case, mode):
    args = of(case)
    before = [t.clone() for t in (args[0], *args[1])]
    with mode():
        ours = ops.route(*args)
    assert type(ours) is Routing
    for a, b in zip(ours, reference.route(*args), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
        assert a.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(before, (args[0], *args[1]), strict=True))


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize(("gated", "biased"), [(True, False), (True, True), (False, True)])
def test_mix_on_a_cpu_is_the_reference(tokens, gated, biased):
    x, *rest = arguments(tokens)
    routing, experts = ops.route(x, *rest, 2, True), some_experts(gated=gated, biased=biased)
    ours = ops.mix(x, routing, experts)
    assert torch.equal(ours, reference.mix(x, routing.weights_TE, experts))
    assert ours.is_contiguous()


def test_results_share_no_memory_with_what_came_in():
    x, rows, biases, offset = arguments(experts=1, mask="evidence")
    routing = ops.route(x, rows, biases, offset, 1, False)
    mixed = ops.mix(x, routing, some_experts(1))
    places = [t.untyped_storage().data_ptr() for t in (x, *rows, *biases, offset, *routing, mixed)]
    assert len(set(places)) == len(places)


WHICH = [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]


@each_route
@pytest.mark.parametrize("which", WHICH)
def test_gradients_are_the_references(case, which):
    """Those of every input, from any of the results, some of which need none."""
    gradients = []
    for function in (ops.route, reference.route):
        x, rows, biases, offset, k, renormalize = of(case)
        leaves = [t for t in (x, *rows[1:], *biases[:1], offset) if t is not None]
        require(*leaves)
        results = function(x, rows, biases, offset, k, renormalize)
        assert not results.top_ids_TK.requires_grad
        generator = torch.Generator().manual_seed(1)
        loss = 0.0
        for result, wanted in zip(results, which, strict=False):
            toward = torch.randn(result.shape, generator=generator)
            loss = loss + (result.masked_fill(result.isinf(), 0.0) * toward).sum() * wanted
        loss.backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **TOLERANCES[ours.dtype])


@pytest.mark.parametrize("renormalize", [True, False])
def test_gradcheck(renormalize):
    # All is computed in float32, whatever comes in: steps are a hundredth, where its rounding is 1e-5 of a difference
    # and the third derivative of a softmax 1e-4. Logits are 1 apart, so that no step changes the choice.
    x = torch.eye(3, 8, dtype=F64) * 2
    rows = [torch.full((1, 8), float(e), dtype=F64) / 2 for e in range(4)]
    biases = [torch.zeros(1, dtype=F64) for _ in rows]
    offset = torch.zeros(3, 4, dtype=F64)
    require(x, *rows, *biases, offset)

    def results(x, offset, *parameters):
        return ops.route(x, parameters[:4], parameters[4:], offset.float(), 2, renormalize)[:3]

    assert torch.autograd.gradcheck(results, (x, offset, *rows, *biases), eps=1e-2, atol=1e-3, rtol=1e-3)


@each_route
def test_opcheck_of_route(case):
    args = of(case)
    require(args[0], *args[1], *args[2])
    torch.library.opcheck(ops.ROUTE, args, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [0, 4])
@pytest.mark.parametrize("gated", [True, False])
def test_opcheck_of_mix(tokens, gated):
    x, *rest = arguments(tokens)
    routing = ops.route(x, *rest, 2, True)
    torch.library.opcheck(ops.MIX, mix_arguments(x, routing, some_experts(gated=gated, biased=not gated)))


def test_a_compiled_function_takes_any_number_of_tokens():
    def both(x, rows, biases, offset, experts):
        routing = ops.route(x, rows, biases, offset, 2, True)
        with torch.no_grad():
            return ops.mix(x, routing, experts), routing

    torch.compiler.reset()
    compiled, experts = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager"), some_experts()
    compiled(*arguments(11), experts)  # another number than the experts': equal sizes are taken for one
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (9, 65, 7):
            args = arguments(tokens)
            mixed, routing = compiled(*args, experts)
            expected, expected_routing = both(*args, experts)
            assert torch.equal(mixed, expected)
            assert all(map(torch.equal, routing, expected_routing))
    assert compiled(*arguments(0), experts)[0].shape == (0, 8)


def test_a_compiled_router_trains():
    def loss(x, rows, biases, offset):
        routing = ops.route(x, rows, biases, offset, 2, True)
        return routing.weights_TE.square().sum() + routing.top_weights_TK[:, 0].sum()

    torch.compiler.reset()
    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")):
        x, rows, biases, offset = arguments(6)
        require(x, *rows, *biases)
        function(x, rows, biases, offset).backward()
        gradients.append([x.grad, *(row.grad for row in rows), *(bias.grad for bias in biases)])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCES[F32])


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("device", ["meta", "cpu", "cuda"])
def test_fakes_have_the_shapes_of_the_results(tokens, device):
    args = arguments(tokens, experts=3)
    routing, experts = ops.route(*args, 4, True), some_experts()
    real = (*routing, ops.mix(args[0], routing, experts))
    if device == "meta":
        fakes = of_device(args, routing, experts, device)
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            fakes = of_device(args, routing, experts, device)
    for fake, result in zip(fakes, real, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (result.shape, result.dtype, result.stride())
        assert fake.device.type == device


def of_device(args, routing, experts, device):
    def there(value):
        if isinstance(value, torch.Tensor):
            return torch.empty(value.shape, dtype=value.dtype, device=device)
        return [there(v) for v in value] if isinstance(value, list) else value

    return (
        *ops.ROUTE(*map(there, args), 4, True),
        ops.MIX(*map(there, mix_arguments(args[0], routing, experts))),
    )


def test_autocast_changes_nothing():
    x, rows, biases, offset = arguments(5)
    plain = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_(), *(row.clone().requires_grad_() for row in rows)]
        with torch.autocast("cpu", BF16, enabled=enabled):
            routing = ops.route(leaves[0], leaves[1:], biases, offset, 2, True)
            with torch.no_grad():
                mixed = ops.mix(x, routing, some_experts())
            routing.weights_TE[:, 0].sum().backward()
        plain.append([*routing, mixed, *(leaf.grad for leaf in leaves)])
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*plain, strict=True))


@pytest.mark.parametrize("which", ["x", "weights", "up"])
def test_mix_refuses_where_a_gradient_would_be_lost(which):
    x, *rest = arguments()
    routing, experts = ops.route(x, *rest, 2, True), some_experts()
    require({"x": x, "weights": routing.weights_TE, "up": experts.up[1]}[which])
    with pytest.raises(RuntimeError, match="implementation 'torch'"):
        ops.mix(x, routing, experts)
    with torch.no_grad():
        assert ops.mix(x, routing, experts).isfinite().all()


def test_a_second_derivative_is_refused():
    x, *rest = arguments()
    require(x)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(ops.route(x, *rest, 2, True).weights_TE[0, 0], x, create_graph=True)


BAD_ROUTES = {
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


@pytest.mark.parametrize("words", BAD_ROUTES)
def test_route_says_what_does_not_fit(words):
    with pytest.raises((ValueError, TypeError), match=words):
        ops.route(*BAD_ROUTES[words](*arguments()), 2, True)


def test_route_says_that_k_is_too_small():
    with pytest.raises(ValueError, match="k is 0"):
        ops.route(*arguments(), 0, True)


BAD_MIXES = {
    "'tanh' is not one of": {"activation": "tanh"},
    "no experts": {"up": []},
    "2 of `down` for 3": {"down": [torch.zeros(8, 8)] * 2},
    "0 of `down` for 3": {"down": []},
    r"gate\[1\] is \[8, 8\], must be \[16, 8\]": {"gate": [torch.zeros(8, 8)] * 3},
    r"up_bias\[0\] is torch.bfloat16": {"up_bias": [torch.zeros(8, dtype=BF16)] * 3},
}


@pytest.mark.parametrize("words", BAD_MIXES)
def test_mix_says_what_does_not_fit(words):
    x, *rest = arguments()
    routing = ops.route(x, *rest, 2, True)
    experts = ExpertTensors(**{**vars(some_experts()), **BAD_MIXES[words]})
    if not experts.up:
        routing = Routing(*(t[:, :0] for t in routing))
    with pytest.raises((ValueError, TypeError), match=words):
        ops.mix(x, routing, experts)


def test_mix_says_that_the_routing_is_of_others():
    x, *rest = arguments()
    routing = ops.route(x, *rest, 2, True)
    with pytest.raises(ValueError, match=r"routing.weights_TE is \[5, 3\], must be \[5, 2\]"):
        ops.mix(x, routing, some_experts(2))


@pytest.mark.parametrize(
    ("words", "experts", "sizes", "dtype"),
    [("65 experts", 65, 8, F32), ("multiples of 8", 3, 12, F32), ("not torch.float64", 3, 8, F64)],
)
def test_what_the_kernels_cannot_take(words, experts, sizes, dtype):
    ops._check_for_kernels(64, {"hidden": 8}, F32, BF16)
    with pytest.raises((ValueError, TypeError), match=words):
        ops._check_for_kernels(experts, {"hidden": sizes}, dtype)


@pytest.mark.parametrize(("tokens", "kernel"), [(0, "decode"), (64, "decode"), (65, "prefill")])
def test_the_number_of_tokens_chooses_the_kernel(tokens, kernel, monkeypatch):
    calls = []
    fakes = {
        "decode": types.SimpleNamespace(MOST_TOKENS=64, decode=lambda *args: calls.append(("decode", args))),
        "prefill": types.SimpleNamespace(prefill=lambda *args: calls.append(("prefill", args))),
    }
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, f"flexmoe.modeling.kernels_{name}_flexmoe", fake)
    x, *rest = arguments(tokens)
    routing, experts = ops.route(x, *rest, 2, True), some_experts(biased=True)
    ops._mix_cuda(*mix_arguments(x, routing, experts))
    [(called, (given, *between, of_experts))] = calls
    assert called == kernel
    assert given is x
    assert [id(t) for t in between] == [id(t) for t in (routing[1:2] if kernel == "decode" else routing[2:])]
    assert of_experts == experts
    scattered = (torch.stack([t, t], -1)[..., 0] for t in routing[1:])
    ops._mix_cuda(x, *scattered, *mix_arguments(x, routing, experts)[4:])
    assert all(t.is_contiguous() for t in calls[1][1][1:-1])


@pytest.fixture
def kernels_on_cpu():
    """The CUDA implementations where the reference stands; the kernels then run in Triton's interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, and take no memory of the CPU")
    library = torch.library.Library(ops.NAMESPACE, "IMPL")
    for name, function in (("route", ops._route_cuda), ("route_backward", ops._route_backward_cuda)):
        library.impl(name, function, "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@each_route
def test_the_kernel_behind_the_operator(case, kernels_on_cpu):
    x, rows, biases, offset, k, renormalize = of(case)
    leaves = [t for t in (x, *rows, *biases, offset) if t is not None]
    require(*leaves)
    ours, theirs = (f(x, rows, biases, offset, k, renormalize) for f in (ops.route, reference.route))
    gradients = []
    for routing in (ours, theirs):
        loss = routing.weights_TE.square().sum() + routing.top_weights_TK.sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    for a, b in zip((*ours, *gradients[0]), (*theirs, *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCES[b.dtype if b.is_floating_point() else F32])
    assert ours.logits_TE.grad_fn.name() != theirs.logits_TE.grad_fn.name()


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """Makes a package of copies of the operators' files, as remote code is one, and imports its operators."""
    monkeypatch.syspath_prepend(tmp_path)
    source = Path(ops.__file__).parent

    def make(name, addition=""):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        for path in (source / "ops_flexmoe.py", source / "routing_flexmoe.py", *source.glob("kernels*_flexmoe.py")):
            shutil.copy(path, tmp_path / name)
        with open(tmp_path / name / "routing_flexmoe.py", "a") as file:
            file.write(addition)
        return importlib.import_module(f"{name}.ops_flexmoe")

    return make


@pytest.mark.filterwarnings("error")
def test_the_same_sources_share_their_operators(copies):
    copy = copies("same_flexmoe_sources")
    assert copy.NAMESPACE == ops.NAMESPACE
    assert copy.ROUTE is ops.ROUTE
    args = arguments()
    for module in (ops, copy):
        routing = module.route(*args, 2, True)
        assert torch.equal(routing.weights_TE, reference.route(*args, 2, True).weights_TE)


def test_redirect_reaches_the_tables_that_the_operators_read(copies):
    kernels = pytest.importorskip("flexmoe.modeling.kernels_flexmoe")
    table = kernels.TABLES.of(((16, 32, 64),), torch.device("cpu"))
    ops.redirect({32: 48})
    copies("moving_flexmoe_sources").redirect({64: 0})
    assert table.tolist() == [[16, 48, 0]]


def test_other_sources_have_operators_of_their_own(copies):
    doubled = (
        "\n_route = route\ndef route(*args):\n    r = _route(*args)\n    return r._replace(weights_TE=r[1] * 2)\n"
    )
    copy = copies("other_flexmoe_sources", doubled)
    assert copy.NAMESPACE != ops.NAMESPACE
    args = arguments()
    ours, theirs = ops.route(*args, 2, True), copy.route(*args, 2, True)
    assert torch.equal(ours.weights_TE * 2, theirs.weights_TE)
    assert ours.weights_TE.any()


WITHOUT_TRITON = """
import json, sys, torch
sys.modules["triton"] = None  # importing it fails
from flexmoe.modeling import ops_flexmoe as ops
from flexmoe.modeling.routing_flexmoe import ExpertTensors
x = torch.ones(2, 8, requires_grad=True)
routing = ops.route(x, [torch.ones(1, 8)], [torch.ones(1)], None, 1, True)
routing.logits_TE.sum().backward()
with torch.no_grad():
    mixed = ops.mix(x, routing, ExpertTensors([torch.ones(8, 8)], [torch.ones(8, 8)]))
ops.redirect({1: 2})
kernels = [name for name in sys.modules if "flexmoe.modeling.kernels" in name]
print(json.dumps([mixed.isfinite().all().item(), x.grad[0].tolist(), kernels]))
"""


def test_a_cpu_needs_no_triton():
    command = [sys.executable, "-c", WITHOUT_TRITON]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(ran.stdout) == [True, [1.0] * 8, []]


def test_the_namespace_is_a_hash():
    assert ops.NAMESPACE.startswith("flexmoe_")
    assert len(bytes.fromhex(ops.NAMESPACE.removeprefix("flexmoe_"))) == 4
