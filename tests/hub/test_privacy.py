"""The scan for private text: what it finds, in which encodings and files, and what ordinary text it leaves alone."""

import base64
import json
import string
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file

from flexmoe.hub.privacy import EMAIL, KEY, PASSWORD, PATH, TOKEN, decode, scan, scan_file

LETTERS = string.ascii_letters + string.digits


def random_text(count: int, characters: str = LETTERS) -> str:
    return "".join(Random(count).choices(characters, k=count))


def kinds(text: str, **options: bool) -> list[str]:
    return [found.kind for found in scan(text, "README.md", **options)]


@pytest.mark.parametrize(
    "address",
    [
        "jane.doe+x@hospital.example.org",
        "jörg@müller.de",
        "用户@例子.公司",
        "δοκιμή@παράδειγμα.ελ",
        "jane@xn--bcher-kva.example.xn--p1ai",
    ],
)
def test_addresses(address: str) -> None:
    (found,) = scan(f"First.\nAsk <{address}>, please.", "README.md")
    assert (found.kind, found.line, found.excerpt) == (EMAIL, 2, address)


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/home/jane/records",
            "/Users/jane/x",
            "/root/.ssh/id_rsa",
            "/srv/x",
            "/opt/conda/envs/jane",
            "/tmp/flexmoe",
        ),
        *("/mnt/c/Users/jane", "/data/records.jsonl", "/scratch/jane/run", "/gpfs/fs1/home/jane", "/lustre/work/jane"),
        *("/content/drive/MyDrive/text", "/kaggle/input/records", "/dbfs/FileStore/x.csv", "/Volumes/Backup/x1"),
        *("/p/project/jane/run", "/cephfs/team/text", "/g100_work/IscrC/jane", "/checkpoint/jane/exp1"),
        *(r"C:\Users\jane\records", r"d:\records", "C:/Users/jane/records", r"\\nas01\share\records"),
        *("file:///home/jane/x", "~/records/2024", "dbfs:/mnt/records", "smb://nas01/records", "hdfs://name:8020/x"),
    ],
)
@pytest.mark.promise(
    "`push`", "local paths: computers, clusters, notebooks, Windows, UNC", "refused with file and line"
)
@pytest.mark.parametrize("form", ["from {} on", "({})", '"path": "{}"', "root={}", "jane@cluster:{}", "`{}`"])
def test_local_paths(path: str, form: str) -> None:
    assert PATH in kinds(form.format(path))


ORDINARY = """
and/or, 1/2/3, km/h, w/o, n/a, s/old/new/, TCP/IP, </div>, <br/>, https://example.org/home/jane/x?y=z
//cdn.example.org/a/b, [text](/docs/a/b), <a href="/home/x">, ![x](images/x.png), ./data/x, ../mnt/x, data/mnt/x
#!/usr/bin/env python, > /dev/null, /etc/hosts, /bin/sh, /proc/self/maps, ~/.cache/huggingface, ~ 3/4, $HOME/x
GET /v1/chat/completions, /api/generate, /openai/v1/models, /path/to/model, /think, /no_think, /usr, /home, /data
{{ url }}/a/b, {% if x %}/c/d{% endif %}, lr=1e-4/2e-5, A: B/C/D, x@y, a@b.c, @decorator.name, git@github.com:a/b.git
key: value, token: <token>, password: ***, https://user:<password>@host, postgresql://{user}:{password}@host/db
\\d+\\s*\\w\\d, [^\\r\\n\\p{L}\\p{N}]?\\p{L}+, C:, a:/, Ratio 3:/4, "\\n\\n", \\\\ is a line break
0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef, sk-learn, hf_hub, AKIA, ghp_, -----BEGIN
"""


@pytest.mark.promise(
    "`push`", "URLs, `and/or`, chat templates, paths of APIs, `/usr/bin`", "not taken for private text"
)
@pytest.mark.parametrize("line", ORDINARY.strip().split("\n"))
def test_ordinary_text_is_not_private(line: str) -> None:
    assert [str(found) for found in scan(line, "README.md")] == []


