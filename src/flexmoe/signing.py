"""Keys for signing expert packages, and the signing itself: elliptic-curve keys in files, so that it works offline.

Signatures are those of the model-signing library; it makes no keys, so `keygen` does. Not here: whose signatures are
accepted (`flexmoe.modeling.trust_flexmoe`), keyless and certificate signatures (that library's own command makes them,
no policy here reads them), and hardware keys.
"""

import os
import secrets
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from flexmoe.modeling.folders_flexmoe import TEMPORARY_MARK, read_regular_file
from flexmoe.modeling.packages_flexmoe import PACKAGE_FILES, ExpertPackage
from flexmoe.modeling.trust_flexmoe import (
    MAX_KEY_BYTES,
    SIGNATURE_FILE,
    Signer,
    known_digests,
    package_digests,
    signing_library,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

_CURVES = ("secp256r1", "secp384r1", "secp521r1")  # what model-signing takes: P-256, P-384, P-521


@dataclass(frozen=True)
class KeyPair:
    """The files of a new key, and the fingerprint that others know it by (`Signer.fingerprint`)."""

    private: Path
    public: Path
    fingerprint: str


def keygen(out_prefix: str | Path, *, password: str | None = None, overwrite: bool = False) -> KeyPair:
    """Makes a key on the curve P-256: `PREFIX.pem`, to be kept secret, and `PREFIX.pub`, to be handed out.

    Args:
        out_prefix: path and name of both files, without the endings. Its folder is made if need be.
        password: encrypts the private key's file. Without one, only the file's mode (0600) guards it.
        overwrite: replace a key that is there. What it signed can then be signed by nobody any more.

    Raises:
        FileExistsError: one of the files exists and `overwrite` is False.
        ValueError: the password is empty.
        ImportError: the extra `signing` is not installed.
    """
    signing_library()  # it brings cryptography
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if password is not None and not password:
        raise ValueError("The password is empty. Give one of at least a character, or none.")
    prefix = Path(out_prefix).expanduser()
    private, public = prefix.with_name(f"{prefix.name}.pem"), prefix.with_name(f"{prefix.name}.pub")
    for path in (private, public):
        _check_new(path, overwrite)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = (
        serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password.encode())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    _write_file(private, pem, mode=0o600, overwrite=overwrite)
    _write_file(public, _public_pem(key), mode=0o644, overwrite=overwrite)
    return KeyPair(private, public, Signer.load(public).fingerprint)


def sign(
    package_folder: str | Path, private_key: str | Path, *, password: str | None = None, overwrite: bool = False
) -> Path:
    """Signs an expert package, after its weights were checked, into its file `model.sig`, and returns that.

    The signature covers every file of the folder but itself and what git adds; so it is the last thing done to a
    package. The weights are read once.

    Args:
        package_folder: the package.
        private_key: a PEM file, as of `keygen`; any key on P-256, P-384 or P-521.
        password: of the private key's file.
        overwrite: replace a signature that is there.

    Raises:
        FileNotFoundError: there is no such folder or key, or no package in it.
        FileExistsError: it is signed already, and `overwrite` is False.
        PackageError: the package is not what its manifest says.
        ValueError: the key or the password does not fit, or a file is none that readers of a package fetch.
        ImportError: the extra `signing` is not installed.
    """
    library = signing_library()
    package = ExpertPackage.open(package_folder)
    signature = package.folder / SIGNATURE_FILE
    _check_new(signature, overwrite)
    key = Path(private_key).expanduser()
    _check_private_key(key, password)
    digests = package_digests(package)
    _check_fetched(package, digests)
    for _ in package.tensors():  # the digests of the weights stand in the manifest; here they are found to be true
        pass
    secret = None if password is None else password.encode()  # its type says text, but it works with bytes only
    with TemporaryDirectory(prefix="flexmoe-") as scratch:
        hashing = known_digests(digests, package.folder.resolve().name, Path(scratch))
        signer = library.signing.Config().use_elliptic_key_signer(private_key=key, password=secret)
        signer.set_hashing_config(hashing).sign(package.folder, Path(scratch, SIGNATURE_FILE))
        _write_file(signature, Path(scratch, SIGNATURE_FILE).read_bytes(), mode=0o644, overwrite=overwrite)
    return signature


def _check_private_key(path: Path, password: str | None) -> None:
    """Errors that name the file, for what the library would fail on in many ways."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    data = read_regular_file(path, max_bytes=MAX_KEY_BYTES)
    try:
        key = serialization.load_pem_private_key(data, None if password is None else password.encode())
    except TypeError:  # what the library says of a password too few or too many
        wanted = "is encrypted: give its password" if password is None else "is not encrypted: give no password"
        raise ValueError(f"{path} {wanted}.") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{path} is no private key as PEM, or the password is wrong ({error}).") from error
    curve = key.curve.name if isinstance(key, ec.EllipticCurvePrivateKey) else type(key).__name__.lstrip("_")
    if curve not in _CURVES:
        raise ValueError(
            f"{path} is a key of another kind ({curve}); signatures are made with {', '.join(_CURVES)}. "
            "Make one with flexmoe keygen."
        )


def _check_fetched(package: ExpertPackage, digests: dict[str, str]) -> None:
    """A signed file that no reader fetches would be missed by each."""
    for name in sorted(digests):
        if not any(fnmatchcase(name, pattern) for pattern in PACKAGE_FILES):
            raise ValueError(
                f"{package.folder}: {name!r} is no file of a package: who fetches the package from the Hub does not "
                "get it, and would find the signature broken. Move it out of the folder; allowed are "
                + ", ".join(PACKAGE_FILES)
                + "."
            )


def _public_pem(key: "EllipticCurvePrivateKey") -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _check_new(path: Path, overwrite: bool) -> None:
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path} exists already. Choose another place, or pass --overwrite (overwrite=True).")


def _write_file(path: Path, data: bytes, *, mode: int, overwrite: bool) -> None:
    """The file appears whole or not at all, never readable by more than `mode` says, and replaces none unasked."""
    temporary = path.with_name(f".{path.name}{TEMPORARY_MARK}{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _put_in_place(temporary, path, overwrite)
    finally:
        temporary.unlink(missing_ok=True)


def _put_in_place(temporary: Path, path: Path, overwrite: bool) -> None:
    if not overwrite:
        _check_new(path, overwrite)
        try:
            os.link(temporary, path)  # unlike a rename, never over a file that appeared meanwhile
            return
        except FileExistsError:
            _check_new(path, overwrite)
        except OSError:  # a file system without hard links, such as a USB stick's
            _check_new(path, overwrite)
    os.replace(temporary, path)


__all__ = ["KeyPair", "keygen", "sign"]
