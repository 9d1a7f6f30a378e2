"""Small expert packages, keys and policies for the tests of signatures."""

import json
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from flexmoe.packages.manifest import ExpertManifest
from flexmoe.packages.package import write_package

# Kinds of private keys, and whether model-signing supports them.
KEYS: dict[str, tuple[Any, bool]] = {
    "P-256": (lambda: ec.generate_private_key(ec.SECP256R1()), True),
    "P-384": (lambda: ec.generate_private_key(ec.SECP384R1()), True),
    "P-521": (lambda: ec.generate_private_key(ec.SECP521R1()), True),
    "secp256k1": (lambda: ec.generate_private_key(ec.SECP256K1()), False),
    "RSA": (lambda: rsa.generate_private_key(65537, 2048), False),
    "Ed25519": (lambda: ed25519.Ed25519PrivateKey.generate(), False),
}


def small_package(folder: Path, seed: int = 0) -> Path:
    """A package of one layer with random weights."""
    generator = torch.Generator().manual_seed(seed)
    manifest = ExpertManifest(
        name="derm",
        version="1.0.0",
        kind="full",
        layers=[0],
        ffn={"class": "LlamaMLP", "hidden": 4, "intermediate": 8},
        dtype="float32",
        anchor={"repo": None, "revision": None, "fingerprint": "0" * 64, "model_type": "llama"},
    )
    tensors = {
        "layers.0.ffn.up_proj.weight": torch.randn(8, 4, generator=generator),
        "layers.0.router.weight": torch.randn(1, 4, generator=generator),
        "layers.0.router.bias": torch.zeros(1),
    }
    return write_package(folder, manifest, tensors.items())


def write_keys(prefix: Path, kind: str) -> tuple[Path, Path]:
    """(private, public) PEM files of a new key of one of the `KEYS`, as openssl writes them."""
    key = KEYS[kind][0]()
    private, public = prefix.with_suffix(".pem"), prefix.with_suffix(".pub")
    plain, pkcs8 = serialization.NoEncryption(), serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, plain))
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, info))
    return private, public


def write_policy(path: Path, *rules: tuple[str, Any]) -> Path:
    """A policy file of (pattern, allowed signers)."""
    listed = [{"pattern": pattern, "allowed_signers": allowed} for pattern, allowed in rules]
    path.write_text(json.dumps({"format_version": 1, "rules": listed}))
    return path
