"""Reading the documents of data files, in every form in which people have them."""

import bz2
import csv
import gzip
import json
import lzma
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flexmoe.data import END_OF_DOCUMENT, Documents, data_paths, read_documents
from flexmoe.data.documents import RowFormat
from flexmoe.data.files import HubDataset, check_output_apart, find_sources

TABLES = ["jsonl", "json", "parquet"]


def write_rows(path: Path, rows: list[dict]) -> Path:
    suffix = path.suffix
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestTables:
    @pytest.mark.parametrize("suffix", [*TABLES, "ndjson", "csv", "tsv"])
    def test_a_document_per_row(self, tmp_path, suffix, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        texts = [f'text {i}, "quoted"\n\tand more' for i in range(600)]
        rows = [{"n": 1, "body": text} for text in texts] + [{"n": 0, "body": " \n"}]
        file = write_rows(tmp_path / f"rows.{suffix}", rows)
        documents = Documents([file], column="body")
        assert list(documents) == texts
        assert (documents.blank, documents.skipped) == (1, 0)
        assert list(documents) == texts, "a second iteration"
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file], "the text was copied elsewhere"

    @pytest.mark.promise(
        "`train`, `graft`, `evaluate`, `export`, `card`, `verify`: data",
        "JSON rows whose other columns change type, or are new late in the file",
        "read",
    )
    @pytest.mark.parametrize("suffix", ["jsonl", "json"])
    @pytest.mark.parametrize(
        ("first", "later"),
        [
            (None, "nightly crawl"),
            ([], [{"id": 1, "tag": "a"}]),
            ("2024-05-06T07:08:09Z", "unknown"),
            ({"a": "1"}, {"a": "1", "b": "2"}),
            (1, 1.5),
            (1, 10**30),
        ],
    )
    def test_other_columns_may_hold_anything(self, tmp_path, suffix, first, later):
        text = "word " * 40  # the change comes after all that a reader could have looked at first
        rows = [{"text": text, "meta": first}] * 700 + [{"text": text, "meta": later}, {"text": text}]
        file = write_rows(tmp_path / f"rows.{suffix}", [*rows, {"new": later, "text": "last"}])
        assert read_documents([file]) == [text] * 702 + ["last"]

    @pytest.mark.promise(
        "`train`, `graft`, `evaluate`, `export`, `card`, `verify`: data",
        "texts that look like dates or numbers",
        "stay texts",
    )
    @pytest.mark.parametrize("suffix", [*TABLES, "csv"])
    def test_texts_that_look_like_something_else_are_texts(self, tmp_path, suffix):
        texts = ["2024-05-06", "2024-05-06T07:08:09Z", "12:30", "1", "1e5", "null", "NaN", "true", "[1]"]
        file = write_rows(tmp_path / f"rows.{suffix}", [{"text": text} for text in texts])
        assert read_documents([file]) == texts

    @pytest.mark.parametrize("suffix", [*TABLES, "csv"])
    def test_a_missing_column(self, tmp_path, suffix):
        file = write_rows(tmp_path / f"rows.{suffix}", [{"body": "x", "title": "y"}])
        for skip_empty in (False, True):
            with pytest.raises(ValueError, match=r"no column 'text'. Its columns: body, title\. .*--text-column"):
                read_documents([file], skip_empty=skip_empty)

    @pytest.mark.promise(
        "`train`, `graft`, `evaluate`, `export`, `card`, `verify`: data",
        "a row without text (null)",
        "refused with the row; `--skip-empty` leaves it out and counts it",
    )
    @pytest.mark.parametrize("suffix", TABLES)
    @pytest.mark.parametrize("row", [{"body": None, "n": 0}, {"n": 0}])
    def test_rows_without_text(self, tmp_path, suffix, row):
        rows = [{"body": f"text {i}", "n": i} for i in range(300)] + [row]
        file = write_rows(tmp_path / f"rows.{suffix}", rows)
        with pytest.raises(ValueError, match=r"row 301 has no text in column 'body'.*--skip-empty"):
            read_documents([file], column="body")
        with pytest.warns(UserWarning, match=r"rows\.\w+: 1 row\(s\) without text were skipped"):
            assert len(read_documents([file], column="body", skip_empty=True)) == 300

    def test_rows_before_the_first_text_may_lack_the_column_if_they_are_skipped(self, tmp_path):
        file = write_rows(tmp_path / "rows.jsonl", [*({f"c{i}": i} for i in range(40)), {"body": "x"}])
        documents = Documents([file], column="body", skip_empty=True)
        assert (list(documents), documents.skipped) == (["x"], 40)

    @pytest.mark.promise(
        "`train`, `graft`, `evaluate`, `export`, `card`, `verify`: data",
        "a text that is cut inside a character",
        "refused with the row",
    )
    def test_half_of_a_surrogate_pair_is_refused(self, tmp_path):
        (tmp_path / "cut.jsonl").write_text('{"text": "whole \\ud83d\\ude42"}\n{"text": "cut \\ud83d"}\n')
        with pytest.raises(ValueError, match=r"row 2 holds half of a surrogate pair \('\\ud83d'\)"):
            read_documents([tmp_path / "cut.jsonl"])

    @pytest.mark.parametrize("value", [3, True, ["x"], {"text": "x"}])
    def test_values_that_are_no_texts(self, tmp_path, value):
        file = write_rows(tmp_path / "rows.jsonl", [{"text": "x"}, {"text": value}])
        with pytest.raises(TypeError, match=rf"holds {type(value).__name__} values \(row 2\)"):
            read_documents([file])

    @pytest.mark.parametrize(
        ("name", "content", "fault"),
        [
            (
                "a.jsonl",
                '{"text": "ok"}\n{"text": \n',
                r"a\.jsonl: cannot be read as jsonl \(line 2 is not a JSON obj",
            ),
            ("a.jsonl", '{"text": "ok"}\n{"text": "cut of', r"line 2 .* Unterminated string"),
            ("a.jsonl", '"text"\n', "line 1 is a str, expected an object"),
            ("a.jsonl", '{"a": ' + "9" * 5000 + "}\n", "line 1 is not a JSON object: Exceeds the limit"),
            ("a.jsonl", '{"text": "ok"}\n' + "[" * 100_000 + "\n", r"a\.jsonl: .* \(line 2 .* nested too deep"),
            ("a.jsonl", '{"text": "a", "n": ' + '{"n": ' * 100_000 + "\n", "line 1 .* nested too deep"),
            ("a.json", '[{"text": "a"}, ' + "[" * 100_000, r"a\.json: .* \(element 2 .* nested too deep"),
            ("a.json", '[{"text": "a"}, {"text": "b"}', "the array has no end"),
            ("a.json", '[{"text": "a"} {"text": "b"}]', r"no ',' or '\]' after element 1"),
            ("a.json", '[{"text": "a"}, 3]', "element 2 is a int"),
            ("a.json", '[{"text": }]', "element 1 is not a JSON object"),
            ("a.csv", 'text,n\n"never closed,1\nmore,2\n', "cannot be read as csv"),
            ("a.csv", "text,n\nx,y,1\n", "line 2 has 3 fields, the first line 2"),
            ("a.csv", "text,n,text\nx,1,y\n", "two columns are called 'text'"),
            ("a.csv", "n,text\n1\n", "row 1 has no text in column 'text'"),
            ("a.parquet", "PAR1, or not", "cannot be read as parquet"),
        ],
    )
    def test_malformed_files(self, tmp_path, name, content, fault):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=fault):
            read_documents([tmp_path / name])

    @pytest.mark.parametrize("content", ["", " \n", "[]", " [ ] \n"])
    def test_tables_without_rows(self, tmp_path, content):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match="empty data set"):
            read_documents([tmp_path / "a.json"])

    @pytest.mark.parametrize("size", [1, 7, 1 << 16])
    def test_arrays_are_read_in_chunks_of_any_size(self, tmp_path, monkeypatch, size):
        monkeypatch.setattr("flexmoe.data.documents._CHUNK", size)
        rows = [{"text": 'a, [1], {"b": 2} \\" é' * i, "n": [i, {"x": None}]} for i in range(1, 6)]
        (tmp_path / "a.json").write_text("\n " + json.dumps(rows, indent=3) + "\n")
        assert read_documents([tmp_path / "a.json"]) == [row["text"] for row in rows]
        (tmp_path / "lines.json").write_text("\n" + "".join(json.dumps(row) + "\n\n" for row in rows))
        assert read_documents([tmp_path / "lines.json"]) == [row["text"] for row in rows]

    def test_long_fields_of_csv(self, tmp_path):
        assert len(read_documents([write_rows(tmp_path / "a.csv", [{"text": "x" * 200_000}])])[0]) == 200_000


