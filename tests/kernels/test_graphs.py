"""CUDA graphs of the kernels: masks are data, experts that are replaced or removed, the graphs of torch.compile.

Nothing here runs without a GPU. What `CapturedForward` refuses is in `tests/flexmoe/test_graphs.py`.
"""

import copy

import pytest
import torch
from transformers import StaticCache

pytest.importorskip("triton")

from flexmoe.kernels.expert_pointers import ExpertPointers
from flexmoe.kernels.experts.op import mix
from flexmoe.kernels.graphs import CapturedForward
from flexmoe.kernels.pointers import update_pointers
from flexmoe.kernels.route.op import route
from flexmoe.modeling.masking_flexmoe import ForwardContext, forward_scope
from flexmoe.testing import TOLERANCES, perturb_expert, random_tokens, tiny_flexmoe
from tests.kernels.experts.inputs import DEVICE, Experts, draw_tokens, mix_in_float64, seeded
from tests.kernels.route.inputs import draw

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph is captured on a GPU"),
    pytest.mark.skipif(DEVICE == "cpu", reason="the kernels run in Triton's interpreter"),
]

BF16 = torch.bfloat16
OWNERS = ("math", "code", "legal")
FEW, MANY = 5, 130
NAMES = ("public", *OWNERS)
each_size = pytest.mark.parametrize("tokens", [FEW, MANY])


def captured(run):
    """`run` as a graph: a function that replays it, and its output, which each replay overwrites."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = run()
    return graph.replay, output


def distance(ours, theirs):
    """The relative error of all elements together: intermediate rounding makes that of elements near 0 large."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def model():
    """Four experts in bfloat16 on kernels; rows in float32, as `from_pretrained` leaves them."""
    model = tiny_flexmoe("olmo2", OWNERS, num_experts_per_tok=2).to(DEVICE, BF16)
    for block in model.flexmoe_blocks():
        block.router.float()
    model.set_experts_implementation("flexmoe_triton")
    assert all(path.plan is not None for path in model.implementation_paths())
    return model


def block_pass(block, x, mask, implementation="flexmoe_triton", names=NAMES):
    """A block as a forward pass calls it; `mask`: bool [batch, experts], which is data."""
    with forward_scope(ForwardContext(names=names, row_mask=mask, implementation=implementation)):
        return block(x)


@each_size
def test_offsets_are_data(tokens):
    inputs = draw(tokens, 7, 5, 136, "random", BF16)
    x, offset = inputs.x.to(DEVICE), inputs.offset.to(DEVICE)
    rows, biases = ([t.to(DEVICE) for t in tensors] for tensors in (inputs.rows, inputs.biases))
    replay, routing = captured(lambda: route(x, rows, biases, offset, 5, True))
    for seed in (1, 2):
        other = draw(tokens, 7, 5, 136, "fewer than k", BF16, seed=seed)
        x.copy_(other.x)
        offset.copy_(other.offset)
        replay()
        for ours, theirs in zip(routing, route(x, rows, biases, offset, 5, True), strict=True):
            assert torch.equal(ours, theirs)
        assert (routing.top_ids_TK == 7).any()


@each_size
def test_a_block_is_replayed_under_other_masks(model, tokens):
    block = model.flexmoe_blocks()[0]
    x = torch.randn(2, tokens, block.hidden_size, device=DEVICE, dtype=BF16)
    mask = torch.ones(2, 4, dtype=torch.bool, device=DEVICE)
    replay, output = captured(lambda: block_pass(block, x, mask))
    outputs = []
    for chosen in ([[1, 1, 0, 0], [0, 0, 1, 1]], [[0, 1, 0, 0], [1, 1, 1, 1]]):
        mask.copy_(torch.tensor(chosen, dtype=torch.bool))
        x.normal_()
        replay()
        assert torch.equal(output, block_pass(block, x, mask))
        assert distance(output, block_pass(block, x, mask, "eager")) < 2e-2
        outputs.append(output.clone())
    assert not torch.equal(*outputs)


