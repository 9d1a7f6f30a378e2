"""Trust policies: which packages are accepted, that altered ones are refused, and that checking reads no weights."""

import base64
import builtins
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_signing
import pytest
from safetensors.torch import load_file, save_file

from flexmoe.conversion.graft import graft
from flexmoe.io import folders
from flexmoe.io.tensors import TensorFile
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.packages import trust
from flexmoe.packages.package import ExpertPackage, PackageError
from flexmoe.packages.signing import KeyPair, keygen, sign
from flexmoe.packages.trust import SIGNATURE_FILE, Signer, TrustPolicy, UntrustedPackageError, resolve_policy
from flexmoe.testing import tiny_anchor
from tests.support.signed_packages import KEYS, small_package, write_keys, write_policy


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, KeyPair]:
    """A signed package, which tests copy, and the keys of its owner."""
    folder = tmp_path_factory.mktemp("signed")
    keys = keygen(folder / "hospital")
    package = small_package(folder / "derm")
    sign(package, keys.private)
    return package, keys


@pytest.fixture
def package(signed: tuple[Path, KeyPair], tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed[0], tmp_path / "derm"))


@pytest.fixture
def policy(signed: tuple[Path, KeyPair], tmp_path: Path) -> TrustPolicy:
    shutil.copy(signed[1].public, tmp_path / "hospital.pub")
    return TrustPolicy.load(write_policy(tmp_path / "policy.json", ("hospital/*", ["hospital.pub"])))


def refusal(policy: TrustPolicy, package: Path, origin: str | None = "hospital/derm") -> str:
    opened = ExpertPackage.open(package)
    with pytest.raises(UntrustedPackageError) as caught:
        policy.check(opened, origin)
    return str(caught.value)


def replace_weights(package: Path) -> None:
    """Replaces the weights and the hashes in the manifest."""
    weights = package / "expert.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights)
    edit_manifest(package, sha256={"expert.safetensors": hashlib.sha256(weights.read_bytes()).hexdigest()})


