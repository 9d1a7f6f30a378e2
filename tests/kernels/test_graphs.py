"""CUDA graphs of the kernels: what is data, what happens when an expert is swapped or gone, torch.compile's graphs.

Nothing here runs without a GPU. What `CapturedForward` refuses is in `tests/flexmoe/test_graphs.py`.
"""

import copy

import pytest
import torch
from transformers import StaticCache

pytest.importorskip("triton")

from flexmoe.graphs import CapturedForward
from flexmoe.modeling import ops_flexmoe as ops
from flexmoe.modeling.context_flexmoe import forward_scope
from flexmoe.modeling.fused_flexmoe import redirecting
from flexmoe.testing import TOLERANCES, perturb_expert, random_tokens, tiny_flexmoe
from tests.kernels.expert_witness import DEVICE, Experts, draw_tokens, said, seeded
from tests.kernels.router_inputs import draw

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
    """`run` as a graph: what replays it, and its output, which each replay writes anew."""
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
    """Of roundings in between, elements near 0 have their share, so it is taken over all."""
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
    model.config._flexmoe_implementation = "triton"
    assert all(path.plan is not None for path in model.implementation_paths())
    return model


def block_pass(block, x, mask, implementation="triton", names=NAMES):
    """A block as a forward pass calls it; `mask`: bool [batch, experts], data."""
    values = {"allowed": names, "row_mask": mask, "implementation": implementation}
    with forward_scope(values):
        return block(x)


@each_size
def test_the_choice_of_experts_is_data(tokens):
    inputs = draw(tokens, 7, 5, 136, "random", BF16)
    x, offset = inputs.x.to(DEVICE), inputs.offset.to(DEVICE)
    rows, biases = ([t.to(DEVICE) for t in tensors] for tensors in (inputs.rows, inputs.biases))
    replay, routing = captured(lambda: ops.route(x, rows, biases, offset, 5, True))
    for seed in (1, 2):
        other = draw(tokens, 7, 5, 136, "fewer than k", BF16, seed=seed)
        x.copy_(other.x)
        offset.copy_(other.offset)
        replay()
        for ours, theirs in zip(routing, ops.route(x, rows, biases, offset, 5, True), strict=True):
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
        assert distance(output, block_pass(block, x, mask, "torch")) < 2e-2
        outputs.append(output.clone())
    assert not torch.equal(*outputs)


@each_size
def test_an_expert_in_the_slot_of_another_is_run(tokens):
    """The old one is gone, and its memory in other hands."""
    kind = Experts([136, 40, 24], 136, dtype=BF16)
    experts, new = kind.draw(seeded("old")), kind.draw(seeded("new"))
    x = draw_tokens(tokens, 136, BF16, seeded("x"))
    inputs = draw(tokens, 3, 2, 136)
    routing = ops.route(x, *([t.to(DEVICE) for t in ts] for ts in (inputs.rows, inputs.biases)), None, 2, True)
    replay, output = captured(lambda: ops.mix(x, routing, experts))
    before = output.clone()
    moves = {}
    for name in ("gate", "up", "down"):
        moves[getattr(experts, name)[1].data_ptr()] = getattr(new, name)[1].data_ptr()
        old = getattr(experts, name)[1]
        getattr(experts, name)[1] = getattr(new, name)[1]
        old.fill_(float("nan"))
    ops.redirect(moves)
    replay()
    assert not torch.equal(output, before)
    assert torch.equal(output, ops.mix(x, routing, experts))
    torch.testing.assert_close(
        output.double().cpu(), said(x, routing.weights_TE, experts), **TOLERANCES[BF16], equal_nan=False
    )


@each_size
def test_an_expert_that_is_gone_says_nan_to_those_who_ask_it(tokens):
    kind = Experts([136, 40, 24], 136, dtype=BF16)
    experts = kind.draw(seeded("old"))
    x = draw_tokens(tokens, 136, BF16, seeded("x"))
    inputs = draw(tokens, 3, 2, 136)
    routing = ops.route(x, *([t.to(DEVICE) for t in ts] for ts in (inputs.rows, inputs.biases)), None, 2, True)
    replay, output = captured(lambda: ops.mix(x, routing, experts))
    replay()
    before = output.clone()
    ops.redirect({experts.down[1].data_ptr(): 0})
    replay()
    torch.cuda.synchronize()
    asks = routing.weights_TE[:, 1] != 0
    assert asks.any()
    assert not asks.all()
    assert output[asks].isnan().all()
    assert torch.equal(output[~asks], before[~asks])


@each_size
def test_a_block_follows_an_expert_that_is_replaced(model, tokens):
    block = model.flexmoe_blocks()[0]
    x = torch.randn(1, tokens, block.hidden_size, device=DEVICE, dtype=BF16)
    mask = torch.ones(1, 4, dtype=torch.bool, device=DEVICE)
    replay, output = captured(lambda: block_pass(block, x, mask))
    before = output.clone()
    network, row = copy.deepcopy(block.experts["math"]), copy.deepcopy(block.router["math"])
    for parameter in (*network.parameters(), *row.parameters()):
        parameter.data.normal_(std=0.3)
    with redirecting(block):
        block.experts["math"], block.router["math"] = network, row
    for _ in range(8):  # whatever takes the memory that the old one had
        torch.full((1 << 16,), float("nan"), device=DEVICE)
    replay()
    assert not torch.equal(output, before)
    assert torch.equal(output, block_pass(block, x, mask))


def test_a_model_says_nan_after_one_was_removed(model):
    tokens = random_tokens(2, 7).to(DEVICE)
    forward = CapturedForward(model, input_ids=tokens, use_cache=False)
    assert forward().logits.isfinite().all()
    logits = forward().logits
    model.remove_expert("code")
    with pytest.raises(RuntimeError, match="capture it again"):
        forward()
    forward._graph.replay()  # as somebody's own graph would be
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


def test_a_captured_step_goes_on_where_the_cache_ends(model):
    """The warm-up's tokens are not in it; a mask under which an expert is idle is captured for all."""
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
        assert distance(output, block_pass(block, x, mask, "torch", names)) < 2e-2


def test_compiled_code_has_graphs_of_its_own(model):
    """Steps on a static cache, in `mode="reduce-overhead"`, with none of its graphs given up."""
    model.float()  # fused code rounds to bfloat16 elsewhere, and a token may then go to another expert
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


def test_a_perturbed_expert_is_heard(model):
    """Its matrices are the same tensors with other values, which a graph reads where they lie."""
    tokens = random_tokens(2, 3).to(DEVICE)
    forward = CapturedForward(model, input_ids=tokens, use_cache=False)
    before = forward().logits.clone()
    perturb_expert(model, "math", seed=3)
    after = forward().logits
    assert not torch.equal(after, before)
    assert distance(after, model(tokens, use_cache=False).logits) < 2e-2
