"""The work folder of a run: what it must share with an earlier one, and damaged checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flexmoe.training.resume import (
    COMPLETE,
    ROWS_FILE,
    RUN_FILE,
    check_checkpoint,
    identify,
    last_checkpoint,
    load_rows,
    open_work_folder,
    save_rows,
    seal_checkpoint,
)

IDENTITY = {"name": "math", "settings": {"seed": 0}}


def checkpoint(work: Path, step: int) -> Path:
    folder = work / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trained.safetensors").write_bytes(bytes(range(200)))
    (folder / "optimizer.pt").write_bytes(b"moments" * 30)
    seal_checkpoint(folder)
    return folder


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The folder of an interrupted run with checkpoints 2 and 4."""
    open_work_folder(tmp_path / "work", IDENTITY, {}, resume=True, main=True)
    for step in (2, 4):
        checkpoint(tmp_path / "work", step)
    return tmp_path / "work"


def resume(work: Path, identity: dict = IDENTITY, *, main: bool = True, defaults: dict | None = None) -> None:
    open_work_folder(work, identity, defaults or {}, resume=True, main=main)


def test_only_the_main_process_opens_the_work_folder(tmp_path):
    work = tmp_path / "work"
    with pytest.raises(FileNotFoundError, match="one file system"):
        resume(work, main=False)
    assert not work.exists()
    open_work_folder(work, IDENTITY, {}, resume=False, main=True)
    (work / "checkpoint-3").mkdir()
    (work / ROWS_FILE).touch()
    for again in (True, False):
        open_work_folder(work, IDENTITY, {}, again, main=False)
        assert {path.name for path in work.iterdir()} == {RUN_FILE, ROWS_FILE, "checkpoint-3"}
    with pytest.raises(ValueError, match=r"other values of: settings\.seed"):
        resume(work, {**IDENTITY, "settings": {"seed": 1}}, main=False)
    resume(work)
    assert {path.name for path in work.iterdir()} == {RUN_FILE, ROWS_FILE}, "the unfinished checkpoint is dropped"


@pytest.mark.parametrize("content", ['{"name": "ma', "", "[]", '{"name": "math"}'])
def test_a_run_with_a_damaged_record(tmp_path, content):
    work = tmp_path / "work"
    work.mkdir()
    (work / RUN_FILE).write_text(content)
    (work / ROWS_FILE).touch()
    resume(work)
    assert json.loads((work / RUN_FILE).read_text()) == IDENTITY
    assert [path.name for path in work.iterdir()] == [RUN_FILE], "without a checkpoint, it starts over"
    kept = checkpoint(work, 2)
    (work / RUN_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"nothing tells whether checkpoint-2 belongs to this run.*--no-resume"):
        resume(work)
    assert kept.is_dir(), "hours of work were deleted"
    open_work_folder(work, IDENTITY, {}, resume=False, main=True)
    assert not kept.exists()


def test_the_last_whole_checkpoint_is_kept(work):
    (work / "checkpoint-6").mkdir()
    resume(work)
    assert sorted(path.name for path in work.glob("checkpoint-*")) == ["checkpoint-4"]


@pytest.mark.promise(
    "`train`",
    "resuming from a checkpoint with a file that is missing, cut off or changed",
    "refused with the checkpoint to resume from",
)
@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda folder: (folder / "optimizer.pt").write_bytes(b"moments" * 29), r"optimizer\.pt \(203 bytes\) is not"),
        (lambda folder: flip(folder / "trained.safetensors"), r"trained\.safetensors \(200 bytes\) is not what was"),
        (lambda folder: (folder / COMPLETE).write_text(""), "its file 'complete' cannot be read"),
        (lambda folder: (folder / COMPLETE).write_text("[]"), "its file 'complete' cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_refused(work, damage, fault):
    damage(work / "checkpoint-4")
    with pytest.raises(ValueError, match=rf"checkpoint-4 is damaged: {fault}.* to resume from checkpoint-2, or"):
        resume(work)
    assert (work / "checkpoint-2").is_dir(), "the whole one was deleted"
    damage(work / "checkpoint-2")
    with pytest.raises(ValueError, match="to start from step 0"):
        check_checkpoint(work / "checkpoint-4")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_the_newest_checkpoint_is_chosen_by_number(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (9, 100, 20):
        checkpoint(tmp_path, step)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name in ("model-1", "model-2"):
        save_file({"w": torch.arange(8.0)}, folder / f"{name}.safetensors")
    return folder


def identity(model: Path, *, main: bool = True, **changes) -> dict:
    given = {"name": "math", "text": "t", "tokens": "i", "processes": 1, "settings": {"seed": 0}, **changes}
    return identify(model, main=main, **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "j"}, r"tokenizer \(the tokenizer, which reads other tokens in the same documents\)\. Give"),
        ({"text": "u", "tokens": "j"}, r"of: text \(the documents\)\. Give the same command, with the same files"),
        ({"settings": {"seed": 1}, "processes": 2}, r"of: settings\.seed, processes\. "),
    ],
)
def test_changes_are_named(work, model, changes, message):
    open_work_folder(work, identity(model), {}, resume=False, main=True)
    resume(work, identity(model))
    with pytest.raises(ValueError, match=message):
        resume(work, identity(model, **changes))


def test_changed_weights_are_noticed(work, model):
    open_work_folder(work, identity(model), {}, resume=False, main=True)
    flip(model / "model-2.safetensors")
    resume(work, identity(model, main=False), main=False)  # reads no weights: the main process does
    with pytest.raises(ValueError, match=r"weights \(the model's weights\)"):
        resume(work, identity(model))
    (model / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(ValueError, match=r"model \(the model's configuration\), weights"):
        resume(work, identity(model))


def test_settings_of_an_older_version_are_its_defaults(work):
    newer = {**IDENTITY, "settings": {"seed": 0, "added": 1}}
    resume(work, newer, defaults={"added": 1})
    with pytest.raises(ValueError, match=r"settings\.added"):
        resume(work, newer, defaults={"added": 2})


def test_damaged_rows_are_refused(tmp_path):
    rows = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.zeros(2)}
    file = tmp_path / ROWS_FILE
    save_rows(file, rows)
    assert all(torch.equal(value, rows[name]) for name, value in load_rows(file).items())
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[-3] ^= 1
    for content in (changed, whole[:-4], b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"router_rows\.safetensors are damaged.*--no-resume"):
            load_rows(file)
