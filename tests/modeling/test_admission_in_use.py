"""Who is refused where experts come in: on a live model, on disk, by reference. The checks have tests of their own."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmoe.conversion.by_reference import compose_by_reference
from flexmoe.conversion.compose import add, compose
from flexmoe.conversion.graft import graft
from flexmoe.conversion.judging import anchor_matrices, public_matrices
from flexmoe.conversion.pins import update_composition
from flexmoe.conversion.stored import StoredModel
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.modeling.admission_flexmoe import AdmissionError, input_matrix_name, sample_step
from flexmoe.modeling.packages_flexmoe import PackageError
from flexmoe.modeling.trust_flexmoe import UntrustedPackageError
from flexmoe.testing import perturb_expert, tiny_anchor

Tensors = dict[str, torch.Tensor]

# A planted expert, the check that sees it, and whether that is one of a row, which is also judged on disk.
PLANTED: dict[str, tuple[Callable[[Tensors], object], str, bool]] = {
    "row x 50": (
        lambda t: [t[f"layers.{i}.router.weight"].mul_(50) for i in (0, 1)],
        r"row against the others: .* times as long as the (longest|shortest) other one",
        True,
    ),
    "row x 50 in one layer": (lambda t: t["layers.1.router.weight"].mul_(50), r"the row in layer 1 is \d+", True),
    "bias + 10": (lambda t: t["layers.0.router.bias"].add_(10), r"the bias in layer 0 is 1\d.* above", True),
    "down_proj x 30": (
        lambda t: t["layers.1.ffn.down_proj.weight"].mul_(30),
        r"weights: down_proj\.weight in layer 1 has .* times the size",
        False,
    ),
    "weights lost": (lambda t: t["layers.0.ffn.up_proj.weight"].zero_(), "empty weights", False),
}


def plant(package: Path, out: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of a package with other weights and a manifest that agrees: the owner is the attacker."""
    shutil.copytree(package, out)
    tensors = load_file(out / "expert.safetensors")
    change(tensors)
    save_file(tensors, out / "expert.safetensors")
    manifest = json.loads((out / "expert_config.json").read_text())
    digest = hashlib.sha256((out / "expert.safetensors").read_bytes()).hexdigest()
    manifest["sha256"] = {"expert.safetensors": digest}
    (out / "expert_config.json").write_text(json.dumps(manifest))
    return out


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graft, honest packages without biases, and each planted one, made of `code`."""
    folder = tmp_path_factory.mktemp("stored")
    tiny_anchor("llama").save_pretrained(folder / "anchor")
    graft(folder / "anchor", folder / "grafted")
    for name in ("math", "code", "law"):
        model = FlexMoeForCausalLM.from_pretrained(folder / "grafted")
        model.add_expert_copy(name)
        perturb_expert(model, name)
        for block in model.flexmoe_blocks():
            torch.nn.init.zeros_(block.router[name].bias)
        model.save_expert(name, folder / name)
    for name, (change, _, _) in PLANTED.items():
        plant(folder / "code", folder / name, change)
    compose(folder / "grafted", [folder / "math"], folder / "model")
    return folder


@pytest.mark.parametrize("planted", PLANTED)
def test_a_live_model_refuses_them_and_stays_as_it_was(stored: Path, planted: str) -> None:
    _, words, _ = PLANTED[planted]
    model = FlexMoeForCausalLM.from_pretrained(stored / "model")
    model.add_expert(stored / "law")
    before, config = model.state_dict(), model.config.to_dict()
    with pytest.raises(AdmissionError, match=f"Expert 'code' is refused.*{words}.*verify=False"):
        model.add_expert(stored / planted)
    with pytest.raises(AdmissionError, match=words):
        model.replace_expert("law", stored / planted)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.config.to_dict() == config
    assert model.add_expert(stored / "code", name="honest") == "honest"
    assert model.add_expert(stored / planted, verify=False) == "code"


def test_an_expert_is_not_measured_by_the_one_whose_place_it_takes(stored: Path) -> None:
    model = FlexMoeForCausalLM.from_pretrained(stored / "model")
    model.add_expert(stored / "row x 50", name="long", verify=False)
    model.add_expert(stored / "row x 50", name="other")  # beside one as long it is nothing special
    model.remove_expert("other")
    with pytest.raises(AdmissionError, match="longest other one, of 'math'"):
        model.replace_expert("long", stored / "row x 50")
    model.replace_expert("long", stored / "code")


@pytest.mark.parametrize("planted", PLANTED)
def test_on_disk_rows_are_judged(stored: Path, planted: str, tmp_path: Path) -> None:
    _, words, is_of_a_row = PLANTED[planted]
    ways: list[Callable[..., object]] = [
        lambda **o: compose(
            stored / "grafted", [stored / "math", stored / planted], tmp_path / "a", public_prior=0.0, **o
        ),
        lambda **o: add(stored / "model", stored / planted, tmp_path / "b", **o),
        lambda **o: compose_by_reference(
            stored / "grafted",
            [stored / planted, stored / "math"],
            tmp_path / "c",
            anchor=stored / "anchor",
            public_prior=0.0,
            **o,
        ),
    ]
    for way in ways:
        if is_of_a_row:
            with pytest.raises(AdmissionError, match=words):
                way()
            assert not list(tmp_path.iterdir())
    for way in ways:
        way(verify=False)


@pytest.fixture(scope="module")
def evil(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages of two who conspire, in three ways."""
    folder = tmp_path_factory.mktemp("evil")
    for name in ("math", "code"):
        plant(stored / name, folder / f"bias-{name}", lambda t: t["layers.0.router.bias"].add_(100))
        plant(stored / name, folder / f"row-{name}", lambda t: t["layers.1.router.weight"].mul_(200))
        plant(stored / name, folder / f"absurd-{name}", lambda t: t["layers.0.router.weight"].mul_(1e6))
    return folder


