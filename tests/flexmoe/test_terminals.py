"""Output on any terminal: narrow, without Unicode, in containers without a home folder, without others' noise."""

import ast
import codecs
import io
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main
from rich.console import Console

from flexmoe.demo.report import print_report
from flexmoe.io.folders import check_new_folder
from flexmoe_cli import app, main, output
from flexmoe_cli.output import prepare_streams, print_json, print_line, print_table, report_error

ROOT = Path(__file__).resolve().parents[2]
ENCODINGS = ("ascii", "latin-1", "cp1252")
TEXT = "naïve → ≤ … “日本” 🙂"

Stream = Callable[..., io.TextIOWrapper]


@pytest.fixture
def stdout(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """Replaces stdout and stderr by one stream of an encoding, as a terminal would be."""

    def replace(encoding: str, errors: str = "strict") -> io.TextIOWrapper:
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        prepare_streams()
        return stream

    return replace


def written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)


class TestEncodings:
    @pytest.mark.promise(
        "`flexmoe` commands",
        "ascii, latin-1 and cp1252 terminals",
        "equivalents or escapes of other characters; `--json` keeps the values",
    )
    @pytest.mark.parametrize("errors", ["strict", "surrogateescape", "backslashreplace"])
    @pytest.mark.parametrize("encoding", ENCODINGS)
    def test_tables_lines_and_errors(self, encoding: str, errors: str, stdout: Stream) -> None:
        stream = stdout(encoding, errors)
        print_table(TEXT, ("expert", "norm"), [["math", "1 … 2"], [TEXT, "≤ 3"]])
        print_line(TEXT)
        report_error(ValueError(TEXT))
        shown = written(stream)
        assert "\\u65e5\\u672c" in shown
        if encoding == "ascii":
            assert "1 ... 2" in shown
            assert 'Error: na\\xefve -> <= ... "\\u65e5\\u672c" \\U0001f642' in shown

    @pytest.mark.parametrize("encoding", [*ENCODINGS, "utf-8"])
    def test_json_has_the_same_values(self, encoding: str, stdout: Stream) -> None:
        stream = stdout(encoding)
        print_json({TEXT: [TEXT, "\x1b[2J"]})
        assert json.loads(written(stream)) == {TEXT: [TEXT, "\x1b[2J"]}
        assert ("日" in written(stream)) == (encoding == "utf-8")

    @pytest.mark.parametrize("encoding", ENCODINGS)
    def test_help(self, encoding: str, stdout: Stream) -> None:
        stream = stdout(encoding)
        assert main(["graft", "--help"]) == 0
        assert main(["graft", "--no-such-option-日本"]) == 2
        assert "--router-bias" in written(stream)

    @pytest.mark.parametrize("command", typer.main.get_command(app).commands)
    def test_help_cuts_no_name(self, command: str, monkeypatch: pytest.MonkeyPatch, stdout: Stream) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        stream = stdout("utf-8")
        assert main([command, "--help"]) == 0
        assert "…" not in written(stream)

    def test_a_choice_of_the_user_is_kept(self, stdout: Stream) -> None:
        stream = stdout("ascii", "replace")
        print_line("→")
        assert written(stream) == "?\n"

    def test_only_encoding_errors_are_handled(self, stdout: Stream) -> None:
        stdout("ascii")
        with pytest.raises(UnicodeDecodeError):
            b"\xff".decode("ascii", codecs.lookup_error(output._FALLBACK) and output._FALLBACK)


COLUMNS = ("expert", "kind", "size", "norms", "from", "license")
ROWS = [
    [f"two-expert-{name}", "low-rank 16 … 64", "1.2 MB", "0.123 … 4.56", f"my-organisation/{name}-expert", "cc-by-4.0"]
    for name in ("math", "code", "unicode")
]


