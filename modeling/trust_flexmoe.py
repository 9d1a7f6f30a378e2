"""Whose expert packages are let in: a policy file that names, per origin, the keys that may have signed a package.

A signature is the file `model.sig` in the package, as the model-signing library makes it (a Sigstore bundle around an
in-toto statement, with an elliptic-curve key, so that it works offline). It names every file of the package with its
SHA-256. The weights are not read for it: the statement is held against the manifest that was parsed, whose digests
they have to match when they are streamed. `docs/signing.md` is the policy file for readers.

Not here: signing and making keys (`flexmoe.signing`), keyless and certificate signatures, and whether an expert that
somebody trusted has signed does any good.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from .folders_flexmoe import file_inside, read_regular_file
from .json_flexmoe import parse_json_object, read_json_object
from .manifest_flexmoe import MANIFEST_FILE, PackageError
from .packages_flexmoe import PACKAGE_FILES, ExpertPackage

SIGNATURE_FILE = "model.sig"
POLICY_VARIABLE = "FLEXMOE_POLICY"  # the policy of whoever passes none
POLICY_VERSION = 1
ANYONE = "anyone"
# What git and `hf download --local-dir` add to a folder is no part of the package. The library leaves out git's too.
NOT_COVERED = frozenset({".git", ".gitattributes", ".github", ".gitignore", ".cache"})

MAX_SIGNATURE_BYTES = 1 << 20  # some 200 bytes a file: room for thousands
MAX_KEY_BYTES = 16 << 10
MAX_FILES = 1000  # of a package; one of 5 TB has that many shards
MAX_OTHER_BYTES = 32 << 20  # of each file that is neither weights nor manifest

# How a public key's DER begins (SubjectPublicKeyInfo with an uncompressed point) and its length, by curve. RFC 5480.
_CURVES = {
    "P-256": ("3059301306072a8648ce3d020106082a8648ce3d03010703420004", 91),
    "P-384": ("3076301006072a8648ce3d020106052b8104002203620004", 120),
    "P-521": ("30819b301006072a8648ce3d020106052b810400230381860004", 158),
}
_PEM_BEGIN, _PEM_END = b"-----BEGIN PUBLIC KEY-----", b"-----END PUBLIC KEY-----"


class UntrustedPackageError(PackageError):
    """A package that the policy does not let in: unsigned, by somebody else, altered, or from where no rule is for."""


@dataclass(frozen=True)
class Signer:
    """A public key that a policy names.

    Attributes:
        path: its file.
        fingerprint: SHA-256 (hex) of the key as PEM, which is `sha256sum` of a file that openssl or `keygen` wrote.
        pem: the key.
    """

    path: Path
    fingerprint: str
    pem: bytes = field(repr=False)

    @classmethod
    def load(cls, path: str | Path) -> Signer:
        """Reads a PEM file. ValueError: it holds no public key on a curve that model-signing takes."""
        pem = _canonical_pem(read_regular_file(path, max_bytes=MAX_KEY_BYTES), path)
        return cls(Path(path), hashlib.sha256(pem).hexdigest(), pem)


@dataclass(frozen=True)
class TrustRule:
    """Who may have signed what comes from an origin: one of the keys `signers`; None is anyone, and nobody too."""

    pattern: str
    signers: tuple[Signer, ...] | None

    def matches(self, origin: str) -> bool:
        """Whether it is for this origin: a Hub id, the case of which does not count, or a folder's absolute path."""
        if os.path.isabs(origin):
            return fnmatchcase(Path(origin).as_posix(), self.pattern)
        return fnmatchcase(origin.lower(), self.pattern.lower())