class TestWhoComesTogether:
    """Packages of one run are no measure for each other that a hijacker could make use of."""

    @pytest.mark.parametrize(
        ("planted", "words"),
        [
            (("bias-math", "bias-code"), "bias: the bias in layer 0 is 100 above the largest other one, of 'public'"),
            (("row-math", "row-code"), "the shortest other one that comes with it, of 'law'"),
            (("absurd-math", "absurd-code"), "row against public: the row in layer 0"),
        ],
    )
    def test_two_who_conspire(
        self, stored: Path, evil: Path, planted: tuple[str, str], words: str, tmp_path: Path
    ) -> None:
        packages = [stored / "law", *(evil / name for name in planted)]
        with pytest.raises(AdmissionError, match=words):
            compose(stored / "grafted", packages, tmp_path / "a", public_prior=0.0)
        with pytest.raises(AdmissionError, match=words):
            compose_by_reference(
                stored / "grafted", packages, tmp_path / "b", anchor=stored / "anchor", public_prior=0.0
            )

    def test_one_alone_is_held_against_publics_matrix_as_in_a_live_model(
        self, stored: Path, evil: Path, tmp_path: Path
    ) -> None:
        graft, package = stored / "grafted", evil / "absurd-math"
        ways: list[Callable[[], object]] = [
            lambda: FlexMoeForCausalLM.from_pretrained(graft).add_expert(package),
            lambda: compose(graft, [package], tmp_path / "a"),
            lambda: add(graft, package, tmp_path / "b"),
            lambda: compose_by_reference(graft, [package], tmp_path / "c", anchor=stored / "anchor"),
        ]
        figures = set()
        for way in ways:
            with pytest.raises(AdmissionError, match="row against public") as caught:
                way()
            figures |= {found.figure for found in caught.value.findings if found.check == "row against public"}
        assert len(figures) == 1

    @pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox"])
    def test_the_matrix_on_disk_is_that_of_the_live_model(self, family: str, tmp_path: Path) -> None:
        tiny_anchor(family).save_pretrained(tmp_path / "anchor")
        stored = StoredModel(graft(tmp_path / "anchor", tmp_path / "grafted"))
        live = FlexMoeForCausalLM.from_pretrained(stored.folder)
        hidden = live.config.get_text_config().hidden_size
        for block, ours, dense in zip(
            live.flexmoe_blocks(),
            public_matrices(stored, live),
            anchor_matrices(tmp_path / "anchor", hidden),
            strict=True,
        ):
            matrix = block.experts["public"].get_parameter(str(input_matrix_name(block.experts["public"], hidden)))
            assert ours is not None
            assert dense is not None
            assert torch.equal(ours, matrix[:: sample_step(len(matrix))])
            assert torch.equal(ours, dense)

    @pytest.mark.parametrize("wild", [math.nan, -math.inf])
    def test_what_is_no_number_is_named_as_that(self, stored: Path, wild: float, tmp_path: Path) -> None:
        package = plant(stored / "math", tmp_path / "wild", lambda t: t["layers.1.router.weight"].fill_(wild))
        with pytest.raises(PackageError, match=r"wild: tensor 'layers\.1\.router\.weight' holds NaN or an infinity"):
            compose(stored / "grafted", [package], tmp_path / "out")

    def test_the_prior_in_force_is_the_measure_of_a_bias(self, stored: Path, tmp_path: Path) -> None:
        package = plant(stored / "math", tmp_path / "mid", lambda t: t["layers.0.router.bias"].fill_(5.0))
        for prior, is_let_in in ((0.5, True), (0.0, False)):
            for out, way, options in (
                ("a", compose, {}),
                ("b", compose_by_reference, {"anchor": stored / "anchor"}),
            ):
                with nullcontext() if is_let_in else pytest.raises(AdmissionError, match="is 5 above"):
                    way(stored / "grafted", [package], tmp_path / f"{out}{prior}", public_prior=prior, **options)


