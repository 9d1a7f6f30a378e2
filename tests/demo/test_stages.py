"""Stages run again exactly when what they depend on has changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexmoe.demo.stages import RECORD, Stage, Stages, folder_digest, source_digest

CODE = ["flexmoe.demo.stages"]


class Counter:
    """The work of a stage; counts how often it runs."""

    def __init__(self, text: str = "result") -> None:
        self.times = 0
        self.text = text

    def __call__(self, folder: Path) -> None:
        self.times += 1
        (folder / "file").write_text(self.text)


def run(root: Path, work: Counter, *, size: int = 1, inputs: tuple[Stage, ...] = (), name: str = "stage") -> Stage:
    return Stages(root).run(name, work, settings={"size": size}, code=CODE, inputs=inputs)


def test_stage_is_reused_unless_its_settings_change(tmp_path: Path) -> None:
    work = Counter()
    assert not run(tmp_path, work).reused
    assert run(tmp_path, work).reused
    assert not run(tmp_path, work, size=2).reused
    assert work.times == 2


@pytest.mark.parametrize("damage", ["edit", "delete", "add", "unfinished"])
def test_modified_folder_is_made_again(tmp_path: Path, damage: str) -> None:
    work = Counter()
    folder = run(tmp_path, work).folder
    if damage == "edit":
        (folder / "file").write_text("resulT")
    elif damage == "delete":
        (folder / "file").unlink()
    elif damage == "add":
        (folder / "more").write_text("")
    else:
        (folder / RECORD).unlink()
    assert not run(tmp_path, work).reused
    assert (folder / "file").read_text() == "result"
    assert not (folder / "more").exists()


def test_failed_stage_is_not_reused(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        Stages(tmp_path).run("stage", fail, settings={"size": 1}, code=CODE)
    assert not run(tmp_path, Counter()).reused


def test_stage_runs_again_if_the_result_of_an_input_changes(tmp_path: Path) -> None:
    downstream = Counter("downstream")
    run(tmp_path, downstream, inputs=(run(tmp_path, Counter("a"), size=1, name="upstream"),), name="downstream")
    same = run(tmp_path, Counter("a"), size=2, name="upstream")
    assert not same.reused
    assert run(tmp_path, downstream, inputs=(same,), name="downstream").reused
    other = run(tmp_path, Counter("b"), size=3, name="upstream")
    assert not run(tmp_path, downstream, inputs=(other,), name="downstream").reused


def test_digests_depend_on_names_contents_and_source(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = folder_digest(tmp_path)
    (tmp_path / ".hidden").write_text("2")
    assert folder_digest(tmp_path) == first
    (tmp_path / "a").rename(tmp_path / "b")
    assert folder_digest(tmp_path) != first
    assert source_digest("flexmoe.demo.stages") != source_digest("flexmoe.demo.corpus")
    with pytest.raises(ValueError, match="no module"):
        source_digest("flexmoe.no_such_module")


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="new or empty folder"):
        run(tmp_path, Counter())
    assert (tmp_path / "stage" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("exists", [True, False])
def test_empty_folder_is_accepted_and_reused(tmp_path: Path, exists: bool) -> None:
    root = tmp_path / "out"
    if exists:
        root.mkdir()
    run(root, Counter())
    (root / "report.json").write_text("{}")  # the caller writes beside the stages
    assert run(root, Counter()).reused
    assert not run(root, Counter(), name="other").reused
