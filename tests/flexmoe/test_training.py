"""Training one expert: what is frozen stays, what is killed goes on, what is wrong is said."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexmoe.conversion.graft import graft
from flexmoe.expert_trainer import ExpertTrainer, Mixture
from flexmoe.hidden_states import RowText, collect_states, ffn_inputs, fit_rows
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.modeling.packages_flexmoe import ExpertPackage
from flexmoe.next_token_loss import next_token_loss
from flexmoe.router_rows import row_method
from flexmoe.testing import random_tokens, tiny_anchor, tiny_flexmoe
from flexmoe.training import ROWS_FILE, RUN_FILE, _open_work_folder, train_expert

FAST = {"sequence_length": 32, "batch_size": 5, "max_steps": 8, "router_tokens": 400, "validation_fraction": 0.1}


def write_documents(path: Path, words: str, seed: int) -> Path:
    chance = random.Random(seed)
    documents = [" ".join(chance.choices(words.split(), k=40)) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """grafted/ (an OLMo-2 anchor that reads letters), bf16/ (the same, stored so), own.jsonl and public.jsonl."""
    root = tmp_path_factory.mktemp("workshop")
    letters = {
        letter: i for i, letter in enumerate(["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz0123456789+= "])
    }
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    own = write_documents(root / "own.jsonl", "1 + 2 = 3 47 = 29 sum", seed=1)
    public = write_documents(root / "public.jsonl", "the sun rises in the east and 1 or 2 set", seed=2)
    for name, dtype in (("grafted", torch.float32), ("bf16", torch.bfloat16)):
        anchor = root / f"{name}-anchor"
        tiny_anchor("olmo2").to(dtype).save_pretrained(anchor)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(anchor)
        graft(anchor, root / name, public_data=[public])
    assert own.is_file()
    return root


def train(workshop: Path, out: Path, model: str = "grafted", **overrides) -> Path:
    return train_expert(
        workshop / model, "math", [workshop / "own.jsonl"], out, progress=False, **{**FAST, **overrides}
    )


def composed_with(workshop: Path, package: Path) -> FlexMoeForCausalLM:
    model = FlexMoeForCausalLM.from_pretrained(workshop / "grafted")
    model.add_expert(package)
    return model


def weights(package: Path) -> dict[str, torch.Tensor]:
    return load_file(package / "expert.safetensors")


def test_expert_learns_and_its_manifest_says_what_was_done(workshop, tmp_path):
    package = train(workshop, tmp_path / "math", max_steps=30, learning_rate=1e-2, license="CC0-1.0")
    report = ExpertPackage.open(package).manifest.training
    losses = report["validation_loss"]
    assert losses["own"]["after"] < losses["own"]["before"] - 0.2
    assert report["tokens"] == 30 * 5 * 32
    assert report["public_tokens"] == report["tokens"] * 2 // 5
    assert report["config"]["router"] == "log_odds"
    assert not list(tmp_path.glob(".*")), "the work folder is left behind"

    for block in composed_with(workshop, package).flexmoe_blocks():
        assert not torch.equal(block.experts["math"].up_proj.weight, block.experts["public"].up_proj.weight)
        assert block.router["math"].weight.abs().sum() > 0
        assert block.router["math"].bias.item() == 0.0


@pytest.mark.parametrize(
    ("router", "bias", "moving"),
    [
        ("log_odds", True, ("experts.math.",)),
        ("random", False, ("experts.math.", "router.math.weight")),
        ("random", True, ("experts.math.", "router.math.weight", "router.math.bias")),
    ],
)
def test_only_the_own_part_of_the_model_in_training_moves(workshop, tmp_path, monkeypatch, router, bias, moving):
    """The very model that the trainer steps on, before and after: all of the rest keeps its bits."""
    states = {}

    def train_watched(self, *args, **kwargs):
        states["before"] = {name: value.clone() for name, value in self.model.state_dict().items()}
        result = original(self, *args, **kwargs)
        states["after"] = {name: value.clone() for name, value in self.model.state_dict().items()}
        return result

    original = ExpertTrainer.train
    monkeypatch.setattr(ExpertTrainer, "train", train_watched)
    package = train(workshop, tmp_path / "math", router=router, router_bias=bias)
    before, after = states["before"], states["after"]
    assert before.keys() == after.keys()
    for name, value in before.items():
        moves = any(f".mlp.{part}" in name for part in moving)
        assert torch.equal(value, after[name]) != moves, name
    trained = composed_with(workshop, package).state_dict()
    assert before.keys() == trained.keys()
    for name, value in after.items():
        assert torch.equal(value, trained[name]), name


def test_the_first_validation_is_of_the_untrained_expert_even_beside_an_old_run(workshop, tmp_path, monkeypatch):
    fresh = train(workshop, tmp_path / "fresh")
    with monkeypatch.context() as patch:
        stop_after(patch, step=4)
        with pytest.raises(KeyboardInterrupt):
            train(workshop, tmp_path / "math", save_steps=4)
    anew = train(workshop, tmp_path / "math", resume=False)
    losses = [ExpertPackage.open(package).manifest.training["validation_loss"] for package in (fresh, anew)]
    assert losses[0] == losses[1]
    assert losses[1]["own"]["before"] != losses[1]["own"]["after"]


def test_inputs_are_never_overwritten(workshop, tmp_path):
    own = tmp_path / "mine" / "own.jsonl"
    own.parent.mkdir()
    shutil.copyfile(workshop / "own.jsonl", own)
    grafted = shutil.copytree(workshop / "grafted", tmp_path / "model")
    embedder = tmp_path / "embedder"
    embedder.mkdir()
    for out, options in (
        (own.parent, {}),
        (grafted, {}),
        (tmp_path, {}),
        (own.parent, {"data": [workshop / "own.jsonl"], "public_data": [own]}),
        (embedder, {"data": [workshop / "own.jsonl"], "router": "embedding", "embedder": str(embedder)}),
    ):
        data = options.pop("data", [own])
        with pytest.raises(ValueError, match="which is read"):
            train_expert(grafted, "math", data, out, overwrite=True, progress=False, **{**FAST, **options})
    assert own.is_file()
    assert (grafted / "config.json").is_file()


def test_only_the_main_process_opens_the_work_folder(tmp_path):
    work, identity = tmp_path / "work", {"name": "math", "settings": {"seed": 0}}
    with pytest.raises(FileNotFoundError, match="one file system"):
        _open_work_folder(work, identity, resume=True, main=False)
    assert not work.exists()
    _open_work_folder(work, identity, resume=False, main=True)
    (work / "checkpoint-3").mkdir()
    (work / ROWS_FILE).touch()
    for resume in (True, False):
        _open_work_folder(work, identity, resume, main=False)
        assert {path.name for path in work.iterdir()} == {RUN_FILE, ROWS_FILE, "checkpoint-3"}
    with pytest.raises(ValueError, match=r"other values of: settings\.seed"):
        _open_work_folder(work, {**identity, "settings": {"seed": 1}}, resume=True, main=False)
    _open_work_folder(work, identity, resume=True, main=True)
    assert {path.name for path in work.iterdir()} == {RUN_FILE, ROWS_FILE}, "the unfinished checkpoint is dropped"


@pytest.mark.parametrize("content", ['{"name": "ma', "", "[]", '{"name": "math"}'])
def test_a_run_whose_record_was_cut_short_begins_anew(tmp_path, content):
    work, identity = tmp_path / "work", {"name": "math", "settings": {"seed": 0}}
    work.mkdir()
    (work / RUN_FILE).write_text(content)
    (work / ROWS_FILE).touch()
    _open_work_folder(work, identity, resume=True, main=True)
    assert json.loads((work / RUN_FILE).read_text()) == identity
    assert [path.name for path in work.iterdir()] == [RUN_FILE]


def test_one_public_document_is_enough_and_errors_name_the_side(workshop, tmp_path):
    one = tmp_path / "one.txt"
    one.write_text("the sun rises in the east and sets in the west " * 10)
    package = train(workshop, tmp_path / "math", public_data=[one], max_steps=1)
    assert list(ExpertPackage.open(package).manifest.training["validation_loss"]) == ["own"]
    with pytest.raises(ValueError, match=r"The own text: 1 distinct document"):
        train_expert(workshop / "grafted", "math", [one], tmp_path / "other", progress=False, **FAST)


def test_sequences_are_as_long_as_the_anchor_takes_unless_it_is_said(workshop, tmp_path):
    package = train(workshop, tmp_path / "math", sequence_length=None, max_steps=1, validation_fraction=0)
    report = ExpertPackage.open(package).manifest.training
    assert report["config"]["sequence_length"] == 128
    assert report["tokens"] == 5 * 128


def test_only_the_own_part_has_gradients_and_optimiser_state(workshop, tmp_path, monkeypatch):
    """Stopped after the checkpoint of step 4, everything that a checkpoint holds belongs to math."""
    stop_after(monkeypatch, step=4)
    with pytest.raises(KeyboardInterrupt):
        train(workshop, tmp_path / "math", save_steps=4)
    checkpoint = tmp_path / ".math.training" / "checkpoint-4"
    saved = load_file(checkpoint / "trained.safetensors")
    assert {name.split(".mlp.")[1] for name in saved} == {
        f"experts.math.{p}_proj.weight" for p in ("gate", "up", "down")
    }
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert sum(entry["exp_avg"].numel() for entry in state.values()) == sum(value.numel() for value in saved.values())
    assert not list(checkpoint.glob("model*.safetensors"))


@pytest.mark.parametrize(("router", "bias"), [("hidden_mean", True), ("random", False)])
def test_rows_trained_by_the_loss_move(workshop, tmp_path, router, bias):
    last, first = (
        train(workshop, tmp_path / f"{steps}", router=router, router_bias=bias, public_ratio=0, max_steps=steps)
        for steps in (9, 1)
    )
    row, bias_name = "layers.1.router.weight", "layers.1.router.bias"
    assert not torch.equal(weights(last)[row], weights(first)[row])
    assert (weights(last)[bias_name].item() != 0) == bias


def test_fitted_rows_do_not_move(workshop, tmp_path):
    last, first = (train(workshop, tmp_path / f"{steps}", router_bias=True, max_steps=steps) for steps in (6, 1))
    for key in ("weight", "bias"):
        assert torch.equal(weights(last)[f"layers.0.router.{key}"], weights(first)[f"layers.0.router.{key}"])
    assert weights(first)["layers.0.router.bias"].item() != 0


@pytest.mark.parametrize(("model", "dtype"), [("grafted", torch.float32), ("bf16", torch.bfloat16)])
def test_a_low_rank_expert_learns_and_is_small(workshop, tmp_path, model, dtype):
    options = {"method": "low_rank", "rank": 4, "alpha": 8.0, "max_steps": 30, "learning_rate": 1e-2}
    package = ExpertPackage.open(train(workshop, tmp_path / "math", model, **options))
    manifest = package.manifest
    assert (manifest.kind, manifest.rank, manifest.alpha) == ("low_rank", [4, 4], 8.0)
    assert manifest.training["config"]["method"] == "low_rank"
    losses = manifest.training["validation_loss"]
    assert losses["own"]["after"] < losses["own"]["before"] - 0.2
    tensors = {name: tensor for name, tensor in package.tensors() if ".ffn." in name}
    assert sum(tensor.numel() for tensor in tensors.values()) == 2 * 3 * 4 * (32 + 64)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    grown = FlexMoeForCausalLM.from_pretrained(workshop / model)
    grown.add_expert(package)
    assert grown.config.expert_records[1]["rank"] == [4, 4]


def test_a_low_rank_run_that_was_stopped_ends_with_the_same_bits(workshop, tmp_path, monkeypatch):
    options = {"method": "low_rank", "rank": 2, "save_steps": 2}
    whole = train(workshop, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train(workshop, tmp_path / "stopped", **options)
    stopped = train(workshop, tmp_path / "stopped", **options)
    one, other = weights(whole), weights(stopped)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"method": "lora"}, "must be 'full' or 'low_rank'"),
        ({"rank": 4}, "they are for method='low_rank'"),
        ({"method": "low_rank", "rank": 0}, "must be more than 0"),
        ({"method": "low_rank", "rank": 33}, "more than the anchor's hidden size, 32"),
        ({"method": "low_rank"}, "rank=64 is more than the anchor's hidden size"),
    ],
)
def test_ranks_that_make_no_sense(workshop, tmp_path, options, fault):
    with pytest.raises(ValueError, match=fault):
        train(workshop, tmp_path / "math", **options)
    assert not (tmp_path / "math").exists()


def test_bfloat16_anchor_keeps_its_dtype(workshop, tmp_path):
    package = train(workshop, tmp_path / "math", model="bf16", max_steps=30, learning_rate=1e-2)
    assert weights(package)["layers.0.ffn.up_proj.weight"].dtype == torch.bfloat16
    assert weights(package)["layers.0.router.weight"].dtype == torch.float32
    losses = ExpertPackage.open(package).manifest.training["validation_loss"]["own"]
    assert losses["after"] < losses["before"] - 0.2


def test_accumulated_and_recomputed_batches_are_one_batch(workshop, tmp_path):
    whole = train(workshop, tmp_path / "whole", batch_size=10)
    halves = train(
        workshop,
        tmp_path / "halves",
        batch_size=5,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
    )
    for name, value in weights(whole).items():
        # Adam divides small gradients by their own size, so rounding shows; a wrong mean would show at 1e-2
        assert torch.allclose(value, weights(halves)[name], atol=2e-4), name


def test_resume_after_kill_gives_the_same_bits(workshop, tmp_path):
    """A process of its own is killed (SIGKILL) after its checkpoint of step 4, with another half-written."""
    whole = train(workshop, tmp_path / "whole", max_steps=12, save_steps=4, router="random", router_bias=True)
    script = (
        "import sys, time, pathlib\nfrom transformers import TrainerCallback\n"
        "from flexmoe import expert_trainer, training\n"
        "class Hang(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **_):\n"
        "        if state.global_step == 7: time.sleep(600)\n"
        "init = expert_trainer.ExpertTrainer.__init__\n"
        "def patched(self, *a, **k): init(self, *a, **k); self.add_callback(Hang)\n"
        "expert_trainer.ExpertTrainer.__init__ = patched\n"
        "root, out = map(pathlib.Path, sys.argv[1:])\n"
        f"training.train_expert(root / 'grafted', 'math', [root / 'own.jsonl'], out, progress=False, **{FAST!r} | "
        "dict(max_steps=12, save_steps=4, router='random', router_bias=True))\n"
    )
    work = tmp_path / ".math.training"
    process = subprocess.Popen([sys.executable, "-c", script, str(workshop), str(tmp_path / "math")])
    try:
        deadline = time.monotonic() + 60
        while not (work / "checkpoint-4" / "complete").exists():
            assert process.poll() is None, "the run ended by itself"
            assert time.monotonic() < deadline, "no checkpoint came"
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "math").exists()
    (work / "checkpoint-8").mkdir()  # as if killed while writing it
    (work / "checkpoint-8" / "trainer_state.json").write_text("{")

    with pytest.raises(ValueError, match=r"with other values of: settings\.seed"):
        train(workshop, tmp_path / "math", max_steps=12, save_steps=4, router="random", router_bias=True, seed=1)
    resumed = train(workshop, tmp_path / "math", max_steps=12, save_steps=4, router="random", router_bias=True)
    assert weights(resumed).keys() == weights(whole).keys()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    manifests = [ExpertPackage.open(package).manifest.training for package in (whole, resumed)]
    assert manifests[0] == manifests[1]


def test_a_loss_that_is_no_number_stops(workshop, tmp_path):
    with pytest.raises(
        ValueError, match=r"loss is (nan|inf) at step [2-8] of 8\. .*Lower the learning rate \(it is 1e\+30\)"
    ):
        train(workshop, tmp_path / "math", learning_rate=1e30, warmup_steps=0)
    assert not (tmp_path / "math").exists()
    train(workshop, tmp_path / "math", resume=False)


def test_errors_say_what_to_do(workshop, tmp_path):
    out = tmp_path / "math"
    own = [workshop / "own.jsonl"]
    with pytest.raises(ValueError, match="'public' is taken"):
        train_expert(workshop / "grafted", "public", own, out)
    with pytest.raises(TypeError, match="a list of them"):
        train_expert(workshop / "grafted", "math", own[0], out)
    with pytest.raises(ValueError, match=r"no column 'body'\. Its columns: text"):
        train(workshop, out, text_column="body")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="empty data set"):
        train_expert(workshop / "grafted", "math", [tmp_path / "empty.txt"], out, **FAST)
    (tmp_path / "short.txt").write_text("1 + 1 = 2")
    with pytest.raises(ValueError, match=r"own training text .* with 10 tokens in all: less than one sequence of 32"):
        train_expert(workshop / "grafted", "math", [tmp_path / "short.txt"], out, **{**FAST, "validation_fraction": 0})
    with pytest.raises(ValueError, match="at most 128 tokens"):
        train(workshop, out, sequence_length=256)
    with pytest.raises(ValueError, match="no such way"):
        train(workshop, out, router="kmeans")
    with pytest.raises(ValueError, match="give one of them"):
        train(workshop, out, epochs=1)
    with pytest.raises(ValueError, match="flexmoe graft"):
        train(workshop, out, model="grafted-anchor")
    tampered = tmp_path / "tampered"
    tampered.mkdir()
    for file in (workshop / "grafted").iterdir():
        (tampered / file.name).write_bytes(file.read_bytes() + (b"\n" if file.suffix == ".jsonl" else b""))
    with pytest.raises(ValueError, match="the file was changed"):
        train_expert(tampered, "math", own, out, **FAST)
    out.mkdir()
    with pytest.raises(FileExistsError, match="overwrite"):
        train(workshop, out)
    assert not (tmp_path / ".math.training").exists()


def test_mixture_keeps_its_quota_and_passes_through_all():
    own, public = torch.arange(7)[:, None], 100 + torch.arange(5)[:, None]
    mixture = Mixture(own, public, public_ratio=0.4, length=50, seed=3)
    seen = torch.stack([mixture[i]["input_ids"] for i in range(50)]).flatten()
    for start in range(46):
        assert (seen[start : start + 5] >= 100).sum() == 2
    assert seen[seen < 100][:28].bincount().tolist() == [4] * 7
    assert (seen[seen >= 100] - 100).bincount().tolist() == [4] * 5
    again = Mixture(own, public, public_ratio=0.4, length=50, seed=3)
    assert all(torch.equal(mixture[i]["input_ids"], again[i]["input_ids"]) for i in range(50))
    alone = Mixture(own, None, public_ratio=0.0, length=14, seed=3)
    assert sorted(int(alone[i]["input_ids"]) for i in range(14)) == sorted([*range(7)] * 2)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_loss_and_gradient_are_those_of_autograd(z_loss):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, 6, 11, generator=generator)).requires_grad_()
    input_ids = torch.randint(11, (3, 6), generator=generator)
    kept = logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(kept, input_ids[:, 1:].flatten()) + z_loss * kept.logsumexp(-1).square().mean()
    loss = next_token_loss(logits, input_ids, z_loss)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(2 * value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(
        next_token_loss(logits + 1e4, input_ids, 0.0), next_token_loss(logits, input_ids, 0.0), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("family", ["olmo2", "gpt2", "llama"])
def test_states_are_the_dense_anchors_ffn_inputs(family):
    """As hooks on the plain dense model's networks catch them; the FlexMoE has another expert that must not matter."""
    from flexmoe.modeling import find_ffn_sites

    dense, model = tiny_anchor(family), tiny_flexmoe(family, ["math"])
    ids = random_tokens(5, 16)
    expected = []
    for site in find_ffn_sites(dense):
        site.ffn(dense).register_forward_pre_hook(lambda _, args: expected.append(args[0].flatten(0, -2)))
    dense(ids)
    model.train()
    for layers in ([0, 1], [1], [0]):
        states = collect_states(model, ids, layers, tokens=70)
        assert sorted(states) == layers
        for layer in layers:
            torch.testing.assert_close(states[layer], expected[layer][:70])
    assert model.training
    assert all(not block._forward_pre_hooks for block in model.flexmoe_blocks())
    torch.testing.assert_close(next(ffn_inputs(model, ids, [0]))[0], expected[0])


@pytest.mark.parametrize("method", ["log_odds", "lda"])
def test_rows_do_not_depend_on_the_memory_there_is(method):
    model = tiny_flexmoe("llama")
    own, public = (RowText([], random_tokens(40, 32, seed)) for seed in (1, 2))
    rows = [
        fit_rows(model, row_method(method), own, public, tokens=600, bias=True, seed=0, max_bytes=budget)
        for budget in (1, 10**9)
    ]
    assert len(rows[0]) == 2
    for one, other in zip(*rows, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert one.bias == other.bias


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Makes training raise KeyboardInterrupt after the checkpoint of `step`."""
    from flexmoe.expert_trainer import _MarkComplete

    on_save = _MarkComplete.on_save

    def interrupted(self, args, state, control, **kwargs):
        on_save(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(_MarkComplete, "on_save", interrupted)
