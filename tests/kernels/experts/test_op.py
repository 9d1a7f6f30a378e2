"""The operator of full experts: the reference's values, torch.compile, fakes, autocast, refusals, choice of kernel.

On a CPU. What the kernels compute is in `test_decode_kernel.py` and `test_prefill_kernel.py`.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flexmoe.kernels.experts import op, reference
from flexmoe.kernels.experts.op import mix
from flexmoe.kernels.experts.reference import ExpertTensors
from flexmoe.kernels.route.op import ROUTE, route
from flexmoe.kernels.route.reference import Routing
from tests.kernels.route.inputs import arguments, require_grad

F32, BF16 = torch.float32, torch.bfloat16


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
    return (x, *routing[1:], *op.as_arguments(experts))


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize(("gated", "biased"), [(True, False), (True, True), (False, True)])
def test_the_reference_runs_on_a_cpu(tokens, gated, biased):
    x, *rest = arguments(tokens)
    routing, experts = route(x, *rest, 2, True), some_experts(gated=gated, biased=biased)
    ours = mix(x, routing, experts)
    assert torch.equal(ours, reference.mix(x, routing.weights_TE, experts))
    assert ours.is_contiguous()


def test_the_result_shares_no_memory_with_arguments():
    x, *rest = arguments(experts=1, mask="evidence")
    routing = route(x, *rest, 1, False)
    mixed = mix(x, routing, some_experts(1))
    addresses = [t.untyped_storage().data_ptr() for t in (x, *routing, mixed)]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("tokens", [0, 4])
@pytest.mark.parametrize("gated", [True, False])
def test_opcheck(tokens, gated):
    x, *rest = arguments(tokens)
    routing = route(x, *rest, 2, True)
    torch.library.opcheck(op.MIX, mix_arguments(x, routing, some_experts(gated=gated, biased=not gated)))


def test_a_compiled_function_takes_any_number_of_tokens():
    def both(x, rows, biases, offset, experts):
        routing = route(x, rows, biases, offset, 2, True)
        with torch.no_grad():
            return mix(x, routing, experts), routing

    torch.compiler.reset()
    compiled, experts = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager"), some_experts()
    compiled(*arguments(11), experts)  # not the number of experts: equal sizes would be specialised to one symbol
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (9, 65, 7):
            args = arguments(tokens)
            mixed, routing = compiled(*args, experts)
            expected, expected_routing = both(*args, experts)
            assert torch.equal(mixed, expected)
            assert all(map(torch.equal, routing, expected_routing))
    assert compiled(*arguments(0), experts)[0].shape == (0, 8)


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("device", ["meta", "cpu", "cuda"])
def test_fakes_have_the_shapes_of_the_results(tokens, device):
    args = arguments(tokens)
    routing, experts = route(*args, 4, True), some_experts()
    real = (*routing, mix(args[0], routing, experts))
    if device == "meta":
        fakes = results_on(device, args, routing, experts)
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            fakes = results_on(device, args, routing, experts)
    for fake, result in zip(fakes, real, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (result.shape, result.dtype, result.stride())
        assert fake.device.type == device


def results_on(device, args, routing, experts):
    def there(value):
        if isinstance(value, torch.Tensor):
            return torch.empty(value.shape, dtype=value.dtype, device=device)
        return [there(v) for v in value] if isinstance(value, list) else value

    return *ROUTE(*map(there, args), 4, True), op.MIX(*map(there, mix_arguments(args[0], routing, experts)))


def test_autocast_changes_nothing():
    x, *rest = arguments(5)
    routing, experts = route(x, *rest, 2, True), some_experts()
    with torch.no_grad(), torch.autocast("cpu", BF16):
        under_autocast = mix(x, routing, experts)
    assert under_autocast.dtype == F32
    assert torch.equal(under_autocast, mix(x, routing, experts))


@pytest.mark.parametrize("which", ["x", "weights", "up"])
def test_a_gradient_is_refused(which):
    x, *rest = arguments()
    routing, experts = route(x, *rest, 2, True), some_experts()
    require_grad({"x": x, "weights": routing.weights_TE, "up": experts.up[1]}[which])
    with pytest.raises(RuntimeError, match="experts_implementation='eager'"):
        mix(x, routing, experts)
    with torch.no_grad():
        assert mix(x, routing, experts).isfinite().all()


BAD = {
    "'tanh' is not one of": {"activation": "tanh"},
    "no experts": {"up": []},
    "2 of `down` for 3": {"down": [torch.zeros(8, 8)] * 2},
    "0 of `down` for 3": {"down": []},
    r"gate\[1\] is \[8, 8\], must be \[16, 8\]": {"gate": [torch.zeros(8, 8)] * 3},
    r"up_bias\[0\] is torch.bfloat16": {"up_bias": [torch.zeros(8, dtype=BF16)] * 3},
}


@pytest.mark.parametrize("words", BAD)
def test_errors_name_the_mismatch(words):
    x, *rest = arguments()
    routing = route(x, *rest, 2, True)
    experts = ExpertTensors(**{**vars(some_experts()), **BAD[words]})
    if not experts.up:
        routing = Routing(*(t[:, :0] for t in routing))
    with pytest.raises((ValueError, TypeError), match=words):
        mix(x, routing, experts)


def test_a_routing_of_other_experts_is_refused():
    x, *rest = arguments()
    routing = route(x, *rest, 2, True)
    with pytest.raises(ValueError, match=r"routing.weights_TE is \[5, 3\], must be \[5, 2\]"):
        mix(x, routing, some_experts(2))


@pytest.mark.parametrize(("tokens", "kernel"), [(0, "decode"), (64, "decode"), (65, "prefill")])
def test_the_number_of_tokens_chooses_the_kernel(tokens, kernel, monkeypatch):
    decode_kernel = pytest.importorskip("flexmoe.kernels.experts.decode_kernel")
    prefill_kernel = pytest.importorskip("flexmoe.kernels.experts.prefill_kernel")
    calls = []
    monkeypatch.setattr(decode_kernel, "decode", lambda *args: calls.append(("decode", args)))
    monkeypatch.setattr(prefill_kernel, "prefill", lambda *args: calls.append(("prefill", args)))
    x, *rest = arguments(tokens)
    routing, experts = route(x, *rest, 2, True), some_experts(biased=True)
    op._mix_cuda(*mix_arguments(x, routing, experts))
    [(called, (given, *between, of_experts))] = calls
    assert called == kernel
    assert given is x
    assert [id(t) for t in between] == [id(t) for t in (routing[1:2] if kernel == "decode" else routing[2:])]
    assert op.as_arguments(of_experts) == op.as_arguments(experts)
    strided = (torch.stack([t, t], -1)[..., 0] for t in routing[1:])
    op._mix_cuda(x, *strided, *mix_arguments(x, routing, experts)[4:])
    assert all(t.is_contiguous() for t in calls[1][1][1:-1])
