"""`flexmoe.verify`: all checks of an expert package for a model, collected into one verdict.

The checks of `add_expert` (format, signature, anchor, shapes, contents, rows and outputs) are made without stopping at
the first failure; with public text, its effect is measured too. Nothing is written; the model is changed in memory
only.

NOT covered: the quality of the expert's answers to its own kind of text, and answers poisoned for a trigger that
public text does not hold. The checks are documented in `docs/admission.md`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flexmoe.admission.checks import check_expert
from flexmoe.admission.findings import Finding, not_checked
from flexmoe.admission.public_text import (
    LAYER_SHARE,
    LOSS,
    MAX_TOKENS,
    SHARE,
    PublicText,
    check_public_text,
    measure_public_text,
    read_public_text,
)
from flexmoe.data import Documents, check_template_is_used
from flexmoe.hub.client import HubAccess, resolve_folder
from flexmoe.io.dense import load_causal_lm
from flexmoe.modeling.configuration_flexmoe import PUBLIC, check_expert_name, expert_record
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.packages.checks import (
    check_anchor,
    check_layers,
    check_shapes,
    expected_shapes,
    package_record,
    public_widths,
)
from flexmoe.packages.manifest import MANIFEST_FILE, PackageError
from flexmoe.packages.modules import ExpertPart, fresh_experts, fresh_networks, parts_from_package
from flexmoe.packages.package import PACKAGE_FILES, ExpertPackage
from flexmoe.packages.trust import TrustPolicy, UntrustedPackageError, resolve_policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_TIMES = 64  # the size of public's networks, up to which a package that does not fit is read nevertheless


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of `verify`.

    Attributes:
        accepted: whether no check refuses the expert.
        package: `name`, `kind`, `version`, `license`, `dtype` and `sha256` of the manifest, `source`, and `bytes`.
        model: the argument of `verify`.
        experts: the experts of the model with the incoming one, under its name in the model.
        replaces: the existing expert of that name, which it would replace; or None.
        num_experts_per_tok: k of the model.
        findings: of every check, in order.
        public_text: None without text, or if the package cannot be added to the model.

    Example:
        ```pycon
        >>> import flexmoe
        >>> verdict = flexmoe.verify("law-expert", "model")
        >>> verdict.accepted, verdict.refusals
        (True, [])
        >>> verdict.findings[0].check
        'format'
        ```
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
        """The fields by name, as printed by `--json`."""
        return asdict(self)

    @property
    def refusals(self) -> list[Finding]:
        """The findings that refuse the expert."""
        return [finding for finding in self.findings if finding.verdict == "refuse"]


def verify(
    package: str | Path | ExpertPackage,
    model: str | Path,
    *,
    name: str | None = None,
    data: Sequence[str | Path] | None = None,
    public_sample: bool = False,
    text_column: str = "text",
    text_template: str | None = None,
    skip_empty: bool = False,
    policy: TrustPolicy | str | Path | None = None,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int = MAX_TOKENS,
    batch_size: int = 8,
) -> Verdict:
    """Checks an expert package before it is added to a model, which is not changed on disk.

    An existing expert of the same name counts as replaced. All experts count as active.

    Args:
        package: folder, Hub id, or an opened package.
        model: folder or Hub id of a FlexMoE model or composition.
        name: the expert's name in the model; by default the package's own.
        data: files of public text, to measure the effect on it; see `flexmoe.data.Documents`.
        public_sample: use the public text stored with the model at its graft. It is known to everyone, so text that
            was not published is a better test.
        text_column, text_template, skip_empty: how rows of tables become texts; see `flexmoe.data.Documents`.
        policy: a trust policy or its file; by default the file in FLEXMOE_POLICY.
        revision: branch, tag or commit of a package on the Hub.
        tokenizer: by default the one in the model's folder.
        max_tokens: of public text, at most.
        batch_size: sequences per forward pass.

    Raises:
        FileNotFoundError: no such package, model or file.
        ValueError: `model` is not a FlexMoE model, the requested public text is missing, or an argument is out of
            range. An invalid package is reported as a finding, not as an error.

    Example:
        ```pycon
        >>> import flexmoe
        >>> verdict = flexmoe.verify("law-expert", "model", data=["public.txt"])
        >>> verdict.experts
        ['public', 'math', 'code', 'law']
        ```
    """
    if data is not None and public_sample:
        raise ValueError("data and public_sample: pass one of the two, your own public text or the model's sample.")
    if name is not None:
        check_expert_name(name)
    if max_tokens < 2 or batch_size < 1:
        raise ValueError(f"max_tokens={max_tokens}, batch_size={batch_size}: at least 2 tokens, and 1 sequence.")
    documents = None
    if data is not None:
        documents = Documents(data, column=text_column, template=text_template, skip_empty=skip_empty)
        check_template_is_used([documents])
    trust = resolve_policy(policy)
    source, opened, origin = _open(package, revision)
    folder = resolve_folder(model).path
    host = load_causal_lm(model, FlexMoeForCausalLM, dtype="auto", policy=trust).eval()
    host.to("cuda" if torch.cuda.is_available() else "cpu")
    host.set_active_experts(None)
    text_NL = read_public_text(
        host,
        folder,
        data=documents,
        public_sample=public_sample,
        tokenizer=tokenizer,
        max_tokens=max_tokens,
    )

    checks = _Checks(host, name or (opened.manifest.name if isinstance(opened, ExpertPackage) else "unreadable"))
    if isinstance(opened, ExpertPackage):
        checks.check_package(opened, trust, origin)
        checks.check_text(text_NL, batch_size)
    else:
        checks.refuse("format", opened)
    return Verdict(
        accepted=all(finding.verdict != "refuse" for finding in checks.findings),
        package=_describe(source, opened),
        model=str(model),
        experts=list(dict.fromkeys([*checks.existing, checks.name])),
        replaces=checks.name if checks.name in checks.existing else None,
        num_experts_per_tok=host.config.num_experts_per_tok,
        findings=checks.findings,
        public_text=checks.public_text,
    )


@dataclass
class _Checks:
    """The checks of an incoming expert `name` for the model `host`: findings so far, and its parts once read."""

    host: FlexMoeForCausalLM
    name: str
    findings: list[Finding] = field(default_factory=list)
    parts: list[ExpertPart] | None = None
    record: dict[str, Any] = field(default_factory=dict)
    public_text: PublicText | None = None

    def __post_init__(self) -> None:
        self.existing = list(self.host.expert_names)

    def accept(self, check: str, message: str) -> None:
        """Adds a finding without a value that accepts the expert."""
        self.findings.append(Finding(check, "accept", None, None, message))

    def refuse(self, check: str, error: object) -> None:
        """Adds a finding without a value that refuses the expert."""
        self.findings.append(Finding(check, "refuse", None, None, str(error)))

    def skip(self, check: str, reason: str) -> None:
        """Adds the finding of a check that could not be made."""
        self.findings.append(not_checked(check, reason))

    def check_package(self, package: ExpertPackage, trust: TrustPolicy | None, origin: str | None) -> None:
        """All checks without text: format, signature, anchor, shapes, contents, rows and outputs."""
        self.accept("format", f"{len(package.infos)} tensors with valid names, in safetensors files")
        self._check_signature(package, trust, origin)
        try:
            check_anchor(self.host.config, package.manifest)
            known = (self.host.config.anchor or {}).get("fingerprint")
            self.accept("anchor", f"made for this anchor, {known}" if known else "neither side has a fingerprint")
        except ValueError as error:
            self.refuse("anchor", error)
        networks = self._check_shapes(package)
        self._check_contents(package, networks)
        if self.parts is None:
            self.skip("rows and outputs", "the package does not fit the model, or is damaged")
        else:
            self.findings += check_expert(
                self.host, self.parts, replaced=self.name, evidence=self.record.get("evidence")
            )

    def check_text(self, text_NL: torch.Tensor | None, batch_size: int) -> None:
        """The effect on public text, int64 [N, L]."""
        if text_NL is None or self.parts is None:
            reason = "no public text" if text_NL is None else "the package does not fit the model, or is damaged"
            for check in (SHARE, LAYER_SHARE, LOSS):
                self.skip(check, reason)
            return
        self.public_text = measure_public_text(self.host, self.record, self.parts, text_NL, batch_size)
        self.findings += check_public_text(self.public_text)

    def _check_signature(self, package: ExpertPackage, trust: TrustPolicy | None, origin: str | None) -> None:
        if trust is None:
            self.skip("signature", "no trust policy")
            return
        try:
            signer = trust.check(package, origin)
        except UntrustedPackageError as error:
            self.refuse("signature", error)
        else:
            self.accept("signature", f"signed with {signer.path}" if signer else "the policy accepts any from there")

    def _check_shapes(self, package: ExpertPackage) -> list[nn.Module] | None:
        """The expert's networks without weights; None if the package does not fit."""
        blocks = self.host.flexmoe_blocks()
        try:
            check_layers([block.layer_index for block in blocks], package.manifest)
            publics = fresh_networks(self.host.config)
            record = package_record(package.manifest, public_widths(self.host.config, publics))
            self.record = expert_record({**record, "name": self.name})
            networks = fresh_experts(self.host.config, self.record, publics)
            by_layer = {block.layer_index: network for block, network in zip(blocks, networks, strict=True)}
            check_shapes(package, expected_shapes(by_layer, self.record, blocks[0].hidden_size))
        except ValueError as error:
            self.refuse("shapes", error)
            return None
        self.accept("shapes", f"a {package.manifest.kind} expert for all {len(networks)} layers")
        return networks

    def _check_contents(self, package: ExpertPackage, networks: list[nn.Module] | None) -> None:
        """Reads every file completely, into the networks if it fits."""
        size, own = sum(info.nbytes for info in package.infos.values()), _network_bytes(self.host)
        if networks is None and size > _MOST_TIMES * own:
            self.skip(
                "contents", f"they take {size:,} bytes, more than {_MOST_TIMES} times public's networks ({own:,})"
            )
            return
        try:
            if networks is None:
                package.verify()
            else:
                self.parts = parts_from_package(self.host.flexmoe_blocks(), networks, package)
        except (ValueError, OSError) as error:
            self.refuse("contents", error)
            return
        self.accept("contents", f"{len(package.manifest.sha256)} file(s) with the SHA-256 of the manifest, all finite")