def edit_manifest(package: Path, **changes: Any) -> None:
    path = package / "expert_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestSigned:
    def test_the_key_is_returned(self, policy: TrustPolicy, package: Path, signed: tuple[Path, KeyPair]) -> None:
        signer = policy.check(ExpertPackage.open(package), "hospital/derm")
        assert signer == policy.rules[0].signers[0]
        assert signer.path.name == "hospital.pub"
        assert signer.fingerprint == hashlib.sha256(signed[1].public.read_bytes()).hexdigest()

    def test_the_folder_of_a_package_may_be_renamed(self, policy: TrustPolicy, package: Path) -> None:
        assert policy.check(ExpertPackage.open(package.rename(package.with_name("other"))), "hospital/other")

    def test_one_of_several_keys_suffices(self, package: Path, signed: tuple[Path, KeyPair], tmp_path: Path) -> None:
        other = keygen(tmp_path / "other").public
        rule = ("*", [str(other), str(signed[1].public)])
        signer = TrustPolicy.load(write_policy(tmp_path / "p.json", rule)).check(ExpertPackage.open(package))
        assert signer.path == signed[1].public

    def test_no_byte_of_the_weights_is_read(
        self, policy: TrustPolicy, package: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = ExpertPackage.open(package)
        (package / "expert.safetensors").unlink()
        monkeypatch.setattr(TensorFile, "__init__", lambda *_: pytest.fail("a weight file was opened"))
        assert policy.check(opened, "hospital/derm")

    def test_files_of_git_and_the_hub_client_are_ignored(self, policy: TrustPolicy, package: Path) -> None:
        for name in (".gitattributes", ".gitignore", ".git/config", ".github/x.yml", ".cache/huggingface/x.metadata"):
            (package / name).parent.mkdir(exist_ok=True, parents=True)
            (package / name).write_text("x")
        assert policy.check(ExpertPackage.open(package), "hospital/derm")

    def test_files_in_subfolders_are_covered(
        self, signed: tuple[Path, KeyPair], policy: TrustPolicy, package: Path
    ) -> None:
        (package / "eval").mkdir()
        (package / "eval" / "scores.json").write_text("{}")
        assert "not signed: 'eval/scores.json'" in refusal(policy, package)
        (package / SIGNATURE_FILE).unlink()
        config = model_signing.signing.Config().use_elliptic_key_signer(private_key=signed[1].private)
        config.sign(
            package, package / SIGNATURE_FILE
        )  # `sign` covers only files that are downloaded, none in subfolders
        assert policy.check(ExpertPackage.open(package), "hospital/derm")
        (package / "eval" / "scores.json").write_text("[]")
        assert "changed: 'eval/scores.json'" in refusal(policy, package)

    def test_a_snapshot_in_the_hub_cache(self, policy: TrustPolicy, package: Path, tmp_path: Path) -> None:
        snapshot = tmp_path / "models--hospital--derm" / "snapshots" / "abc"
        blobs = snapshot.parents[1] / "blobs"
        for folder in (snapshot, blobs):
            folder.mkdir(parents=True)
        for file in package.iterdir():
            shutil.copy(file, blobs / f"blob-{file.name}")
            (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")
        assert policy.check(ExpertPackage.open(snapshot), "hospital/derm")
        (blobs / "blob-README.md").write_text("edited")
        assert "changed: 'README.md'" in refusal(policy, snapshot)

    def test_another_curve_and_other_line_endings(self, package: Path, tmp_path: Path) -> None:
        private, public = write_keys(tmp_path / "key", "P-521")
        public.write_bytes(b"from the hospital\r\n" + public.read_bytes().replace(b"\n", b"\r\n"))
        sign(package, private, overwrite=True)
        policy = TrustPolicy.load(write_policy(tmp_path / "p.json", ("*", [public.name])))
        assert policy.check(ExpertPackage.open(package)).path == public


ALTERED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "manifest": (lambda p: edit_manifest(p, version="2.0.0"), "changed: 'expert_config.json'"),
    "weights and manifest": (replace_weights, "changed: 'expert.safetensors', 'expert_config.json'"),
    "card": (lambda p: (p / "README.md").write_text("trust me"), "changed: 'README.md'"),
    "config": (lambda p: (p / "config.json").write_text("{}"), "changed: 'config.json'"),
    "an additional file": (
        lambda p: (p / "adapter_model.safetensors").touch(),
        "not signed: 'adapter_model.safetensors'",
    ),
    "a missing file": (lambda p: (p / "README.md").unlink(), "signed but missing: 'README.md'"),
    "another name": (
        lambda p: (p / "README.md").rename(p / "READ.md"),
        "not signed: 'READ.md'; signed but missing: 'README.md'",
    ),
    "many additional files": (lambda p: [(p / f"{i}.txt").touch() for i in range(9)], "'4.txt' and 4 more"),
    "a file that is a pipe": (lambda p: os.mkfifo(p / "pipe"), "not a regular file"),
    "a link out": (lambda p: (p / "out").symlink_to("/etc/hostname"), "leads out of the folder"),
    "a linked folder": (lambda p: (p / "out").symlink_to(p.parent), "leads out of the folder"),
}


class TestAltered:
    @pytest.mark.parametrize("what", ALTERED)
    def test_it_is_refused_by_name(self, what: str, policy: TrustPolicy, package: Path) -> None:
        alter, expected = ALTERED[what]
        alter(package)
        message = refusal(policy, package)
        assert expected in message
        assert f"rule 1 of {policy.path} (pattern 'hospital/*')" in message
        assert "ask its owner" in message

    def test_altered_weights_are_detected_when_they_are_read(self, policy: TrustPolicy, package: Path) -> None:
        weights = package / "expert.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        opened = ExpertPackage.open(package)
        assert policy.check(opened, "hospital/derm")
        with pytest.raises(PackageError, match="SHA-256"):
            list(opened.tensors())

    def test_the_parsed_manifest_is_verified_not_the_file(self, policy: TrustPolicy, package: Path) -> None:
        honest = (package / "expert_config.json").read_bytes()
        replace_weights(package)
        opened = ExpertPackage.open(package)
        (package / "expert_config.json").write_bytes(honest)  # for the check only
        with pytest.raises(UntrustedPackageError, match=r"changed: 'expert.safetensors', 'expert_config.json'"):
            policy.check(opened, "hospital/derm")

    def test_bounds(self, policy: TrustPolicy, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trust, "MAX_FILES", 3)
        assert "more than 3 files" in refusal(policy, package)
        monkeypatch.setattr(trust, "MAX_FILES", 10)
        monkeypatch.setattr(trust, "MAX_OTHER_BYTES", 10)
        assert "larger than the 10 bytes" in refusal(policy, package)


def drop(*keys: str | int) -> Callable[[bytes], bytes]:
    """Removes one field of a signature."""

    def change(signature: bytes) -> bytes:
        bundle = json.loads(signature)
        inner = bundle
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return json.dumps(bundle).encode()

    return change


def put(value: Any, *keys: str | int) -> Callable[[bytes], bytes]:
    """Replaces the value of one field of a signature."""

    def change(signature: bytes) -> bytes:
        bundle = json.loads(signature)
        inner = bundle
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return json.dumps(bundle).encode()

    return change


def statement(signature: bytes) -> bytes:
    return base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"])


HINT = ("verificationMaterial", "publicKey", "hint")
HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "cannot be read"),
    "garbage": (lambda _: b"\xff\x00garbage", "cannot be read"),
    "a list": (lambda _: b"[]", "cannot be read"),
    "nested": (lambda _: b'{"a":' * 100_000, "nested too deep"),
    "huge": (lambda s: s + b" " * trust.MAX_SIGNATURE_BYTES, "larger than"),
    "no object": (lambda _: b"{}", "names no key"),
    "no key": (drop(*HINT), "names no key"),
    "a number as key": (put(7, *HINT), "names no key"),
    "a list as material": (put([], "verificationMaterial"), "names no key"),
    "a certificate too": (put({"rawBytes": "AA=="}, "verificationMaterial", "certificate"), "damaged or forged"),
    "two spellings": (put({"hint": ""}, "verificationMaterial", "public_key"), "damaged or forged"),
    "no envelope": (drop("dsseEnvelope"), "damaged or forged"),
    "no signatures": (put([], "dsseEnvelope", "signatures"), "damaged or forged"),
    "another payload": (put("e30=", "dsseEnvelope", "payload"), "damaged or forged"),
    "no base64": (put("!", "dsseEnvelope", "payload"), "damaged or forged"),
    "another type": (put("text/plain", "dsseEnvelope", "payloadType"), "damaged or forged"),
    "an empty signature": (put("", "dsseEnvelope", "signatures", 0, "sig"), "damaged or forged"),
    "another medium": (put("application/json", "mediaType"), "damaged or forged"),
    "another key's fingerprint": (put("f" * 64, *HINT), "claims to be signed with the key 'ffff"),
}