def referring(world: Path, out: Path, *names: str, **options: object) -> Path:
    packages = [world / name for name in names]
    return compose_by_reference(world / "grafted", packages, out, anchor=world / "anchor", public_prior=0.0, **options)


class TestCompositions:
    """A composition's own experts are a measure, and let in like any others where they come into another one."""

    @pytest.fixture
    def world(self, stored: Path, tmp_path: Path) -> Path:
        """A composition of two in a place where packages may be replaced."""
        world = shutil.copytree(stored, tmp_path / "world")
        referring(world, world / "composition", "math", "law")
        return world

    @pytest.mark.parametrize("planted", [name for name in PLANTED if PLANTED[name][2]])
    def test_experts_of_the_base_are_the_measure(self, world: Path, planted: str, tmp_path: Path) -> None:
        with pytest.raises(AdmissionError, match=r"longest other one, of '(math|law|public)'|is 1.* above"):
            compose_by_reference(world / "composition", [world / planted], tmp_path / "out")
        compose_by_reference(world / "composition", [world / planted], tmp_path / "out", verify=False)
        compose_by_reference(world / "composition", [world / "code"], tmp_path / "fine")

    def test_rows_count_as_they_are_in_the_composition(self, world: Path, tmp_path: Path) -> None:
        model = FlexMoeForCausalLM.from_pretrained(world / "composition")
        for block in model.flexmoe_blocks():
            block.router["law"].weight.data *= 50
        sources = {"public": world / "anchor", "math": world / "math", "law": world / "law"}
        tuned = model.save_composition(world / "tuned", sources=sources)
        compose_by_reference(tuned, [world / "row x 50"], tmp_path / "a")  # beside one as long it is nothing special
        code = referring(world, world / "code-alone", "code")
        with pytest.raises(AdmissionError, match=r"Expert 'law' is refused.*the longest other one, of 'code'"):
            compose_by_reference(code, [tuned], tmp_path / "b")
        merged = compose_by_reference(code, [tuned], tmp_path / "b", verify=False)
        assert FlexMoeForCausalLM.from_pretrained(merged).expert_names == ["public", "code", "math", "law"]

    def test_the_policy_is_asked_of_everybody(self, world: Path, tmp_path: Path) -> None:
        code = referring(world, world / "code-alone", "code")
        for allowed, is_let_in in (("*", True), ("*/code", False), ("*/[!c]*", False)):
            rules = [{"pattern": f"{world}/{allowed}", "allowed_signers": "anyone"}]
            policy = tmp_path / "policy.json"
            policy.write_text(json.dumps({"format_version": 1, "rules": rules}))
            for base, part in ((code, world / "composition"), (world / "composition", code)):
                with nullcontext() if is_let_in else pytest.raises(UntrustedPackageError):
                    compose_by_reference(base, [part], tmp_path / "out", policy=policy, overwrite=True)

    def test_a_package_that_is_another_one_now_is_not_passed_on(self, world: Path, tmp_path: Path) -> None:
        code = referring(world, world / "code-alone", "code")
        plant(world / "math", world / "other", lambda t: t["layers.0.ffn.up_proj.weight"].mul_(1.01))
        shutil.rmtree(world / "math")
        shutil.move(world / "other", world / "math")
        for base, part in ((code, world / "composition"), (world / "composition", world / "code")):
            with pytest.raises(ValueError, match=r"'math' that a composition was saved with.*--update"):
                compose_by_reference(base, [part], tmp_path / "out")

    def test_a_damaged_package_of_a_composition_is_not_passed_on(self, world: Path, tmp_path: Path) -> None:
        code = referring(world, world / "code-alone", "code")
        file = world / "math" / "expert.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
        with pytest.raises(ValueError, match="SHA-256"):
            compose_by_reference(code, [world / "composition"], tmp_path / "out")

    @pytest.mark.parametrize("planted", [name for name in PLANTED if PLANTED[name][2]])
    def test_a_newer_version_is_judged_in_its_place(self, world: Path, planted: str, tmp_path: Path) -> None:
        both = referring(world, world / "both", "math", "code")
        shutil.rmtree(world / "code")
        shutil.copytree(world / planted, world / "code")
        for experts in ({"code": None}, None):
            with pytest.raises(AdmissionError, match=r"Expert 'code' is refused.*of '(math|public)'"):
                update_composition(both, tmp_path / "out", experts=experts)
        assert not (tmp_path / "out").exists()
        (move,) = update_composition(both, tmp_path / "out", verify=False)
        assert move.name == "code"

    def test_neither_the_old_version_nor_another_new_one_is_an_excuse(self, world: Path, tmp_path: Path) -> None:
        long = plant(world / "law", world / "long", lambda t: t["layers.0.router.weight"].mul_(200))
        base = referring(world, world / "three", "math", "code", "long", names={"law": "long"}, verify=False)
        plant(long, world / "longer", lambda t: t["layers.0.router.weight"].mul_(2))
        shutil.rmtree(long)
        shutil.move(world / "longer", long)
        with pytest.raises(AdmissionError, match=r"Expert 'long' is refused.*the longest other one, of '(code|math)'"):
            update_composition(base, tmp_path / "out")
        shutil.rmtree(world / "code")
        plant(long, world / "code", lambda t: None)
        with pytest.raises(AdmissionError, match=r"is refused.*the longest other one, of 'math'"):
            update_composition(base, tmp_path / "out")

    def test_the_only_expert_is_held_against_the_anchor(self, world: Path, tmp_path: Path) -> None:
        alone = referring(world, world / "alone", "math")
        plant(world / "math", world / "newer", lambda t: t["layers.0.router.weight"].mul_(1e6))
        shutil.rmtree(world / "math")
        shutil.move(world / "newer", world / "math")
        with pytest.raises(AdmissionError, match="row against public"):
            update_composition(alone, tmp_path / "out")