class TestTemplates:
    ROWS = ({"title": "T1", "body": "B1", "n": 1}, {"title": None, "body": "B2", "n": 2})

    @pytest.mark.promise(
        "`train`, `graft`, `evaluate`, `export`, `card`, `verify`: data", "several columns, `--text-template`", "read"
    )
    @pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
    def test_several_columns(self, tmp_path, suffix):
        file = write_rows(tmp_path / f"rows.{suffix}", list(self.ROWS))
        options = {"template": "{{# {title}}}\n{body} {title}"}
        with pytest.raises(ValueError, match="row 2 has no text in column 'title'"):
            read_documents([file], **options)
        with pytest.warns(UserWarning, match="1 row"):
            assert read_documents([file], **options, skip_empty=True) == ["{# T1}\nB1 T1"]
        with pytest.raises(TypeError, match="column 'n' holds int values"):
            read_documents([file], template="{body} {n}")
        with pytest.raises(ValueError, match="no column 'text'"):
            read_documents([file], template="{body} {text}")

    def test_values_are_not_templates(self):
        assert RowFormat.of(None, "{a}{b}").render({"a": "{b} {{", "b": "\\1"}) == "{b} {{\\1"

    @pytest.mark.parametrize("template", ["no column", "{}", "{a} {", "a} {b}", "{a{b}}"])
    def test_malformed_templates(self, template):
        with pytest.raises(ValueError, match="--text-template"):
            RowFormat.of(None, template)

    def test_a_template_and_a_column(self, tmp_path):
        with pytest.raises(ValueError, match="give one of them"):
            RowFormat.of("body", "{title}")


