"""`flexmoe.verify`: whether a contributed expert should be let into a model; every check, collected into one verdict.

What `add_expert` asks of a package (format, hashes, fit, rows and weights) is asked here without stopping at the first
fault, and with public text two questions more: how much of it the newcomer would take, and what that does to the loss.
Nothing is written; the model is changed in memory alone.

NOT covered: what the expert answers to its own kind of text, and answers poisoned for a trigger that public text does
not hold. `docs/admission.md` is for readers.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoTokenizer

from flexmoe.data import LONGEST_SEQUENCE, pack, read_documents, read_public_sample
from flexmoe.evaluation import token_losses
from flexmoe.modeling import ExpertPackage, FlexMoeBlock, FlexMoeForCausalLM, track_usage
from flexmoe.modeling.admission_flexmoe import Finding, Judgement, judge_parts
from flexmoe.modeling.configuration_flexmoe import check_expert_name, expert_record
from flexmoe.modeling.fitting_flexmoe import (
    ExpertPart,
    check_anchor,
    check_layers,
    fresh_experts,
    fresh_networks,
    name_in_package,
    package_record,
    parts_from_package,
    public_widths,
)
from flexmoe.modeling.hub_flexmoe import HubAccess, resolve_folder
from flexmoe.modeling.manifest_flexmoe import MANIFEST_FILE, PackageError
from flexmoe.modeling.packages_flexmoe import PACKAGE_FILES
from flexmoe.modeling.trust_flexmoe import TrustPolicy, UntrustedPackageError, resolve_policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARE_BAR = 0.5
"""Most that a newcomer may take of public text's routing weight: public and the other owners keep the majority. Honest
ones take 0.02 to 0.26 in the demo; a row of zeros, which is undecided, takes just this beside public alone."""

LAYER_SHARE_BAR = 0.6
"""The same in any one layer. Honest ones: at most 0.32."""

LOSS_BAR = 0.02
"""Most that the loss on public text may rise, as a share of it. Honest ones in the demo: -0.5 % to +0.2 %; with rows
that are mere hidden means, as FlexOlmo starts: up to +1.0 %."""

MAX_TOKENS = 32_768
"""Of public text that are looked at; both losses are of the same ones."""

SHARE, LAYER_SHARE, LOSS = "share of public text", "share in one layer", "loss on public text"
_DATA_CHECKS = (SHARE, LAYER_SHARE, LOSS)
_ROUNDING = 1e-6  # shares are sums of float32 softmaxes: a row of zeros takes 0.5 and a few units in the last place


@dataclass(frozen=True, kw_only=True)
class PublicText:
    """What happens to public text when the newcomer comes.

    Attributes:
        tokens: looked at.
        share: of their routing weight that the newcomer takes, over all layers; `layer_shares` by layer.
        loss_before: nats per token without it, `loss_after` with it.
    """

    tokens: int
    share: float
    layer_shares: list[float]
    loss_before: float
    loss_after: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All that `verify` found.

    Attributes:
        accepted: whether no check refuses the expert.
        package: what its manifest says (`name`, `kind`, `version`, `license`, `dtype`, `sha256`), `source`, `bytes`.
        model: as it was given.
        experts: those that would be active, the newcomer among them, under the name that it would have.
        replaces: the expert of this name that the model has already, whose place the newcomer would take; or None.
        num_experts_per_tok: k of the model.
        findings: of every check, in order.
        public_text: None without data, and where the package could not be put into the model.
    """

    accepted: bool
    package: dict[str, Any]
    model: str
    experts: list[str]
    replaces: str | None
    num_experts_per_tok: int
    findings: list[Finding]
    public_text: PublicText | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as `--json` prints them."""
        return asdict(self)

    @property
    def refusals(self) -> list[Finding]:
        """The findings that refuse it."""
        return [finding for finding in self.findings if finding.verdict == "refuse"]


def verify(
    package: str | Path | ExpertPackage,
    model: str | Path,
    *,
    name: str | None = None,
    data: Sequence[str | Path] | None = None,
    public_sample: bool = False,
    text_column: str = "text",
    policy: TrustPolicy | str | Path | None = None,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int = MAX_TOKENS,
    batch_size: int = 8,
) -> Verdict:
    """Judges an expert package as a newcomer to a model, which stays as it is on disk.

    An expert of the model that has the newcomer's name is taken to be replaced. All experts count as active.

    Args:
        package: folder, Hub id, or an opened package.
        model: folder or Hub id of a FlexMoE model or composition.
        name: what the newcomer would be called there; its own name by default.
        data: files of public text (.txt, .md, .jsonl, .json, .parquet), for what it does to it.
        public_sample: take the public text that the model keeps since its graft. Everybody knows that one, so text
            that nobody has seen tells more.
        text_column: of tables in `data`.
        policy: a trust policy or its file; by default the one that FLEXMOE_POLICY names, if it is set.
        revision: branch, tag or commit of a package on the Hub.
        tokenizer: the one beside the model by default.
        max_tokens: of public text, at most.
        batch_size: sequences per forward pass.

    Raises:
        FileNotFoundError: no such package, model or file.
        ValueError: `model` is no FlexMoE, there is no public text where some was asked for, or an argument is out of
            range. What is wrong with the package is a finding, not an error.
    """
    if data is not None and public_sample:
        raise ValueError("data and public_sample: give one of the two, your own public text or the model's sample.")
    if name is not None:
        check_expert_name(name)
    if max_tokens < 2 or batch_size < 1:
        raise ValueError(f"max_tokens={max_tokens}, batch_size={batch_size}: at least 2 tokens, and 1 sequence.")
    trust = resolve_policy(policy)
    source, opened, origin = _open(package, revision)
    folder = resolve_folder(model).path
    host = FlexMoeForCausalLM.from_pretrained(model, dtype="auto", policy=trust).eval()
    host.to("cuda" if torch.cuda.is_available() else "cpu")
    host.set_active_experts(None)
    text = _public_text(host, folder, data, public_sample, text_column, tokenizer, max_tokens)

    case = _Case(host, name or (opened.manifest.name if isinstance(opened, ExpertPackage) else "unreadable"))
    if isinstance(opened, ExpertPackage):
        case.judge(opened, trust, origin)
        case.judge_on(text, batch_size)
    else:
        case.refuse("format", opened)
    return Verdict(
        accepted=all(finding.verdict != "refuse" for finding in case.findings),
        package=_facts(source, opened),
        model=str(model),
        experts=list(dict.fromkeys([*case.before, case.name])),
        replaces=case.name if case.name in case.before else None,
        num_experts_per_tok=host.config.num_experts_per_tok,
        findings=case.findings,
        public_text=case.public_text,
    )


@dataclass
class _Case:
    """A newcomer `name` before the model `host`: what was found so far, and its parts once they could be read."""

    host: FlexMoeForCausalLM
    name: str
    findings: list[Finding] = field(default_factory=list)
    parts: list[ExpertPart] | None = None
    record: dict[str, Any] = field(default_factory=dict)
    public_text: PublicText | None = None

    def __post_init__(self) -> None:
        self.before = list(self.host.expert_names)

    def accept(self, check: str, sentence: str) -> None:
        """Notes that a check without a figure lets it pass."""
        self.findings.append(Finding(check, "accept", None, None, sentence))

    def refuse(self, check: str, fault: object) -> None:
        """Notes that a check without a figure refuses it."""
        self.findings.append(Finding(check, "refuse", None, None, str(fault)))

    def skip(self, check: str, reason: str) -> None:
        """Notes that a check could not look."""
        self.findings.append(Finding(check, "not judged", None, None, reason))

    def judge(self, package: ExpertPackage, trust: TrustPolicy | None, origin: str | None) -> None:
        """All that needs no text: format, signer, anchor, shapes, contents, rows and weights."""
        self.accept(
            "format", f"{len(package.infos)} tensors under names that a package may have, in safetensors files"
        )
        self._judge_signer(package, trust, origin)
        try:
            check_anchor(self.host.config, package.manifest)
            known = (self.host.config.anchor or {}).get("fingerprint")
            self.accept("anchor", f"made for this anchor, {known}" if known else "neither side has a fingerprint")
        except ValueError as error:
            self.refuse("anchor", error)
        networks = self._judge_shapes(package)
        self._judge_contents(package, networks)
        if self.parts is None:
            self.skip("rows and weights", "the package does not fit, or is damaged")
        else:
            self.findings += judge_parts(self.host.flexmoe_blocks(), self.parts, replaced=self.name)

    def judge_on(self, text: torch.Tensor | None, batch_size: int) -> None:
        """What the newcomer does to public text, int64 [N, L]."""
        if text is None or self.parts is None:
            reason = "no public text was given" if text is None else "the package does not fit, or is damaged"
            for check in _DATA_CHECKS:
                self.skip(check, reason)
            return
        before = token_losses(self.host, text, batch_size).mean().item()
        if not math.isfinite(before):
            raise ValueError("The model's own loss on this public text is not finite: nothing can be told from it.")
        self.host._put(self.record, self.parts)  # what add_expert ends with, of the parts that were judged
        with track_usage(self.host) as usage:
            after = token_losses(self.host, text, batch_size).mean().item()
        shares = [usage.share(block.layer_index).get(self.name, 0.0) for block in self.host.flexmoe_blocks()]
        self.public_text = PublicText(
            tokens=text.numel(),
            share=usage.share().get(self.name, 0.0),
            layer_shares=shares,
            loss_before=before,
            loss_after=after,
        )
        self.findings += judge_public_text(self.public_text)

    def _judge_signer(self, package: ExpertPackage, trust: TrustPolicy | None, origin: str | None) -> None:
        if trust is None:
            self.skip("signature", "no trust policy was given")
            return
        try:
            signer = trust.check(package, origin)
        except UntrustedPackageError as error:
            self.refuse("signature", error)
        else:
            said = f"signed with {signer.path}" if signer else "the policy takes anybody's from there"
            self.accept("signature", said)

    def _judge_shapes(self, package: ExpertPackage) -> list[nn.Module] | None:
        """The empty networks that the package's tensors have a place in; None if there is a misfit."""
        try:
            check_layers([block.layer_index for block in self.host.flexmoe_blocks()], package.manifest)
            plain = fresh_networks(self.host.config)
            record = package_record(package.manifest, public_widths(self.host.config, plain))
            self.record = expert_record({**record, "name": self.name})
            networks = fresh_experts(self.host.config, self.record, plain)
        except ValueError as error:
            self.refuse("shapes", error)
            return None
        if misfit := _misfit(package, self.host.flexmoe_blocks(), networks):
            self.refuse("shapes", misfit)
            return None
        self.accept("shapes", f"a {package.manifest.kind} expert for all {len(networks)} layers")
        return networks

    def _judge_contents(self, package: ExpertPackage, networks: list[nn.Module] | None) -> None:
        """Reads every file to its end, into the networks if it fits."""
        try:
            if networks is None:
                for _ in package.tensors():
                    pass
            else:
                self.parts = parts_from_package(self.host.flexmoe_blocks(), networks, package)
        except (ValueError, OSError) as error:
            self.refuse("contents", error)
            return
        self.accept("contents", f"SHA-256 of {len(package.manifest.sha256)} file(s) as named, every number finite")