class TestTables:
    @pytest.mark.parametrize("width", [60, 80, 120])
    @pytest.mark.parametrize("columns", [2, 4, 6])
    def test_rows_are_told_apart_and_nothing_is_cut(
        self, columns: int, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("COLUMNS", str(width))
        print_table("Experts", COLUMNS[:columns], [row[:columns] for row in ROWS])
        shown = capsys.readouterr().out
        assert all(len(line) <= width for line in shown.splitlines())
        assert all(row[0] in shown for row in ROWS)
        assert shown.count("…") == 6 * (columns > 3) + 3 * (columns in (2, 3))  # those of the cells

    def test_a_table_that_is_too_wide_is_a_list(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("COLUMNS", "60")
        print_table("Experts [1]", (*COLUMNS, "active"), [[*row, ""] for row in ROWS])
        title, *lines = capsys.readouterr().out.splitlines()
        assert title == "Experts [1]"
        assert lines[:6] == [
            "  two-expert-math",
            "    kind     low-rank 16 … 64",
            "    size     1.2 MB",
            "    norms    0.123 … 4.56",
            "    from     my-organisation/math-expert",
            "    license  cc-by-4.0",
        ]
        assert len(lines) == 18

    @pytest.mark.parametrize("width", [70, 80, 140])
    def test_the_report_of_the_demo(self, width: int) -> None:
        report = json.loads((ROOT / "docs" / "demo-tiny" / "report.json").read_text(encoding="utf-8"))
        console = Console(file=io.StringIO(), width=width)
        print_report(report, console)
        shown = console.file.getvalue()
        assert ("(120.5)" in shown) == (width == 140)  # perplexities only where there is room
        assert shown.count("…") == 1  # of the shortened SHA-256
        for system, score in report["systems"].items():
            (line,) = (line for line in shown.splitlines() if line.startswith(f"  {system}  "))
            assert line.rstrip().endswith(f"{score['mean']:.3f}")


class TestWithoutAHomeFolder:
    @pytest.fixture(autouse=True)
    def _no_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(cls: type[Path]) -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", classmethod(none))

    @pytest.mark.promise(
        "`flexmoe` commands",
        "no home folder",
        "works; what needs one says what to set",
    )
    def test_a_folder_can_be_overwritten(self, tmp_path: Path) -> None:
        assert check_new_folder(tmp_path, overwrite=True) == tmp_path
        with pytest.raises(ValueError, match="would delete"):
            check_new_folder(Path.cwd(), overwrite=True)

    def test_what_needs_one_says_so(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(RuntimeError) as caught:
            Path.home()
        report_error(caught.value)
        assert "determine home directory. Set HOME; or set HF_HOME" in capsys.readouterr().err


@pytest.mark.promise(
    "`flexmoe` commands",
    "torchao's messages at its import",
    "not shown",
)
def test_messages_about_others_imports_are_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    noise = {
        "torchao": "Failed to load torchao/_C_mxfp8.so: Could not load this library",
        "torch.utils._pytree": "<enum 'X'> is an Enum. Calling register_constant() on Enum subclasses is deprecated",
    }
    output.quiet_libraries()
    output.quiet_libraries()
    for logger, message in noise.items():
        logging.getLogger(logger).warning(message)
        logging.getLogger(logger).warning("news")
        assert len(logging.getLogger(logger).filters) == 1
    assert [record.getMessage() for record in caplog.records] == ["news", "news"]


MODES = ("r", "w", "a", "x", "rt", "wt", "at", "xt", "r+", "w+")


def test_every_text_file_has_an_encoding() -> None:
    """Without one, a file gets that of the terminal's locale."""
    found = []
    for path in (path for folder in ("src", "conversion", "modeling") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            arguments = {keyword.arg for keyword in node.keywords}
            modes = [each.value for each in node.args if isinstance(each, ast.Constant) and each.value in MODES]
            opens = name in ("open", "fdopen") and modes
            is_text = (
                opens or name in ("read_text", "write_text") or (name in ("run", "Popen") and "text" in arguments)
            )
            if is_text and "encoding" not in arguments:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found
