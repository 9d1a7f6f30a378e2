"""A small run of the demo: the report, the files that owners open, the exact opt-out, and reuse by a second run."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from flexmoe.demo import DemoSettings, opt_out, owners, run_demo
from flexmoe.demo.anchor import build_anchor, train_tokenizer
from flexmoe.demo.anchor_source import GivenAnchor
from flexmoe.demo.owners import PACKAGE, OwnerSettings, train_owner
from flexmoe.demo.pipeline import DEFAULT_OWNERS, MODEL, TINY, Demo
from flexmoe.demo.stages import Stage, Stages
from tests.demo.conftest import TinyRun, tiny_settings
from tests.support.forked import replace_new_processes

SYSTEMS = {
    "anchor",
    "two-expert-math",
    "two-expert-code",
    "composed",
    "composed-k1",
    "composed-k2",
    "soup",
    "true-domain",
    "opted-out",
}


@pytest.fixture(scope="module")
def report(tiny_run: TinyRun) -> dict:
    return json.loads((tiny_run.out / "report.json").read_text())


def test_no_owner_opens_files_of_another(tiny_run: TinyRun) -> None:
    """Python's audit event `open` does not see native readers (safetensors, tokenizers).

    `test_owner_without_access_to_other_files_gives_the_same_package` covers those.
    """
    owners = {name: (tiny_run.out / "owners" / name).resolve() for name in ("math", "code")}
    corpus = (tiny_run.out / "corpus").resolve()
    for name, cwd in owners.items():
        opened = [path for process_cwd, path in tiny_run.opened if process_cwd == cwd]
        others = [folder for other, folder in owners.items() if other != name] + [corpus]
        assert cwd / "data" / "documents.jsonl" in opened  # the audit hook works
        assert not [path for path in opened for folder in others if path.is_relative_to(folder)]


@pytest.mark.usefixtures("processes_of_the_run")
def test_owner_without_access_to_other_files_gives_the_same_package(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Training again in a separate folder, without the other owner and the corpus, gives a bit-equal package."""
    data = shutil.copyfile(tiny_run.out / "corpus" / "owners" / "math.jsonl", tmp_path / "math.jsonl")
    grafted = shutil.copytree(tiny_run.out / "grafted" / MODEL, tmp_path / "grafted")
    first = tiny_run.out / "owners" / "math" / PACKAGE
    statement = json.loads((first / "expert_config.json").read_text())["data_statement"]
    threads = max(1, (os.cpu_count() or 1) // 2)  # as in the run: sums depend on the number of threads
    owner = tmp_path / "owner"
    train_owner("math", data, grafted, owner, tiny_settings().owner, threads=threads, statement=statement)
    second = owner / PACKAGE
    names = sorted(path.name for path in first.iterdir())
    assert sorted(path.name for path in second.iterdir()) == names
    for name in names:
        assert (second / name).read_bytes() == (first / name).read_bytes(), name


def test_folder_of_an_owner_has_no_text_of_another(tiny_run: TinyRun) -> None:
    texts = {
        name: (tiny_run.out / "corpus" / "owners" / f"{name}.jsonl").read_bytes().splitlines()
        for name in ("math", "code")
    }
    for name, other in (("math", "code"), ("code", "math")):
        folder = tiny_run.out / "owners" / name
        contents = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
        assert all(line in contents for line in texts[name])
        assert not [line for line in texts[other] if line in contents]


def test_report_is_complete(report: dict) -> None:
    assert report["domains"] == ["public", "math", "code"]
    assert set(report["systems"]) == SYSTEMS
    for score in report["systems"].values():
        assert set(score["loss"]) == set(report["domains"])
        assert score["mean"] == pytest.approx(sum(score["loss"].values()) / 3)
        assert score["perplexity"]["math"] == pytest.approx(math.exp(score["loss"]["math"]))
    assert set(report["kept"]) == {"math", "code"}
    for shares in report["routing"].values():
        assert set(shares) == {"public", "math", "code"}
        assert sum(shares.values()) == pytest.approx(1)
    assert sum(report["mix"].values()) == pytest.approx(1)
    assert report["mix"]["english"] > 0.5
    assert report["seeds"] == [0]
    assert report["seconds"] > 0
    assert report["peak_bytes"] > 1e8
    assert {"flexmoe", "torch", "transformers", "python"} <= set(report["versions"])
    assert [c["domain"] for c in report["continuations"]] == report["domains"]


def test_true_domain_uses_the_model_of_each_domain(report: dict) -> None:
    loss = {name: score["loss"] for name, score in report["systems"].items()}
    assert loss["true-domain"] == {
        "public": loss["anchor"]["public"],
        "math": loss["two-expert-math"]["math"],
        "code": loss["two-expert-code"]["code"],
    }


def test_opting_out_is_exact(report: dict) -> None:
    result = report["opt_out"]
    assert result["owner"] == "math"
    assert result["composed_from"] == ["code"]
    assert result["state_dict_equal"]
    assert result["logits_equal"]
    assert result["config_equal"]
    assert result["files_equal"]
    assert report["systems"]["opted-out"]["loss"] != report["systems"]["composed"]["loss"]


def test_plots_and_markdown_are_written(tiny_run: TinyRun) -> None:
    for name in ("losses.png", "routing.png"):
        assert (tiny_run.out / name).read_bytes().startswith(b"\x89PNG")
    text = (tiny_run.out / "report.md").read_text()
    assert all(f"| {system} |" in text or f"| **{system}** |" in text for system in SYSTEMS)


def test_second_run_reuses_all_stages(tiny_run: TinyRun, report: dict, tmp_path: Path) -> None:
    output = io.StringIO()
    out = shutil.copytree(tiny_run.out, tmp_path / "moved")  # reuse must not depend on the location
    again = json.loads(run_demo(out, settings=tiny_settings(), console=Console(file=output)).read_text())
    assert all(stage["reused"] for stage in again["stages"].values())
    assert "reusing owners/math" in output.getvalue()
    for key in ("systems", "kept", "routing", "opt_out", "continuations", "mix"):
        assert again[key] == report[key]


def test_graft_depends_on_the_code_that_reads_public_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: dict[str, list[str]] = {}

    def run(self: Stages, name: str, make: object, *, code: Sequence[str], **_: object) -> Stage:
        recorded[name] = list(code)
        return Stage(tmp_path, reused=True, seconds=0.0, digest="")

    monkeypatch.setattr(Stages, "run", run)
    (tmp_path / "public.jsonl").touch()
    demo = Demo(tmp_path, tiny_settings(), Console(quiet=True))
    demo.done = {name: Stage(tmp_path, reused=True, seconds=0.0, digest="") for name in ("corpus", "anchor")}
    demo.grafted()
    assert {"flexmoe.modeling", "flexmoe.conversion", "flexmoe.data"} <= set(recorded["grafted"])


def test_seed_owners_and_steps_apply_to_every_stage() -> None:
    settings = DemoSettings.of(anchor=TINY, seed=3, owners=("cpp", "math"), steps=50)
    assert (settings.corpus.seed, settings.anchor.seed, settings.owner.seed) == (3, 3, 3)
    assert settings.owners == ("cpp", "math")
    assert (settings.owner.steps, settings.anchor.steps) == (50, 200)


def test_owners_of_a_real_anchor_train_as_the_command_chooses() -> None:
    settings = DemoSettings.of(seed=3)
    assert settings.anchor == GivenAnchor(source="smollm2")
    assert settings.owners == DEFAULT_OWNERS
    assert settings.owner.arguments() == ["--epochs", "0.4", "--method", "full", "--seed", "3"]
    assert OwnerSettings.chosen(steps=5).arguments() == ["--max-steps", "5", "--method", "full", "--seed", "0"]
    assert DemoSettings.of(anchor="model.gguf", steps=5).owner.steps == 5


def test_settings_of_the_small_anchor_are_options_of_the_command() -> None:
    options = OwnerSettings(rank=None, router_bias=True).arguments()
    assert options[options.index("--learning-rate") + 1] == "0.002"
    assert "--router-bias" in options
    assert "--no-router-bias" in OwnerSettings().arguments()
    assert "--rank" not in options


@pytest.mark.soak
def test_an_anchor_that_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole demo on a random model with a chat template."""
    replace_new_processes(monkeypatch, [owners, opt_out])
    settings = tiny_settings()
    tokenizer = train_tokenizer(["a question and an answer"], 300)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer:"
    for part in (tokenizer, build_anchor(tokenizer, settings.anchor)):
        part.save_pretrained(tmp_path / "model")
    settings = replace(
        settings,
        corpus=replace(settings.corpus, public_share=0.0, owner_tokens=30_000),
        anchor=GivenAnchor(source=str(tmp_path / "model"), sequence_length=64, sequences=2),
    )
    path = run_demo(tmp_path / "out", settings=settings, console=Console(quiet=True))
    report = json.loads(path.read_text())
    assert set(report["systems"]) == SYSTEMS - {"composed-k1", "composed-k2"}
    assert set(report["corpus"]["held_out_tokens"].values()) == {128}
    assert all(value for key, value in report["opt_out"].items() if key.endswith("_equal"))
    assert [set(record) for record in report["chat"]] == [{"domain", "question", "experts_off", "experts_on"}] * 2
    assert "expert_own" in report["continuations"][1]
    assert "expert_own" not in report["continuations"][0]
    assert "## Chat" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"owners": ("math", "poetry")}, "no text for owner"),
        ({"owners": ("math", "math")}, "distinct"),
        ({"owners": ("math",)}, "two owners"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_invalid_settings_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemoSettings.of(**arguments)


def test_only_an_owner_can_opt_out() -> None:
    with pytest.raises(ValueError, match="no owner"):
        replace(tiny_settings(), opt_out="cpp")