def judge_public_text(text: PublicText) -> list[Finding]:
    """Holds what happens to public text against the bars of this module."""
    layer = max(range(len(text.layer_shares)), key=lambda i: _worst_first(text.layer_shares[i]))
    most, rise = text.layer_shares[layer], text.loss_after / text.loss_before - 1
    return [
        _figure(
            SHARE, text.share, SHARE_BAR, f"it takes {text.share:.1%} of the routing weight of {text.tokens} tokens"
        ),
        _figure(LAYER_SHARE, most, LAYER_SHARE_BAR, f"it takes {most:.1%} of it in layer {layer}, its most"),
        _figure(LOSS, rise, LOSS_BAR, f"from {text.loss_before:.4f} to {text.loss_after:.4f}, {rise:+.2%}"),
    ]


def _figure(check: str, figure: float, bar: float, sentence: str) -> Finding:
    verdict: Judgement = "accept" if figure <= bar + _ROUNDING else "refuse"  # what is no number is refused
    return Finding(check, verdict, figure, bar, sentence)


def _worst_first(share: float) -> float:
    return math.inf if math.isnan(share) else share


def _open(
    package: str | Path | ExpertPackage, revision: str | None
) -> tuple[str, ExpertPackage | Exception, str | None]:
    """(where it is, the package or what is wrong with it, its Hub id). FileNotFoundError: there is none."""
    if isinstance(package, ExpertPackage):
        return str(package.folder), package, None
    found = HubAccess().resolve(package, revision, owned=True, allow_patterns=PACKAGE_FILES)
    if not os.path.lexists(found.path / MANIFEST_FILE):
        raise FileNotFoundError(f"{found.path} is not an expert package: it has no {MANIFEST_FILE}.")
    try:
        return str(package), ExpertPackage.open(found.path), found.repo
    except (PackageError, FileNotFoundError) as error:  # of a file that the manifest names
        return str(package), error, found.repo


