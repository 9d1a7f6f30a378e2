"""Keys and signatures: how they are written, which packages cannot be signed, and that other tools can verify them."""

import builtins
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from cryptography.hazmat.primitives import serialization
from typer.testing import CliRunner

from flexmoe.packages.package import ExpertPackage, PackageError
from flexmoe.packages.signing import keygen, sign
from flexmoe.packages.trust import Signer, TrustPolicy
from flexmoe_cli import app, main
from tests.support.signed_packages import KEYS, small_package, write_keys, write_policy

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "signing.md").read_text(encoding="utf-8")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return small_package(tmp_path / "derm")


def policy_of(public: Path) -> TrustPolicy:
    return TrustPolicy.load(write_policy(public.with_name("policy.json"), ("*", [public.name])))


class TestKeygen:
    def test_the_private_key_is_readable_by_its_owner_only(self, tmp_path: Path) -> None:
        keys = keygen(tmp_path / "new" / "dr.house")
        assert (keys.private.name, keys.public.name) == ("dr.house.pem", "dr.house.pub")
        assert keys.private.stat().st_mode & 0o777 == 0o600
        assert keys.public.stat().st_mode & 0o077
        assert {path.name for path in keys.private.parent.iterdir()} == {"dr.house.pem", "dr.house.pub"}
        assert b"PRIVATE" not in keys.public.read_bytes()
        assert Signer.load(keys.public).fingerprint == keys.fingerprint

    @pytest.mark.parametrize("existing", ["key.pem", "key.pub"])
    def test_an_existing_key_is_not_replaced(self, existing: str, tmp_path: Path) -> None:
        (tmp_path / existing).write_text("precious")
        with pytest.raises(FileExistsError, match=re.escape(existing)):
            keygen(tmp_path / "key")
        assert [path.name for path in tmp_path.iterdir()] == [existing]
        assert (tmp_path / existing).read_text() == "precious"
        keys = keygen(tmp_path / "key", overwrite=True)
        assert "precious" not in keys.private.read_text() + keys.public.read_text()
        assert keys.private.stat().st_mode & 0o777 == 0o600

    def test_a_link_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "key.pem").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(FileExistsError):
            keygen(tmp_path / "key")
        keygen(tmp_path / "key", overwrite=True)
        assert not (tmp_path / "elsewhere").exists()

    def test_with_a_password(self, tmp_path: Path) -> None:
        keys = keygen(tmp_path / "key", password="Grüße")
        with pytest.raises(TypeError):
            serialization.load_pem_private_key(keys.private.read_bytes(), None)
        assert serialization.load_pem_private_key(keys.private.read_bytes(), "Grüße".encode())
        with pytest.raises(ValueError, match="password is empty"):
            keygen(tmp_path / "other", password="")


class TestSign:
    @pytest.mark.parametrize("kind", KEYS)
    def test_kinds_of_keys(self, kind: str, package: Path, tmp_path: Path) -> None:
        private, public = write_keys(tmp_path / "key", kind)
        if KEYS[kind][1]:
            assert sign(package, private) == package / "model.sig"
            assert policy_of(public).check(ExpertPackage.open(package)).path == public
        else:
            with pytest.raises(ValueError, match=r"key\.pem is a key of another kind .*flexmoe keygen"):
                sign(package, private)
            assert not (package / "model.sig").exists()

    def test_the_command_of_model_signing_verifies_it(self, package: Path, tmp_path: Path) -> None:
        keys = keygen(tmp_path / "key")
        (package / ".gitattributes").touch()
        signature = sign(package, keys.private)
        command = [sys.executable, "-m", "model_signing", "verify", "key", str(package)]
        command += ["--signature", str(signature), "--public_key", str(keys.public)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, "Verification succeeded"), done.stderr

    def test_a_signature_made_by_model_signing_is_accepted(self, package: Path, tmp_path: Path) -> None:
        import model_signing

        keys = keygen(tmp_path / "key")
        config = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys.private)
        config.sign(package, package / "model.sig")
        assert policy_of(keys.public).check(ExpertPackage.open(package)).fingerprint == keys.fingerprint
        sign(package, keys.private, overwrite=True)
        model_signing.verifying.Config().use_elliptic_key_verifier(public_key=keys.public).verify(
            package, package / "model.sig"
        )

    def test_an_existing_signature_is_not_replaced(self, package: Path, tmp_path: Path) -> None:
        keys = keygen(tmp_path / "key")
        before = sign(package, keys.private).read_bytes()
        with pytest.raises(FileExistsError, match="--overwrite"):
            sign(package, keys.private)
        assert (package / "model.sig").read_bytes() == before
        assert sign(package, keys.private, overwrite=True).read_bytes() != before
        assert not [path for path in package.iterdir() if path.name.startswith(".")]

    def test_the_weights_are_read_once(self, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[str] = []
        real = ExpertPackage.tensors

        def counted(self: ExpertPackage) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in real(self):
                read.append(name)
                yield name, tensor

        monkeypatch.setattr(ExpertPackage, "tensors", counted)
        real_open = builtins.open  # the library would use it

        def guarded(file: Any, *args: Any, **kwargs: Any) -> Any:
            assert Path(str(file)).suffix != ".safetensors"
            return real_open(file, *args, **kwargs)

        monkeypatch.setattr(builtins, "open", guarded)
        sign(package, keygen(tmp_path / "key").private)
        assert sorted(read) == sorted(ExpertPackage.open(package).infos)

    def test_a_damaged_package_is_not_signed(self, package: Path, tmp_path: Path) -> None:
        weights = package / "expert.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        with pytest.raises(PackageError, match="SHA-256"):
            sign(package, keygen(tmp_path / "key").private)
        assert not (package / "model.sig").exists()

    @pytest.mark.parametrize("name", ["plot.png", "code.py", ".DS_Store", "eval/README.md"])
    def test_files_that_are_not_downloaded_are_not_signed(self, name: str, package: Path, tmp_path: Path) -> None:
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).touch()
        with pytest.raises(ValueError, match=f"'{re.escape(name)}' is not a file of a package"):
            sign(package, keygen(tmp_path / "key").private)

    def test_passwords(self, package: Path, tmp_path: Path) -> None:
        locked = keygen(tmp_path / "locked", password="open sesame")
        with pytest.raises(ValueError, match=r"locked\.pem is encrypted: pass its password"):
            sign(package, locked.private)
        with pytest.raises(ValueError, match="password is wrong"):
            sign(package, locked.private, password="open barley")
        assert policy_of(locked.public).check(
            ExpertPackage.open(sign(package, locked.private, password="open sesame").parent)
        )
        with pytest.raises(ValueError, match="is not encrypted: pass no password"):
            sign(package, keygen(tmp_path / "plain").private, password="x", overwrite=True)

    @pytest.mark.parametrize(
        ("key", "error", "expected"),
        [
            ("key.pub", ValueError, "not a private key as PEM"),
            ("lost.pem", FileNotFoundError, "lost.pem"),
            (".", ValueError, "not a regular file"),
        ],
    )
    def test_files_without_a_private_key(
        self, key: str, error: type[Exception], expected: str, package: Path, tmp_path: Path
    ) -> None:
        keygen(tmp_path / "key")
        with pytest.raises(error, match=expected):
            sign(package, tmp_path / key)


