"""The command line: the library call of each command, its output, and the speed of --help."""

import ast
import gc
import importlib
import inspect as signatures
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from flexmoe.evaluation import DomainScore
from flexmoe.grafting import graft
from flexmoe.modeling import configuration_flexmoe
from flexmoe.planning.plan import plan
from flexmoe.testing import perturb_expert, tiny_anchor
from flexmoe.training.messages import TrainingInterrupted
from flexmoe.training.settings import TrainingSettings
from flexmoe_cli import app, main
from flexmoe_cli.arguments import (
    parse_domains,
    parse_experts,
    parse_renames,
    parse_size,
    parse_template,
    repeat_file_options,
)
from flexmoe_cli.early_checks import EXPERT_NAME
from flexmoe_cli.output import (
    human_bytes,
    human_count,
    large_import,
    print_json,
    print_line,
    print_table,
    report_error,
    show_warning,
)
from flexmoe_cli.tables import show_trained
from tests.support.letters import letter_tokenizer
from tests.support.soak import thinned

COMMANDS = (
    *("plan", "graft", "train", "compose", "add", "remove", "inspect", "evaluate"),
    *(
        "card",
        "keygen",
        "sign",
        "push",
        "pull",
        "verify",
        "export",
        "import",
        "compress",
        "densify",
        "fit-router",
        "demo",
    ),
)


SHOWN = (
    "commands.show_result",
    "commands.show_export",
    "commands.show_import",
    "composing.show_composed",
    "sharing.show_result",
    "training.show_trained",
)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch):
    """Replaces a function of the library by one that checks the signature and records the arguments."""
    calls: list[dict] = []

    def replace(function: str, result: object = Path("result")) -> list[dict]:
        module, name = function.rsplit(".", 1)
        real = getattr(importlib.import_module(module), name)

        def recorder(*args, **kwargs):
            calls.append(signatures.signature(real).bind(*args, **kwargs).arguments)
            return result

        monkeypatch.setattr(function, recorder)
        # the files are names only
        monkeypatch.setattr("flexmoe_cli.early_checks._light_module", lambda *_: MagicMock())
        for shown in SHOWN:
            monkeypatch.setattr(f"flexmoe_cli.{shown}", lambda *_: None)
        return calls

    return replace


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_has_help(self, command: str) -> None:
        result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0
        assert "--json" in result.output
        assert "--debug" in result.output

    def test_commands_are_listed_in_the_order_of_use(self) -> None:
        output = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
        assert re.findall(r"^│ ([a-z][\w-]*)  ", output, re.MULTILINE) == list(COMMANDS)

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--version"]) == 0
        assert re.fullmatch(r"flexmoe \d+\.\d+\.\d+\n", capsys.readouterr().out)

    def test_help_does_not_import_the_library(self) -> None:
        code = "import sys; from flexmoe_cli import main; main(['train', '--help']); print(sorted(sys.modules))"
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        loaded = {name.split(".")[0] for name in ast.literal_eval(process.stdout.splitlines()[-1])}
        assert not loaded & {"flexmoe", "torch", "transformers", "datasets", "numpy", "huggingface_hub"}

    @pytest.mark.parametrize(("command", "count"), [("train", 9), ("graft", 3)])
    def test_help_shows_the_defaults_of_the_library(self, command: str, count: int) -> None:
        output = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"}).output
        shown = {
            option.replace("-", "_"): value
            for option, value in re.findall(r"--([a-z-]+) .*Default: ([^ ]+?)\.? +│", output)
            if not option.startswith("no-")
        }
        assert len(shown) >= count
        for option, value in shown.items():
            if command == "train":
                default = getattr(TrainingSettings(), option)
            else:
                default = signatures.signature(graft).parameters[option].default
            assert value == ("no" if default is False else str(default)) or float(value) == default, option


