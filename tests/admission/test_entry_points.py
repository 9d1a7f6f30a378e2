"""Admission checks wherever experts are added: to a live model, on disk, by reference. See also `test_checks.py`."""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import flexmoe
from flexmoe.admission.findings import AdmissionError
from flexmoe.admission.measures import input_matrix_name, sample_step
from flexmoe.admission.outputs import OUTPUT
from flexmoe.admission.router_inputs import inputs_of_anchor, inputs_of_live, inputs_of_stored
from flexmoe.admission.verification import verify
from flexmoe.composition.edit import compose_by_reference, update_composition
from flexmoe.conversion.compose import add, compose
from flexmoe.conversion.graft import graft
from flexmoe.hub.stored_model import StoredModel
from flexmoe.io.dense import DenseCheckpoint
from flexmoe.io.tensors import TensorFile
from flexmoe.meta import build_on_meta
from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.norms import input_norms
from flexmoe.packages.package import PackageError
from flexmoe.packages.trust import UntrustedPackageError
from flexmoe.testing import ANCHOR_CONFIGS, perturb_expert, random_tokens, tiny_anchor
from flexmoe_cli import main
from tests.support.families import tiny_config
from tests.support.soak import soak, thinned

Tensors = dict[str, torch.Tensor]


def repeated(tensors: Tensors, times: int) -> None:
    """Repeats each neuron: the matrices keep their size, the output is `times` times as large."""
    for layer in (0, 1):
        for name in ("gate", "up", "down"):
            key = f"layers.{layer}.ffn.{name}_proj.weight"
            tensors[key] = tensors[key].repeat((1, times) if name == "down" else (times, 1))


def scaled(tensors: Tensors, part: str, factor: float) -> None:
    for name in tensors:
        if part in name:
            tensors[name].mul_(factor)


# A malicious expert, the check that refuses it, and whether that is a check of rows.
MALICIOUS: dict[str, tuple[Callable[[Tensors], object], str, bool]] = {
    "row x 50": (
        lambda t: scaled(t, ".router.weight", 50),
        r"row against the others: .* times as long as the (longest other|shortest other incoming) row",
        True,
    ),
    "row x 50 in one layer": (lambda t: t["layers.1.router.weight"].mul_(50), r"the row in layer 1 is \d+", True),
    "bias + 10": (lambda t: t["layers.0.router.bias"].add_(10), r"the bias in layer 0 is 1\d.* above", True),
    "down_proj x 30": (
        lambda t: t["layers.1.ffn.down_proj.weight"].mul_(30),
        r"output: in layer 1, the output is .* times as large",
        False,
    ),
    "neurons x 300": (lambda t: repeated(t, 300), r"output: in layer 0, the output is \d+", False),
    "matrices x 7": (lambda t: scaled(t, "_proj.weight", 7), r"output: in layer 0, the output is \d+", False),
    "weights lost": (lambda t: t["layers.0.ffn.up_proj.weight"].zero_(), "empty output: in layer 0", False),
}

# One attack of each check and of each way to escape it; `make soak` runs the others too.
DISTINCT = ("row x 50 in one layer", "bias + 10", "neurons x 300", "matrices x 7", "weights lost")
attacks = pytest.mark.parametrize("attack", thinned(MALICIOUS, DISTINCT))

# Factors of the first matrix of a low-rank expert, in its second layer.
FACTORS = {"A of 3e38": (3e38, 0.0), "1e37 against 1e-37": (1e37, 1e-37), "both 300": (300.0, 300.0)}


