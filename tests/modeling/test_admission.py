"""Rows, biases and weights of newcomers that are let in or refused, as numbers that can be seen."""

import copy
import math

import pytest
import torch
from torch import nn

from flexmoe.modeling import PUBLIC, FlexMoeForCausalLM
from flexmoe.modeling.admission_flexmoe import (
    BIAS_BAR,
    EMPTY_BAR,
    LONE_ROW_BAR,
    ROW_BAR,
    WEIGHT_BAR,
    AdmissionError,
    Finding,
    judge_parts,
    judge_row_tensors,
    judge_rows,
    judge_scale,
    refuse_unless_admitted,
)
from flexmoe.modeling.fitting_flexmoe import fresh_experts, parts_from_public
from flexmoe.modeling.packages_flexmoe import PackageError
from flexmoe.testing import tiny_flexmoe

H = 4
ACCEPT, REFUSE, NOT_JUDGED = "accept", "refuse", "not judged"
OTHERS, LONE, BIAS = "row against the others", "row against public", "bias"


def rows(*lengths, bias=0.0):
    """One row per layer, of these lengths."""
    return [(torch.full((1, H), length / H**0.5), torch.tensor([float(bias)])) for length in lengths]


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in findings}


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


class TestRows:
    @pytest.mark.parametrize(
        ("own", "others", "public", "figure", "verdict"),
        [
            ((2, 6), {"a": rows(1, 3)}, rows(0, 0), 2, ACCEPT),
            ((1, 1), {"a": rows(1, 3), "b": rows(0.1, 0.1)}, rows(0, 0), 1, ACCEPT),  # the longest of them counts
            ((50, 3), {"a": rows(1, 3)}, rows(0, 0), 50, REFUSE),
            ((1, 150), {"a": rows(1, 3)}, rows(0, 0), 50, REFUSE),  # one layer is enough
            ((ROW_BAR, 1), {"a": rows(1, 1)}, rows(0, 0), ROW_BAR, ACCEPT),
            ((ROW_BAR + 0.1, 1), {"a": rows(1, 1)}, rows(0, 0), ROW_BAR + 0.1, REFUSE),
            ((0, 0), {"a": rows(1, 1)}, rows(0, 0), 0, ACCEPT),
            ((50, 50), {}, rows(0, 0), None, NOT_JUDGED),  # nobody to compare with
            ((50, 50), {"copy": rows(0, 0)}, rows(0, 0), None, NOT_JUDGED),
            ((50, 50), {}, rows(1, 40), 50, REFUSE),  # an imported public's row is one
            ((math.nan, 1), {"a": rows(1, 1)}, rows(0, 0), math.inf, REFUSE),
        ],
    )
    def test_length_against_the_others(self, own, others, public, figure, verdict):
        found = by_name(judge_rows(rows(*own), public=public, others=others))[OTHERS]
        assert found.verdict == verdict
        assert found.figure == (None if figure is None else pytest.approx(figure))

    @pytest.mark.parametrize(
        ("own", "newcomers", "others", "figure", "verdict"),
        [
            ((200, 200), {"a": rows(1, 3), "evil": rows(200, 200)}, {}, 200, REFUSE),  # the shortest counts
            ((200, 1), {"evil": rows(200, 200), "a": rows(1, 3)}, {}, 200, REFUSE),
            ((200, 200), {"copy": rows(0, 0)}, {}, None, NOT_JUDGED),
            ((200, 200), {"evil": rows(200, 200)}, {"a": rows(1, 3)}, 200, REFUSE),  # no excuse beside who is there
            ((2, 2), {"tiny": rows(0.01, 0.01)}, {"a": rows(1, 1)}, 2, ACCEPT),
            ((1, 1), {"nan": rows(math.nan, math.nan), "a": rows(1, 1)}, {}, 1, ACCEPT),
        ],
    )
    def test_length_against_those_who_come_with_it(self, own, newcomers, others, figure, verdict):
        found = by_name(judge_rows(rows(*own), public=rows(0, 0), others=others, newcomers=newcomers))[OTHERS]
        assert found.verdict == verdict
        assert found.figure == (None if figure is None else pytest.approx(figure))

    @pytest.mark.parametrize("spread", [2.4, 3.2, 9.1])  # as measured: one method, beside public text, two methods
    @pytest.mark.parametrize("count", range(2, 9))
    def test_honest_ones_who_come_together_are_let_in(self, count, spread):
        lengths = [5 * spread ** (i / (count - 1)) for i in range(count)]
        for i, own in enumerate(lengths):
            newcomers = {str(j): rows(length) for j, length in enumerate(lengths) if j != i}
            assert (
                by_name(judge_rows(rows(own), public=rows(0), others={}, newcomers=newcomers))[OTHERS].verdict
                == ACCEPT
            )

    def test_newcomers_do_not_vouch_for_each_others_biases(self):
        evil = rows(1, bias=100)
        found = by_name(judge_rows(evil, public=rows(0), others={"a": rows(1)}, newcomers={"evil": evil}))[BIAS]
        assert (found.verdict, found.figure) == (REFUSE, 100)

    @pytest.mark.parametrize(
        ("length", "scale", "verdict"),
        [
            (LONE_ROW_BAR - 1, 0.0, ACCEPT),  # against 1: public's matrix is zero
            (LONE_ROW_BAR + 1, 0.0, REFUSE),
            (3 * LONE_ROW_BAR - 1, 3 / H**0.5, ACCEPT),  # its rows are 3 long
            (3 * LONE_ROW_BAR + 1, 3 / H**0.5, REFUSE),
        ],
    )
    def test_length_against_public_where_nobody_else_is(self, length, scale, verdict):
        matrix = torch.full((8, H), scale)
        found = judge_rows(rows(length), public=rows(0), others={}, input_matrices=[matrix])
        assert by_name(found)[LONE].verdict == verdict

    @pytest.mark.parametrize(
        ("own", "public", "other", "figure", "verdict"),
        [
            (-16, 0, -1, -16, ACCEPT),
            (1, 0, -1, 1, ACCEPT),
            (10, 0, -1, 10, REFUSE),
            (20, 0.5, -1, 19.5, REFUSE),  # public's is a prior
            (BIAS_BAR - 0.01, 0, -9, BIAS_BAR - 0.01, ACCEPT),
            (BIAS_BAR + 0.01, 0, -9, BIAS_BAR + 0.01, REFUSE),
            (8, 0, 7, 1, ACCEPT),  # where all have such biases, their inputs are so
            (math.nan, 0, 0, math.inf, REFUSE),
        ],
    )
    def test_bias(self, own, public, other, figure, verdict):
        others = {"a": rows(1, 1, bias=other)}
        ours = rows(1, bias=-20) + rows(1, bias=own)  # the second layer decides
        found = by_name(judge_rows(ours, public=rows(0, 0, bias=public), others=others))[BIAS]
        assert found.verdict == verdict
        assert found.figure == pytest.approx(figure)

    def test_the_sentence_names_layer_figure_and_whose_row_it_was_held_against(self):
        found = judge_rows(rows(1, 90), public=rows(0, 0), others={"math": rows(1, 2), "code": rows(1, 3)})
        assert (
            by_name(found)[OTHERS].sentence
            == "the row in layer 1 is 30 times as long as the longest other one, of 'code'"
        )

    def test_rows_in_shards_are_not_gathered(self):
        sharded = rows(1)
        sharded[0][0].full_tensor = None  # what tells a DTensor
        assert set(verdicts(judge_rows(sharded, public=rows(0), others={})).values()) == {NOT_JUDGED}
        found = by_name(judge_rows(rows(50), public=rows(0), others={"a": sharded, "b": rows(1)}))
        assert found[OTHERS].figure == pytest.approx(50)  # against those that can be read

    def test_rows_by_the_names_of_a_package_come_in_the_order_of_their_layers(self):
        def tensors(*lengths):
            made = enumerate(rows(*lengths))
            return {
                f"layers.{i}.router.{k}": v for i, pair in made for k, v in zip(("weight", "bias"), pair, strict=True)
            }

        lengths = [1.0] * 12
        found = judge_row_tensors(
            tensors(*lengths[:10], 50, 1), public=tensors(*[0] * 12), others={"a": tensors(*lengths)}
        )
        assert by_name(found)[OTHERS].figure == pytest.approx(50)
        assert "layer 10" in by_name(found)[OTHERS].sentence