@each_size
def test_an_expert_that_replaces_another_is_run(tokens):
    """The old one's memory holds something else by then."""
    kind = Experts([136, 40, 24], 136, dtype=BF16)
    experts, new = kind.draw(seeded("old")), kind.draw(seeded("new"))
    x = draw_tokens(tokens, 136, BF16, seeded("x"))
    inputs = draw(tokens, 3, 2, 136)
    routing = route(x, *([t.to(DEVICE) for t in ts] for ts in (inputs.rows, inputs.biases)), None, 2, True)
    replay, output = captured(lambda: mix(x, routing, experts))
    before = output.clone()
    moves = {}
    for name in ("gate", "up", "down"):
        moves[getattr(experts, name)[1].data_ptr()] = getattr(new, name)[1].data_ptr()
        old = getattr(experts, name)[1]
        getattr(experts, name)[1] = getattr(new, name)[1]
        old.fill_(float("nan"))
    update_pointers(moves)
    replay()
    assert not torch.equal(output, before)
    assert torch.equal(output, mix(x, routing, experts))
    torch.testing.assert_close(
        output.double().cpu(), mix_in_float64(x, routing.weights_TE, experts), **TOLERANCES[BF16], equal_nan=False
    )


@each_size
def test_a_removed_expert_gives_nan_to_its_tokens(tokens):
    kind = Experts([136, 40, 24], 136, dtype=BF16)
    experts = kind.draw(seeded("old"))
    x = draw_tokens(tokens, 136, BF16, seeded("x"))
    inputs = draw(tokens, 3, 2, 136)
    routing = route(x, *([t.to(DEVICE) for t in ts] for ts in (inputs.rows, inputs.biases)), None, 2, True)
    replay, output = captured(lambda: mix(x, routing, experts))
    replay()
    before = output.clone()
    update_pointers({experts.down[1].data_ptr(): 0})
    replay()
    torch.cuda.synchronize()
    routed = routing.weights_TE[:, 1] != 0
    assert routed.any()
    assert not routed.all()
    assert output[routed].isnan().all()
    assert torch.equal(output[~routed], before[~routed])


@each_size
def test_a_graph_of_a_block_follows_an_expert_that_is_replaced(model, tokens):
    pointers = ExpertPointers(model)
    block = model.flexmoe_blocks()[0]
    x = torch.randn(1, tokens, block.hidden_size, device=DEVICE, dtype=BF16)
    mask = torch.ones(1, 4, dtype=torch.bool, device=DEVICE)
    replay, output = captured(lambda: block_pass(block, x, mask))
    before = output.clone()
    network, row = copy.deepcopy(block.experts["math"]), copy.deepcopy(block.router["math"])
    for parameter in (*network.parameters(), *row.parameters()):
        parameter.data.normal_(std=0.3)
    block.experts["math"], block.router["math"] = network, row
    assert pointers.update()
    for _ in range(8):  # overwrites the memory of the old one
        torch.full((1 << 16,), float("nan"), device=DEVICE)
    replay()
    assert not torch.equal(output, before)
    assert torch.equal(output, block_pass(block, x, mask))


def test_a_graph_gives_nan_after_an_expert_was_removed(model):
    tokens = random_tokens(2, 7).to(DEVICE)
    forward = CapturedForward(model, input_ids=tokens, use_cache=False)
    assert forward().logits.isfinite().all()
    logits = forward().logits
    model.remove_expert("code")
    with pytest.raises(RuntimeError, match="capture it again"):
        forward()
    forward._graph.replay()  # without its checks
    torch.cuda.synchronize()
    assert logits.isnan().any()
    again = CapturedForward(model, input_ids=tokens, use_cache=False)
    assert distance(again().logits, model(tokens, use_cache=False).logits) < 2e-2


def test_a_captured_forward_gives_the_models_logits(model):
    tokens = random_tokens(2, 1).to(DEVICE)
    masks = [model.expert_mask(rows).to(DEVICE) for rows in ([["public", "math"], ["code"]], [list(NAMES)] * 2)]
    forward = CapturedForward(model, input_ids=tokens, expert_mask=masks[0], use_cache=False)
    for mask in (*masks, masks[0]):
        other = random_tokens(2, 1, seed=int(mask.sum())).to(DEVICE)
        expected = model(other, expert_mask=mask, use_cache=False).logits
        assert distance(forward(input_ids=other, expert_mask=mask).logits, expected) < 2e-2


