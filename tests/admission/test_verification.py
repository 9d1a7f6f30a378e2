"""`flexmoe.verify`: honest experts are accepted one after another; malicious ones are refused by their check."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import typer.main

from flexmoe.admission.evidence import EVIDENCE, EVIDENCE_THRESHOLD
from flexmoe.admission.outputs import EMPTY, EMPTY_THRESHOLD, OUTPUT, OUTPUT_THRESHOLD
from flexmoe.admission.public_text import (
    LAYER_SHARE,
    LAYER_SHARE_THRESHOLD,
    LOSS,
    LOSS_THRESHOLD,
    SHARE,
    SHARE_THRESHOLD,
    PublicText,
    check_public_text,
)
from flexmoe.admission.rows import BIAS, BIAS_THRESHOLD, LONE, LONE_ROW_THRESHOLD, OTHERS, ROW_THRESHOLD
from flexmoe.admission.verification import verify
from flexmoe.conversion.compose import compose
from flexmoe.conversion.graft import graft
from flexmoe.data import pack
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.packages.package import ExpertPackage, write_package
from flexmoe.routers.hidden_states import RowText, collect_moments, fit_rows
from flexmoe.routers.rows import row_method
from flexmoe.testing import VOCABULARY, tiny_anchor
from flexmoe_cli import app, main
from tests.support.hub import HubServer, point_client_at
from tests.support.letters import letter_tokenizer
from tests.support.soak import soak

KINDS = ("math", "code", "law", "news", "poems")
Change = Callable[[str, torch.Tensor], torch.Tensor]


def documents(kind: str, count: int, seed: int = 0) -> list[str]:
    """Text of made-up words, different for each kind. A twentieth of public's documents is of each other kind."""
    draw = random.Random(f"{kind} {seed}")
    if kind == "public":
        kinds = [draw.choice(KINDS) if draw.random() < 0.05 * len(KINDS) else "own" for _ in range(count)]
        return [documents(other, 1, draw.randrange(1 << 30))[0] for other in kinds]
    spell = random.Random(kind)
    letters = spell.sample("abcdefghijklmnopqrstuvwxyz", 12)
    words = ["".join(spell.choices(letters, k=spell.randint(2, 5))) for _ in range(12)]
    return [" ".join(draw.choices(words, k=40)) + "." for _ in range(count)]


