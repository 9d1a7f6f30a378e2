"""Admission checks on several anchors: honest experts are accepted, and malicious ones made from them are refused.

    python benchmarks/bench_admission.py [--anchors olmo2-128 gpt2-192 olmo2-256] [--demo NAME=DIR] [--owners NAME ...]

Without arguments, as `make bench` runs it: the smallest anchor of `bench_defaults.py`. Anchors, and the experts of
their owners (60 steps with the settings that `flexmoe train` chooses), are made once, in some minutes each. `--demo`
takes the folder of a run of the demo as a further anchor, for example one on SmolLM2-135M (`make demo`).

Each expert is checked with the experts of the other owners in the model and held-out public text (`flexmoe.verify`),
and so is each variant of it with changed weights and valid hashes. `add_expert` on a live model, `flexmoe.add` on disk
and `flexmoe.compose` must decide as `verify` does without text, the first two with the same values. The results
replace those of the same anchor and owner in docs/benchmarks/admission.json. Does not cover low-rank experts, rows
with evidence, or signatures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_defaults import OWNERS, TRAINED, prepare_anchor
from machine import machine
from safetensors.torch import save_file
from torch import Tensor

from flexmoe import add, compose, train_expert, verify
from flexmoe.admission.findings import AdmissionError, Finding
from flexmoe.admission.outputs import EMPTY, OUTPUT
from flexmoe.admission.public_text import LAYER_SHARE, LOSS, SHARE
from flexmoe.admission.rows import BIAS, LONE, OTHERS
from flexmoe.data import pack
from flexmoe.data.public_sample import read_public_sample
from flexmoe.demo.owners import PACKAGE
from flexmoe.demo.scoring import load
from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.packages.manifest import MANIFEST_FILE, PackageError
from flexmoe.packages.package import CONFIG_FILE, ExpertPackage
from flexmoe.routers.hidden_states import collect_moments
from flexmoe.tokenization import load_tokenizer

RESULT = Path(__file__).parents[1] / "docs" / "benchmarks" / "admission.json"
CONTENTS = "contents"
ROWS = (OTHERS, LONE, BIAS)
SHOWN = (*ROWS, OUTPUT, EMPTY, SHARE, LAYER_SHARE, LOSS)  # of honest experts
# Values that are equal to those of `verify`: on disk, outputs are checked up to the first layer that is refused, and
# `compose` has all experts as incoming ones.
COMPARED = {"live": (*ROWS, OUTPUT, EMPTY), "add": ROWS, "compose": ()}
TOKENS = {"trained": 8_192, "demo": 1_024}  # of public text; a demo may run on a large anchor
STEPS = 60  # of 2,048 tokens; one pass would be 220
LOGIT = 5.0  # mean logit of public text for the row that points at it, as a bias of 5 would add
HONEST = "honest"

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], object]


@dataclass(frozen=True)
class Variant:
    """A change of an honest expert's tensors, and what has to refuse it.

    Attributes:
        check: the check that measures it.
        refused: whether it has to be; None: it is measured only.
    """

    change: Change
    check: str
    refused: bool | None


@dataclass(frozen=True)
class Anchor:
    """A grafted anchor with the packages of its owners and public text that nothing was trained on."""

    name: str
    grafted: Path
    packages: Mapping[str, Path]
    public: Path
    tokens: int


def trained_anchor(name: str, work: Path) -> Anchor:
    """An anchor of `bench_defaults`, and the experts of its owners, each made once."""
    grafted, packages = prepare_anchor(name, work, None), {}
    for owner in OWNERS:
        packages[owner] = work / "admission" / name / owner
        if not packages[owner].exists():
            own = work / "corpus" / "owners" / f"{owner}.jsonl"
            train_expert(grafted, owner, [own], packages[owner], max_steps=STEPS)
    return Anchor(name, grafted, packages, work / "corpus" / "held_out" / "public.jsonl", TOKENS["trained"])


def demo_anchor(name: str, folder: Path) -> Anchor:
    """The anchor and experts of a run of the demo."""
    packages = {owner.name: owner / PACKAGE for owner in sorted((folder / "owners").iterdir())}
    public = folder / "corpus" / "held_out" / "public.jsonl"
    return Anchor(name, folder / "grafted" / "model", packages, public, TOKENS["demo"])


def scaled(part: str, factor: float) -> Change:
    def change(tensors: Tensors) -> None:
        for name in _names(tensors, part):
            tensors[name] = tensors[name] * factor

    return change


def shifted(bias: float) -> Change:
    def change(tensors: Tensors) -> None:
        for name in _names(tensors, ".router.bias"):
            tensors[name] = tensors[name] + bias

    return change


def scaled_in_one_layer(factor: float) -> Change:
    def change(tensors: Tensors) -> None:
        rows = _names(tensors, ".router.weight")
        name = sorted(rows, key=_layer)[len(rows) // 2]
        tensors[name] = tensors[name] * factor

    return change


def nan(tensors: Tensors) -> None:
    tensors[_names(tensors, ".ffn.")[0]].view(-1)[-1] = math.nan


def random_weights(size: float, bias: float) -> Change:
    def change(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in _names(tensors, ".ffn."):
            old = tensors[name].float()
            drawn = torch.randn(old.shape, generator=generator) * old.square().mean().sqrt() * size
            tensors[name] = drawn.to(tensors[name].dtype)
        shifted(bias)(tensors)

    return change


def towards(means: Mapping[int, Tensor], logit: float) -> Change:
    """Rows along the mean router input of public text, whose logit there is `logit` on average."""

    def change(tensors: Tensors) -> None:
        for name in _names(tensors, ".router.weight"):
            mean = means[_layer(name)].float()
            tensors[name] = (mean * (logit / mean.square().sum()))[None].to(tensors[name].dtype)

    return change


def variants(last_matrix: str, means: Mapping[int, Tensor]) -> dict[str, Variant]:
    """Those of an expert by name; `last_matrix` is the name of the last matrix of its networks."""
    row = ".router.weight"
    return {
        HONEST: Variant(lambda _: None, "", False),
        "row x 50": Variant(scaled(row, 50), OTHERS, True),
        "row x 50 in one layer": Variant(scaled_in_one_layer(50), OTHERS, True),
        "bias + 10": Variant(shifted(10), BIAS, True),
        "last matrix x 30": Variant(scaled(last_matrix, 30), OUTPUT, True),
        "all matrices x 7": Variant(scaled(".ffn.", 7), OUTPUT, True),
        "weights of zero": Variant(scaled(".ffn.", 0), EMPTY, True),
        "one NaN": Variant(nan, CONTENTS, True),
        "row negated": Variant(scaled(row, -1), LAYER_SHARE, True),
        "row towards public text": Variant(towards(means, LOGIT), LAYER_SHARE, True),
        "bias + 4.5": Variant(shifted(4.5), LAYER_SHARE, None),
        "random weights x 2, bias + 2": Variant(random_weights(2, 2), LOSS, None),
        "random weights x 2": Variant(random_weights(2, 0), LOSS, None),
        "last matrix x 4": Variant(scaled(last_matrix, 4), OUTPUT, None),
    }


def _names(tensors: Tensors, part: str) -> list[str]:
    return [name for name in tensors if part in name]


def _layer(name: str) -> int:
    return int(name.split(".")[1])


def write_variant(package: Path, out: Path, change: Change) -> Path:
    """A copy of a package with changed tensors and valid hashes; `write_package` would refuse a NaN."""
    opened = ExpertPackage.open(package)
    tensors = {name: tensor.clone() for name, tensor in opened.tensors()}
    change(tensors)
    out.mkdir()
    weights = out / "expert.safetensors"
    save_file(tensors, weights)
    manifest = replace(opened.manifest, sha256={weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()})
    (out / MANIFEST_FILE).write_text(json.dumps(manifest.to_dict()), encoding="utf-8")
    (out / CONFIG_FILE).write_bytes((package / CONFIG_FILE).read_bytes())
    return out


def last_matrix(grafted: Path) -> str:
    """The name in a package of the matrix that public's networks end with."""
    network = load(grafted).flexmoe_blocks()[0].experts["public"]
    return f".ffn.{[name for name, tensor in network.named_parameters() if tensor.dim() == 2][-1]}"


