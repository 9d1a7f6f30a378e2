"""Evidence of the tokens so far: the same in one pass and token by token, whatever the cache, padding and packing.

Does not cover fitting (`tests/routers/test_evidence.py`).
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, StaticCache
from transformers.generation import ContinuousBatchingConfig

from flexmoe.admission.evidence import EVIDENCE
from flexmoe.admission.findings import AdmissionError
from flexmoe.batching import Requests
from flexmoe.conversion.export import export
from flexmoe.kernels.graphs import _cache_lengths, _reset_lengths
from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.modeling.evidence_flexmoe import FADING, read_evidence
from flexmoe.testing import tiny_anchor

OWNERS = ("math", "law")
DECAYS, WINDOW = [0.9, 0.98], 12
FAMILIES = ("llama", "gpt2", "gemma2")  # rotary, absolute positions, sliding windows


def evidence_model(family: str) -> FlexMoeForCausalLM:
    """A model whose experts, rows, tables and calibrations are random."""
    anchor = tiny_anchor(family, seed=0)
    evidence = {"tokens": anchor.config.get_text_config().vocab_size, "decays": DECAYS, "window": WINDOW}
    records = [{"name": name, "evidence": evidence} for name in OWNERS]
    model = FlexMoeForCausalLM(FlexMoeConfig(anchor_config=anchor.config, experts=["public", *records])).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for block in model.flexmoe_blocks():
            for name in OWNERS:
                row = block.router[name]
                row.weight.normal_(std=0.3)
                row.calibration.normal_(std=0.5)
                if block.layer_index == 0:
                    row.table.normal_(std=2.0)
                for parameter in block.experts[name].parameters():
                    parameter.normal_(std=0.1)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> FlexMoeForCausalLM:
    return evidence_model(request.param)


@pytest.fixture(scope="module")
def ids(model: FlexMoeForCausalLM) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def logits(model: FlexMoeForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def small_batches(**options: Any) -> ContinuousBatchingConfig:
    """Few tokens at a time, and a cache for few: some versions take gigabytes otherwise."""
    size = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"  # before 5.18
    return ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=11, **{size: 4}, **options)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-5)


def test_features_are_their_definition(model: FlexMoeForCausalLM, ids: torch.Tensor) -> None:
    features = read_evidence(model, ["public", "math"], {"input_ids": ids})
    assert features.keys() == {"math"}
    scores = model.flexmoe_blocks()[0].router["math"].table[ids]
    for row, at in ((0, 0), (1, 7), (0, 29)):
        first = max(0, at - WINDOW + 1)
        sums = [sum(decay ** (at - i) * scores[row, i] for i in range(first, at + 1)) for decay in DECAYS]
        fading = 1 - (1 - FADING) * sum(FADING ** (at - i) for i in range(first, at + 1))
        found = features["math"].view(2, 30, -1)[row, at]
        assert torch.allclose(found, torch.tensor([*sums, fading]), atol=1e-5)


def test_evidence_changes_the_logits(model: FlexMoeForCausalLM, ids: torch.Tensor, logits: torch.Tensor) -> None:
    other = ids.clone()
    other[:, 5] = (other[:, 5] + 1) % model.config.vocab_size
    without = copy.deepcopy(model)
    for name in OWNERS:
        without.flexmoe_blocks()[0].router[name].table.zero_()
    assert not close(without(input_ids=ids).logits, logits)
    assert torch.equal(model(input_ids=other).logits[:, :5], logits[:, :5])  # causal


@pytest.mark.parametrize("cuts", [[17, 30], [1, *range(2, 31)], [29, 30]], ids=["chunks", "tokens", "one token"])
@pytest.mark.parametrize("static", [False, True])
def test_parts_are_as_the_whole(
    model: FlexMoeForCausalLM, ids: torch.Tensor, logits: torch.Tensor, cuts: list[int], static: bool
) -> None:
    cache = StaticCache(config=model.config.anchor_config, max_cache_len=40) if static else None
    parts, start = [], 0
    for end in cuts:
        out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
        parts.append(out.logits)
        cache, start = out.past_key_values, end
    assert close(torch.cat(parts, 1), logits)


def test_padding_and_packing_change_nothing(
    model: FlexMoeForCausalLM, ids: torch.Tensor, logits: torch.Tensor
) -> None:
    pad, ones = torch.zeros(2, 5, dtype=torch.long), torch.ones_like(ids)
    mask = torch.cat([pad, ones], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    left = model(input_ids=torch.cat([pad, ids], 1), attention_mask=mask, position_ids=positions)
    right = model(input_ids=torch.cat([ids, pad], 1), attention_mask=torch.cat([ones, pad], 1))
    positions = torch.cat([torch.arange(18), torch.arange(12)])[None]
    packed = model(input_ids=ids[:1], position_ids=positions, use_cache=False)
    assert close(left.logits[:, 5:], logits)
    assert close(right.logits[:, :30], logits)
    assert close(packed.logits[:, 18:], model(input_ids=ids[:1, 18:]).logits)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static", "disable_compile": True},
        {"num_beams": 3},
        {"num_beams": 2, "cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda options: " ".join(options),
)
def test_generation_is_as_without_a_cache(model: FlexMoeForCausalLM, ids: torch.Tensor, options: dict) -> None:
    prompts = ids[:1, :25] if "prompt_lookup_num_tokens" in options else ids[:, :12]
    plain = {key: value for key, value in options.items() if key == "num_beams"}
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        model.generate(prompts, **settings, **options), model.generate(prompts, use_cache=False, **settings, **plain)
    )


def test_a_padded_prompt_continues_as_it_does_alone(model: FlexMoeForCausalLM, ids: torch.Tensor) -> None:
    prompts, mask = ids[:, :12].clone(), torch.ones(2, 12, dtype=torch.long)
    prompts[0, :4], mask[0, :4] = 0, 0
    settings = {"max_new_tokens": 6, "do_sample": False}
    alone = model.generate(ids[:1, 4:12], **settings)[0, 8:]
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(prompts, attention_mask=mask, **settings, **options)[0, 12:], alone)


def test_embeddings_are_routed_without_evidence(model: FlexMoeForCausalLM, ids: torch.Tensor) -> None:
    states = model.get_input_embeddings()(ids[:, :12])
    settings = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones(2, 12)}
    assert model.generate(inputs_embeds=states, **settings).shape == (2, 4)
    features = read_evidence(model, ["math"], {"inputs_embeds": states})["math"]
    assert not features[:, :-1].any()
    assert (features[:, -1] == 1).all()  # nothing was read


def test_a_cache_without_ids_is_refused(model: FlexMoeForCausalLM, ids: torch.Tensor) -> None:
    cache = model.anchor(input_ids=ids[:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"5 tokens without their ids.*fresh cache"):
        model(input_ids=ids[:, 5:6], past_key_values=cache)


@pytest.mark.parametrize("implementation", ["flexmoe_triton", "flexmoe_cpu", "flexmoe_training"])
def test_implementations_read_the_same_evidence(
    model: FlexMoeForCausalLM, ids: torch.Tensor, logits: torch.Tensor, implementation: str
) -> None:
    other = copy.deepcopy(model)
    other.set_experts_implementation(implementation)
    if implementation == "flexmoe_triton" and model.config.anchor_config.model_type == "llama":
        assert {path.fuses_router for path in other.implementation_paths()} == {True}
    assert close(other(input_ids=ids).logits, logits)
    assert close(other(input_ids=ids[:1, :1]).logits, logits[:1, :1])
    mask = other.expert_mask([["public", "law"], None])
    assert close(other(input_ids=ids, expert_mask=mask).logits, model(input_ids=ids, expert_mask=mask).logits)


def test_passes_before_a_graph_is_captured_leave_no_ids_in_the_cache() -> None:
    """What `CapturedForward` does around its warm-up, which itself needs CUDA."""
    model = evidence_model("llama")
    ids, cache = torch.arange(3, 33)[None], StaticCache(model.config, max_cache_len=40)
    lengths = _cache_lengths({"past_key_values": cache})
    for _ in range(2):
        model(input_ids=ids[:, :7], past_key_values=cache)
        _reset_lengths(lengths)
    assert close(model(input_ids=ids, past_key_values=cache).logits, model(input_ids=ids).logits)


@pytest.mark.promise(
    "continuous batching",
    "experts with evidence; with CUDA graphs or compilation",
    "each request reads its own tokens; refused with the reason",
)
def test_continuous_batching_reads_what_each_request_has_read(model: FlexMoeForCausalLM, ids: torch.Tensor) -> None:
    """Prompts of several lengths, longer ones in chunks, blocks that are shared and copied, requests that wait."""
    prompts = [ids[0, :n].tolist() for n in (21, 3, 9, 21)] + [ids[1, :17].tolist()]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    outputs = model.generate_batch(prompts, config, small_batches())
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        found = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        assert output.generated_tokens == found[0, len(prompt) :].tolist()


def test_requests_that_are_forked_after_one_token(model: FlexMoeForCausalLM) -> None:
    config = GenerationConfig(
        max_new_tokens=3, do_sample=True, num_return_sequences=2, eos_token_id=-1, pad_token_id=0
    )
    outputs = model.generate_batch([[5], [5, 6, 7]], config, small_batches())
    assert {len(output.generated_tokens) for output in outputs.values()} == {3}  # 5.17 returns each prompt once


def test_requests_are_grouped_and_put_back_in_order() -> None:
    def request(tokens: list[int], past: int, count: int) -> Any:
        state = SimpleNamespace(initial_tokens=tokens[:2], generated_tokens=tokens[2:], position_offset=past)
        return SimpleNamespace(state=state, query_length=count)

    requests, prepared = Requests(window=4), []
    inputs = SimpleNamespace(prepare_batch_tensors=lambda requests_in_batch, **_: prepared.append(requests_in_batch))
    requests.watch(SimpleNamespace(inputs_and_outputs=inputs))
    batch = [request([5, 6, 7, 8, 9], 5, 1), request([1, 2], 0, 2), request([3, 4], 1, 1)]
    inputs.prepare_batch_tensors(requests_in_batch=batch)
    assert prepared == [batch]
    groups, order = requests.groups(torch.tensor([10, 1, 2, 4]))
    assert [(ids.tolist(), count) for ids, count in groups] == [([[7, 8, 9, 10], [-1, -1, 3, 4]], 1), ([[1, 2]], 2)]
    assert order.tolist() == [0, 2, 3, 1]


def test_compilation_in_continuous_batching_is_refused_and_changes_nothing(
    model: FlexMoeForCausalLM, ids: torch.Tensor
) -> None:
    before = model.config._attn_implementation
    compiled = small_batches(varlen_compile_config=CompileConfig())
    with pytest.raises(ValueError, match=r"evidence of \['math', 'law'\].*use_cuda_graph=False"):
        model.generate_batch([ids[0, :5].tolist()], GenerationConfig(max_new_tokens=2), compiled)
    assert model.config._attn_implementation == before
    model(input_ids=ids)


def test_experts_with_evidence_that_are_allowed_after_a_manager_was_made(model: FlexMoeForCausalLM) -> None:
    changed = copy.deepcopy(model)
    changed.set_active_experts(["public"])
    manager = changed.init_continuous_batching(
        GenerationConfig(max_new_tokens=2, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=small_batches(),
    )
    changed.set_active_experts(["public", "law"])
    manager.start()
    request = manager.add_request([5, 6, 7])
    output = manager.get_result(request_id=request, timeout=30)
    manager.stop(block=True)
    assert "after the manager was made" in output.error


def test_adding_masking_and_removing_are_exact(
    model: FlexMoeForCausalLM, ids: torch.Tensor, logits: torch.Tensor, tmp_path: Path
) -> None:
    masked = model(input_ids=ids, experts=["public", "math"]).logits
    changed = copy.deepcopy(model)
    package = changed.save_expert("law", tmp_path / "law")
    changed.remove_expert("law")
    assert torch.equal(changed(input_ids=ids).logits, masked)
    changed.add_expert(package, verify=False)  # the random table claims random text
    assert torch.equal(changed(input_ids=ids).logits, logits)
    changed.rename_expert("law", "legal")
    assert torch.equal(changed(input_ids=ids).logits, logits)
    changed.save_pretrained(tmp_path / "model")
    assert torch.equal(FlexMoeForCausalLM.from_pretrained(tmp_path / "model")(input_ids=ids).logits, logits)


def test_a_table_that_claims_every_token_is_refused(tmp_path: Path) -> None:
    model = evidence_model("llama")
    for block in model.flexmoe_blocks():
        block.router["law"].calibration.fill_(0.5)
    model.flexmoe_blocks()[0].router["law"].table.fill_(4.0)
    package = model.save_expert("law", tmp_path / "law")
    model.remove_expert("law")
    with pytest.raises(
        AdmissionError, match=r"evidence: in layer \d, a text of the tokens with its lowest scores adds \d+"
    ) as caught:
        model.add_expert(package)
    assert [finding.check for finding in caught.value.findings if finding.verdict == "refuse"] == [EVIDENCE]
    assert model.expert_names == ["public", "math"]


def test_formats_without_evidence_are_refused(tmp_path: Path) -> None:
    model = evidence_model("llama")
    for block in model.flexmoe_blocks():
        for name in OWNERS:
            block.router[name].bias.zero_()
    model.config.norm_topk_prob = True
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"math, law are also routed by the tokens so far.*--drop-evidence"):
        export(tmp_path / "model", tmp_path / "out", to="mixtral")
    export(tmp_path / "model", tmp_path / "out", to="mixtral", drop_evidence=True)