class TestSignatureFile:
    @pytest.mark.parametrize("what", HOSTILE)
    def test_hostile_files(
        self, what: str, policy: TrustPolicy, package: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        change, expected = HOSTILE[what]
        path = package / SIGNATURE_FILE
        path.write_bytes(change(path.read_bytes()))
        assert expected in refusal(policy, package)
        assert capfd.readouterr() == ("", "")

    def test_random_damage(self, policy: TrustPolicy, package: Path) -> None:
        path = package / SIGNATURE_FILE
        honest, opened, rng = path.read_bytes(), ExpertPackage.open(package), random.Random(0)
        refused = 0
        for _ in range(150):
            damaged = bytearray(honest)
            for _ in range(rng.randint(1, 3)):
                place = rng.randrange(len(damaged))
                damaged[place : place + rng.choice((0, 1, 40))] = rng.randbytes(rng.choice((0, 1, 1, 5)))
            path.write_bytes(damaged)
            try:
                policy.check(opened, "hospital/derm")
            except UntrustedPackageError:
                refused += 1
            else:  # the signed statement is unchanged
                assert statement(damaged) == statement(honest)
        assert refused > 100

    def test_an_unsigned_package_is_refused(self, policy: TrustPolicy, package: Path) -> None:
        (package / SIGNATURE_FILE).unlink()
        assert "it is not signed" in refusal(policy, package)

    @pytest.mark.parametrize("kind", ["link out", "loop", "dangling", "folder", "pipe"])
    def test_links_folders_and_pipes(self, kind: str, policy: TrustPolicy, package: Path) -> None:
        path = package / SIGNATURE_FILE
        path.rename(package.parent / "outside.sig")
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to({"link out": "../outside.sig", "loop": path.name, "dangling": "nowhere"}[kind])
        assert "cannot be read" in refusal(policy, package)

    def test_the_signature_of_another_package_of_the_owner(
        self, signed: tuple[Path, KeyPair], policy: TrustPolicy, package: Path
    ) -> None:
        other = small_package(package.with_name("other"), seed=1)
        shutil.copy(package / SIGNATURE_FILE, other)
        assert "changed: 'expert.safetensors', 'expert_config.json'" in refusal(policy, other)

    def test_the_signature_of_another_key(self, policy: TrustPolicy, package: Path, tmp_path: Path) -> None:
        mallory = keygen(tmp_path / "mallory")
        sign(package, mallory.private, overwrite=True)
        message = refusal(policy, package)
        assert mallory.fingerprint in message
        assert policy.rules[0].signers[0].fingerprint[:16] in message

    def test_the_signature_of_another_key_with_the_owners_fingerprint(
        self, signed: tuple[Path, KeyPair], policy: TrustPolicy, package: Path, tmp_path: Path
    ) -> None:
        sign(package, keygen(tmp_path / "mallory").private, overwrite=True)
        path = package / SIGNATURE_FILE
        path.write_bytes(put(signed[1].fingerprint, *HINT)(path.read_bytes()))
        assert "damaged or forged" in refusal(policy, package)

    def test_other_digest_algorithms(self, signed: tuple[Path, KeyPair], policy: TrustPolicy, package: Path) -> None:
        (package / SIGNATURE_FILE).unlink()
        hashing = model_signing.hashing.Config().use_file_serialization(hashing_algorithm="blake2")
        config = model_signing.signing.Config().use_elliptic_key_signer(private_key=signed[1].private)
        config.set_hashing_config(hashing).sign(package, package / SIGNATURE_FILE)
        assert "digests by blake2" in refusal(policy, package)


# Rules of a policy, the origin of an unsigned package, and whether it is accepted.
ORIGINS: list[tuple[list[tuple[str, Any]], str | None, str]] = [
    ([("*", "anyone")], "any/one", "accepted"),
    ([("*", "anyone")], None, "accepted"),
    ([("hospital/*", "anyone"), ("*", [])], "hospital/derm", "accepted"),
    ([("*", []), ("hospital/*", "anyone")], "hospital/derm", "rule 1"),
    ([("hospital/*", ["k.pub"]), ("*", "anyone")], "hospital/derm", "rule 1"),
    ([("hospital/*", ["k.pub"]), ("*", "anyone")], "Hospital/Derm", "rule 1"),
    ([("hospital/*", ["k.pub"]), ("*", "anyone")], "hospital-b/derm", "accepted"),
    ([("Hospital/*", "anyone")], "hospital/derm", "accepted"),
    ([("hospital/d?rm", "anyone"), ("hospital/[xy]", [])], "hospital/derm", "accepted"),
    ([("hospital/*", "anyone")], "gpt2", "no rule"),
    ([("hospital/*", "anyone")], None, "no rule"),
    ([], "hospital/derm", "no rule"),
    ([("{folder}/*", "anyone")], None, "accepted"),
    ([("{folder}/drafts/*", "anyone")], None, "no rule"),
    ([("{FOLDER}/*", "anyone")], None, "no rule"),
]


class TestPolicy:
    @pytest.mark.parametrize(("rules", "origin", "expected"), ORIGINS)
    def test_the_first_rule_that_matches_decides(
        self, rules: list[tuple[str, Any]], origin: str | None, expected: str, tmp_path: Path
    ) -> None:
        write_keys(tmp_path / "k", "P-256")
        home = str(tmp_path.resolve())
        filled = [(p.replace("{folder}", home).replace("{FOLDER}", home.upper()), allowed) for p, allowed in rules]
        policy = TrustPolicy.load(write_policy(tmp_path / "policy.json", *filled))
        package = small_package(tmp_path / "derm")
        if expected == "accepted":
            assert policy.check(ExpertPackage.open(package), origin) is None
        else:
            assert expected in refusal(policy, package, origin)

    def test_links_to_a_folder_are_followed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = small_package(tmp_path / "derm")
        (tmp_path / "trusted").mkdir()
        (tmp_path / "trusted" / "derm").symlink_to(package)
        pattern = f"{tmp_path.resolve()}/trusted/*"
        policy = TrustPolicy.load(write_policy(tmp_path / "policy.json", (pattern, "anyone")))
        assert "no rule" in refusal(policy, tmp_path / "trusted" / "derm", None)
        monkeypatch.chdir(tmp_path / "trusted")
        assert "no rule" in refusal(policy, Path("../derm"), None)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("{", "not valid JSON"),
            ("[]", "expected a JSON object"),
            ('{"rules": []}', "format_version is None"),
            ('{"format_version": 2, "rules": [], "more": 1}', "format_version is 2"),
            ('{"format_version": true, "rules": []}', "format_version is True"),
            ('{"format_version": 1}', "the key 'rules' is missing"),
            ('{"format_version": 1, "rules": [], "rule": 1}', "unknown key 'rule'; known are format_version, rules"),
            ('{"format_version": 1, "rules": {}}', "rules must be a list"),
            ('{"format_version": 1, "rules": [], "rules": []}', "given twice"),
        ],
    )
    def test_invalid_files(self, text: str, expected: str, tmp_path: Path) -> None:
        path = tmp_path / "policy.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=expected) as caught:
            TrustPolicy.load(path)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize(
        ("rule", "expected"),
        [
            ("anyone", "must be an object"),
            ({"pattern": "*"}, "'allowed_signers' is missing"),
            ({"pattern": "*", "allowed_signers": "anyone", "pin": 1}, "unknown key 'pin'"),
            ({"pattern": "", "allowed_signers": "anyone"}, "pattern must be text"),
            ({"pattern": 7, "allowed_signers": "anyone"}, "pattern must be text"),
            ({"pattern": "*", "allowed_signers": "Anyone"}, "must be 'anyone' or a list"),
            ({"pattern": "*", "allowed_signers": None}, "must be 'anyone' or a list"),
            ({"pattern": "*", "allowed_signers": [""]}, "must be 'anyone' or a list"),
            ({"pattern": "*", "allowed_signers": ["policy.json"]}, "not a public key"),
            ({"pattern": "*", "allowed_signers": ["k.pem"]}, "not a public key"),
            ({"pattern": "*", "allowed_signers": ["."]}, "not a regular file"),
        ],
    )
    def test_invalid_rules(self, rule: Any, expected: str, tmp_path: Path) -> None:
        write_keys(tmp_path / "k", "P-256")
        path = tmp_path / "policy.json"
        path.write_text(json.dumps({"format_version": 1, "rules": [{"pattern": "a", "allowed_signers": []}, rule]}))
        with pytest.raises(ValueError, match=expected) as caught:
            TrustPolicy.load(path)
        assert f"{path}: rule 2" in str(caught.value)

    @pytest.mark.parametrize("missing", ["policy", "key"])
    def test_missing_files(self, missing: str, tmp_path: Path) -> None:
        path = tmp_path / "policy.json"
        if missing == "key":
            write_policy(path, ("*", ["keys/lost.pub"]))
        with pytest.raises(
            FileNotFoundError, match=r"no policy file .*policy\.json" if missing == "policy" else r"rule 1.*lost\.pub"
        ):
            TrustPolicy.load(path)

    @pytest.mark.parametrize("kind", KEYS)
    def test_kinds_of_keys(self, kind: str, tmp_path: Path) -> None:
        _, public = write_keys(tmp_path / "k", kind)
        if KEYS[kind][1]:
            assert Signer.load(public).pem == public.read_bytes()
        else:
            with pytest.raises(ValueError, match="P-256, P-384, P-521; RSA"):
                Signer.load(public)

    def test_the_policy_in_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("FLEXMOE_POLICY", raising=False)
        assert resolve_policy(None) is None
        path = write_policy(tmp_path / "policy.json", ("env/*", "anyone"))
        given = write_policy(tmp_path / "given.json", ("given/*", "anyone"))
        monkeypatch.setenv("FLEXMOE_POLICY", str(path))
        assert resolve_policy(None).rules[0].pattern == "env/*"
        assert resolve_policy(given).rules[0].pattern == resolve_policy(str(given)).rules[0].pattern == "given/*"
        policy = TrustPolicy.load(given)
        assert resolve_policy(policy) is policy
        path.unlink()
        with pytest.raises(FileNotFoundError, match="FLEXMOE_POLICY"):
            resolve_policy(None)
        path.write_text("{}")
        with pytest.raises(ValueError, match="FLEXMOE_POLICY"):
            resolve_policy(None)