class TestCommands:
    def run(self, capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    def test_keygen_and_sign(self, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = self.run(capsys, "keygen", "--out", tmp_path / "k")
        assert (code, err) == (0, "")
        fingerprint = Signer.load(tmp_path / "k.pub").fingerprint
        assert f"{tmp_path}/k.pem" in out
        assert fingerprint in out
        code, out, _ = self.run(capsys, "sign", package, "--key", tmp_path / "k.pem")
        assert code == 0
        assert str(package / "model.sig") in out
        assert policy_of(tmp_path / "k.pub").check(ExpertPackage.open(package))
        code, _, err = self.run(capsys, "sign", package, "--key", tmp_path / "k.pem")
        assert code == 1
        assert "--overwrite" in err
        assert self.run(capsys, "sign", package, "--key", tmp_path / "k.pem", "--overwrite")[0] == 0

    def test_json(self, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        _, out, _ = self.run(capsys, "keygen", "--out", tmp_path / "k", "--json")
        private, public = f"{tmp_path}/k.pem", f"{tmp_path}/k.pub"
        fingerprint = Signer.load(public).fingerprint
        assert json.loads(out) == {"private": private, "public": public, "fingerprint": fingerprint}
        _, out, _ = self.run(capsys, "sign", package, "--key", private, "--json")
        assert json.loads(out) == {"package": str(package), "signature": str(package / "model.sig")}

    def test_passwords(self, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        secret = tmp_path / "secret"
        secret.write_text("open sesame\n")
        assert self.run(capsys, "keygen", "--out", tmp_path / "k", "--password-file", secret)[0] == 0
        code, _, err = self.run(capsys, "sign", package, "--key", tmp_path / "k.pem")
        assert code == 1
        assert "is encrypted" in err
        assert self.run(capsys, "sign", package, "--key", tmp_path / "k.pem", "--password-file", secret)[0] == 0
        line = ["sign", str(package), "--key", f"{tmp_path}/k.pem", "--ask-password", "--overwrite"]
        assert CliRunner().invoke(app, line, input="open sesame\n").exit_code == 0
        line = ["keygen", "--out", f"{tmp_path}/asked", "--ask-password"]
        result = CliRunner().invoke(app, line, input="swordfish\nswordfish\n")
        assert result.exit_code == 0
        assert "swordfish" not in result.output
        sign(package, tmp_path / "asked.pem", password="swordfish", overwrite=True)
        code, _, err = self.run(
            capsys, "sign", package, "--key", tmp_path / "k.pem", "--password-file", secret, "--ask-password"
        )
        assert code == 1
        assert "Pass one of them" in err

    def test_the_commands_and_the_policy_of_the_document_are_valid(self, tmp_path: Path) -> None:
        lines = "\n".join(re.findall(r"^```bash\n(.*?)^```", DOCUMENT, flags=re.M | re.S)).splitlines()
        commands = [shlex.split(line, comments=True) for line in lines if line.startswith("flexmoe ")]
        assert [words[1] for words in commands] == ["keygen", "sign"]
        for words in commands:
            with typer.main.get_command(app).commands[words[1]].make_context(words[1], words[2:]) as context:
                assert context.params
        (text,) = re.findall(r"^```json\n(.*?)^```", DOCUMENT, flags=re.M | re.S)
        (tmp_path / "policy.json").write_text(text)
        for name in ("hospital", "hospital-2027"):
            keygen(tmp_path / "keys" / name)
        policy = TrustPolicy.load(tmp_path / "policy.json")
        assert [rule.signers and len(rule.signers) for rule in policy.rules] == [2, None, 1]