def _misfit(package: ExpertPackage, blocks: Sequence[FlexMoeBlock], networks: Sequence[nn.Module]) -> str | None:
    """What of the package has no place in these networks and rows, or which of them it lacks."""
    wanted: dict[str, tuple[int, ...]] = {}
    for block, network in zip(blocks, networks, strict=True):
        at = f"layers.{block.layer_index}"
        wanted |= {f"{at}.ffn.{name_in_package(network, k)}": tuple(v.shape) for k, v in network.state_dict().items()}
        wanted |= {f"{at}.router.weight": (1, block.hidden_size), f"{at}.router.bias": (1,)}
    found = {name: info.shape for name, info in package.infos.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            ours, theirs = (shapes.get(name) for shapes in (wanted, found))
            return f"tensor {name!r} has the shape {_shape(theirs)}; the model wants {_shape(ours)}"
    return None


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _public_text(
    host: FlexMoeForCausalLM,
    folder: Path,
    data: Sequence[str | Path] | None,
    public_sample: bool,
    text_column: str,
    tokenizer: PreTrainedTokenizerBase | None,
    max_tokens: int,
) -> torch.Tensor | None:
    """Public text as sequences [N, L]; None if none was asked for. ValueError: less than two tokens."""
    if data is None and not public_sample:
        return None
    record: Mapping[str, Any] | None = host.config.public_sample
    documents = read_public_sample(folder, record) if data is None else read_documents(data, column=text_column)
    random.Random(0).shuffle(documents)  # a few long ones must not stand for all, and two runs must agree
    some, letters = [], 0
    for document in documents:  # no need to tokenise gigabytes: a token has some five letters
        some.append(document)
        letters += len(document)
        if letters > 16 * max_tokens:
            break
    stream = pack(some, tokenizer or AutoTokenizer.from_pretrained(folder), 2).flatten()[:max_tokens]
    limit = getattr(host.config.get_text_config(), "max_position_embeddings", None) or LONGEST_SEQUENCE
    length = min(LONGEST_SEQUENCE, limit, len(stream))
    return stream[: len(stream) // length * length].view(-1, length)


def _facts(source: str, opened: ExpertPackage | Exception) -> dict[str, Any]:
    if isinstance(opened, Exception):
        return {"source": source}
    manifest = opened.manifest
    kept = ("name", "kind", "version", "license", "dtype", "sha256")
    size = sum(info.nbytes for info in opened.infos.values())
    return {"source": source, **{key: getattr(manifest, key) for key in kept}, "bytes": size}


__all__ = ["Finding", "PublicText", "Verdict", "judge_public_text", "verify"]