@dataclass(frozen=True)
class TrustPolicy:
    """Rules, of which the first that matches a package's origin decides; a package that none matches is refused."""

    path: Path
    rules: tuple[TrustRule, ...]

    @classmethod
    def load(cls, path: str | Path) -> TrustPolicy:
        """Reads a policy file and the keys that it names, which are relative to it.

        Raises:
            FileNotFoundError: there is no such file, or not one of the keys.
            ValueError: not strict JSON, an unknown key, a wrong value, or a file that holds no fitting public key;
                names the file and the rule.
        """
        path = Path(path).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"There is no policy file {path}.")
        values = read_json_object(path)
        version = values.get("format_version")
        if type(version) is not int or version != POLICY_VERSION:
            raise ValueError(f"{path}: format_version is {version!r}; this FlexMoE reads {POLICY_VERSION}.")
        _check_keys(values, ("format_version", "rules"), str(path))
        if not isinstance(values["rules"], list):
            raise ValueError(f"{path}: rules must be a list of objects; it is {str(values['rules'])[:200]!r}.")
        rules = [_read_rule(rule, path, number) for number, rule in enumerate(values["rules"], start=1)]
        return cls(path, tuple(rules))

    def check(self, package: ExpertPackage, origin: str | None = None) -> Signer | None:
        """The key that signed the package, or None where the policy lets in anyone's. Reads none of its weights.

        That the weights are those that were signed is certain once `package.tensors()` has ended.

        Args:
            package: as it was opened, and will be used.
            origin: the Hub id that it was fetched by; None for a package from a folder, whose path (absolute, links
                followed) then counts.

        Raises:
            UntrustedPackageError: it is not let in; says why, by which rule, and what to do.
            ImportError: the policy asks for a signature, and model-signing is not installed.
        """
        origin = os.path.realpath(package.folder) if origin is None else origin
        for number, rule in enumerate(self.rules, start=1):
            if rule.matches(origin):
                said = f"rule {number} of {self.path} (pattern {rule.pattern!r})"
                return None if rule.signers is None else _check_signature(package, origin, rule.signers, said)
        raise UntrustedPackageError(
            f"{package.folder} from {origin}: refused, because no rule of {self.path} matches where it comes from. If "
            "you trust its owner, add a rule with the owner's key."
        )


def resolve_policy(policy: TrustPolicy | str | Path | None = None) -> TrustPolicy | None:
    """The policy to follow: as given or read from a file; by default the file that FLEXMOE_POLICY names, if it is set.

    Raises: as `TrustPolicy.load`.
    """
    if isinstance(policy, str | Path):
        return TrustPolicy.load(policy)
    if policy is not None:  # perhaps one of another copy of this code (remote code)
        return policy
    named = os.environ.get(POLICY_VARIABLE)
    if not named:
        return None
    try:
        return TrustPolicy.load(named)
    except (OSError, ValueError) as error:
        raise type(error)(f"{error} (The environment variable {POLICY_VARIABLE} names this policy.)") from error


def package_digests(package: ExpertPackage) -> dict[str, str]:
    """SHA-256 (hex) of every file that a signature of the package covers, by its path in the folder.

    The manifest counts as it was parsed and the weights by the digests in it, so they need no second reading; the
    other files are read. In the Hub's cache, where any program may have fetched more of the repository, the files that
    no package has do not count.

    Raises:
        PackageError: a link leads out of the folder, a file is no regular one or too large, or there are too many.
    """
    digests = {MANIFEST_FILE: package.manifest_sha256, **package.manifest.sha256}
    in_cache = package.folder.parent.name == "snapshots"
    try:
        for name, path in _files(package.folder):
            if name not in digests and (not in_cache or any(fnmatchcase(name, known) for known in PACKAGE_FILES)):
                digests[name] = hashlib.sha256(read_regular_file(path, max_bytes=MAX_OTHER_BYTES)).hexdigest()
    except (OSError, ValueError) as error:
        raise PackageError(f"{package.folder}: not every file of it can be signed or checked: {error}") from error
    return digests