SECRETS = {
    "hf_" + random_text(34): TOKEN,
    "ghp_" + random_text(36): TOKEN,
    "AKIAIOSFODNN7EXAMPLE": TOKEN,
    "aws_secret_access_key = " + random_text(40): TOKEN,
    "AccountKey=" + random_text(86) + "==": TOKEN,
    "xoxb-123456789012-123456789012-" + random_text(24): TOKEN,
    "123456789:AA" + random_text(33): TOKEN,
    "ya29." + random_text(60): TOKEN,
    # by Kingfisher's rules only
    "gsk_" + random_text(52): TOKEN,
    "r8_" + random_text(37): TOKEN,
    "nvapi-" + random_text(64): TOKEN,
    "SG." + random_text(22) + "." + random_text(43): TOKEN,
    "dckr_pat_" + random_text(27): TOKEN,
    "wandb_v1_" + random_text(77): TOKEN,
    "https://alice:s3cretPassw0rd@git.example.org/x.git": PASSWORD,
    "-----BEGIN RSA PRIVATE KEY-----": KEY,
    "-----BEGIN OPENSSH PRIVATE KEY-----": KEY,
    "-----BEGIN PGP PRIVATE KEY BLOCK-----": KEY,
    "---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----": KEY,
    "PuTTY-User-Key-File-3: ssh-ed25519": KEY,
}


@pytest.mark.promise(
    "`push`",
    "tokens of twenty services, PEM, PGP and PuTTY keys, passwords in URLs",
    "refused; secrets are not repeated",
)
@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_found_and_not_repeated(secret: str) -> None:
    (found,) = scan(f"One.\nTwo: {secret} there", "README.md")
    assert (found.kind, found.line) == (SECRETS[secret], 2)
    assert len(found.excerpt) <= 11
    assert secret[12:] not in str(found)


def test_in_base64_only_secrets_are_found() -> None:
    """The limit that docs/hub.md and SECURITY.md state."""
    for text, found in (
        ("github " + next(s for s in SECRETS if s.startswith("ghp_")), [TOKEN]),
        ("jane@müller.de", []),
    ):
        encoded = base64.b64encode(f"Text: {text}, and more.".encode()).decode()
        assert [one.kind for one in scan(f"image: {encoded}", "README.md")] == found


def test_the_rule_is_named() -> None:
    (found,) = scan("gsk_" + random_text(52), "README.md")
    assert "groq" in found.rule
    assert found.rule in str(found)


@pytest.mark.promise("`push`", "private text in UTF-16 or UTF-32", "refused with file and line")
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes("A card.\nFrom /srv/records of jörg@müller.de.".encode(encoding))
    assert [(found.kind, found.line) for found in scan_file(path, path.name)] == [(PATH, 2), (EMAIL, 2)]


def test_binary_data_is_not_taken_for_utf_16() -> None:
    assert "jane@hospital.example.org" in decode(bytes(range(256)) + b"\0\0jane@hospital.example.org\0")


@pytest.mark.promise("`push`", "private text behind escapes of JSON", "refused with file and line")
@pytest.mark.parametrize(
    ("escaped", "kind"),
    [
        (r"\u006aane\u0040hospital.example.org", EMAIL),
        (r"\/srv\/records\/2024", PATH),
        (r"C:\\Users\\jane\\records", PATH),
        (r"\\\\nas01\\share\\records", PATH),
        (r"line\n\/home\/jane\/x", PATH),
        (r"{\"path\": \"\\/srv\\/records\"}", PATH),
        (r"hf_\u0041" + random_text(33), TOKEN),
        (r"-----BEGIN PRIVATE KEY-----\nMIIEvQ", KEY),
    ],
)
def test_json_escapes(escaped: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(f'{{\n "a": 1,\n "b": "{escaped}"\n}}')
    (found,) = scan_file(path, path.name)
    assert (found.kind, found.line) == (kind, 3)


@pytest.mark.promise("`push`", "private text in `__metadata__` of safetensors", "refused")
def test_the_header_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(2)}, path, metadata={"format": "pt", "made": '{"by": "/home/jane/train.py"}'})
    (found,) = scan_file(path, path.name)
    assert (found.kind, found.file) == (PATH, "model.safetensors")
    save_file({"w": torch.tensor([list(b"jane@hospital.example.org")], dtype=torch.uint8)}, path)
    assert scan_file(path, path.name) == []  # weights are not text


@pytest.mark.promise("`push`", "private text in a vocabulary", "refused with file and line")
@pytest.mark.parametrize("token", ["Ġ/home/jane/x", "▁jane@hospital.example.org", "Ġhf_" + random_text(34)])
def test_tokens_of_a_vocabulary(token: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": {"/usr": 0, "Ġ/home": 1, "://": 2, token: 3}}}, indent=1))
    (found,) = scan_file(path, path.name, is_vocabulary=True)
    assert found.line == 7


def test_a_path_in_a_sentencepiece_model(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"  # its trainer's settings are stored with the pieces
    path.write_bytes(b"\x0a\x0e\x0a\x05\xe2\x96\x81the\x15\0\0\0\0\x12\x1a\x0a\x16/scratch/jane/text.txt\x18\x01")
    (found,) = scan_file(path, path.name, is_vocabulary=True)
    assert (found.kind, found.excerpt) == (PATH, "/scratch/jane/text.txt")