class TestScale:
    """Public's matrices are 64 x 64 of 0.5: above the size of one that keeps its input's, 1 / 8."""

    @staticmethod
    def network(**scales: float) -> nn.Module:
        network = nn.Module()
        for name in ("up", "down"):
            part = nn.Linear(64, 64)
            nn.init.constant_(part.weight, 0.5 * scales.get(name, 1.0))
            nn.init.constant_(part.bias, 2.0 * scales.get(f"{name}_bias", 1.0))
            network.add_module(name, part)
        return network

    @pytest.mark.parametrize(
        ("scales", "weights", "empty", "figure"),
        [
            ({}, ACCEPT, ACCEPT, 1),
            ({"down": 1.15}, ACCEPT, ACCEPT, 1.15),
            ({"down": 30}, REFUSE, ACCEPT, 30),
            ({"down": -30}, REFUSE, ACCEPT, 30),
            ({"up_bias": 30}, REFUSE, ACCEPT, 30),
            ({"up": WEIGHT_BAR - 0.1}, ACCEPT, ACCEPT, WEIGHT_BAR - 0.1),
            ({"up": WEIGHT_BAR + 0.1}, REFUSE, ACCEPT, WEIGHT_BAR + 0.1),
            ({"up": 0}, ACCEPT, REFUSE, 1),
            ({"up_bias": 0}, ACCEPT, ACCEPT, 1),
            ({"down": EMPTY_BAR * 0.9}, ACCEPT, REFUSE, 1),
            ({"down": EMPTY_BAR * 1.1}, ACCEPT, ACCEPT, 1),
        ],
    )
    def test_size_against_public(self, scales, weights, empty, figure):
        found = by_name(judge_scale([self.network(), self.network(**scales)], [self.network(), self.network()]))
        assert (found["weights"].verdict, found["empty weights"].verdict) == (weights, empty)
        assert found["weights"].figure == pytest.approx(figure, rel=0.01)
        if weights == REFUSE:
            assert f"{next(iter(scales)).replace('_', '.').removesuffix('.bias')}." in found["weights"].sentence
            assert "layer 1" in found["weights"].sentence

    @pytest.mark.parametrize(("size", "verdict"), [(4.0 / 8, ACCEPT), (4.1 / 8, REFUSE)])
    def test_a_matrix_that_starts_at_zero_may_grow_to_what_keeps_the_size_of_its_input(self, size, verdict):
        public, grown = self.network(down=0), self.network(down=size / 0.5)
        found = by_name(judge_scale([grown], [public]))
        assert found["weights"].verdict == verdict
        assert found["empty weights"].verdict == ACCEPT

    def test_experts_of_another_width_are_measured_per_number(self):
        narrow = self.network()
        narrow.up = nn.Linear(64, 32)
        nn.init.constant_(narrow.up.weight, 0.5)
        nn.init.constant_(narrow.up.bias, 2.0)
        assert by_name(judge_scale([narrow], [self.network()]))["weights"].figure == pytest.approx(1)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
    def test_in_other_dtypes(self, dtype):
        def cast(network):
            for part in (network.up, network.down):
                for key in ("weight", "bias"):
                    setattr(part, key, nn.Parameter(getattr(part, key).detach().to(dtype), requires_grad=False))
            return network

        found = by_name(judge_scale([cast(self.network(down=30))], [cast(self.network())]))
        assert found["weights"].figure == pytest.approx(30, rel=0.05)

    def test_numbers_whose_norm_is_too_large_for_float16(self):
        public, drowning = self.network().half(), self.network(down=100_000 / 64 / 0.5).half()
        assert by_name(judge_scale([drowning], [public]))["weights"].figure == pytest.approx(
            100_000 / 64 / 0.5, rel=0.01
        )


