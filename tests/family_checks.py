"""What is promised of every dense family, as functions of a family's name: each raises AssertionError if it is not so.

The name of a published model goes for a family's, too. Run by `test_families`, `test_named_models` and the program
that writes `docs/families.md`. Does not cover which families (`families`) and models (`named_models`) there are.
"""

import functools
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import flexmoe
from flexmoe.modeling import FlexMoeForCausalLM, FlexMoeModel, find_ffn_sites
from flexmoe.modeling.anchors_flexmoe import FfnSite
from flexmoe.modeling.dense_flexmoe import CheckpointNamesError
from flexmoe.testing import grown_flexmoe, random_tokens, realigned
from tests.families import tiny_config
from tests.named_models import NAMED_MODELS

TOKENS = random_tokens(2, 9)


@functools.lru_cache(maxsize=1)
def anchor_of(family: str) -> PreTrainedModel:
    """The random dense model of the family, or of the published model; checks leave it as it is."""
    torch.manual_seed(0)
    config = NAMED_MODELS[family].configuration() if family in NAMED_MODELS else tiny_config(family)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def greedy(model: PreTrainedModel) -> torch.Tensor:
    return model.generate(TOKENS, max_new_tokens=5, min_new_tokens=5, do_sample=False)


def graft_is_bit_equal(family: str, folder: Path) -> None:
    """With "public" alone, the logits and the text of greedy decoding are the anchor's."""
    anchor = anchor_of(family)
    model = grown_flexmoe(anchor)
    assert torch.equal(logits(model), logits(anchor))
    if anchor.can_generate():
        assert torch.equal(greedy(model), greedy(anchor))


def stream_and_model_agree(family: str, folder: Path) -> None:
    """The streaming graft writes the tensors that the model has, and the anchor's logits come back from it."""
    anchor = anchor_of(family)
    anchor.save_pretrained(folder / "dense")
    try:
        flexmoe.graft(folder / "dense", folder / "grafted")
    except CheckpointNamesError as error:  # it names the way out, which is taken
        if "save_original_format=False" not in str(error):
            raise
        anchor.save_pretrained(folder / "rewritten", save_original_format=False)
        flexmoe.graft(folder / "rewritten", folder / "grafted")
    model, info = FlexMoeForCausalLM.from_pretrained(folder / "grafted", output_loading_info=True)
    assert not _strangers(info), _strangers(info)[:5]
    assert torch.equal(logits(realigned(model.eval())), logits(anchor))


def classes_load_each_other(family: str, folder: Path) -> None:
    """Both models, by both ways of naming them, load both's checkpoints whole; only an untied head can be missing."""
    model = grown_flexmoe(anchor_of(family), ["math"])
    model.save_pretrained(folder / "causal")
    decoder, info = FlexMoeModel.from_pretrained(folder / "causal", output_loading_info=True)
    assert not _strangers(info), _strangers(info)[:5]
    decoder.save_pretrained(folder / "decoder")
    head = {name for name in model.state_dict() if name not in decoder.state_dict()}
    for loader, expected in (
        (AutoModel, FlexMoeModel),
        (FlexMoeModel, FlexMoeModel),
        (AutoModelForCausalLM, FlexMoeForCausalLM),
        (FlexMoeForCausalLM, FlexMoeForCausalLM),
    ):
        for saved in ("causal", "decoder"):
            loaded, info = loader.from_pretrained(folder / saved, output_loading_info=True)
            assert type(loaded) is expected
            assert set(_strangers(info)) <= (head if saved == "decoder" else set())
            for name, tensor in loaded.state_dict().items():
                assert name in head or torch.equal(tensor, model.state_dict()[name]), name


def save_reload_generate(family: str, folder: Path) -> None:
    """A model of three experts comes back with its logits, its text and the choice of experts."""
    model = grown_flexmoe(anchor_of(family), ["math", "code"], num_experts_per_tok=2)
    model.save_pretrained(folder)
    again = realigned(AutoModelForCausalLM.from_pretrained(folder).eval())
    assert torch.equal(logits(again), logits(model))
    if not model.can_generate():
        return
    assert torch.equal(greedy(again), greedy(model))
    model.remove_expert("math")
    chosen = again.generate(TOKENS, max_new_tokens=5, min_new_tokens=5, do_sample=False, experts=["public", "code"])
    assert torch.equal(chosen, greedy(model))