def mean_router_inputs(anchor: Anchor) -> dict[int, Tensor]:
    """By layer, those of the public sample, which an owner has."""
    model = load(anchor.grafted)
    documents = read_public_sample(anchor.grafted, model.config.public_sample)[:200]
    tokenizer = load_tokenizer(anchor.grafted)
    sequences = pack(documents, tokenizer, 128, vocab_size=model.config.get_text_config().vocab_size)
    layers = [block.layer_index for block in model.flexmoe_blocks()]
    moments = collect_moments(model, sequences, layers, min(anchor.tokens, sequences.numel()))
    return {layer: moments[layer].mean for layer in layers}


class Host:
    """A model with the other owners' experts: its folder, in the dtype that this machine computes in, and live."""

    def __init__(self, anchor: Anchor, owner: str, scratch: Path) -> None:
        self.grafted, self.scratch = anchor.grafted, scratch
        self.others = [package for name, package in anchor.packages.items() if name != owner]
        self.folder = compose(anchor.grafted, self.others, scratch / "composed")
        stored = FlexMoeConfig.from_pretrained(self.folder).dtype
        self.model: FlexMoeForCausalLM = load(self.folder)
        if self.model.dtype != stored:  # `verify` loads what is stored
            self.folder = scratch / "converted"
            self.model.save_pretrained(self.folder)

    def refusals(self, package: Path) -> Iterator[tuple[str, PackageError | None]]:
        """The error with which each way of adding an expert refuses this package; None: it accepts it."""
        out = self.scratch / "out"
        yield "live", _error(lambda: self.model.add_expert(package, name="incoming"))
        if "incoming" in self.model.expert_names:
            self.model.remove_expert("incoming")
        yield "add", _error(lambda: add(self.folder, package, out, name="incoming", overwrite=True))
        yield (
            "compose",
            _error(lambda: compose(self.grafted, [*self.others, package], out, public_prior=0.0, overwrite=True)),
        )


