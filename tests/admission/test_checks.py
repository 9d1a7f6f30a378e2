"""Checks of rows and biases with visible constants, and of live models. See also `test_outputs.py`."""

import copy
import math

import pytest
import torch
from torch import nn

from flexmoe.admission.checks import check_expert
from flexmoe.admission.findings import AdmissionError, Finding, refuse_unless_admitted
from flexmoe.admission.outputs import EMPTY, OUTPUT
from flexmoe.admission.router_inputs import RouterInput
from flexmoe.admission.rows import (
    BIAS,
    BIAS_THRESHOLD,
    LONE,
    LONE_ROW_THRESHOLD,
    OTHERS,
    ROW_THRESHOLD,
    check_row_tensors,
    check_rows,
)
from flexmoe.modeling import PUBLIC, FlexMoeForCausalLM
from flexmoe.modeling.low_rank_flexmoe import LowRankDelta
from flexmoe.packages.modules import fresh_experts, parts_from_public
from flexmoe.packages.package import PackageError
from flexmoe.testing import tiny_flexmoe
from tests.support.soak import soak

H = 4
ACCEPT, REFUSE, NOT_CHECKED = "accept", "refuse", "not checked"


def rows(*lengths, bias=0.0):
    """One row per layer, of these lengths."""
    return [(torch.full((1, H), length / H**0.5), torch.tensor([float(bias)])) for length in lengths]


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in findings}


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


class TestRows:
    @pytest.mark.parametrize(
        ("own", "others", "public", "value", "verdict"),
        [
            ((2, 6), {"a": rows(1, 3)}, rows(0, 0), 2, ACCEPT),
            ((1, 1), {"a": rows(1, 3), "b": rows(0.1, 0.1)}, rows(0, 0), 1, ACCEPT),  # the longest of them counts
            ((50, 3), {"a": rows(1, 3)}, rows(0, 0), 50, REFUSE),
            ((1, 150), {"a": rows(1, 3)}, rows(0, 0), 50, REFUSE),  # one layer is enough
            ((ROW_THRESHOLD, 1), {"a": rows(1, 1)}, rows(0, 0), ROW_THRESHOLD, ACCEPT),
            ((ROW_THRESHOLD + 0.1, 1), {"a": rows(1, 1)}, rows(0, 0), ROW_THRESHOLD + 0.1, REFUSE),
            ((0, 0), {"a": rows(1, 1)}, rows(0, 0), 0, ACCEPT),
            ((50, 50), {}, rows(0, 0), None, NOT_CHECKED),  # no reference
            ((50, 50), {"copy": rows(0, 0)}, rows(0, 0), None, NOT_CHECKED),
            ((50, 50), {}, rows(1, 40), 50, REFUSE),  # an imported public's row is one
            ((math.nan, 1), {"a": rows(1, 1)}, rows(0, 0), math.inf, REFUSE),
        ],
    )
    def test_length_against_the_others(self, own, others, public, value, verdict):
        found = by_name(check_rows(rows(*own), public=public, others=others))[OTHERS]
        assert found.verdict == verdict
        assert found.value == (None if value is None else pytest.approx(value))

    @pytest.mark.parametrize(
        ("own", "incoming", "others", "value", "verdict"),
        [
            ((200, 200), {"a": rows(1, 3), "evil": rows(200, 200)}, {}, 200, REFUSE),  # the shortest counts
            ((200, 1), {"evil": rows(200, 200), "a": rows(1, 3)}, {}, 200, REFUSE),
            ((200, 200), {"copy": rows(0, 0)}, {}, None, NOT_CHECKED),
            (
                (200, 200),
                {"evil": rows(200, 200)},
                {"a": rows(1, 3)},
                200,
                REFUSE,
            ),  # irrelevant beside an existing expert
            ((2, 2), {"tiny": rows(0.01, 0.01)}, {"a": rows(1, 1)}, 2, ACCEPT),
            ((1, 1), {"nan": rows(math.nan, math.nan), "a": rows(1, 1)}, {}, 1, ACCEPT),
        ],
    )
    def test_length_against_other_incoming_experts(self, own, incoming, others, value, verdict):
        found = by_name(check_rows(rows(*own), public=rows(0, 0), others=others, incoming=incoming))[OTHERS]
        assert found.verdict == verdict
        assert found.value == (None if value is None else pytest.approx(value))

    @pytest.mark.parametrize("spread", [2.4, 3.2, 9.1])  # as measured: one method, beside public text, two methods
    @pytest.mark.parametrize("count", range(2, 9))
    def test_honest_experts_added_together_are_accepted(self, count, spread):
        lengths = [5 * spread ** (i / (count - 1)) for i in range(count)]
        for i, own in enumerate(lengths):
            incoming = {str(j): rows(length) for j, length in enumerate(lengths) if j != i}
            assert (
                by_name(check_rows(rows(own), public=rows(0), others={}, incoming=incoming))[OTHERS].verdict == ACCEPT
            )

    def test_incoming_experts_are_no_reference_for_each_others_biases(self):
        evil = rows(1, bias=100)
        found = by_name(check_rows(evil, public=rows(0), others={"a": rows(1)}, incoming={"evil": evil}))[BIAS]
        assert (found.verdict, found.value) == (REFUSE, 100)

    @pytest.mark.parametrize(
        ("length", "scale", "verdict"),
        [
            (LONE_ROW_THRESHOLD - 1, 0.0, ACCEPT),  # against 1: public's matrix is zero
            (LONE_ROW_THRESHOLD + 1, 0.0, REFUSE),
            (3 * LONE_ROW_THRESHOLD - 1, 3 / H**0.5, ACCEPT),  # its rows are 3 long
            (3 * LONE_ROW_THRESHOLD + 1, 3 / H**0.5, REFUSE),
        ],
    )
    def test_length_against_public_without_other_experts(self, length, scale, verdict):
        matrix = torch.full((8, H), scale)
        found = check_rows(rows(length), public=rows(0), others={}, inputs=[RouterInput(matrix)])
        assert by_name(found)[LONE].verdict == verdict

    @pytest.mark.parametrize(
        ("own", "public", "other", "value", "verdict"),
        [
            (-16, 0, -1, -16, ACCEPT),
            (1, 0, -1, 1, ACCEPT),
            (10, 0, -1, 10, REFUSE),
            (20, 0.5, -1, 19.5, REFUSE),  # public's is a prior
            (BIAS_THRESHOLD - 0.01, 0, -9, BIAS_THRESHOLD - 0.01, ACCEPT),
            (BIAS_THRESHOLD + 0.01, 0, -9, BIAS_THRESHOLD + 0.01, REFUSE),
            (8, 0, 7, 1, ACCEPT),  # if all have such biases, the inputs need them
            (math.nan, 0, 0, math.inf, REFUSE),
        ],
    )
    def test_bias(self, own, public, other, value, verdict):
        others = {"a": rows(1, 1, bias=other)}
        ours = rows(1, bias=-20) + rows(1, bias=own)  # the second layer decides
        found = by_name(check_rows(ours, public=rows(0, 0, bias=public), others=others))[BIAS]
        assert found.verdict == verdict
        assert found.value == pytest.approx(value)

    def test_the_message_has_layer_value_and_reference(self):
        found = check_rows(rows(1, 90), public=rows(0, 0), others={"math": rows(1, 2), "code": rows(1, 3)})
        assert (
            by_name(found)[OTHERS].message
            == "the row in layer 1 is 30 times as long as the longest other row, of 'code'"
        )

    def test_sharded_rows_are_not_gathered(self):
        sharded = rows(1)
        sharded[0][0].full_tensor = None  # the attribute of a DTensor
        assert set(verdicts(check_rows(sharded, public=rows(0), others={})).values()) == {NOT_CHECKED}
        found = by_name(check_rows(rows(50), public=rows(0), others={"a": sharded, "b": rows(1)}))
        assert found[OTHERS].value == pytest.approx(50)  # relative to the readable ones

    def test_rows_by_their_names_in_a_package_are_ordered_by_layer(self):
        def tensors(*lengths):
            made = enumerate(rows(*lengths))
            return {
                f"layers.{i}.router.{k}": v for i, pair in made for k, v in zip(("weight", "bias"), pair, strict=True)
            }

        lengths = [1.0] * 12
        found = check_row_tensors(
            tensors(*lengths[:10], 50, 1), public=tensors(*[0] * 12), others={"a": tensors(*lengths)}
        )
        assert by_name(found)[OTHERS].value == pytest.approx(50)
        assert "layer 10" in by_name(found)[OTHERS].message


