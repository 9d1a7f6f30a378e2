"""The checks of dense families: functions of a family's name that raise AssertionError if the check fails.

They also take the name of a published model. Used by `test_families`, `test_named_models` and `families_table.py`,
which copies the first lines of their docstrings to `docs/families.md`. Does not cover the tables of families
(`families`) and published models (`named_models`).
"""

import functools
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import flexmoe
from flexmoe.io.dense import CheckpointNamesError
from flexmoe.modeling import FlexMoeForCausalLM, FlexMoeModel, find_ffn_sites
from flexmoe.modeling.anchors_flexmoe import FfnSite
from flexmoe.testing import flexmoe_from_anchor, random_tokens, realigned
from tests.support.families import tiny_config
from tests.support.named_models import NAMED_MODELS

TOKENS = random_tokens(2, 9)


@functools.lru_cache(maxsize=1)
def anchor_of(family: str) -> PreTrainedModel:
    """The random dense model of the family or published model. It is cached, so checks must not change it."""
    torch.manual_seed(0)
    config = NAMED_MODELS[family].configuration() if family in NAMED_MODELS else tiny_config(family)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def greedy(model: PreTrainedModel) -> torch.Tensor:
    return model.generate(TOKENS, max_new_tokens=5, min_new_tokens=5, do_sample=False)


def graft_has_equal_logits(anchor: PreTrainedModel) -> FlexMoeForCausalLM:
    """The graft of the anchor, after comparing their logits bit for bit."""
    model = flexmoe_from_anchor(anchor)
    assert torch.equal(logits(model), logits(anchor))
    return model


def graft_is_bit_equal(family: str, folder: Path) -> None:
    """With "public" alone, logits and greedily decoded text equal those of the anchor, bit for bit."""
    anchor = anchor_of(family)
    model = graft_has_equal_logits(anchor)
    if anchor.can_generate():
        assert torch.equal(greedy(model), greedy(anchor))


def stream_and_model_agree(family: str, folder: Path) -> None:
    """The graft of a checkpoint has exactly the tensors of the model, and its logits equal those of the anchor."""
    anchor = anchor_of(family)
    anchor.save_pretrained(folder / "dense")
    try:
        flexmoe.graft(folder / "dense", folder / "grafted")
    except CheckpointNamesError as error:  # follow its advice to save in another format
        if "save_original_format=False" not in str(error):
            raise
        anchor.save_pretrained(folder / "rewritten", save_original_format=False)
        flexmoe.graft(folder / "rewritten", folder / "grafted")
    model, info = FlexMoeForCausalLM.from_pretrained(folder / "grafted", output_loading_info=True)
    assert not _mismatched_keys(info), _mismatched_keys(info)[:5]
    assert torch.equal(logits(realigned(model.eval())), logits(anchor))


def classes_load_each_other(family: str, folder: Path) -> None:
    """Both model classes and both Auto classes load the checkpoints of both; only an untied head may be missing."""
    model = flexmoe_from_anchor(anchor_of(family), ["math"])
    model.save_pretrained(folder / "causal")
    decoder, info = FlexMoeModel.from_pretrained(folder / "causal", output_loading_info=True)
    assert not _mismatched_keys(info), _mismatched_keys(info)[:5]
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
            assert set(_mismatched_keys(info)) <= (head if saved == "decoder" else set())
            for name, tensor in loaded.state_dict().items():
                assert name in head or torch.equal(tensor, model.state_dict()[name]), name


def save_reload_generate(family: str, folder: Path) -> None:
    """A saved and reloaded model of three experts has equal logits, generated text and selection of experts."""
    model = flexmoe_from_anchor(anchor_of(family), ["math", "code"], num_experts_per_tok=2)
    model.save_pretrained(folder)
    loaded = realigned(AutoModelForCausalLM.from_pretrained(folder).eval())
    assert torch.equal(logits(loaded), logits(model))
    if not model.can_generate():
        return
    assert torch.equal(greedy(loaded), greedy(model))
    model.remove_expert("math")
    chosen = loaded.generate(TOKENS, max_new_tokens=5, min_new_tokens=5, do_sample=False, experts=["public", "code"])
    assert torch.equal(chosen, greedy(model))


def backward_reaches_the_expert(family: str, folder: Path) -> None:
    """The frozen anchor has no gradients; all networks and rows of the expert have."""
    model = flexmoe_from_anchor(anchor_of(family), ["math"])
    model.freeze_except("math")
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".experts.math." in name or ".router.math." in name), name
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def remove_is_exact(family: str, folder: Path) -> None:
    """After `remove_expert`, config, names, order, bytes and logits equal those of a model without that expert."""
    anchor = anchor_of(family)
    model, never = flexmoe_from_anchor(anchor, ["math", "code"]), flexmoe_from_anchor(anchor, ["code"])
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
    assert not torch.equal(with_math, masked), "math does not change the logits, so the comparison proves nothing"


def norm_follows_is_true(family: str, folder: Path) -> None:
    """Whether a norm follows the network is detected correctly; the default of `norm_topk_prob` depends on it."""
    anchor = anchor_of(family)
    same = []
    for site in find_ffn_sites(anchor):
        # outputs far above a norm's eps, and as large as the residual, so that a norm of their sum would change
        once, twice = (_layer_output(anchor, site, size) for size in (1.0, 2.0))
        same.append(torch.allclose(once, twice, rtol=1e-3, atol=1e-3 * float(once.abs().mean())))
    assert flexmoe_from_anchor(anchor).config.norm_topk_prob is not all(same)


def decode_is_prefill(family: str, folder: Path) -> None:
    """Decoding with a cache gives the bits of the anchor, and matches a single forward pass where the anchor does."""
    anchor = anchor_of(family)
    if "past_key_values" not in inspect.signature(anchor.forward).parameters:
        return
    expected = _stepwise(anchor)
    assert torch.equal(_stepwise(flexmoe_from_anchor(anchor)), expected)
    if _close(expected, logits(anchor)):
        model = flexmoe_from_anchor(anchor, ["math"])
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


QUICK = ("backward_reaches_the_expert", "remove_is_exact", "norm_follows_is_true")
"""The checks that neither write files nor decode."""

DECODING = ("graft_is_bit_equal", "decode_is_prefill")
"""The checks that decode token by token, which takes most of the time of those that write no files."""


def run_all(family: str, folder: Path) -> None:
    """Runs every check of a family, each in its own folder."""
    for name, check in CHECKS.items():
        (folder / name).mkdir()
        check(family, folder / name)


def _mismatched_keys(info: dict) -> list[str]:
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
    """The output of the decoder layer if the output of its network is scaled to the root mean square `size`."""
    found = []
    network, layer = model.get_submodule(f"{site.layer}.{site.attributes[-1]}"), model.get_submodule(site.layer)
    handles = [
        network.register_forward_hook(lambda _module, _args, out: out * size / out.square().mean().sqrt()),
        layer.register_forward_hook(lambda _module, _args, out: found.append(out if torch.is_tensor(out) else out[0])),
    ]
    try:
        logits(model)
    finally:
        for handle in handles:
            handle.remove()
    return found[0]