def test_a_captured_step_continues_a_cache(model):
    """The cache has no tokens of the warm-up; a mask that leaves an expert idle is captured with all experts."""
    tokens = random_tokens(2, 9).to(DEVICE)
    mask = model.expert_mask([["public", "math"], ["public"]])
    logits = {}
    for name in ("eager", "captured"):
        cache = StaticCache(config=model.config, max_cache_len=9)
        model(tokens[:, :4], past_key_values=cache, expert_mask=mask)
        step = lambda cache=cache, **inputs: model(past_key_values=cache, expert_mask=mask, **inputs)  # noqa: E731
        if name == "captured":
            step = CapturedForward(model, input_ids=tokens[:, 4:5], past_key_values=cache, expert_mask=mask)
        logits[name] = [step(input_ids=tokens[:, i : i + 1]).logits.clone() for i in range(4, 9)]
    for ours, theirs in zip(logits["captured"], logits["eager"], strict=True):
        assert distance(ours, theirs) < 2e-2


@each_size
def test_a_bare_graph_gives_nan_after_a_cast(model, tokens):
    """Which moves every tensor; the graph does not read the freed memory."""
    pointers = ExpertPointers(model)
    block = model.flexmoe_blocks()[0]
    x = torch.randn(1, tokens, block.hidden_size, device=DEVICE, dtype=BF16)
    mask = torch.ones(1, 4, dtype=torch.bool, device=DEVICE)
    replay, output = captured(lambda: block_pass(block, x, mask))
    replay()
    assert output.isfinite().all()
    model.to(torch.float32)
    assert not pointers.update()
    replay()
    torch.cuda.synchronize()
    assert output.isnan().all()


@each_size
def test_low_rank_experts_are_captured(tokens):
    thin = {"name": "thin", "kind": "low_rank", "rank": [8, 8]}
    model = tiny_flexmoe("olmo2", ("math", thin, "code"), num_experts_per_tok=2).to(DEVICE, BF16)
    block = model.flexmoe_blocks()[0]
    x = torch.randn(2, tokens, block.hidden_size, device=DEVICE, dtype=BF16)
    mask = torch.ones(2, 4, dtype=torch.bool, device=DEVICE)
    names = tuple(model.expert_names)
    replay, output = captured(lambda: block_pass(block, x, mask, names=names))
    for chosen in ([[1, 1, 0, 0], [0, 0, 1, 1]], [[0, 1, 1, 0], [1, 1, 1, 1]]):
        mask.copy_(torch.tensor(chosen, dtype=torch.bool))
        replay()
        assert distance(output, block_pass(block, x, mask, "eager", names)) < 2e-2


def test_torch_compile_captures_graphs(model):
    """Steps on a static cache, in `mode="reduce-overhead"`, without a skipped graph."""
    model.float()  # fused code rounds to bfloat16 in other places, and a token may then be routed differently
    tokens = random_tokens(2, 12).to(DEVICE)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    logits = {}
    for name, step in (("eager", model), ("compiled", compiled)):
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(tokens[:, :4], past_key_values=cache, use_cache=True)
        logits[name] = []
        for position in range(4, 12):
            torch.compiler.cudagraph_mark_step_begin()
            out = step(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
            logits[name].append(out.logits.clone())
    for ours, theirs in zip(logits["compiled"], logits["eager"], strict=True):
        assert distance(ours, theirs) < 1e-4
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def test_values_that_change_in_place_take_effect(model):
    """A graph reads the same memory."""
    tokens = random_tokens(2, 3).to(DEVICE)
    forward = CapturedForward(model, input_ids=tokens, use_cache=False)
    before = forward().logits.clone()
    perturb_expert(model, "math", seed=3)
    after = forward().logits
    assert not torch.equal(after, before)
    assert distance(after, model(tokens, use_cache=False).logits) < 2e-2