def change_package(package: Path, out: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of a package with changed weights and hashes, as a malicious owner could make it."""
    shutil.copytree(package, out)
    tensors = load_file(out / "expert.safetensors")
    change(tensors)
    save_file(tensors, out / "expert.safetensors")
    manifest = json.loads((out / "expert_config.json").read_text())
    digest = hashlib.sha256((out / "expert.safetensors").read_bytes()).hexdigest()
    manifest["sha256"] = {"expert.safetensors": digest}
    if manifest["kind"] == "full":
        manifest["ffn"]["intermediate"] = [len(tensors[f"layers.{i}.ffn.up_proj.weight"]) for i in (0, 1)]
    (out / "expert_config.json").write_text(json.dumps(manifest))
    return out


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graft, honest packages without biases, each malicious one, made from `code`, and compositions by reference."""
    folder = tmp_path_factory.mktemp("stored")
    tiny_anchor("llama").save_pretrained(folder / "anchor")
    graft(folder / "anchor", folder / "grafted")
    for name in ("math", "code", "law", "thin"):
        model = FlexMoeForCausalLM.from_pretrained(folder / "grafted")
        model.add_expert_copy(name, rank=2 if name == "thin" else None)
        perturb_expert(model, name)
        for block in model.flexmoe_blocks():
            torch.nn.init.zeros_(block.router[name].bias)
        model.save_expert(name, folder / name)
    for name, (change, _, _) in MALICIOUS.items():
        change_package(folder / "code", folder / name, change)
    for name, values in FACTORS.items():

        def fill(tensors: Tensors, values: tuple[float, float] = values) -> None:
            for part, value in zip(("lora_A", "lora_B"), values, strict=True):
                tensors[f"layers.1.ffn.gate_proj.{part}.weight"].fill_(value)

        change_package(folder / "thin", folder / name, fill)
    compose(folder / "grafted", [folder / "math"], folder / "model")
    referring(folder, folder / "of math", "math")
    referring(folder, folder / "of code", "code")
    referring(folder, folder / "of math and law", "math", "law")
    referring(folder, folder / "of math and code", "math", "code")
    return folder


@attacks
def test_a_live_model_refuses_them_and_is_unchanged(stored: Path, attack: str) -> None:
    _, words, _ = MALICIOUS[attack]
    model = FlexMoeForCausalLM.from_pretrained(stored / "model")
    model.add_expert(stored / "law")
    before, config = model.state_dict(), model.config.to_dict()
    with pytest.raises(AdmissionError, match=f"{re.escape(attack)}: Expert 'code' is refused.*{words}.*verify=False"):
        model.add_expert(stored / attack)
    with pytest.raises(AdmissionError, match=words):
        model.replace_expert("law", stored / attack)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.config.to_dict() == config
    assert model.add_expert(stored / "code", name="honest") == "honest"
    assert model.add_expert(stored / attack, verify=False) == "code"


def test_the_replaced_expert_is_no_reference(stored: Path) -> None:
    model = FlexMoeForCausalLM.from_pretrained(stored / "model")
    model.add_expert(stored / "row x 50", name="long", verify=False)
    model.add_expert(stored / "row x 50", name="other")  # accepted beside an equally long one
    model.remove_expert("other")
    with pytest.raises(AdmissionError, match="longest other row, of 'math'"):
        model.replace_expert("long", stored / "row x 50")
    model.replace_expert("long", stored / "code")


def ways_on_disk(stored: Path, attack: str, out: Path) -> list[Callable[..., object]]:
    """Every way to add a package on disk; the folders that they write are in `out`."""
    packages = [stored / "math", stored / attack]
    settings = {"anchor": stored / "anchor", "public_prior": 0.0}
    return [
        lambda **o: compose(stored / "grafted", packages, out / "a", public_prior=0.0, **o),
        lambda **o: add(stored / "model", stored / attack, out / "b", **o),
        lambda **o: compose_by_reference(stored / "grafted", packages[::-1], out / "c", **settings, **o),
    ]


@pytest.mark.promise(
    "`compose`, `add`, `compose_by_reference`",
    "an expert whose neurons are repeated, or whose matrices are all a little too large",
    "refused by what its networks compute, in any layer, before the next layer is read",
)
@attacks
def test_they_are_refused_on_disk(stored: Path, attack: str, tmp_path: Path) -> None:
    _, words, _ = MALICIOUS[attack]
    ways = ways_on_disk(stored, attack, tmp_path)
    for way in ways:
        with pytest.raises(AdmissionError, match=f"{re.escape(attack)}: Expert 'code' is refused.*{words}"):
            way()
        assert not list(tmp_path.iterdir())
    for way in ways:
        way(verify=False)


@pytest.mark.promise(
    "`add_expert`, `compose`, `add`, `compose_by_reference`, `verify`",
    "low-rank factors of 3e38 and 0, or of 1e37 and 1e-37",
    "refused: the output is not finite",
)
@pytest.mark.parametrize("factors", thinned(FACTORS, ["A of 3e38", "1e37 against 1e-37"]))
def test_factors_are_judged_by_what_they_compute(stored: Path, factors: str, tmp_path: Path) -> None:
    model = FlexMoeForCausalLM.from_pretrained(stored / "model")
    for way in (lambda: model.add_expert(stored / factors), *ways_on_disk(stored, factors, tmp_path)):
        with pytest.raises(
            AdmissionError, match=f"{factors}: Expert 'thin' is refused. output: in layer 1, .*threshold"
        ):
            way()
    assert not list(tmp_path.iterdir())
    assert model.expert_names == ["public", "math"]
    refused = verify(stored / factors, stored / "model").refusals
    assert [finding.check for finding in refused] == [OUTPUT]


def test_an_honest_low_rank_expert_is_accepted_on_disk(stored: Path, tmp_path: Path) -> None:
    for way in ways_on_disk(stored, "thin", tmp_path):
        way()


def test_without_the_anchor_outputs_have_to_be_finite(stored: Path, tmp_path: Path) -> None:
    """A composition whose anchor is not available: experts cannot be compared with public."""
    world = shutil.copytree(stored, tmp_path / "world")
    base = world / "of math"
    shutil.rmtree(world / "anchor")
    for factors in ("A of 3e38", "1e37 against 1e-37"):
        with pytest.raises(AdmissionError, match="output is NaN or infinite"):
            compose_by_reference(base, [world / factors], tmp_path / "out")
    for name in ("both 300", "thin", "neurons x 300"):
        compose_by_reference(base, [world / name], tmp_path / "out", overwrite=True)


def test_a_layer_is_checked_before_the_next_is_read(stored: Path, tmp_path: Path, monkeypatch) -> None:
    """The package is read once, and one layer of it is in memory."""
    read: list[str] = []
    fill = TensorFile.fill

    def recording(self: TensorFile, name: str, *args: object) -> object:
        if self.path.parent.name == "lost" and ".router." not in name:
            read.append(name)
        return fill(self, name, *args)

    monkeypatch.setattr(TensorFile, "fill", recording)
    change_package(stored / "code", tmp_path / "lost", lambda t: t["layers.0.ffn.up_proj.weight"].zero_())
    with pytest.raises(AdmissionError, match="empty output: in layer 0"):
        add(stored / "model", tmp_path / "lost", tmp_path / "out")
    assert not any(name.startswith("layers.1.") for name in read)
    read.clear()
    add(stored / "model", tmp_path / "lost", tmp_path / "out", verify=False)
    assert len(read) == len(set(read)) == 6


@pytest.mark.promise(
    "`compose`, `compose_by_reference`", "a `public_prior` that float32 cannot hold", "refused with the limit"
)
@pytest.mark.parametrize(
    ("prior", "error"), [(1e39, ValueError), (-1e39, ValueError), (math.nan, ValueError), (10**400, ValueError),
                         (math.inf, ValueError), ("1", TypeError), (True, TypeError)]
)  # fmt: skip
def test_a_prior_has_to_be_a_float32(stored: Path, prior: object, error: type[Exception], tmp_path: Path) -> None:
    for way, base, options in (
        (compose, stored / "grafted", {}),
        (compose_by_reference, stored / "grafted", {"anchor": stored / "anchor"}),
        (compose_by_reference, stored / "of math", {}),
    ):
        with pytest.raises(error, match="public_prior must be a"):
            way(base, [stored / "code"], tmp_path / "out", public_prior=prior, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.promise(
    "`FlexMoeConfig`, `graft`, `compose`, `compose_by_reference`",
    "`num_experts_per_tok=0`",
    "an ordinary ValueError",
)
@pytest.mark.parametrize(
    ("k", "error", "message"), [(0, ValueError, "at least 1; got 0"), (2.0, TypeError, "integer")]
)
def test_a_number_of_experts_per_token_is_an_integer(
    stored: Path, k: object, error: type[Exception], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for way in (
        lambda: compose(stored / "grafted", [stored / "code"], out, num_experts_per_tok=k),
        lambda: compose_by_reference(stored / "grafted", [stored / "code"], out, num_experts_per_tok=k),
        lambda: graft(stored / "anchor", out, num_experts_per_tok=k),
        lambda: flexmoe.graft(stored / "anchor", out, num_experts_per_tok=k),
    ):
        with pytest.raises(error, match=f"^num_experts_per_tok must be .*{message}"):
            way()
    with pytest.raises(ValueError, match=r"^num_experts_per_tok must be at least 1; got 0\.$"):
        FlexMoeConfig(num_experts_per_tok=0)


def test_the_commands_refuse_them_too(stored: Path, tmp_path: Path, capsys) -> None:
    parts = [str(stored / "grafted"), str(stored / "code"), "--out", str(tmp_path / "out")]
    for options, message in (
        (["--public-prior", "1e39"], "public_prior must be a finite number"),
        (["--public-prior", "nan"], "public_prior must be a finite number"),
        (["--num-experts-per-tok", "0"], "num_experts_per_tok must be at least 1; got 0."),
    ):
        for more in ([], ["--by-reference"]):
            assert main(["compose", *parts, *options, *more]) == 1
            error = " ".join(capsys.readouterr().err.split())
            assert message in error
            assert "Strict" not in error
    assert main(["graft", str(stored / "anchor"), "--out", str(tmp_path / "out"), "--num-experts-per-tok", "0"]) == 1
    assert "num_experts_per_tok must be at least 1; got 0." in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def wide_package(package: Path, out: Path, width: int) -> Path:
    """A package that claims rows of any width; the weights are a sparse file, and their hash is wrong."""
    shutil.copytree(package, out)
    values = json.loads((out / "expert_config.json").read_text())
    values["ffn"]["hidden"] = width
    (out / "expert_config.json").write_text(json.dumps(values))
    entries, end = {}, 0
    for name, tensor in load_file(package / "expert.safetensors").items():
        shape = [1, width] if name.endswith("router.weight") else list(tensor.shape)
        begin, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with (out / "expert.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return out


@pytest.mark.promise(
    "`add_expert`, `compose`, `add`, `compose_by_reference`, `verify`",
    "router rows of any width, in a sparse file",
    "refused by manifest and header, before a byte of them is read",
)
@pytest.mark.parametrize("width", [soak(33), 1 << 20, 10**9])
def test_rows_of_another_width_are_refused_before_they_are_read(
    stored: Path, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = wide_package(stored / "code", tmp_path / "wide", width)
    model = FlexMoeForCausalLM.from_pretrained(stored / "model")
    fill = TensorFile.fill

    def refusing(self: TensorFile, *args: object) -> object:
        assert self.path.parent.name != "wide"
        return fill(self, *args)

    monkeypatch.setattr(TensorFile, "fill", refusing)
    expected = "hidden at most 1,048,576" if width == 10**9 else f"wide.* {width}"
    for way in (
        lambda: compose(stored / "grafted", [package], tmp_path / "out"),
        lambda: add(stored / "model", package, tmp_path / "out"),
        lambda: compose_by_reference(stored / "grafted", [package], tmp_path / "out", anchor=stored / "anchor"),
        lambda: compose_by_reference(stored / "of math", [package], tmp_path / "out"),
        lambda: model.add_expert(package),
    ):
        with pytest.raises(ValueError, match=expected):
            way()
    assert not verify(package, stored / "model").accepted
    assert not (tmp_path / "out").exists()


def test_rows_of_a_model_with_another_shape_are_not_read(stored: Path, tmp_path: Path) -> None:
    model = shutil.copytree(stored / "grafted", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".router.public.weight"))
    save_file({**tensors, name: torch.zeros(1, 33)}, model / "model.safetensors", metadata={"format": "pt"})
    for way in (
        lambda: flexmoe.inspect(model),
        lambda: compose(model, [stored / "math"], tmp_path / "out"),
        lambda: compose_by_reference(model, [stored / "math"], tmp_path / "out", anchor=stored / "anchor"),
    ):
        with pytest.raises(
            ValueError, match=r"router.public.weight' has shape \[1, 33\]; its config implies \[1, 32\]"
        ):
            way()


@pytest.fixture(scope="module")
def evil(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Malicious packages of two owners, in three variants."""
    folder = tmp_path_factory.mktemp("evil")
    for name in ("math", "code"):
        change_package(stored / name, folder / f"bias-{name}", lambda t: t["layers.0.router.bias"].add_(100))
        change_package(stored / name, folder / f"row-{name}", lambda t: t["layers.1.router.weight"].mul_(200))
        change_package(stored / name, folder / f"absurd-{name}", lambda t: t["layers.0.router.weight"].mul_(1e6))
    return folder


class TestIncomingTogether:
    """Malicious packages of the same run cannot justify each other."""

    @pytest.mark.parametrize(
        ("attack", "words"),
        [
            (("bias-math", "bias-code"), "bias: the bias in layer 0 is 100 above the largest other bias, of 'public'"),
            (("row-math", "row-code"), "the shortest other incoming row, of 'law'"),
            (("absurd-math", "absurd-code"), "row against public: the row in layer 0"),
        ],
    )
    def test_two_colluding_owners(
        self, stored: Path, evil: Path, attack: tuple[str, str], words: str, tmp_path: Path
    ) -> None:
        packages = [stored / "law", *(evil / name for name in attack)]
        with pytest.raises(AdmissionError, match=words):
            compose(stored / "grafted", packages, tmp_path / "a", public_prior=0.0)
        with pytest.raises(AdmissionError, match=words):
            compose_by_reference(
                stored / "grafted", packages, tmp_path / "b", anchor=stored / "anchor", public_prior=0.0
            )

    def test_a_single_expert_is_compared_with_publics_matrix_as_in_a_live_model(
        self, stored: Path, evil: Path, tmp_path: Path
    ) -> None:
        graft, package = stored / "grafted", evil / "absurd-math"
        ways: list[Callable[[], object]] = [
            lambda: FlexMoeForCausalLM.from_pretrained(graft).add_expert(package),
            lambda: compose(graft, [package], tmp_path / "a"),
            lambda: add(graft, package, tmp_path / "b"),
            lambda: compose_by_reference(graft, [package], tmp_path / "c", anchor=stored / "anchor"),
        ]
        values = set()
        for way in ways:
            with pytest.raises(AdmissionError, match="row against public") as caught:
                way()
            values |= {found.value for found in caught.value.findings if found.check == "row against public"}
        assert len(values) == 1

    @pytest.mark.parametrize("family", ["gpt2", "phi3", soak("gpt_neox"), "gemma2", "olmo2"])
    def test_the_router_input_on_disk_is_that_of_the_live_model(self, family: str, tmp_path: Path) -> None:
        anchor = tiny_anchor(family)
        for module in anchor.modules():
            if "norm" in type(module).__name__.lower():
                nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
        anchor.save_pretrained(tmp_path / "anchor")
        stored = StoredModel(graft(tmp_path / "anchor", tmp_path / "grafted"))
        live = FlexMoeForCausalLM.from_pretrained(stored.folder)
        hidden = live.config.get_text_config().hidden_size
        inputs: dict[int, torch.Tensor] = {}
        for block in live.flexmoe_blocks():
            block.register_forward_pre_hook(lambda block, args: inputs.update({block.layer_index: args[0]}))
        live(random_tokens(8, 64))
        for block, ours, theirs, of_live in zip(
            live.flexmoe_blocks(),
            inputs_of_stored(stored, live),
            inputs_of_anchor(DenseCheckpoint(tmp_path / "anchor"), hidden),
            inputs_of_live(live),
            strict=True,
        ):
            matrix = block.experts["public"].get_parameter(str(input_matrix_name(block.experts["public"], hidden)))
            assert torch.equal(ours.matrix, matrix[:: sample_step(len(matrix))])
            assert torch.equal(ours.matrix, theirs.matrix)
            assert ours.typical_length(hidden) == pytest.approx(of_live.typical_length(hidden))
            if family == "olmo2":  # its networks read the residual stream
                assert ours.scale is theirs.scale is of_live.scale is None
                continue
            assert torch.equal(ours.scale, of_live.scale)
            assert torch.equal(ours.scale, theirs.scale)
            measured = inputs[block.layer_index].detach().flatten(0, -2).square().mean(0).sqrt()
            assert torch.corrcoef(torch.stack([measured.log(), ours.scale.log()]))[0, 1] > 0.9

    def test_norms_are_found_layer_by_layer(self) -> None:
        """In layers of one kind, OLMo-hybrid's post_attention_layernorm is before the network, in others it is not."""
        config = tiny_config("olmo_hybrid")
        _, sites = build_on_meta(config)
        names = input_norms(config)
        assert len(names) == len(sites)
        assert {name is None for name in names} == {True, False}

    def test_the_attention_of_a_model_does_not_matter(self) -> None:
        config = ANCHOR_CONFIGS["llama"]()
        config._attn_implementation = "flex_attention"
        assert input_norms(config) == tuple(f"model.layers.{i}.post_attention_layernorm" for i in range(2))

    def test_offloaded_norms_are_read(self, tmp_path: Path) -> None:
        anchor = tiny_anchor("llama")
        for layer in anchor.model.layers:
            nn.init.normal_(layer.post_attention_layernorm.weight, generator=torch.Generator().manual_seed(0))
        anchor.save_pretrained(tmp_path / "anchor")
        folder = graft(tmp_path / "anchor", tmp_path / "model")
        model = FlexMoeForCausalLM.from_pretrained(folder)
        places = {name: "cpu" for name, _ in model.named_parameters() if ".layers.1." not in name}
        places["anchor.model.layers.1"] = "disk"
        offloaded = FlexMoeForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
        for one, other in zip(inputs_of_live(model), inputs_of_live(offloaded), strict=True):
            assert torch.equal(one.scale, other.scale)

    @pytest.mark.parametrize("way", ["live", "on disk"])
    def test_rows_are_compared_in_the_scale_of_their_input(self, way: str, tmp_path: Path) -> None:
        """A fitted row has a huge coordinate where the norm's weight is nearly zero, as in pretrained models."""
        anchor = tiny_anchor("llama")
        with torch.no_grad():
            for layer in anchor.model.layers:
                layer.post_attention_layernorm.weight[3] = 1e-4
        anchor.save_pretrained(tmp_path / "anchor")
        graft(tmp_path / "anchor", tmp_path / "model")
        model = FlexMoeForCausalLM.from_pretrained(tmp_path / "model")
        packages = {}
        for name, unit, value in (("plain", 0, 1.0), ("honest", 3, 1e3), ("hijacker", 5, 1e3)):
            model.add_expert_copy(name)
            for block in model.flexmoe_blocks():
                row = block.router[name].weight.data.normal_(generator=torch.Generator().manual_seed(0))
                row[0, unit] = value
            packages[name] = model.save_expert(name, tmp_path / name)
            model.remove_expert(name)

        def put(name: str) -> None:
            if way == "live":
                model.add_expert(packages[name])
            else:
                add(tmp_path / "with-plain", packages[name], tmp_path / f"with-{name}")

        if way == "live":
            put("plain")
        else:
            compose(tmp_path / "model", [packages["plain"]], tmp_path / "with-plain")
        put("honest")
        with pytest.raises(AdmissionError, match=r"row in layer 0 is .* times as long as the longest other row"):
            put("hijacker")

    @pytest.mark.parametrize("wild", [math.nan, -math.inf])
    def test_rows_that_are_not_finite_are_refused_by_name(self, stored: Path, wild: float, tmp_path: Path) -> None:
        package = change_package(stored / "math", tmp_path / "wild", lambda t: t["layers.1.router.weight"].fill_(wild))
        with pytest.raises(PackageError, match=r"wild: tensor 'layers\.1\.router\.weight' holds NaN or an infinity"):
            compose(stored / "grafted", [package], tmp_path / "out")

    def test_biases_are_compared_with_the_public_prior(self, stored: Path, tmp_path: Path) -> None:
        package = change_package(stored / "math", tmp_path / "mid", lambda t: t["layers.0.router.bias"].fill_(5.0))
        for prior, is_accepted in ((0.5, True), (0.0, False)):
            for out, way, options in (
                ("a", compose, {}),
                ("b", compose_by_reference, {"anchor": stored / "anchor"}),
            ):
                with nullcontext() if is_accepted else pytest.raises(AdmissionError, match="is 5 above"):
                    way(stored / "grafted", [package], tmp_path / f"{out}{prior}", public_prior=prior, **options)


def referring(world: Path, out: Path, *names: str, **options: object) -> Path:
    packages = [world / name for name in names]
    return compose_by_reference(world / "grafted", packages, out, anchor=world / "anchor", public_prior=0.0, **options)


class TestCompositions:
    """A composition's experts are the reference, and are checked when they are added to another composition."""

    @pytest.fixture
    def world(self, stored: Path, tmp_path: Path) -> Path:
        """Compositions whose packages may be replaced."""
        return shutil.copytree(stored, tmp_path / "world")

    @pytest.mark.parametrize("attack", [name for name in MALICIOUS if MALICIOUS[name][2]])
    def test_experts_of_the_base_are_the_reference(self, world: Path, attack: str, tmp_path: Path) -> None:
        with pytest.raises(AdmissionError, match=r"longest other row, of '(math|law|public)'|is 1.* above"):
            compose_by_reference(world / "of math and law", [world / attack], tmp_path / "out")
        compose_by_reference(world / "of math and law", [world / attack], tmp_path / "out", verify=False)
        compose_by_reference(world / "of math and law", [world / "code"], tmp_path / "fine")

    def test_rows_are_compared_as_they_are_in_the_composition(self, world: Path, tmp_path: Path) -> None:
        model = FlexMoeForCausalLM.from_pretrained(world / "of math and law")
        for block in model.flexmoe_blocks():
            block.router["law"].weight.data *= 50
        sources = {"public": world / "anchor", "math": world / "math", "law": world / "law"}
        tuned = model.save_composition(world / "tuned", sources=sources)
        compose_by_reference(tuned, [world / "row x 50"], tmp_path / "a")  # accepted beside an equally long one
        code = world / "of code"
        with pytest.raises(AdmissionError, match=r"Expert 'law' is refused.*the longest other row, of 'code'"):
            compose_by_reference(code, [tuned], tmp_path / "b")
        merged = compose_by_reference(code, [tuned], tmp_path / "b", verify=False)
        assert FlexMoeForCausalLM.from_pretrained(merged).expert_names == ["public", "code", "math", "law"]

    def test_the_policy_applies_to_all_packages(self, world: Path, tmp_path: Path) -> None:
        code = world / "of code"
        for allowed, is_accepted in (("*", True), ("*/code", False), ("*/[!c]*", False)):
            rules = [{"pattern": f"{world}/{allowed}", "allowed_signers": "anyone"}]
            policy = tmp_path / "policy.json"
            policy.write_text(json.dumps({"format_version": 1, "rules": rules}))
            for base, part in ((code, world / "of math and law"), (world / "of math and law", code)):
                with nullcontext() if is_accepted else pytest.raises(UntrustedPackageError):
                    compose_by_reference(base, [part], tmp_path / "out", policy=policy, overwrite=True)

    def test_a_replaced_package_is_refused(self, world: Path, tmp_path: Path) -> None:
        code = world / "of code"
        change_package(world / "math", world / "other", lambda t: t["layers.0.ffn.up_proj.weight"].mul_(1.01))
        shutil.rmtree(world / "math")
        shutil.move(world / "other", world / "math")
        for base, part in ((code, world / "of math and law"), (world / "of math and law", world / "code")):
            with pytest.raises(ValueError, match=r"composition was saved with as 'math'.*--update"):
                compose_by_reference(base, [part], tmp_path / "out")

    def test_a_damaged_package_of_a_composition_is_refused(self, world: Path, tmp_path: Path) -> None:
        code = world / "of code"
        file = world / "math" / "expert.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
        with pytest.raises(ValueError, match="SHA-256"):
            compose_by_reference(code, [world / "of math and law"], tmp_path / "out")

    @attacks
    def test_a_newer_version_is_checked_as_a_replacement(self, world: Path, attack: str, tmp_path: Path) -> None:
        both = world / "of math and code"
        shutil.rmtree(world / "code")
        shutil.copytree(world / attack, world / "code")
        for experts in ({"code": None}, None):
            words = "of '(math|public)'" if MALICIOUS[attack][2] else MALICIOUS[attack][1]
            with pytest.raises(AdmissionError, match=f"Expert 'code' is refused.*{words}"):
                update_composition(both, tmp_path / "out", experts=experts)
        assert not (tmp_path / "out").exists()
        (move,) = update_composition(both, tmp_path / "out", verify=False)
        assert move.name == "code"

    def test_neither_the_old_version_nor_another_new_one_is_a_reference(self, world: Path, tmp_path: Path) -> None:
        long = change_package(world / "law", world / "long", lambda t: t["layers.0.router.weight"].mul_(200))
        base = referring(world, world / "three", "math", "code", "long", names={"law": "long"}, verify=False)
        change_package(long, world / "longer", lambda t: t["layers.0.router.weight"].mul_(2))
        shutil.rmtree(long)
        shutil.move(world / "longer", long)
        with pytest.raises(AdmissionError, match=r"Expert 'long' is refused.*the longest other row, of '(code|math)'"):
            update_composition(base, tmp_path / "out")
        shutil.rmtree(world / "code")
        change_package(long, world / "code", lambda t: None)
        with pytest.raises(AdmissionError, match=r"is refused.*the longest other row, of 'math'"):
            update_composition(base, tmp_path / "out")

    def test_a_single_expert_is_compared_with_the_anchor(self, world: Path, tmp_path: Path) -> None:
        change_package(world / "math", world / "newer", lambda t: t["layers.0.router.weight"].mul_(1e6))
        shutil.rmtree(world / "math")
        shutil.move(world / "newer", world / "math")
        with pytest.raises(AdmissionError, match="row against public"):
            update_composition(world / "of math", tmp_path / "out")