class TestTexts:
    def test_files_are_split_at_separator_lines_only(self, tmp_path):
        whole = tmp_path / "whole.md"
        whole.write_text("one\n\ntwo\n")
        several = tmp_path / "several.txt"
        several.write_text(f"a\nb\n{END_OF_DOCUMENT}\n\n{END_OF_DOCUMENT}\nc {END_OF_DOCUMENT}\n", encoding="utf-8")
        documents = Documents([several, whole])
        assert list(documents) == ["a\nb\n", f"c {END_OF_DOCUMENT}\n", "one\n\ntwo\n"]
        assert documents.blank == 1

    def test_long_files(self, tmp_path):
        text = "".join(f"line {i}\n" for i in range(10_000))
        (tmp_path / "long.txt").write_text(f"{text}{END_OF_DOCUMENT}\n{text}")
        assert read_documents([tmp_path / "long.txt"]) == [text, text]

    @pytest.mark.promise(
        "`train`, `graft`, `evaluate`, `export`, `card`, `verify`: data",
        "byte-order marks of UTF-8, UTF-16 and UTF-32",
        "read without them",
    )
    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
    @pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv"])
    def test_byte_order_marks_are_no_text(self, tmp_path, encoding, suffix):
        file = write_rows(tmp_path / f"a.{suffix}", [{"text": "naïve 🙂"}])
        if suffix == "txt":
            file.write_text("naïve 🙂")
        file.write_bytes(file.read_text().encode(encoding))
        assert read_documents([file]) == ["naïve 🙂"]

    def test_byte_order_marks_of_joined_files(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('\ufeff{"text": "a"}\n\ufeff{"text": "b"}\n', encoding="utf-8")
        (tmp_path / "b.txt").write_text(f"\ufeffa\n{END_OF_DOCUMENT}\n\ufeffb", encoding="utf-8")
        assert read_documents([tmp_path / "a.jsonl", tmp_path / "b.txt"]) == ["a", "b", "a\n", "b"]

    @pytest.mark.promise(
        "`train`, `graft`, `evaluate`, `export`, `card`, `verify`: data",
        "binary files, and UTF-16 without a byte-order mark",
        "refused with what to do",
    )
    @pytest.mark.parametrize(
        ("content", "fault"),
        [
            (b"caf\xe9 ", r"a\.txt: not UTF-8 text \(invalid continuation byte: b'\\xe9'\)"),
            ("text".encode("utf-16-le"), "NUL characters.* UTF-16 without a byte-order mark"),
            (b"\x00\x01binary", "NUL characters"),
            (b"\xff\xfea\x00b", "not UTF-16"),
        ],
    )
    def test_files_that_are_no_text(self, tmp_path, content, fault):
        (tmp_path / "a.txt").write_bytes(content)
        for read in (read_documents, lambda data: Documents(data).check()):
            with pytest.raises(ValueError, match=fault):
                read([tmp_path / "a.txt"])


class TestCompression:
    @pytest.mark.promise(
        "`train`, `graft`, `evaluate`, `export`, `card`, `verify`: data",
        "`.gz`, `.zst`, `.bz2`, `.xz`",
        "read; refused if cut off",
    )
    @pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
    @pytest.mark.parametrize("format", ["txt", "jsonl", "csv"])
    def test_compressed_files(self, tmp_path, suffix, format):
        plain = write_rows(tmp_path / f"a.{format}", [{"text": "naïve 🙂 " * 3000}] * 3)
        expected = read_documents([plain])
        packed = tmp_path / f"a.{format}{suffix}".upper()  # as Windows may write it
        packed.write_bytes(compressed(plain.read_bytes(), suffix))
        assert read_documents([packed]) == expected
        packed.write_bytes(packed.read_bytes()[:-9])
        with pytest.raises(ValueError, match=rf"cannot be read as {format}\{suffix}"):
            read_documents([packed])
        packed.write_bytes(b"not compressed")
        with pytest.raises(ValueError, match=rf"cannot be read as {format}\{suffix}"):
            read_documents([packed])

    def test_files_compressed_in_parts(self, tmp_path):
        for suffix in (".gz", ".zst"):
            path = tmp_path / f"a.jsonl{suffix}"
            path.write_bytes(b"".join(compressed(f'{{"text": "{x}"}}\n'.encode(), suffix) for x in "ab"))
            assert read_documents([path]) == ["a", "b"]


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        return pa.Codec("zstd").compress(data, asbytes=True)
    return {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(data)


class TestSources:
    @pytest.mark.parametrize("name", ["notes[1].jsonl", "a*b.parquet", "what?.json", "[x]/rows.jsonl"])
    def test_paths_that_exist_are_no_patterns(self, tmp_path, name):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / f"aXb{Path(name).suffix}", [{"text": "another file"}])
        file = write_rows(tmp_path / name, [{"text": "this file"}])
        assert read_documents([file]) == ["this file"]

    @pytest.mark.promise(
        "`train`, `graft`, `evaluate`, `export`, `card`, `verify`: data",
        "folders and patterns in quotes",
        "read; refused if a folder holds texts as well as tables",
    )
    def test_folders_and_patterns(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("notes/b.txt", "notes/a.md", "notes/deep/c.TXT", "notes/.hidden.txt", "notes/.git/d.txt"):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(name)
        Path("notes/figure.png").touch()
        assert read_documents(["notes"]) == ["notes/a.md", "notes/b.txt", "notes/deep/c.TXT"]
        assert read_documents(["notes/*.txt"]) == ["notes/b.txt"]
        assert read_documents(["notes/**/*.[tT]*"]) == ["notes/b.txt", "notes/deep/c.TXT"]
        assert data_paths([Path("notes/*.md"), "notes/b.txt"]) == [Path("notes/a.md"), Path("notes/b.txt")]
        write_rows(Path("notes/table.jsonl"), [{"text": "x"}])
        with pytest.raises(ValueError, match=r"text files \(a\.md\) as well as tables \(table\.jsonl\).*\*\.jsonl'"):
            find_sources(["notes"])
        assert read_documents(["notes/**/*.jsonl"]) == ["x"]

    @pytest.mark.parametrize(
        ("name", "error", "fault"),
        [
            ("absent.txt", FileNotFoundError, r"absent\.txt: no such file or folder\.$"),
            ("owner/data-set", FileNotFoundError, r"on the Hub is written hf:owner/data-set\."),
            ("folder/data-set", FileNotFoundError, "no such file or folder.$"),
            ("*.md", FileNotFoundError, "no file matches"),
            ("folder", FileNotFoundError, "holds no data files"),
            ("letter.docx", ValueError, r"end in \.txt, \.md, .*'\.docx' is not one"),
            ("rows.parquet.gz", ValueError, "not parquet"),
            ("hf:owner", ValueError, "write hf:OWNER/NAME"),
            ("hf:owner/name/more", ValueError, "write hf:OWNER/NAME"),
        ],
    )
    def test_what_cannot_be_read(self, tmp_path, monkeypatch, name, error, fault):
        monkeypatch.chdir(tmp_path)
        Path("folder").mkdir()
        for file in ("letter.docx", "rows.parquet.gz"):
            Path(file).touch()
        with pytest.raises(error, match=fault):
            find_sources([name])

    def test_one_path_and_no_path(self):
        with pytest.raises(TypeError, match=r"Write \['a\.txt'\]"):
            find_sources("a.txt")
        with pytest.raises(ValueError, match="at least one"):
            find_sources([])

    @pytest.mark.promise(
        "`train`, `graft`, `evaluate`, `export`, `card`, `verify`: data",
        "pointers of Git LFS or git-annex",
        "refused with the command that fetches the file",
    )
    @pytest.mark.parametrize("name", ["chapter.txt", "rows.jsonl", "rows.parquet", "rows.jsonl.gz"])
    def test_pointers_instead_of_files(self, tmp_path, name):
        pointers = {
            "Git LFS": f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 12345\n",
            "git-annex": "/annex/objects/SHA256E-s5--0a.txt\n",
        }
        for kind, content in pointers.items():
            (tmp_path / name).write_text(content)
            with pytest.raises(ValueError, match=rf"{name} is a {kind} pointer.*`git (lfs pull|annex get)`"):
                read_documents([tmp_path / name])

    def test_outputs_in_folders_of_data_are_refused(self, tmp_path):
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes/a.txt").write_text("x")
        with pytest.raises(ValueError, match=r"in .*notes, a folder of data"):
            check_output_apart(tmp_path / "notes/expert", [tmp_path / "notes"])
        check_output_apart(tmp_path / "notes/expert", [tmp_path / "notes/a.txt"])

    def test_the_beginning_of_each_file_is_checked(self, tmp_path):
        good, bad = (write_rows(tmp_path / f"{name}.jsonl", [{name: "x"}]) for name in ("text", "body"))
        with pytest.raises(ValueError, match=r"body\.jsonl: no column 'text'"):
            Documents([good, bad]).check()


@pytest.mark.promise(
    "`train`, `graft`, `evaluate`, `export`, `card`, `verify`: data",
    "a data set on the Hub, `hf:owner/name@config:split`",
    "streamed",
)
class TestHub:
    """Data sets on the Hub; `datasets` itself reads a local folder in their place, without a network."""

    @pytest.fixture
    def hub(self, tmp_path, monkeypatch) -> SimpleNamespace:
        import datasets

        folder = tmp_path / "owner/letters"
        (folder / "en").mkdir(parents=True)
        for split in ("train", "test"):
            write_rows(folder / f"en/{split}.parquet", [{"text": f"en {split}", "n": 1}])
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/train.parquet\n"
            "  - split: test\n    path: en/test.parquet\n---\n"
        )
        real, calls = datasets.load_dataset, []

        def load(repo, *args, **options):
            calls.append(options)
            return real(str(tmp_path / repo), *args, **options)

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        return SimpleNamespace(calls=calls, folder=tmp_path)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("hf:owner/letters", "en train"),
            ("hf:owner/letters:test", "en test"),
            ("hf:owner/letters@en", "en train"),
            ("hf:owner/letters@en:test", "en test"),
        ],
    )
    def test_configurations_and_splits(self, hub, name, expected):
        assert read_documents([Path(name)]) == [expected], "the command line gives paths"
        assert all(call["streaming"] for call in hub.calls), "no copy of the text is left in a cache"

    def test_what_is_missing(self, hub):
        for name in ("hf:owner/letters@fr", "hf:owner/letters:dev"):
            with pytest.raises(ValueError, match=rf"{name} cannot be read .*@CONFIG:SPLIT"):
                read_documents([name])
        with pytest.raises(ValueError, match=r"hf:owner/letters: no column 'body'. Its columns: text, n"):
            read_documents(["hf:owner/letters"], column="body")

    def test_checks_of_the_beginning_open_no_connection(self, hub):
        Documents(["hf:owner/letters"]).check()
        assert not hub.calls

    def test_names(self):
        (source,) = find_sources(["hf:HuggingFaceFW/fineweb-2@ces_Latn:train"])
        assert source == HubDataset("HuggingFaceFW/fineweb-2", "ces_Latn", "train")
        assert str(source) == "hf:HuggingFaceFW/fineweb-2@ces_Latn:train"
        assert data_paths(["hf:owner/name"]) == []


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "txt"])
def test_memory_is_that_of_a_part_of_the_file(tmp_path, suffix):
    file = write_rows(tmp_path / f"a.{'jsonl' if suffix == 'txt' else suffix}", [{"text": "x" * 2000}] * 4000)
    if suffix == "txt":
        file = tmp_path / "a.txt"
        file.write_text(f"{'x' * 2000}\n{END_OF_DOCUMENT}\n" * 4000)
    next(iter(Documents([file])))  # imports
    tracemalloc.start()
    try:
        assert sum(1 for _ in Documents([file])) == 4000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000, "the file has 8 MB"


def test_reading_needs_neither_torch_nor_the_package() -> None:
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'numpy', 'datasets'): sys.modules[name] = None\n"
        "from flexmoe_cli.early_checks import check_data\ncheck_data([['absent.txt']])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.stderr.splitlines()[-1] == "FileNotFoundError: absent.txt: no such file or folder."