def train(model: torch.nn.Module, sequences: torch.Tensor, steps: int, rate: float) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = sequences[torch.randint(len(sequences), (8,), generator=generator)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


class Packages(dict[str, Path]):
    """The package of each owner, which is trained when it is first read."""

    def __init__(self, make: Callable[[str], Path]) -> None:
        self.make = make

    def __missing__(self, kind: str) -> Path:
        self[kind] = self.make(kind)
        return self[kind]


@dataclass(frozen=True)
class World:
    """A grafted anchor with a public sample, the packages of five owners, and unpublished public text."""

    grafted: Path
    packages: Packages
    public: Path
    composed: Path
    towards_public: list[torch.Tensor]  # mean router input of public text, by layer


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("world"), letter_tokenizer()
    texts = {
        kind: RowText(docs := documents(kind, 150), pack(docs, tokenizer, 64, vocab_size=VOCABULARY))
        for kind in (*KINDS, "public")
    }
    anchor = tiny_anchor("llama")
    train(anchor, texts["public"].sequences, steps=120, rate=1e-2)
    for part in (anchor, tokenizer):
        part.save_pretrained(folder / "anchor")
    for name, seed in (("public.txt", 1), ("sample.txt", 2)):
        (folder / name).write_text("\n<|endofdocument|>\n".join(documents("public", 60, seed)))
    graft(folder / "anchor", folder / "grafted", public_data=[folder / "sample.txt"])

    def make(kind: str) -> Path:
        model = FlexMoeForCausalLM.from_pretrained(folder / "grafted")
        rows = fit_rows(
            model, row_method("log_odds"), texts[kind], texts["public"], tokens=4000, bias=kind == "law", seed=0
        )
        model.add_expert_copy(kind)
        for block, row in zip(model.flexmoe_blocks(), rows, strict=True):
            block.router[kind].load_state_dict({"weight": row.weight[None], "bias": torch.tensor([row.bias])})
        model.freeze_except(kind, rows=False)
        train(model, torch.cat([texts[kind].sequences, texts["public"].sequences]), steps=25, rate=3e-3)
        return model.save_expert(kind, folder / kind)

    packages = Packages(make)
    compose(folder / "grafted", [packages[kind] for kind in KINDS[:3]], folder / "composed", public_prior=0.0)
    moments = collect_moments(
        FlexMoeForCausalLM.from_pretrained(folder / "grafted"), texts["public"].sequences, [0, 1], 2000
    )
    means = [moments[layer].mean.float() for layer in (0, 1)]
    return World(folder / "grafted", packages, folder / "public.txt", folder / "composed", means)


def change_package(package: Path, out: Path, change: Change, **manifest: object) -> Path:
    """A copy of the package with changed tensors and valid hashes."""
    opened = ExpertPackage.open(package)
    tensors = [(name, change(name, tensor)) for name, tensor in opened.tensors()]
    return write_package(out, replace(opened.manifest, **{"name": "evil", **manifest}), tensors)


def files(*folders: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for folder in folders for path in folder.rglob("*.*")
    }


def scaled(factor: float, part: str) -> Change:
    return lambda name, tensor: tensor * factor if part in name else tensor


def shifted(bias: float) -> Change:
    return lambda name, tensor: tensor + bias if name.endswith("router.bias") else tensor


def refused_by(verdict) -> set[str]:
    return {finding.check for finding in verdict.refusals}


@pytest.mark.parametrize("number", [3, soak(5)])
def test_honest_experts_are_accepted_one_after_another(world, tmp_path, number):
    model = world.grafted
    packages = [world.packages[kind] for kind in KINDS[:number]]
    for count, package in enumerate(packages):
        if count:
            model = compose(world.grafted, packages[:count], tmp_path / str(count), public_prior=0.0)
        for text in ({}, {"data": [world.public]}):
            verdict = verify(package, model, **text)
            assert verdict.accepted, verdict.refusals
            assert (
                next(finding for finding in verdict.findings if finding.check == OUTPUT).value < OUTPUT_THRESHOLD / 2
            )
            accepting = {finding.check for finding in verdict.findings if finding.verdict == "accept"}
            assert {"format", "anchor", "shapes", "contents", BIAS, OUTPUT, EMPTY} <= accepting
            assert (OTHERS in accepting) == bool(count)
            assert ({SHARE, LAYER_SHARE, LOSS} <= accepting) == bool(text)
        assert verdict.experts == ["public", *KINDS[: count + 1]]
        assert 0 < verdict.public_text.share < 0.4


WITHOUT_TEXT: dict[str, tuple[Change, str, str]] = {
    "a row fifty times as long": (scaled(50, ".router.weight"), OTHERS, r"times as long as the longest other row"),
    "in one layer only": (scaled(50, "layers.1.router.weight"), OTHERS, r"layer 1 is .* times as long"),
    "a bias of 10": (shifted(10), BIAS, r"is 10 above"),
    "a network thirty times as large": (scaled(30, "down_proj"), OUTPUT, r"in layer \d, the output is .* as large as"),
    "a network of zeros": (scaled(0, ".ffn."), EMPTY, r"the output varies 0 times as much as public's"),
}


@pytest.mark.parametrize("case", WITHOUT_TEXT)
def test_malicious_experts_are_refused_without_text(world, tmp_path, case):
    change, check, sentence = WITHOUT_TEXT[case]
    evil = change_package(world.packages["news"], tmp_path / "evil", change)
    verdict = verify(evil, world.composed)
    assert refused_by(verdict) == {check}
    (finding,) = verdict.refusals
    assert finding.value is not None
    assert (finding.value < finding.threshold) == (check == EMPTY)
    assert re.search(sentence, finding.message)


def test_a_dominating_low_rank_expert_is_refused(world, tmp_path):
    torch.manual_seed(0)  # with factors of 30, some seeds stay below the threshold
    model = FlexMoeForCausalLM.from_pretrained(world.composed)
    model.add_expert_copy("evil", rank=2)
    for block in model.flexmoe_blocks():
        torch.nn.init.normal_(block.experts["evil"].down_proj.B.weight, std=300.0)
    verdict = verify(model.save_expert("evil", tmp_path / "evil"), world.composed)
    assert refused_by(verdict) == {OUTPUT}


def test_an_honest_low_rank_expert_is_accepted(world, tmp_path):
    model = FlexMoeForCausalLM.from_pretrained(world.composed)
    model.add_expert_copy("fine", rank=2)
    for block in model.flexmoe_blocks():
        torch.nn.init.normal_(block.experts["fine"].down_proj.B.weight, std=0.05)
        block.router["fine"].load_state_dict(block.router["math"].state_dict())
    verdict = verify(model.save_expert("fine", tmp_path / "fine"), world.composed, data=[world.public])
    assert verdict.accepted, verdict.refusals


def towards(world: World, length: float) -> Change:
    """Rows that point at public text, `length` times as long as the honest ones."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not name.endswith("router.weight"):
            return tensor
        mean = world.towards_public[int(name.split(".")[1])]
        return (mean / mean.norm() * tensor.norm() * length)[None]

    return change


@pytest.mark.parametrize("case", ["a bias of 4.5", "a row that points at public text", "an honest row turned round"])
def test_malicious_experts_below_the_thresholds_are_refused_with_text(world, tmp_path, case):
    change = {
        "a bias of 4.5": shifted(4.5),
        "a row that points at public text": towards(world, 3.0),
        "an honest row turned round": scaled(-1, ".router.weight"),
    }[case]
    evil = change_package(world.packages["news"], tmp_path / "evil", change)
    assert verify(evil, world.composed).accepted
    verdict = verify(evil, world.composed, data=[world.public])
    assert refused_by(verdict) >= {SHARE, LAYER_SHARE}
    assert verdict.public_text.share > 0.5


def test_a_harmful_expert_below_the_thresholds_is_refused_by_the_loss(world, tmp_path):
    noise = torch.Generator().manual_seed(0)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if ".ffn." not in name:
            return tensor + 2 * name.endswith("router.bias")
        return torch.randn(tensor.shape, generator=noise) * tensor.square().mean().sqrt() * 2

    evil = change_package(world.packages["news"], tmp_path / "evil", change)
    assert verify(evil, world.composed).accepted
    assert LOSS in refused_by(verify(evil, world.composed, data=[world.public]))


def test_a_bias_of_20_is_refused_without_and_with_text(world, tmp_path):
    evil = change_package(world.packages["math"], tmp_path / "evil", shifted(20))
    before = files(world.composed, evil)
    verdict = verify(evil, world.composed, public_sample=True)
    assert refused_by(verdict) >= {BIAS, SHARE, LAYER_SHARE}
    assert verdict.public_text.share > 0.99
    assert files(world.composed, evil) == before


def test_all_checks_are_made_after_a_failure(world, tmp_path):
    other = ExpertPackage.open(world.packages["math"]).manifest.anchor | {"fingerprint": "0" * 64}
    evil = change_package(world.packages["math"], tmp_path / "evil", scaled(30, "down_proj"), anchor=other)
    assert refused_by(verify(evil, world.composed)) == {"anchor", OUTPUT}


def test_damaged_files_are_refused(world, tmp_path):
    evil = change_package(world.packages["math"], tmp_path / "evil", scaled(1, ""))
    weights = evil / "expert.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    verdict = verify(evil, world.composed, data=[world.public])
    assert refused_by(verdict) == {"contents"}
    assert "SHA-256" in verdict.refusals[0].message
    assert verdict.public_text is None
    weights.write_bytes(content[:100])
    verdict = verify(evil, world.composed)
    assert refused_by(verdict) == {"format"}
    weights.unlink()
    assert refused_by(verify(evil, world.composed)) == {"format"}


def test_a_wrong_shape_is_refused_and_the_contents_are_still_checked(world, tmp_path):
    evil = change_package(
        world.packages["math"],
        tmp_path / "evil",
        lambda name, t: t[:, :-2] if name.endswith("down_proj.weight") else t,
    )
    verdict = verify(evil, world.composed)
    assert refused_by(verdict) == {"shapes"}
    assert "[32, 62]" in verdict.refusals[0].message
    assert {f.check: f.verdict for f in verdict.findings}["contents"] == "accept"


def test_a_policy_that_refuses_everything(world, tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"format_version": 1, "rules": []}))
    assert refused_by(verify(world.packages["math"], world.composed, policy=policy)) == {"signature"}


def test_an_expert_of_the_same_name_is_replaced(world):
    verdict = verify(world.packages["math"], world.composed, data=[world.public])
    assert verdict.accepted
    assert verdict.replaces == "math"
    assert verdict.public_text.loss_before == verdict.public_text.loss_after
    assert verdict.experts == ["public", "math", "code", "law"]
    other = verify(world.packages["math"], world.composed, name="sums")
    assert other.replaces is None
    assert other.experts[-1] == "sums"


def test_a_composition_as_model(world, tmp_path):
    model = FlexMoeForCausalLM.from_pretrained(world.composed)
    sources = {"public": world.grafted.parent / "anchor", **{name: world.packages[name] for name in KINDS[:3]}}
    model.save_composition(tmp_path / "composition", sources=sources)
    verdict = verify(
        world.packages["news"], tmp_path / "composition", data=[world.public], tokenizer=letter_tokenizer()
    )
    merged = verify(world.packages["news"], world.composed, data=[world.public])
    assert verdict.findings == merged.findings


def test_a_package_on_the_hub(world, tmp_path, monkeypatch):
    with HubServer().running() as hub:
        hub.tokens["secret"] = "hospital"
        point_client_at(hub.url, monkeypatch, token="secret")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        model = FlexMoeForCausalLM.from_pretrained(world.composed)
        model.push_expert_to_hub("math", "hospital/math", token="secret")
        verdict = verify("hospital/math", world.grafted)
        assert verdict.accepted
        assert verdict.package["source"] == "hospital/math"
        rules = [{"pattern": "hospital/*", "allowed_signers": "anyone"}]
        (tmp_path / "policy.json").write_text(json.dumps({"format_version": 1, "rules": rules}))
        signed = verify("hospital/math", world.grafted, policy=tmp_path / "policy.json")
        assert {finding.check: finding.verdict for finding in signed.findings}["signature"] == "accept"


def test_the_thresholds_in_the_document_are_those_of_the_code():
    text = (Path(__file__).resolve().parents[2] / "docs" / "admission.md").read_text()
    table = dict(re.findall(r"^\| ([a-z ]+) \| .* \| (?:above|below) \+?([\d.]+)", text, flags=re.M))
    thresholds = {
        OTHERS: ROW_THRESHOLD,
        LONE: LONE_ROW_THRESHOLD,
        BIAS: BIAS_THRESHOLD,
        EVIDENCE: EVIDENCE_THRESHOLD,
        OUTPUT: OUTPUT_THRESHOLD,
        EMPTY: EMPTY_THRESHOLD,
        SHARE: SHARE_THRESHOLD,
        LAYER_SHARE: LAYER_SHARE_THRESHOLD,
        LOSS: LOSS_THRESHOLD * 100,
    }
    assert {check: float(value) for check, value in table.items()} == thresholds


def test_the_commands_of_the_document_are_valid():
    text = (Path(__file__).resolve().parents[2] / "docs" / "admission.md").read_text()
    (block,) = re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S)
    command = typer.main.get_command(app).commands["verify"]
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert len(lines) == 3
    for words in lines:
        with command.make_context("verify", words[2:]) as context:
            assert context.params["model"] == "./composed"


README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data": ["x.txt"], "public_sample": True}, ValueError, "one of the two"),
        ({"max_tokens": 1}, ValueError, "max_tokens=1"),
        ({"data": ["missing.txt"]}, FileNotFoundError, "missing.txt"),
        (
            {"data": [README], "text_template": "{title}"},
            ValueError,
            "is for the columns of tables",
        ),
    ],
)
def test_wrong_arguments(world, options, error, message):
    with pytest.raises(error, match=message):
        verify(world.packages["math"], world.grafted, **options)


def test_folders_without_a_package_or_a_model(world, tmp_path):
    with pytest.raises(FileNotFoundError, match="not an expert package"):
        verify(world.grafted, world.grafted)
    with pytest.raises(ValueError, match="llama"):
        verify(world.packages["math"], world.grafted.parent / "anchor")


@pytest.mark.parametrize(
    ("share", "layers", "after", "refused"),
    [
        (0.2, [0.1, 0.3], 4.0, set()),
        (0.5, [0.5, 0.5], 4.0, set()),  # a row of zeros
        (0.51, [0.5, 0.52], 4.0, {SHARE}),
        (0.4, [0.1, 0.7], 4.0, {LAYER_SHARE}),
        (0.1, [0.1, 0.1], 4.09, {LOSS}),
        (0.1, [0.1, 0.1], 3.0, set()),
        (0.1, [0.1, 0.1], float("inf"), {LOSS}),
        (float("nan"), [0.1, float("nan")], float("nan"), {SHARE, LAYER_SHARE, LOSS}),
    ],
)
def test_the_thresholds_for_public_text(share, layers, after, refused):
    text = PublicText(tokens=100, share=share, layer_shares=layers, loss_before=4.0, loss_after=after)
    assert {finding.check for finding in check_public_text(text) if finding.verdict == "refuse"} == refused


class TestCommand:
    @pytest.fixture(autouse=True)
    def wide(self, monkeypatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")

    def test_accepted(self, world, capsys):
        line = ["verify", world.packages["news"], "--model", world.composed, "--data", world.public]
        assert main(list(map(str, line))) == 0
        out = capsys.readouterr().out
        assert "Accepted: no check refuses news." in out
        for check in (OTHERS, BIAS, OUTPUT, SHARE, LOSS, "≥ 0.01", "≤ 12"):
            assert check in out

    def test_refused(self, world, tmp_path, capsys):
        evil = change_package(world.packages["news"], tmp_path / "evil", shifted(10))
        line = [str(evil), "--model", str(world.composed)]
        assert main(["verify", *line]) == 3
        assert "Refused: evil fails bias." in capsys.readouterr().out
        assert main(["verify", *line, "--public-sample", "--json"]) == 3
        found = json.loads(capsys.readouterr().out)
        assert found["accepted"] is False
        assert found["package"]["name"] == "evil"
        assert found["num_experts_per_tok"] >= 1
        bias = next(finding for finding in found["findings"] if finding["check"] == BIAS)
        assert bias["verdict"] == "refuse"
        assert bias["value"] == pytest.approx(10)
        assert found["public_text"]["share"] > 0.9

    def test_failed(self, world, tmp_path, capsys):
        assert main(["verify", str(tmp_path), "--model", str(world.composed)]) == 1
        assert "Error:" in capsys.readouterr().err
        assert main(["verify", str(world.packages["math"]), "--model", str(tmp_path / "none")]) == 1
        assert main(["verify", str(world.packages["math"])]) == 2