def _error(call: Callable[[], object]) -> PackageError | None:
    try:
        call()
    except PackageError as error:
        return error
    return None


def check(anchor: Anchor, host: Host, package: Path, *, is_malicious: bool) -> dict[str, Any]:
    """Values and refusals by `verify`, and how the other ways of adding an expert disagree with it.

    Public text is read for experts that are accepted without it. A malicious expert with a short row, as the reference
    for the other incoming ones, may cause `compose` to refuse those.
    """
    tokenizer = load_tokenizer(anchor.grafted)
    verdict = verify(package, host.folder)
    is_accepted, found = verdict.accepted, {finding.check: finding for finding in verdict.findings}
    if is_accepted:
        verdict = verify(package, host.folder, data=[anchor.public], max_tokens=anchor.tokens, tokenizer=tokenizer)
        found = {finding.check: finding for finding in verdict.findings}
    decisions, disagreements = {}, []
    for way, error in host.refusals(package):
        decisions[way] = "accepted" if error is None else "refused"
        is_stricter = way == "compose" and error is not None and is_malicious
        if (error is None) != is_accepted and not is_stricter:
            disagreements.append(f"{way}: {error or 'accepted'}")
        elif isinstance(error, AdmissionError):
            disagreements += [
                f"{way}: {finding.check} {finding.value}, by verify {found[finding.check].value}"
                for finding in error.findings
                if finding.check in COMPARED[way] and not _are_equal(finding, found[finding.check])
            ]
    return {
        "accepted": verdict.accepted,
        "accepted_without_text": is_accepted,
        "refused_by": [finding.check for finding in verdict.refusals],
        "values": {name: _rounded(each.value) for name, each in found.items() if each.value is not None},
        "messages": {finding.check: finding.message for finding in verdict.refusals},
        "tokens": verdict.public_text.tokens if verdict.public_text else 0,
        "ways": decisions,
        "disagreements": disagreements,
    }


def _are_equal(a: Finding, b: Finding) -> bool:
    if a.value is None or b.value is None:
        return a.value is b.value
    return a.verdict == b.verdict and math.isclose(a.value, b.value, rel_tol=1e-3, abs_tol=1e-6)


def _rounded(value: float) -> float | str:
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)