def known_digests(digests: Mapping[str, str], name: str, scratch: Path) -> Any:
    """A `model_signing.hashing.Config` that takes digests as they are known and reads no file of the package.

    Its attribute `signed` is None until the library has found a signature to be right and compares what it covers;
    then it is the digests that it names, by path, each with `algorithm` and `digest_hex`.

    Args:
        digests: as `package_digests`.
        name: of the package, which goes into a signature as a hint to readers.
        scratch: a temporary folder.
    """
    library = signing_library()
    sample = scratch / "sample"
    sample.touch()
    # The class of a digest is no public name of the library, a digest that it made is.
    digest = next(library.hashing.hash(sample).resource_descriptors()).digest
    ignored = sorted({SIGNATURE_FILE, *NOT_COVERED})  # goes into the signature: readers leave out the same
    how = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": ignored}

    # the two bases are known only once the library is
    class ComparedManifest(library.manifest.Manifest):  # type: ignore[name-defined]
        def __eq__(self, other: Any) -> bool:
            config.signed = {item.identifier: item.digest for item in other.resource_descriptors()}
            return super().__eq__(other)

    class KnownDigests(library.hashing.Config):  # type: ignore[name-defined]
        signed: Mapping[str, Any] | None = None

        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> ComparedManifest:
            items = [
                library.manifest.FileManifestItem(
                    path=PurePosixPath(path), digest=replace(digest, digest_value=bytes.fromhex(value))
                )
                for path, value in digests.items()
            ]
            return ComparedManifest(name, items, library.manifest.SerializationType.from_args(how))

    config = KnownDigests()
    return config


def signing_library() -> Any:
    """The module `model_signing`. ImportError: it, or something that it needs, is not installed; says what to do."""
    try:
        import model_signing
    except ImportError as error:
        raise ImportError(
            f"Signatures need the model-signing library ({error}). Install it: pip install 'flexmoe[signing]'"
        ) from error
    return model_signing


def _check_signature(package: ExpertPackage, origin: str, signers: tuple[Signer, ...], said: str) -> Signer:
    def refuse(why: str, cause: Exception | None = None) -> NoReturn:
        raise UntrustedPackageError(f"{package.folder} from {origin}: refused by {said}, because {why}") from cause

    signing_library()  # a missing library is no fault of the package
    if not os.path.lexists(package.folder / SIGNATURE_FILE):
        refuse(
            f"it is not signed: it has no {SIGNATURE_FILE}. Ask its owner to sign it (flexmoe sign), or let {ANYONE} "
            "in by a rule of its own."
        )
    try:
        path = file_inside(package.folder, SIGNATURE_FILE)
        signature = read_regular_file(path, max_bytes=MAX_SIGNATURE_BYTES)
        claimed = _claimed_fingerprint(parse_json_object(signature, str(path)))
    except (OSError, ValueError) as error:
        refuse(f"its {SIGNATURE_FILE} cannot be read ({error}). Fetch the package again, or ask its owner.", error)
    if claimed is None:
        refuse(f"its {SIGNATURE_FILE} names no key. Keyless and certificate signatures don't count: use flexmoe sign.")
    signer = next((signer for signer in signers if signer.fingerprint == claimed), None)
    if signer is None:
        known = ", ".join(f"{signer.path} ({signer.fingerprint[:16]}...)" for signer in signers) or "none"
        refuse(
            f"it says that the key {claimed[:64]!r} signed it, and the keys allowed are: {known}. If that key is its "
            "owner's, got on a way that you trust, add it to the rule."
        )
    try:
        digests = package_digests(package)
    except PackageError as error:
        refuse(f"{error} Fetch the package again, or ask its owner.", error)
    if fault := _signature_fault(signature, signer, digests):
        refuse(f"{fault} Fetch the package again, or ask its owner.")
    return signer


def _signature_fault(signature: bytes, signer: Signer, digests: Mapping[str, str]) -> str | None:
    """What is wrong with a signature of files with these digests; None if nothing is."""
    with TemporaryDirectory(prefix="flexmoe-") as folder:
        # The library opens files by name. It gets the bytes that were read, not a stranger's file once more.
        scratch = Path(folder)
        (scratch / SIGNATURE_FILE).write_bytes(signature)
        (scratch / "key.pub").write_bytes(signer.pem)
        hashing = known_digests(digests, "package", scratch)
        try:
            verifier = signing_library().verifying.Config().use_elliptic_key_verifier(public_key=scratch / "key.pub")
            verifier.set_hashing_config(hashing).verify(scratch, scratch / SIGNATURE_FILE)
        except Exception as error:  # of any kind: the library promises none for files that are not as it wrote them
            if hashing.signed is not None:
                return f"its files are not those that {signer.path} signed: {_differences(hashing.signed, digests)}."
            reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
            return f"its {SIGNATURE_FILE} is damaged or forged: it does not verify with {signer.path} ({reason})."
    return None


