"""Trust policies: a file that lists, per origin, the public keys whose signatures are accepted on expert packages.

A signature is the file `model.sig` in the package, as written by the model-signing library: a Sigstore bundle around
an in-toto statement, signed with an elliptic-curve key, which works offline. The statement lists every file of the
package with its SHA-256. Verifying it reads no weights: it is compared with the parsed manifest, and the weights are
compared with the manifest when they are streamed. The policy file is specified in `docs/signing.md`.

Does not cover making keys and signatures (`flexmoe.packages.signing`), keyless and certificate signatures, or the
quality of a signed expert.
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

from flexmoe.io.folders import file_inside, read_regular_file
from flexmoe.io.strict_json import parse_json_object, read_json_object
from flexmoe.packages.manifest import MANIFEST_FILE, PackageError
from flexmoe.packages.package import PACKAGE_FILES, ExpertPackage

SIGNATURE_FILE = "model.sig"
POLICY_VARIABLE = "FLEXMOE_POLICY"  # names the default policy
POLICY_VERSION = 1
ANYONE = "anyone"
# Added to a folder by git and `hf download --local-dir`; not part of the package. The library ignores git's too.
NOT_COVERED = frozenset({".git", ".gitattributes", ".github", ".gitignore", ".cache"})

MAX_SIGNATURE_BYTES = 1 << 20  # some 200 bytes per file of the package
MAX_KEY_BYTES = 16 << 10
MAX_FILES = 1000  # in a package: the number of shards of 5 TB
MAX_OTHER_BYTES = 32 << 20  # per file other than weights and manifest

# Prefix of a public key's DER (SubjectPublicKeyInfo with an uncompressed point) and its length, by curve. RFC 5480.
_CURVES = {
    "P-256": ("3059301306072a8648ce3d020106082a8648ce3d03010703420004", 91),
    "P-384": ("3076301006072a8648ce3d020106052b8104002203620004", 120),
    "P-521": ("30819b301006072a8648ce3d020106052b810400230381860004", 158),
}
_PEM_BEGIN, _PEM_END = b"-----BEGIN PUBLIC KEY-----", b"-----END PUBLIC KEY-----"


class UntrustedPackageError(PackageError):
    """A package that the policy refuses: unsigned, signed with another key, altered, or without a matching rule."""


@dataclass(frozen=True)
class Signer:
    """A public key listed in a policy.

    Attributes:
        path: its file.
        fingerprint: SHA-256 (hex) of the key as PEM: the `sha256sum` of a file written by openssl or `keygen`.
        pem: the key as PEM.
    """

    path: Path
    fingerprint: str
    pem: bytes = field(repr=False)

    @classmethod
    def load(cls, path: str | Path) -> Signer:
        """Reads a PEM file. ValueError: it holds no public key on a curve that model-signing supports."""
        pem = _canonical_pem(read_regular_file(path, max_bytes=MAX_KEY_BYTES), path)
        return cls(Path(path), hashlib.sha256(pem).hexdigest(), pem)


@dataclass(frozen=True)
class TrustRule:
    """The accepted signers for an origin: one of the keys `signers`; None accepts any package, signed or not."""

    pattern: str
    signers: tuple[Signer, ...] | None

    def matches(self, origin: str) -> bool:
        """Whether the rule applies to this origin: a Hub id (case-insensitive) or the absolute path of a folder."""
        if os.path.isabs(origin):
            return fnmatchcase(Path(origin).as_posix(), self.pattern)
        return fnmatchcase(origin.lower(), self.pattern.lower())


@dataclass(frozen=True)
class TrustPolicy:
    """Rules of which the first that matches a package's origin decides; without a match, the package is refused.

    Example:
        ```pycon
        >>> import json, flexmoe
        >>> from pathlib import Path
        >>> rule = {"pattern": "*", "allowed_signers": ["keys/hospital.pub"]}
        >>> _ = Path("policy.json").write_text(json.dumps({"format_version": 1, "rules": [rule]}))
        >>> policy = flexmoe.TrustPolicy.load("policy.json")
        >>> _ = flexmoe.sign("math-expert", "keys/hospital.pem")
        >>> policy.check(flexmoe.ExpertPackage.open("math-expert"), None).path.name
        'hospital.pub'
        ```
    """

    path: Path
    rules: tuple[TrustRule, ...]

    @classmethod
    def load(cls, path: str | Path) -> TrustPolicy:
        """Reads a policy file and the files of public keys that it names, relative to it.

        Raises:
            FileNotFoundError: there is no such file, or a key is missing.
            ValueError: not strict JSON, an unknown entry, a wrong value, or a file without a suitable public key;
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
        """Verifies the package's signature and returns its key; None if the rule accepts anyone. Reads no weights.

        The weights are verified against the signed digests once `package.tensors()` has ended.

        Args:
            package: the opened package, as it will be used.
            origin: the Hub id from which it was fetched; None for a folder, whose absolute path with links resolved is
                matched instead.

        Raises:
            UntrustedPackageError: it is refused; with the reason, the rule, and what to do.
            ImportError: a signature is required, and model-signing is not installed.
        """
        origin = os.path.realpath(package.folder) if origin is None else origin
        for number, rule in enumerate(self.rules, start=1):
            if rule.matches(origin):
                name = f"rule {number} of {self.path} (pattern {rule.pattern!r})"
                return None if rule.signers is None else _check_signature(package, origin, rule.signers, name)
        raise UntrustedPackageError(
            f"{package.folder} from {origin}: refused, because no rule of {self.path} matches its origin. If you "
            "trust its owner, add a rule with the owner's key."
        )