def measure(anchor: Anchor, owner: str, *, required_only: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of each variant of an owner's expert."""
    made = variants(last_matrix(anchor.grafted), mean_router_inputs(anchor))
    if required_only:
        made = {name: variant for name, variant in made.items() if variant.refused is not None}
    with tempfile.TemporaryDirectory() as scratch:
        host = Host(anchor, owner, Path(scratch))
        for name, variant in made.items():
            package = anchor.packages[owner]
            with tempfile.TemporaryDirectory() as folder:
                if name != HONEST:
                    package = write_variant(package, Path(folder) / "package", variant.change)
                found = check(anchor, host, package, is_malicious=name != HONEST)
                yield name, {"check": variant.check, "has_to_be_refused": variant.refused, **found}


_SMALL_OUTPUT = (
    "public's output for random input is smaller than the input there, which is then the reference: 15.8 of 16"
)
ACCEPTED = {("olmo2-128", "unicode", "last matrix x 30"): _SMALL_OUTPUT}
"""Malicious experts that no check refuses, by anchor, owner and expert, with the reason."""


def failures(result: Mapping[str, Any]) -> list[str]:
    """Honest experts that are refused, malicious ones that are accepted, and ways of adding them that disagree."""
    found = []
    for anchor, owners in result["anchors"].items():
        for owner, experts in owners.items():
            for name, expert in experts.items():
                where = f"{anchor}, {owner}, {name}"
                if expert["has_to_be_refused"] == expert["accepted"] and (anchor, owner, name) not in ACCEPTED:
                    found.append(f"{where}: {expert['values']} {expert['messages'] or 'is accepted'}")
                found += [f"{where}: {words}" for words in expert["disagreements"]]
    return found


def table(result: Mapping[str, Any]) -> str:
    """The table of docs/admission.md: ranges over the owners of each anchor; bold if the check refuses all of them."""
    anchors = result["anchors"]
    names = list(dict.fromkeys(name for owners in anchors.values() for experts in owners.values() for name in experts))
    lines = [["expert", "check", *anchors, "verdict"], ["---", "---", *["---:"] * len(anchors), "---"]]
    for name in names:
        columns = [[experts[name] for experts in owners.values() if name in experts] for owners in anchors.values()]
        everywhere = [expert for column in columns for expert in column]
        verdict = " or ".join(dict.fromkeys(_verdict(expert) for expert in everywhere))
        checks = SHOWN if name == HONEST else [everywhere[0]["check"]]
        lines += [[name, check, *(_cell(column, check) for column in columns), verdict] for check in checks]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _verdict(expert: Mapping[str, Any]) -> str:
    if expert["accepted"]:
        return "accepted"
    return "refused with text" if expert["accepted_without_text"] else "refused"


def _cell(experts: Sequence[Mapping[str, Any]], check: str) -> str:
    values = sorted(float(expert["values"][check]) for expert in experts if check in expert["values"])
    if not values:
        return "refused" if experts and all(check in expert["refused_by"] for expert in experts) else ""
    words = [f"{100 * value:+.1f} %" if check == LOSS else f"{value:.3g}" for value in (values[0], values[-1])]
    text = " to ".join(dict.fromkeys(words))
    return f"**{text}**" if all(check in expert["refused_by"] for expert in experts) else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchors", nargs="*", choices=[*TRAINED], help="default: olmo2-128, if there is no --demo")
    parser.add_argument("--demo", metavar="NAME=DIR", help="the folder of a run of the demo")
    parser.add_argument("--owners", nargs="*", help="only these")
    parser.add_argument("--required", action="store_true", help="without the variants that may be accepted")
    parser.add_argument("--work", type=Path, default=Path("build/defaults"), help="that of bench_defaults.py")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    names = arguments.anchors if arguments.anchors is not None else [] if arguments.demo else ["olmo2-128"]
    anchors = [trained_anchor(name, arguments.work) for name in names]
    if arguments.demo:
        name, _, folder = arguments.demo.partition("=")
        anchors.append(demo_anchor(name, Path(folder)))
    result: dict[str, Any] = {"anchors": {}}
    if arguments.out.is_file():
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
    result = {**machine(), "anchors": result["anchors"]}
    for anchor in anchors:
        for owner in arguments.owners or anchor.packages:
            experts = {}
            for name, expert in measure(anchor, owner, required_only=arguments.required):
                sys.stderr.write(f"{anchor.name}, {owner}, {name}: {expert}\n")
                experts[name] = expert
            result["anchors"].setdefault(anchor.name, {})[owner] = experts
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(table(result) + "\n")
    failing = failures({"anchors": {anchor.name: result["anchors"][anchor.name] for anchor in anchors}})
    assert not failing, "\n".join(failing)


if __name__ == "__main__":
    main()
