"""Keys and signatures for expert packages: elliptic-curve keys in files, which work offline.

Signatures are made by the model-signing library; it makes no keys, so `keygen` does. Does not cover which signatures
are accepted (`flexmoe.packages.trust`), keyless and certificate signatures (made by that library's own command,
accepted by no policy here), or hardware keys.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from flexmoe.io.folders import check_new_file, read_regular_file, write_file
from flexmoe.packages.package import PACKAGE_FILES, ExpertPackage
from flexmoe.packages.trust import (
    MAX_KEY_BYTES,
    SIGNATURE_FILE,
    Signer,
    known_digests,
    package_digests,
    signing_library,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

_CURVES = ("secp256r1", "secp384r1", "secp521r1")  # those of model-signing: P-256, P-384, P-521


@dataclass(frozen=True)
class KeyPair:
    """The files of a new key, and its fingerprint (`Signer.fingerprint`)."""

    private: Path
    public: Path
    fingerprint: str


def keygen(out_prefix: str | Path, *, password: str | None = None, overwrite: bool = False) -> KeyPair:
    """Makes a key on the curve P-256: `PREFIX.pem`, the private key, and `PREFIX.pub`, the public key to distribute.

    Args:
        out_prefix: path of both files without their extensions. Its folder is created if necessary.
        password: encrypts the private key. Without one, it is protected by the mode of the file (0600) only.
        overwrite: replace an existing key, which is lost.

    Raises:
        FileExistsError: one of the files exists and `overwrite` is False.
        ValueError: the password is empty.
        ImportError: the extra `signing` is not installed.

    Example:
        ```pycon
        >>> import flexmoe
        >>> key = flexmoe.keygen("keys/publisher")
        >>> key.private.name, key.public.name
        ('publisher.pem', 'publisher.pub')
        ```
    """
    signing_library()  # depends on cryptography
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if password is not None and not password:
        raise ValueError("The password is empty. Pass a password of at least one character, or none.")
    prefix = Path(out_prefix).expanduser()
    private, public = prefix.with_name(f"{prefix.name}.pem"), prefix.with_name(f"{prefix.name}.pub")
    for path in (private, public):
        check_new_file(path, overwrite)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = (
        serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password.encode())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    write_file(private, pem, mode=0o600, overwrite=overwrite)
    write_file(public, _public_pem(key), mode=0o644, overwrite=overwrite)
    return KeyPair(private, public, Signer.load(public).fingerprint)


def sign(
    package_folder: str | Path, private_key: str | Path, *, password: str | None = None, overwrite: bool = False
) -> Path:
    """Verifies an expert package, signs it, and returns the path of the signature, `model.sig` in the package.

    The signature covers every file of the folder except itself and files of git, so sign last. The weights are read
    once.

    Args:
        package_folder: the package.
        private_key: a PEM file as written by `keygen`, or any key on P-256, P-384 or P-521.
        password: of the private key.
        overwrite: replace an existing signature.

    Raises:
        FileNotFoundError: there is no such folder or key, or no package in it.
        FileExistsError: it is signed already, and `overwrite` is False.
        PackageError: the package is invalid or damaged.
        ValueError: the key or the password is wrong, or a file is not part of a package, so that readers would not
            fetch it.
        ImportError: the extra `signing` is not installed.

    Example:
        ```pycon
        >>> import flexmoe
        >>> flexmoe.sign("math-expert", "keys/hospital.pem").name
        'model.sig'
        ```
    """
    library = signing_library()
    package = ExpertPackage.open(package_folder)
    signature = package.folder / SIGNATURE_FILE
    check_new_file(signature, overwrite)
    key = Path(private_key).expanduser()
    _check_private_key(key, password)
    digests = package_digests(package)
    _check_fetched(package, digests)
    for _ in package.tensors():  # verifies the digests in the manifest
        pass
    secret = None if password is None else password.encode()  # annotated as text, but only bytes work
    with TemporaryDirectory(prefix="flexmoe-") as scratch:
        hashing = known_digests(digests, package.folder.resolve().name, Path(scratch))
        signer = library.signing.Config().use_elliptic_key_signer(private_key=key, password=secret)
        signer.set_hashing_config(hashing).sign(package.folder, Path(scratch, SIGNATURE_FILE))
        write_file(signature, Path(scratch, SIGNATURE_FILE).read_bytes(), mode=0o644, overwrite=overwrite)
    return signature


def _check_private_key(path: Path, password: str | None) -> None:
    """Checks the key before the library does, whose errors do not name the file."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    data = read_regular_file(path, max_bytes=MAX_KEY_BYTES)
    try:
        key = serialization.load_pem_private_key(data, None if password is None else password.encode())
    except TypeError:  # a password is missing or superfluous
        hint = "is encrypted: pass its password" if password is None else "is not encrypted: pass no password"
        raise ValueError(f"{path} {hint}.") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{path} is not a private key as PEM, or the password is wrong ({error}).") from error
    curve = key.curve.name if isinstance(key, ec.EllipticCurvePrivateKey) else type(key).__name__.lstrip("_")
    if curve not in _CURVES:
        raise ValueError(
            f"{path} is a key of another kind ({curve}); supported are {', '.join(_CURVES)}. Make one with "
            "flexmoe keygen."
        )


def _check_fetched(package: ExpertPackage, digests: dict[str, str]) -> None:
    """Checks that readers fetch every signed file: without one of them, the signature does not verify."""
    for name in sorted(digests):
        if not any(fnmatchcase(name, pattern) for pattern in PACKAGE_FILES):
            raise ValueError(
                f"{package.folder}: {name!r} is not a file of a package, so it is not fetched from the Hub, and the "
                "signature would not verify there. Move it out of the folder; allowed are "
                + ", ".join(PACKAGE_FILES)
                + "."
            )


def _public_pem(key: "EllipticCurvePrivateKey") -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


__all__ = ["KeyPair", "keygen", "sign"]