class TestModels:
    """On live models, of which nothing may change."""

    @staticmethod
    def parts(model: FlexMoeForCausalLM, rank: int | None = None):
        record = {"name": "new", "kind": "full"}
        if rank is not None:
            record |= {"kind": "low_rank", "rank": [rank] * 2}
        return parts_from_public(model.flexmoe_blocks(), fresh_experts(model.config, record))

    @pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox"])
    def test_a_copy_of_public_is_let_in_by_any_family(self, family):
        model = tiny_flexmoe(family, ["math"])
        before = {key: value.clone() for key, value in model.state_dict().items()}
        found = judge_parts(model.flexmoe_blocks(), self.parts(model))
        assert set(verdicts(found).values()) == {ACCEPT}
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    def test_an_expert_is_not_held_against_the_one_that_it_replaces(self):
        model = tiny_flexmoe("llama", ["math"])
        parts = self.parts(model)
        for _, row in parts:
            nn.init.constant_(row.weight, 1e3)
        blocks = model.flexmoe_blocks()
        assert verdicts(judge_parts(blocks, parts))[OTHERS] == REFUSE
        assert verdicts(judge_parts(blocks, parts, replaced="math"))[OTHERS] == NOT_JUDGED

    @pytest.mark.parametrize(("scale", "verdict"), [(1.0, ACCEPT), (300.0, REFUSE)])
    def test_a_low_rank_difference_is_measured_without_being_made(self, scale, verdict):
        model = tiny_flexmoe("llama")
        parts = self.parts(model, rank=2)
        delta = parts[1][0].down_proj
        nn.init.normal_(delta.B.weight, std=0.3 * scale, generator=torch.Generator().manual_seed(0))
        found = by_name(judge_parts(model.flexmoe_blocks(), parts))
        product = delta.B.weight @ delta.A.weight
        unit = 32**-0.5  # public's own weights, random ones, are smaller than that
        assert found["weights"].figure == pytest.approx((product.square().mean().sqrt() / unit).item(), rel=1e-4)
        assert found["weights"].verdict == verdict
        assert "empty weights" not in found  # no difference is none to complain of

    def test_what_cannot_be_read_is_not_judged_and_says_why(self):
        model = tiny_flexmoe("llama", ["math"])
        parts = self.parts(model)
        with torch.device("meta"):
            hollow = FlexMoeForCausalLM(copy.deepcopy(model.config))
        found = judge_parts(hollow.flexmoe_blocks(), parts)
        assert set(verdicts(found).values()) == {NOT_JUDGED}
        assert "meta" in by_name(found)["weights"].sentence
        refuse_unless_admitted("new", found)
        found = judge_parts(model.flexmoe_blocks(), [(network.to("meta"), row.to("meta")) for network, row in parts])
        assert set(verdicts(found).values()) == {NOT_JUDGED}

    def test_beside_a_quantised_public_rows_are_judged(self):
        model = tiny_flexmoe("llama", ["math"])
        parts = self.parts(model)
        for block in model.flexmoe_blocks():
            for matrix in block.experts[PUBLIC].children():
                if isinstance(matrix, nn.Linear):
                    matrix.weight = nn.Parameter(matrix.weight.detach().to(torch.int8), requires_grad=False)
        found = by_name(judge_parts(model.flexmoe_blocks(), parts))
        assert found[OTHERS].verdict == found[BIAS].verdict == ACCEPT
        assert found[LONE].verdict == found["weights"].verdict == NOT_JUDGED
        assert "quantised" in found["weights"].sentence

    def test_beneath_an_adapter(self):
        peft = pytest.importorskip("peft")
        model = tiny_flexmoe("llama", ["math"])
        parts = self.parts(model)
        plain = judge_parts(model.flexmoe_blocks(), parts)
        pattern = r".*\.experts\.(?:public)\.(?:down_proj|gate_proj)"
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=pattern))
        assert judge_parts(model.flexmoe_blocks(), parts) == plain


def test_a_refusal_says_who_what_the_figures_and_what_to_do():
    found = judge_rows(rows(50, bias=10.0), public=rows(0), others={"a": rows(1)})
    with pytest.raises(AdmissionError) as caught:
        refuse_unless_admitted("evil", found)
    text = str(caught.value)
    for part in (
        "--no-verify",
        "'evil'",
        "50 times",
        "bar 12",
        "10 above",
        "bar 4.6",
        "flexmoe verify",
        "verify=False",
    ):
        assert part in text
    assert "\n" not in text
    assert isinstance(caught.value, PackageError)
    assert caught.value.findings == tuple(found)


def test_what_was_not_judged_is_no_reason_to_refuse():
    refuse_unless_admitted("new", [Finding("bias", NOT_JUDGED, None, None, "public's bias cannot be read")])
    refuse_unless_admitted("new", [])