def _open(
    package: str | Path | ExpertPackage, revision: str | None
) -> tuple[str, ExpertPackage | Exception, str | None]:
    """(source, the package or its error, its Hub id). FileNotFoundError: there is no package."""
    if isinstance(package, ExpertPackage):
        return str(package.folder), package, None
    found = HubAccess().resolve(package, revision, owned=True, allow_patterns=PACKAGE_FILES)
    if not os.path.lexists(found.path / MANIFEST_FILE):
        raise FileNotFoundError(f"{found.path} is not an expert package: it has no {MANIFEST_FILE}.")
    try:
        return str(package), ExpertPackage.open(found.path), found.repo
    except (PackageError, FileNotFoundError) as error:  # the latter: a weight file is missing
        return str(package), error, found.repo


def _network_bytes(host: FlexMoeForCausalLM) -> int:
    tensors = [tensor for block in host.flexmoe_blocks() for tensor in block.experts[PUBLIC].parameters()]
    return sum(tensor.nbytes for tensor in tensors)


def _describe(source: str, opened: ExpertPackage | Exception) -> dict[str, Any]:
    if isinstance(opened, Exception):
        return {"source": source}
    keys = ("name", "kind", "version", "license", "dtype", "sha256")
    size = sum(info.nbytes for info in opened.infos.values())
    return {"source": source, **{key: getattr(opened.manifest, key) for key in keys}, "bytes": size}


__all__ = ["Finding", "PublicText", "Verdict", "verify"]