def _differences(signed: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    if others := sorted({digest.algorithm for digest in signed.values()} - {"sha256"}):
        return f"it gives digests by {others[0]}, and only sha256 of whole files, the default, is read here"
    parts = {
        "changed": [name for name, digest in digests.items() if name in signed and signed[name].digest_hex != digest],
        "not signed": digests.keys() - signed.keys(),
        "signed but not there": signed.keys() - digests.keys(),
    }
    return "; ".join(f"{what}: {_some(names)}" for what, names in parts.items() if names)


def _some(names: Any) -> str:
    first = [repr(name[:200]) for name in sorted(names)[:5]]
    return ", ".join(first) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _claimed_fingerprint(bundle: dict[str, Any]) -> str | None:
    """The fingerprint of the key that a signature says it was made with, which proves nothing."""
    value: Any = bundle
    for key in ("verificationMaterial", "publicKey", "hint"):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) and value else None


def _files(folder: Path) -> list[tuple[str, Path]]:
    """(path in the folder with slashes, path) of each file that a signature covers; ValueError where none can."""
    found: list[tuple[str, Path]] = []
    pending = [(PurePosixPath(), folder)]
    while pending:
        inside, here = pending.pop()
        with os.scandir(here) as entries:
            for entry in entries:
                name = inside / entry.name
                if str(name) in NOT_COVERED or str(name) == SIGNATURE_FILE:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append((name, Path(entry.path)))
                else:
                    found.append((str(name), file_inside(here, entry.name)))  # refuses a link to a folder, too
                if len(found) + len(pending) > MAX_FILES:
                    raise ValueError(f"{folder}: more than {MAX_FILES} files and folders are no package.")
    return found


def _canonical_pem(data: bytes, path: str | Path) -> bytes:
    """The PEM text of a public key as openssl writes it, from a file that may have other line ends or text around."""
    _, begin, rest = data.partition(_PEM_BEGIN)
    body, end, _ = rest.partition(_PEM_END)
    try:
        der = base64.b64decode(b"".join(body.split()), validate=True)
    except ValueError:
        der = b""
    fits = any(len(der) == length and der.startswith(bytes.fromhex(start)) for start, length in _CURVES.values())
    if not begin or not end or not fits:
        raise ValueError(
            f"{path}: not a public key as PEM on one of the curves {', '.join(_CURVES)}; RSA, Ed25519 and private "
            "keys are not for this. Give the .pub file that `flexmoe keygen` made."
        )
    text = base64.b64encode(der)
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return b"\n".join([_PEM_BEGIN, *lines, _PEM_END, b""])


def _read_rule(rule: Any, policy: Path, number: int) -> TrustRule:
    where = f"{policy}: rule {number}"
    if not isinstance(rule, dict):
        raise ValueError(f"{where} must be an object with pattern and allowed_signers; it is {str(rule)[:200]!r}.")
    _check_keys(rule, ("pattern", "allowed_signers"), where)
    pattern, allowed = rule["pattern"], rule["allowed_signers"]
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"{where}: pattern must be text such as 'hospital/*'; it is {str(pattern)[:200]!r}.")
    if allowed == ANYONE:
        return TrustRule(pattern, None)
    if not isinstance(allowed, list) or not all(isinstance(key, str) and key for key in allowed):
        raise ValueError(
            f"{where}: allowed_signers must be {ANYONE!r} or a list of public keys' files; it is "
            f"{str(allowed)[:200]!r}."
        )
    try:
        return TrustRule(pattern, tuple(Signer.load(policy.parent / key) for key in allowed))
    except (OSError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error


def _check_keys(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    if unknown := sorted(values.keys() - set(known)):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(known)}.")
    if missing := [key for key in known if key not in values]:
        raise ValueError(f"{where}: the key {missing[0]!r} is missing.")


__all__ = [
    "NOT_COVERED",
    "SIGNATURE_FILE",
    "Signer",
    "TrustPolicy",
    "TrustRule",
    "UntrustedPackageError",
    "known_digests",
    "package_digests",
    "resolve_policy",
    "signing_library",
]