def backward_reaches_the_expert(family: str, folder: Path) -> None:
    """A frozen anchor's gradients are none; the expert's networks and rows all get theirs."""
    model = grown_flexmoe(anchor_of(family), ["math"])
    model.freeze_except("math")
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".experts.math." in name or ".router.math." in name), name
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def remove_is_exact(family: str, folder: Path) -> None:
    """After `remove_expert`, config, names, order, bytes and logits are those of the model that never had it."""
    anchor = anchor_of(family)
    model, never = grown_flexmoe(anchor, ["math", "code"]), grown_flexmoe(anchor, ["code"])
    with_math = logits(model)
    with model.only_experts("public", "code"):
        masked = logits(model)
    model.remove_expert("math")
    assert model.config.to_dict() == never.config.to_dict()
    ours, theirs = model.state_dict(), never.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(logits(model), logits(never))
    assert torch.equal(masked, logits(never))
    assert not torch.equal(with_math, masked), "math never said anything: the comparison proves nothing"


def norm_follows_is_true(family: str, folder: Path) -> None:
    """Scaling what a network returns scales its layer's output, unless a norm takes it: which the default goes by."""
    anchor = anchor_of(family)
    same = []
    for site in find_ffn_sites(anchor):
        # far above a norm's eps; and of the order of the residual, which a norm of their sum would see
        once, twice = (_layer_output(anchor, site, size) for size in (1.0, 2.0))
        same.append(torch.allclose(once, twice, rtol=1e-3, atol=1e-3 * float(once.abs().mean())))
    assert grown_flexmoe(anchor).config.norm_topk_prob is not all(same)


def decode_is_prefill(family: str, folder: Path) -> None:
    """Token by token through the cache: the anchor's bits, and the logits of one pass wherever the anchor's are."""
    anchor = anchor_of(family)
    if "past_key_values" not in inspect.signature(anchor.forward).parameters:
        return
    assert torch.equal(_stepwise(grown_flexmoe(anchor)), _stepwise(anchor))
    if _close(_stepwise(anchor), logits(anchor)):
        model = grown_flexmoe(anchor, ["math"])
        assert _close(_stepwise(model), logits(model))


CHECKS: dict[str, Callable[[str, Path], None]] = {
    check.__name__: check
    for check in (
        graft_is_bit_equal,
        stream_and_model_agree,
        classes_load_each_other,
        save_reload_generate,
        backward_reaches_the_expert,
        remove_is_exact,
        norm_follows_is_true,
        decode_is_prefill,
    )
}


QUICK = (
    "graft_is_bit_equal",
    "backward_reaches_the_expert",
    "remove_is_exact",
    "norm_follows_is_true",
    "decode_is_prefill",
)
"""The checks that touch no file."""


def run_all(family: str, folder: Path) -> None:
    """Every check of one family, each in a folder of its own."""
    for name, check in CHECKS.items():
        (folder / name).mkdir()
        check(family, folder / name)


def _strangers(info: dict) -> list[str]:
    return sorted(itertools.chain(info["missing_keys"], info["unexpected_keys"]))


@torch.no_grad()
def _stepwise(model: PreTrainedModel) -> torch.Tensor:
    cache, steps = None, []
    for token in TOKENS.split(1, 1):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = out.get("past_key_values")
        steps.append(out.logits)
    return torch.cat(steps, 1)


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def _layer_output(model: PreTrainedModel, site: FfnSite, size: float) -> torch.Tensor:
    """What the decoder layer returns when its network's output is scaled to the root mean square `size`."""
    seen = []
    network, layer = model.get_submodule(f"{site.layer}.{site.attributes[-1]}"), model.get_submodule(site.layer)
    handles = [
        network.register_forward_hook(lambda _module, _args, out: out * size / out.square().mean().sqrt()),
        layer.register_forward_hook(lambda _module, _args, out: seen.append(out if torch.is_tensor(out) else out[0])),
    ]
    try:
        logits(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0]