class TestModels:
    """On live models, which must not change."""

    @staticmethod
    def parts(model: FlexMoeForCausalLM, rank: int | None = None):
        record = {"name": "new", "kind": "full"}
        if rank is not None:
            record |= {"kind": "low_rank", "rank": [rank] * 2}
        return parts_from_public(model.flexmoe_blocks(), fresh_experts(model.config, record))

    @pytest.mark.parametrize("family", ["llama", "gpt2", soak("phi3"), soak("gpt_neox"), "gemma2"])
    def test_a_copy_of_public_is_accepted_in_any_family(self, family):
        model = tiny_flexmoe(family, ["math"])
        before = {key: value.clone() for key, value in model.state_dict().items()}
        found = check_expert(model, self.parts(model))
        assert set(verdicts(found).values()) == {ACCEPT}
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    def test_the_replaced_expert_is_no_reference(self):
        model = tiny_flexmoe("llama", ["math"])
        parts = self.parts(model)
        for _, row in parts:
            nn.init.constant_(row.weight, 1e3)
        assert verdicts(check_expert(model, parts))[OTHERS] == REFUSE
        assert verdicts(check_expert(model, parts, replaced="math"))[OTHERS] == NOT_CHECKED

    @pytest.mark.parametrize(
        ("a", "b", "verdict"), [(None, 0.3, ACCEPT), (None, 300.0, REFUSE), (3e38, 0.0, REFUSE), (1e37, 1e-37, REFUSE)]
    )
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_a_low_rank_difference_is_measured(self, family, a, b, verdict):
        model = tiny_flexmoe(family)
        parts = self.parts(model, rank=2)
        delta = next(part for part in parts[1][0].modules() if isinstance(part, LowRankDelta))
        if a is not None:
            nn.init.constant_(delta.A.weight, a)
        nn.init.normal_(delta.B.weight, std=b, generator=torch.Generator().manual_seed(0))
        for part in parts[1][0].modules():
            if isinstance(part, LowRankDelta) and b == 300.0:
                nn.init.normal_(part.B.weight, std=b, generator=torch.Generator().manual_seed(0))
        found = by_name(check_expert(model, parts))
        assert found[OUTPUT].verdict == verdict
        if verdict == REFUSE:
            assert "in layer 1" in found[OUTPUT].message

    @pytest.mark.parametrize("mode", [True, False])
    def test_dropout_is_off_and_public_keeps_its_mode(self, mode):
        model = tiny_flexmoe("gpt2", ["math"]).train(mode)
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.9
        parts = self.parts(model)
        found = by_name(check_expert(model, parts))
        assert found == by_name(check_expert(model, parts))
        assert found[OUTPUT].value < 1  # public's output is smaller than its input
        assert found[EMPTY].value == 1
        assert all(part.training == mode for part in model.modules())

    def test_unreadable_tensors_are_not_checked_with_the_reason(self):
        model = tiny_flexmoe("llama", ["math"])
        parts = self.parts(model)
        with torch.device("meta"):
            empty = FlexMoeForCausalLM(copy.deepcopy(model.config))
        found = check_expert(empty, parts)
        assert set(verdicts(found).values()) == {NOT_CHECKED}
        assert "meta" in by_name(found)[OUTPUT].message
        refuse_unless_admitted("new", found)
        on_meta = [(network.to("meta"), row.to("meta")) for network, row in parts]
        found = check_expert(model, on_meta)
        assert set(verdicts(found).values()) == {NOT_CHECKED}

    def test_outputs_are_compared_with_those_of_an_offloaded_public(self):
        accelerate = pytest.importorskip("accelerate")
        model = tiny_flexmoe("llama", ["math"])
        parts = self.parts(model)
        plain = by_name(check_expert(model, parts))
        accelerate.cpu_offload(model)
        assert next(model.flexmoe_blocks()[0].experts[PUBLIC].parameters()).is_meta
        found = by_name(check_expert(model, parts))
        assert (found[OUTPUT], found[EMPTY]) == (plain[OUTPUT], plain[EMPTY])
        assert found[OUTPUT].verdict == ACCEPT

    def test_outputs_beside_a_sharded_public_have_to_be_finite(self):
        model = tiny_flexmoe("llama", ["math"])
        parts = self.parts(model)
        for parameter in model.flexmoe_blocks()[0].experts[PUBLIC].parameters():
            parameter.full_tensor = None  # the attribute of a DTensor
        found = by_name(check_expert(model, parts))
        assert found[OUTPUT].verdict == ACCEPT
        assert "not all layers are compared: layer 0: public's network is sharded" in found[OUTPUT].message
        nn.init.constant_(parts[0][0].up_proj.weight, 3e38)
        assert by_name(check_expert(model, parts))[OUTPUT].verdict == REFUSE

    def test_rows_are_checked_beside_a_quantised_public(self):
        model = tiny_flexmoe("llama", ["math"])
        parts = self.parts(model)
        for block in model.flexmoe_blocks():
            for matrix in block.experts[PUBLIC].children():
                if isinstance(matrix, nn.Linear):
                    matrix.weight = nn.Parameter(matrix.weight.detach().to(torch.int8), requires_grad=False)
        found = by_name(check_expert(model, parts))
        assert found[OTHERS].verdict == found[BIAS].verdict == ACCEPT
        assert found[LONE].verdict == found[OUTPUT].verdict == NOT_CHECKED
        assert "quantised" in found[OUTPUT].message

    def test_tensors_beneath_adapters_are_measured(self):
        peft = pytest.importorskip("peft")
        model = tiny_flexmoe("llama", ["math"])
        parts = self.parts(model)
        plain = check_expert(model, parts)
        pattern = r".*\.experts\.(?:public)\.(?:down_proj|gate_proj)"
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=pattern))
        assert check_expert(model, parts) == plain


def test_a_refusal_has_name_values_thresholds_and_what_to_do():
    found = check_rows(rows(50, bias=10.0), public=rows(0), others={"a": rows(1)})
    with pytest.raises(AdmissionError) as caught:
        refuse_unless_admitted("evil", found)
    text = str(caught.value)
    for part in (
        "--no-verify",
        "'evil'",
        "50 times",
        "threshold 12",
        "10 above",
        "threshold 4.6",
        "flexmoe verify",
        "verify=False",
    ):
        assert part in text
    assert "\n" not in text
    assert isinstance(caught.value, PackageError)
    assert caught.value.findings == tuple(found)


def test_checks_that_could_not_be_made_do_not_refuse():
    refuse_unless_admitted("new", [Finding("bias", NOT_CHECKED, None, None, "public's bias cannot be read")])
    refuse_unless_admitted("new", [])