def resolve_policy(policy: TrustPolicy | str | Path | None = None) -> TrustPolicy | None:
    """The policy in force: `policy`, or read from that file; by default from the file in FLEXMOE_POLICY, if it is set.

    Raises:
        FileNotFoundError, ValueError: as `TrustPolicy.load`.
    """
    if isinstance(policy, str | Path):
        return TrustPolicy.load(policy)
    if policy is not None:
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

    The digests of the manifest as parsed and of the weights as listed in it are known, so only the other files are
    read. In the Hub's cache, where other programs may have fetched more of the repository, files that do not belong to
    a package are ignored.

    Raises:
        PackageError: a link leads out of the folder, a file is not regular or too large, or there are too many.
    """
    digests = {MANIFEST_FILE: package.manifest_sha256, **package.manifest.sha256}
    in_cache = package.folder.parent.name == "snapshots"
    try:
        for name, path in _files(package.folder):
            if name not in digests and (not in_cache or any(fnmatchcase(name, known) for known in PACKAGE_FILES)):
                digests[name] = hashlib.sha256(read_regular_file(path, max_bytes=MAX_OTHER_BYTES)).hexdigest()
    except (OSError, ValueError) as error:
        raise PackageError(f"{package.folder}: not all of its files can be signed or verified: {error}") from error
    return digests


def known_digests(digests: Mapping[str, str], name: str, scratch: Path) -> Any:
    """A `model_signing.hashing.Config` that uses known digests and reads no file of the package.

    Its attribute `signed` is None until the library has verified a signature and compares the files that it covers;
    then it holds the signed digests by path, each with `algorithm` and `digest_hex`.

    Args:
        digests: as of `package_digests`.
        name: the package's, which becomes a hint in the signature.
        scratch: a temporary folder.
    """
    library = signing_library()
    sample = scratch / "sample"
    sample.touch()
    # the library does not export the class of a digest, so take one that it computed
    digest = next(library.hashing.hash(sample).resource_descriptors()).digest
    ignored = sorted({SIGNATURE_FILE, *NOT_COVERED})  # part of the signature: readers ignore the same
    settings = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": ignored}

    # defined here because the library, an optional dependency, provides their bases
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
            return ComparedManifest(name, items, library.manifest.SerializationType.from_args(settings))

    config = KnownDigests()
    return config


def signing_library() -> Any:
    """The module `model_signing`. ImportError: it or a dependency is not installed; with what to do."""
    try:
        import model_signing
    except ImportError as error:
        raise ImportError(
            f"Signatures need the model-signing library ({error}). Install it: pip install 'flexmoe[signing]'"
        ) from error
    return model_signing


def _check_signature(package: ExpertPackage, origin: str, signers: tuple[Signer, ...], rule: str) -> Signer:
    def refuse(reason: str, cause: Exception | None = None) -> NoReturn:
        raise UntrustedPackageError(f"{package.folder} from {origin}: refused by {rule}, because {reason}") from cause

    signing_library()  # first: a missing library is not an error of the package
    if not os.path.lexists(package.folder / SIGNATURE_FILE):
        refuse(
            f"it is not signed: it has no {SIGNATURE_FILE}. Ask its owner to sign it (flexmoe sign), or accept "
            f"{ANYONE} in a rule of its own."
        )
    try:
        path = file_inside(package.folder, SIGNATURE_FILE)
        signature = read_regular_file(path, max_bytes=MAX_SIGNATURE_BYTES)
        claimed = _claimed_fingerprint(parse_json_object(signature, str(path)))
    except (OSError, ValueError) as error:
        refuse(f"its {SIGNATURE_FILE} cannot be read ({error}). Fetch the package again, or ask its owner.", error)
    if claimed is None:
        refuse(
            f"its {SIGNATURE_FILE} names no key. Keyless and certificate signatures are not supported: use "
            "flexmoe sign."
        )
    signer = next((signer for signer in signers if signer.fingerprint == claimed), None)
    if signer is None:
        known = ", ".join(f"{signer.path} ({signer.fingerprint[:16]}...)" for signer in signers) or "none"
        refuse(
            f"it claims to be signed with the key {claimed[:64]!r}; the allowed keys are: {known}. If that key is its "
            "owner's, and you got it from a trusted source, add it to the rule."
        )
    try:
        digests = package_digests(package)
    except PackageError as error:
        refuse(f"{error} Fetch the package again, or ask its owner.", error)
    if reason := _signature_error(signature, signer, digests):
        refuse(f"{reason} Fetch the package again, or ask its owner.")
    return signer


def _signature_error(signature: bytes, signer: Signer, digests: Mapping[str, str]) -> str | None:
    """The reason why a signature does not hold for files with these digests; None if it does."""
    with TemporaryDirectory(prefix="flexmoe-") as folder:
        # The library opens files by name: it gets the bytes that were checked, not the untrusted file again.
        scratch = Path(folder)
        (scratch / SIGNATURE_FILE).write_bytes(signature)
        (scratch / "key.pub").write_bytes(signer.pem)
        hashing = known_digests(digests, "package", scratch)
        try:
            verifier = signing_library().verifying.Config().use_elliptic_key_verifier(public_key=scratch / "key.pub")
            verifier.set_hashing_config(hashing).verify(scratch, scratch / SIGNATURE_FILE)
        except Exception as error:  # the library does not document its errors for malformed files
            if hashing.signed is not None:
                return f"its files are not those that {signer.path} signed: {_differences(hashing.signed, digests)}."
            reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
            return f"its {SIGNATURE_FILE} is damaged or forged: it does not verify with {signer.path} ({reason})."
    return None


def _differences(signed: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    if others := sorted({digest.algorithm for digest in signed.values()} - {"sha256"}):
        return f"it has digests by {others[0]}; only sha256 of complete files, the default, is supported"
    parts = {
        "changed": [name for name, digest in digests.items() if name in signed and signed[name].digest_hex != digest],
        "not signed": digests.keys() - signed.keys(),
        "signed but missing": signed.keys() - digests.keys(),
    }
    return "; ".join(f"{what}: {_some(names)}" for what, names in parts.items() if names)


def _some(names: Any) -> str:
    first = [repr(name[:200]) for name in sorted(names)[:5]]
    return ", ".join(first) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _claimed_fingerprint(bundle: dict[str, Any]) -> str | None:
    """The key fingerprint that a signature claims, unverified."""
    value: Any = bundle
    for key in ("verificationMaterial", "publicKey", "hint"):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) and value else None


def _files(folder: Path) -> list[tuple[str, Path]]:
    """(POSIX path in the folder, path) of each file that a signature covers. ValueError: one cannot be covered."""
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
                    found.append((str(name), file_inside(here, entry.name)))  # also refuses a link to a folder
                if len(found) + len(pending) > MAX_FILES:
                    raise ValueError(f"{folder}: more than {MAX_FILES} files and folders in a package.")
    return found


def _canonical_pem(data: bytes, path: str | Path) -> bytes:
    """A public key as openssl writes it, from a PEM file that may have other line endings or surrounding text."""
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
            "keys are not supported. Pass the .pub file that `flexmoe keygen` wrote."
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