class TestCalls:
    """Each command is one call, with the given options only."""

    def test_graft(self, call, tmp_path: Path) -> None:
        texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
        for text in texts:
            text.touch()
        calls = call("flexmoe.grafting.graft")
        line = ["graft", "owner/anchor", "--out", "o", "--public-data", *map(str, texts), "--max-shard-size", "2GB"]
        assert main([*line, "--no-norm-topk-prob", "--no-fingerprint", "--seed", "7"]) == 0
        (bound,) = calls
        assert bound["anchor"] == "owner/anchor"
        assert bound["out"] == Path("o")
        assert bound["public_data"] == texts
        assert bound["max_shard_size"] == 2_000_000_000
        assert (bound["norm_topk_prob"], bound["fingerprint"], bound["seed"]) == (False, False, 7)
        assert (bound["overwrite"], "revision" in bound) == (False, False)

    def test_plan(self, call, capsys: pytest.CaptureFixture[str]) -> None:
        planned = plan(tiny_anchor("llama").config)
        calls = call("flexmoe.planning.plan.plan", planned)
        line = ["plan", "owner/anchor", "--experts", "8", "--k", "4", "--rank", "64", "--tokens-per-expert", "50e9"]
        own_gpu = ["--gpu", "mine", "--gpu-tflops", "100", "--gpu-memory-gb", "24", "--gpu-bandwidth-tb", "0.5"]
        assert main([*line, *own_gpu, "--mfu", "0.3", "--dtype", "float32", "--json"]) == 0
        assert calls.pop() == {
            "anchor": "owner/anchor",
            "experts": 8,
            "k": 4,
            "rank": 64,
            "tokens_per_expert": 50e9,
            "gpu": "mine",
            "gpu_tflops": 100,
            "gpu_memory_gb": 24,
            "gpu_bandwidth_tb": 0.5,
            "mfu": 0.3,
            "dtype": "float32",
        }
        assert json.loads(capsys.readouterr().out) == planned.to_dict()
        assert main(["plan", "a"]) == 0
        assert calls.pop() == {"anchor": "a"}, "defaults are the library's"

    def test_graft_with_fine_tunes(self, call) -> None:
        calls = call("flexmoe.grafting.graft")
        experts = ["--expert", "math=owner/math", "--expert", "code=runs/k=2/code"]
        assert main(["graft", "owner/anchor", "--out", "o", *experts, "--shared", "average"]) == 0
        assert calls[0]["experts"] == {"math": "owner/math", "code": "runs/k=2/code"}
        assert calls[0]["shared"] == "average"

    def test_graft_with_router_data(self, call) -> None:
        calls = call("flexmoe.grafting.graft")
        experts = ["--expert", "math=m", "--expert", "code=c"]
        data = ["--router-data", "math=a.txt", "math=b.txt", "code=c.jsonl", "--router", "lda", "--router-bias"]
        assert main(["graft", "base", *experts, *data, "--router-tokens", "9", "--embedder", "e", "--out", "o"]) == 0
        (bound,) = calls
        assert bound["router_data"] == {"math": [Path("a.txt"), Path("b.txt")], "code": [Path("c.jsonl")]}
        assert (bound["router"], bound["router_bias"], bound["router_tokens"]) == ("lda", True, 9)
        assert (bound["embedder"], "recipe" in bound) == ("e", False)
        assert main(["graft", "base", "--out", "o"]) == 0
        assert not {"router_data", "router", "router_bias", "router_tokens", "embedder"} & calls[1].keys()

    def test_graft_of_a_recipe(self, call) -> None:
        calls = call("flexmoe.grafting.graft")
        assert main(["graft", "--recipe", "moe.yaml", "--seed", "3", "--out", "o"]) == 0
        (bound,) = calls
        assert (bound["anchor"], bound["recipe"], bound["seed"]) == (None, Path("moe.yaml"), 3)
        assert not bound["experts"]
        assert (bound["shared"], bound["norm_topk_prob"]) == (None, None)

    def test_train(self, call, tmp_path: Path) -> None:
        for name in ("a.jsonl", "b.jsonl"):
            (tmp_path / name).touch()
        calls = call("flexmoe.training.experts.train_expert")
        data = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
        assert main(["train", "--data", *data, "grafted", "--name", "math", "--out", "o", "--router-bias"]) == 0
        (bound,) = calls
        assert (bound["grafted"], bound["name"], bound["out"]) == ("grafted", "math", Path("o"))
        assert bound["data"] == [Path(path) for path in data]
        assert bound["overrides"] == {"router_bias": True}, "defaults are the library's"

    def test_data_options_are_the_same_everywhere(self, call, monkeypatch) -> None:
        rows = ["--text-template", r"{a}\n{b}", "--skip-empty"]
        expected = {"text_template": "{a}\n{b}", "skip_empty": True}
        for function, *line in (
            ("flexmoe.training.experts.train_expert", "train", "g", "--name", "math", "--data", "x.csv", "--out", "o"),
            ("flexmoe.grafting.graft", "graft", "a", "--public-data", "x.csv", "--out", "o"),
            ("flexmoe.evaluation.evaluate", "evaluate", "m", "--data", "x.csv", "--json"),
            ("flexmoe.card_files.measure", "card", "m", "--data", "x.csv"),
            ("flexmoe.admission.verification.verify", "verify", "p", "--model", "m", "--data", "x.csv"),
        ):
            calls = call(function, {})
            main([*line, *rows])
            bound = calls.pop()
            assert expected.items() <= (bound.get("overrides") or bound).items(), line

    @pytest.mark.promise("`train`", "Ctrl-C", "says what is kept and how to continue; exit code 130")
    def test_an_interrupted_training_says_what_is_kept(self, monkeypatch, call, capsys) -> None:
        call("flexmoe.training.experts.train_expert")
        line = ["train", "g", "--name", "math", "--data", "x.txt", "--out", "o"]
        for stop, text in (
            (
                TrainingInterrupted("Stopped. --no-resume (resume=False) starts over."),
                "Stopped. --no-resume starts over.",
            ),
            (KeyboardInterrupt(), "Interrupted before training began: nothing was kept"),
        ):

            def interrupted(*_: object, stop: BaseException = stop, **__: object) -> None:
                raise stop

            monkeypatch.setattr("flexmoe.training.experts.train_expert", interrupted)
            assert main(line) == 130
            assert capsys.readouterr().err.startswith(text)

    def test_training_ends_with_the_losses(self, monkeypatch, capsys) -> None:
        training = {"validation_loss": {"own": {"before": 2.0, "after": 1.5}}}
        found = {"kind": "package", "bytes": 9, "experts": [{"name": "math", "active": True, "training": training}]}
        monkeypatch.setattr("flexmoe.inspection.inspect", lambda _: found)
        show_trained(Path("o"), False, "Send the folder.")
        assert capsys.readouterr().out.splitlines()[-1] == (
            "Loss per token on held-out text, before -> after: own 2.0000 -> 1.5000."
        )
        show_trained(Path("o"), True, "Send the folder.")
        assert json.loads(capsys.readouterr().out) == found

    def test_training_options_and_settings_are_the_same(self, call) -> None:
        calls = call("flexmoe.training.experts.train_expert")
        values = {"router": "lda", "evidence": "none", "embedder": "e", "text_column": "body", "dtype": "float32"}
        values["text_template"] = "{a}"
        flags = {"router_bias", "gradient_checkpointing", "skip_empty"}
        options = []
        for name in (field.name for field in fields(TrainingSettings)):
            options += [f"--{name.replace('_', '-')}", *([] if name in flags else [values.get(name, "1")])]
        assert main(["train", "g", "--name", "math", "--data", "x.txt", "--out", "o", *options]) == 0
        assert calls[0]["overrides"].keys() == {field.name for field in fields(TrainingSettings)}

    def test_compose(self, call) -> None:
        calls = call("flexmoe.conversion.compose.compose")
        line = ["compose", "g", "p/math", "p/code", "--out", "o", "--name", "p/code=c2"]
        assert main([*line, "--public-prior", "-0.5"]) == 0
        (bound,) = calls
        assert (bound["grafted"], bound["packages"]) == ("g", ["p/math", "p/code"])
        assert bound["names"] == {"p/code": "c2"}
        assert bound["public_prior"] == -0.5
        assert bound["num_experts_per_tok"] is None

    def test_add_and_remove(self, call) -> None:
        calls = call("flexmoe.conversion.compose.add")
        assert main(["add", "m", "p", "--out", "o", "--name", "math-2", "--overwrite"]) == 0
        assert calls.pop() == {
            "model": "m",
            "package": "p",
            "out": Path("o"),
            "name": "math-2",
            "position": None,
            "verify": True,
            "policy": None,
            "overwrite": True,
        }
        calls = call("flexmoe.conversion.compose.remove")
        assert main(["remove", "m", "math", "--out", "o"]) == 0
        assert calls.pop() == {"model": "m", "name": "math", "out": Path("o"), "overwrite": False}

    def test_evaluate(self, call, capsys: pytest.CaptureFixture[str]) -> None:
        score = DomainScore(loss=1.5, perplexity=float("inf"), tokens=3, documents=2)
        calls = call("flexmoe.evaluation.evaluate", {"math": score})
        line = ["evaluate", "m", "--data", "math=a.txt", "math=b.txt", "code=c.txt", "--json"]
        assert main([*line, "--expert", "public", "--expert", "math"]) == 0
        (bound,) = calls
        assert bound["data"] == {"math": [Path("a.txt"), Path("b.txt")], "code": [Path("c.txt")]}
        assert bound["experts"] == ["public", "math"]
        printed = json.loads(capsys.readouterr().out)
        assert printed["domains"]["math"] == {"loss": 1.5, "perplexity": None, "tokens": 3, "documents": 2}

    def test_export(self, call) -> None:
        calls = call("flexmoe.conversion.export.export")
        assert main(["export", "m", "--to", "dense", "--expert", "math", "--out", "o", "--max-shard-size", "2GB"]) == 0
        (bound,) = calls
        assert (bound["model"], bound["out"], bound["to"], bound["expert"]) == (
            "m",
            Path("o"),
            "dense",
            "math",
        )
        assert (bound["drop_bias"], bound["overwrite"], bound["max_shard_size"]) == (
            False,
            False,
            2_000_000_000,
        )
        assert main(["export", "m", "--to", "mixtral", "--drop-bias", "--overwrite", "--out", "o"]) == 0
        assert (calls[1]["drop_bias"], calls[1]["overwrite"], calls[1]["expert"]) == (True, True, None)

    def test_export_with_text_compares_losses(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}')
        scores = iter([1.5, 1.75] * 2)

        def evaluate(model: object, data: dict, **_: object) -> dict[str, DomainScore]:
            return {name: DomainScore(loss=next(scores), perplexity=1.0, tokens=3, documents=2) for name in data}

        monkeypatch.setattr("flexmoe_cli.commands.check_data", lambda *_: None)
        monkeypatch.setattr("flexmoe.conversion.export.export", lambda *_, **__: tmp_path)
        monkeypatch.setattr("flexmoe.evaluation.evaluate", evaluate)
        line = ["export", "m", "--to", "mixtral", "--drop-bias", "--out", "o", "--data", "math=a.txt"]
        assert main([*line, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["losses"] == {"math": {"model": 1.5, "export": 1.75}}
        assert main(line) == 0
        assert re.search(r"math .*1\.5000.*1\.7500.*\+0\.2500", capsys.readouterr().out)

    def test_import(self, call) -> None:
        calls = call("flexmoe.conversion.import_flex_olmo.import_flex_olmo")
        assert main(["import", "owner/flex", "--names", "public, math,code", "--out", "o"]) == 0
        (bound,) = calls
        assert (bound["checkpoint"], bound["out"]) == ("owner/flex", Path("o"))
        assert (bound["names"], bound["overwrite"]) == (["public", "math", "code"], False)

    def test_demo(self, call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        report = {"thresholds": [{"passed": False}], "opt_out": {"owner": "code", "files_equal": True}}
        (tmp_path / "report.json").write_text(json.dumps(report))
        calls = call("flexmoe.demo.run_demo", tmp_path / "report.json")
        assert main(["demo", "--out", str(tmp_path), "--owners", "math,code", "--steps", "3", "--json"]) == 0
        (bound,) = calls
        assert (bound["out"], bound["seed"], bound["owners"], bound["steps"]) == (
            tmp_path,
            0,
            ("math", "code"),
            3,
        )
        assert json.loads(capsys.readouterr().out) == report

    def test_demo_fails_after_its_report_if_the_opt_out_is_not_exact(self, call, tmp_path: Path, capsys) -> None:
        report = {"opt_out": {"owner": "code", "state_dict_equal": True, "logits_equal": False, "files_equal": False}}
        (tmp_path / "report.json").write_text(json.dumps(report))
        call("flexmoe.demo.run_demo", tmp_path / "report.json")
        assert main(["demo", "--out", str(tmp_path), "--json"]) == 1
        printed = capsys.readouterr()
        assert json.loads(printed.out) == report
        assert printed.err.startswith(
            "Error: The opt-out was not exact: the model from which code was removed differs"
        )
        assert "in logits, files." in printed.err


EARLY = {
    "train g --name Math --data own.jsonl --out o": "--name 'Math' is not an expert name",
    "train g --name law --data own.jsonl --out o": "The name 'law' is taken: g has public, law.",
    "train ./gg --name math --data own.jsonl --out o": "./gg: no such folder.",
    "train g --name math --data own.jsonl --out g": "g exists already.",
    "train g --name math --data owm.jsonl --out o": "owm.jsonl: no such file or folder.",
    "train g --name math --data own.jsonl --out o --public-data *.txt": "*.txt: no file matches this pattern.",
    "train g --name math --data own.jsonl --out o --text-column body": "no column 'body'. Its columns: text.",
    "train g --name math --data own.jsonl --out o --text-template {title}": "own.jsonl: no column 'title'.",
    "train g --name math --data own.jsonl --out o --text-template {title": "a single '{'",
    "graft a --public-data x.txt --out o": "x.txt: no such file or folder.",
    "graft a --expert m=x --router-data m=x.txt --out o": "x.txt: no such file or folder.",
    "evaluate m --data x.txt": "x.txt: no such file or folder.",
    "export m --to mixtral --data m=x.txt --out o": "x.txt: no such file or folder.",
    "card m --data x.txt": "x.txt: no such file or folder.",
    "verify p --model m --data x.txt": "x.txt: no such file or folder.",
}
"""Command lines that are refused before the library is imported."""


@pytest.mark.promise("`flexmoe` commands", "a misspelt name, path or column", "refused before PyTorch is imported")
def test_names_files_and_columns_are_checked_before_the_library_is_imported(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "config.json").write_text('{"experts": ["public", {"name": "law"}]}')
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'numpy', 'datasets'): sys.modules[name] = None\n"
        f"from flexmoe_cli import main\nfor line in {list(EARLY)!r}: assert main(line.split()) == 1"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert process.returncode == 0, process.stderr
    for shown, (line, expected) in zip(process.stderr.splitlines(), EARLY.items(), strict=True):
        assert expected in shown, line


def test_early_checks_accept_the_names_that_the_library_accepts() -> None:
    assert EXPERT_NAME.pattern == configuration_flexmoe._NAME.pattern


class TestErrors:
    def fail(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def raises(*_: object) -> None:
            raise error

        monkeypatch.setattr("flexmoe.inspection.inspect", raises)

    @pytest.mark.parametrize(
        ("error", "text"),
        [
            (ValueError("What is [wrong].\n   What\tto do."), "Error: What is [wrong]. What to do."),
            (KeyError("no tensor 'x'"), "Error: no tensor 'x'"),
            (FileExistsError("o exists"), "Error: o exists"),
            (ValueError(), "Error: ValueError"),
            (
                RuntimeError("odd"),
                "Error: RuntimeError: odd (Unexpected error: --debug shows the traceback.)",
            ),
        ],
    )
    def test_one_paragraph_on_stderr(self, monkeypatch, capsys, error: Exception, text: str) -> None:
        self.fail(monkeypatch, error)
        assert main(["inspect", "x"]) == 1
        assert capsys.readouterr() == ("", text + "\n")

    def test_debug_raises(self, monkeypatch) -> None:
        self.fail(monkeypatch, ValueError("here"))
        with pytest.raises(ValueError, match="here"):
            main(["inspect", "x", "--debug"])

    @pytest.mark.parametrize(
        "line",
        [["nonsense"], ["remove", "m"], ["graft", "a", "--out", "o", "--max-shard-size", "big"], ["inspect", "--x"]],
    )
    def test_invalid_command_lines_exit_with_2(self, capsys, line: list[str]) -> None:
        assert main(line) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "Usage: flexmoe" in printed.err

    def test_a_warning_is_one_line_without_code(self, monkeypatch, capsys) -> None:
        import warnings

        def warns(*_: object) -> dict:
            warnings.warn("something\nodd", UserWarning, stacklevel=1)
            return {}

        monkeypatch.setattr("flexmoe.inspection.inspect", warns)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert main(["inspect", "x", "--json"]) == 0
        assert capsys.readouterr() == ("{}\n", "Warning: something odd\n")

    @pytest.mark.parametrize(("extra", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
    def test_no_color_is_respected(self, monkeypatch, capsys, extra: dict[str, str], coloured: bool) -> None:
        for key, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", **extra}.items():
            monkeypatch.setenv(key, value)
        self.fail(monkeypatch, ValueError("red"))
        assert main(["inspect", "x"]) == 1
        assert ("31m" in capsys.readouterr().err) is coloured


# What a terminal interprets: a title, C1's own ESC [, right-to-left text, invisible characters, a surrogate.
CONTROLS = "\x1b]0;t\x07\x1b[2J\x9b31m\x08\x7f\u202e\u2066\u200b\u200e\ufeff\U000e0041\ud800"


class TestUntrustedText:
    @pytest.mark.parametrize(
        "show",
        [
            lambda text: print_line(f"[bold]x[/] {text}"),
            lambda text: print_table(text, ("name", "licence"), [(text, text)]),
            lambda text: report_error(ValueError(text)),
            lambda text: show_warning(text, UserWarning, "", 0),
            lambda text: print_json({text: [text]}),
        ],
        ids=["line", "table", "error", "warning", "json"],
    )
    def test_control_characters_are_escaped(self, monkeypatch, capsys, show) -> None:
        monkeypatch.setenv("COLUMNS", "400")
        show(f"a{CONTROLS}b ünï 日本 👩‍💻")
        printed = "".join(capsys.readouterr())
        assert not set(CONTROLS) & set(printed) - set("]0;t[2J31m")
        assert "ünï 日本 👩‍💻" in printed
        assert re.search(r"\\(x1b|u001b)\]0;t\\(x07|u0007)", printed)

    def test_json_is_unchanged(self, capsys) -> None:
        print_json({"text": CONTROLS + "\n"})
        assert json.loads(capsys.readouterr().out) == {"text": CONTROLS + "\n"}

    def test_a_cell_is_one_line(self, capsys) -> None:
        print_table("t", ("name",), [("a\nb",)])
        assert "a\\nb" in capsys.readouterr().out


class TestArguments:
    def test_file_options_take_several_files(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("a.txt").touch()
        Path("b.txt").touch()
        Path("folder").mkdir()

        def joined(line: str) -> str:
            return " ".join(repeat_file_options(line.split()))

        assert joined("--data a.txt b.txt --out o") == "--data a.txt --data b.txt --out o"
        assert joined("--data a.txt folder") == "--data a.txt folder"
        assert joined("--data missing.txt b.txt") == "--data missing.txt --data b.txt"
        assert joined("--data a.txt missing.txt b.txt") == "--data a.txt missing.txt b.txt"
        assert joined("--data x=a.txt y=b.txt m") == "--data x=a.txt --data y=b.txt m"
        assert joined("--out a.txt b.txt") == "--out a.txt b.txt"
        assert joined("--data a.txt -- b.txt") == "--data a.txt -- b.txt"
        assert joined("--data a.txt b/*.md hf:o/n@c:s m") == "--data a.txt --data b/*.md --data hf:o/n@c:s m"

    def test_a_name_applies_to_the_files_after_it(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("a.txt", "b.txt", "c.txt", "runs/k=2/d.txt"):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).touch()

        def joined(line: str) -> str:
            return " ".join(repeat_file_options(line.split(), named=True))

        assert joined("--data x=a.txt b.txt runs/k=2/d.txt") == "--data x=a.txt --data x=b.txt --data x=runs/k=2/d.txt"
        assert joined("--data x=a.txt y=b.txt c.txt") == "--data x=a.txt --data y=b.txt --data y=c.txt"
        assert joined("--data x=a.txt --data b.txt c.txt") == "--data x=a.txt --data b.txt --data c.txt"
        assert joined("--data a.txt b.txt") == "--data a.txt --data b.txt"
        assert parse_domains(["x=runs/k=2/d.txt"]) == {"x": [Path("runs/k=2/d.txt")]}

    def test_only_evaluate_has_named_files(self, call, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("a.txt", "b.txt", "x=a.txt"):
            Path(name).touch()
        calls = call("flexmoe.training.experts.train_expert")
        assert main(["train", "g", "--name", "math", "--out", "o", "--data", "x=a.txt", "b.txt"]) == 0
        assert calls.pop()["data"] == [Path("x=a.txt"), Path("b.txt")]
        calls = call("flexmoe.evaluation.evaluate", {})
        assert main(["evaluate", "m", "--json", "--data", "x=a.txt", "b.txt"]) == 0
        assert calls.pop()["data"] == {"x": [Path("a.txt"), Path("b.txt")]}

    @pytest.mark.parametrize(
        ("text", "size"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2GiB", 2 << 30), ("700", 700), ("3M", 3_000_000)]
    )
    def test_sizes(self, text: str, size: int) -> None:
        assert parse_size(text) == size

    def test_domains(self) -> None:
        bound = parse_domains(["math=a.txt", "dir=x/b.txt", "c.txt", "math=d.txt"])
        assert bound == {"math": [Path("a.txt"), Path("d.txt")], "dir": [Path("x/b.txt")], "c": [Path("c.txt")]}
        assert parse_domains(["runs/k=2/math.txt"]) == {"math": [Path("runs/k=2/math.txt")]}
        with pytest.raises(ValueError, match="write name=file"):
            parse_domains(["math="])
        with pytest.raises(ValueError, match="write name=file"):
            parse_domains(["=a.txt"])
        assert parse_domains(["x=notes/*.txt", "hf:o/n"]) == {"x": [Path("notes/*.txt")], "n": [Path("hf:o/n")]}
        with pytest.raises(ValueError, match="write name=file"):
            parse_domains(["notes/*.txt"])

    def test_templates_may_have_escapes(self) -> None:
        assert parse_template(r"{title}\n\t{body}\\n\x") == "{title}\n\t{body}\\n\\x"

    def test_experts(self) -> None:
        assert parse_experts(["math=a/b", "code=k=2/c"]) == {"math": "a/b", "code": "k=2/c"}
        for wrong in (["math"], ["=folder"], ["math="]):
            with pytest.raises(ValueError, match="write name=folder"):
                parse_experts(wrong)
        with pytest.raises(ValueError, match="'math' is already a"):
            parse_experts(["math=a", "math=b"])

    def test_renames(self) -> None:
        assert parse_renames(["p=math", "runs/k=2/p=code"]) == {"p": "math", "runs/k=2/p": "code"}
        with pytest.raises(ValueError, match="write package=name"):
            parse_renames(["math"])
        with pytest.raises(ValueError, match="one name per package"):
            parse_renames(["p=a", "p=b"])

    def test_human_readable_numbers(self) -> None:
        assert [human_bytes(count) for count in (0, 999, 1000, 1_234_567, 8_660_000_000)] == [
            "0 B",
            "999 B",
            "1 kB",
            "1.23 MB",
            "8.66 GB",
        ]
        assert [human_count(count) for count in (7, 4_330_000_000, 999_999)] == ["7", "4.33 B", "1 M"]
        assert [human_count(count, 4) for count in (33_270_665_440, 999_940, 999_960)] == ["33.27 B", "999.9 K", "1 M"]

    def test_garbage_collection_is_enabled_after_a_failed_import(self) -> None:
        def failing() -> None:
            with large_import():
                assert not gc.isenabled()
                raise ImportError

        assert gc.isenabled()
        with pytest.raises(ImportError):
            failing()
        assert gc.isenabled()

    def test_json_is_standard(self, capsys) -> None:
        print_json({"a": float("nan"), "b": [float("-inf"), 1.5], "c": Path("x"), "d": True, "é": None})
        assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": "x", "d": True, "é": None}


@pytest.mark.parametrize("is_fresh", thinned([False, True], [False]))
def test_as_a_process(is_fresh: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The installed script: exit code, one paragraph on stderr and nothing of other libraries, nothing on stdout."""
    monkeypatch.setenv("NO_COLOR", "1")
    line = ["inspect", "/nowhere/at/all"]
    if is_fresh:
        script = Path(sys.executable).parent / "flexmoe"
        assert subprocess.run([script, *line], check=False).returncode == 1
    else:
        assert main(line) == 1
    output = capfd.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("Error: /nowhere/at/all: no such folder.")


def test_workflow(tmp_path: Path, monkeypatch, capsys) -> None:
    """Graft, compose two owners' packages, remove one, inspect and evaluate: each by its command, on real files."""
    monkeypatch.chdir(tmp_path)
    tiny_anchor("llama").save_pretrained("anchor")
    letter_tokenizer().save_pretrained("anchor")
    Path("held_out.txt").write_text("a text that nobody owns")

    def run(*line: str) -> dict:
        assert main([*line, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    def names(found: dict) -> list[str]:
        return [expert["name"] for expert in found["experts"]]

    assert names(run("graft", "anchor", "--out", "grafted")) == ["public"]
    model = AutoModelForCausalLM.from_pretrained("grafted")
    for name in ("math", "code"):
        model.add_expert_copy(name)
        perturb_expert(model, name)
        model.save_expert(name, name, license="MIT")

    composed = run("compose", "grafted", "math", "code", "--out", "whole", "--public-prior", "0")
    assert names(composed) == ["public", "math", "code"]
    without = run("remove", "whole", "math", "--out", "without")
    assert names(without) == ["public", "code"]
    assert names(run("add", "without", "math", "--out", "again", "--name", "algebra")) == ["public", "code", "algebra"]
    inspected = run("inspect", "without", "--device", "cuda")
    assert [path["layer"] for path in inspected.pop("paths")] == [0, 1]
    assert inspected == without

    only = run("evaluate", "whole", "--data", "x=held_out.txt", "--expert", "public", "--expert", "code")
    assert only["domains"] == run("evaluate", "without", "--data", "x=held_out.txt")["domains"]

    assert main(["inspect", "whole", "--device", "cpu"]) == 0
    assert "MIT" in capsys.readouterr().out
    assert main(["remove", "whole", "math", "--out", "without"]) == 1
    assert "--overwrite" in capsys.readouterr().err