def test_without_the_library(policy: TrustPolicy, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "model_signing":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'flexmoe\[signing\]'"):
        policy.check(ExpertPackage.open(package), "hospital/derm")
    anyone = TrustPolicy.load(write_policy(package.parent / "open.json", ("*", "anyone")))
    assert anyone.check(ExpertPackage.open(package)) is None


def test_the_signature_is_read_once(policy: TrustPolicy, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parsed and the verified bytes are the same, even if the file is replaced in between."""
    opened: list[str] = []
    real = folders.open_regular_file

    def counted(path: Path) -> int:
        opened.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(folders, "open_regular_file", counted)
    assert policy.check(ExpertPackage.open(package), "hospital/derm")
    assert opened.count(SIGNATURE_FILE) == 1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense anchor, the package of an expert for it, signed, a composition of both, and a policy for its key."""
    folder = tmp_path_factory.mktemp("world")
    tiny_anchor("llama").save_pretrained(folder / "anchor")
    graft(folder / "anchor", folder / "grafted")
    model = FlexMoeForCausalLM.from_pretrained(folder / "grafted")
    model.add_expert_copy("derm")
    model.save_expert("derm", folder / "derm")
    model = FlexMoeForCausalLM.from_pretrained(folder / "grafted")
    model.add_expert(folder / "derm")
    model.save_composition(folder / "composition", sources={"public": folder / "anchor", "derm": folder / "derm"})
    keys = keygen(folder / "hospital")
    sign(folder / "derm", keys.private)
    write_policy(folder / "policy.json", ("*", [keys.public.name]))
    keygen(folder / "other")
    write_policy(folder / "other.json", ("*", ["other.pub"]))
    return folder


class TestModels:
    """Every way to add a package checks the policy first."""

    @pytest.mark.parametrize("how", ["add", "replace"])
    def test_an_untrusted_expert_leaves_the_model_unchanged(
        self, how: str, world: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = FlexMoeForCausalLM.from_pretrained(world / "grafted")
        if how == "replace":
            model.add_expert(world / "derm", policy=world / "policy.json")
        before, names = {key: value.clone() for key, value in model.state_dict().items()}, model.expert_names

        def add(**options: Any) -> None:
            if how == "replace":
                model.replace_expert("derm", world / "derm", **options)
            else:
                model.add_expert(world / "derm", **options)

        with pytest.raises(UntrustedPackageError, match="claims to be signed with the key"):
            add(policy=world / "other.json")
        monkeypatch.setenv("FLEXMOE_POLICY", str(world / "other.json"))
        with pytest.raises(UntrustedPackageError, match="claims to be signed with the key"):
            add()
        assert model.expert_names == names
        assert model.state_dict().keys() == before.keys()
        assert all(value.equal(before[key]) for key, value in model.state_dict().items())
        add(policy=TrustPolicy.load(world / "policy.json"))
        assert model.expert_names == ["public", "derm"]

    def test_compositions(self, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        composition = world / "composition"
        with pytest.raises(UntrustedPackageError, match="claims to be signed with the key"):
            FlexMoeForCausalLM.from_pretrained(composition, policy=world / "other.json")
        monkeypatch.setenv("FLEXMOE_POLICY", str(world / "other.json"))
        with pytest.raises(UntrustedPackageError, match="claims to be signed with the key"):
            FlexMoeForCausalLM.from_pretrained(composition)
        loaded = FlexMoeForCausalLM.from_pretrained(composition, policy=world / "policy.json")
        assert loaded.expert_names == ["public", "derm"]
