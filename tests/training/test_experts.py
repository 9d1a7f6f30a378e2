"""Training one expert: frozen parameters, resumed runs, errors."""

import contextlib
import json
import multiprocessing
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from flexmoe.conversion.graft import graft
from flexmoe.evaluation import evaluate
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.packages.package import ExpertPackage
from flexmoe.routers.evidence import EvidenceSettings
from flexmoe.testing import tiny_anchor
from flexmoe.tokenization import load_tokenizer
from flexmoe.training import experts, next_token_loss, probe
from flexmoe.training.experts import train_expert
from flexmoe.training.fit_router import fit_router
from flexmoe.training.messages import TrainingInterrupted
from flexmoe.training.trainer import ExpertTrainer

pytestmark = pytest.mark.filterwarnings("ignore:The own text is small")

FAST = {"sequence_length": 32, "batch_size": 5, "max_steps": 8, "router_tokens": 400, "validation_fraction": 0.1}


RATE_OF_THE_WORKSHOP = 7.8e-3  # 0.25 / 32


def write_documents(path: Path, words: str, seed: int) -> Path:
    chance = random.Random(seed)
    documents = [" ".join(chance.choices(words.split(), k=40)) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """grafted/ (an OLMo-2 anchor, tokens are letters), bf16/ (the same in bfloat16), own.jsonl, public.jsonl."""
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


def test_expert_learns_and_its_manifest_records_the_training(workshop, tmp_path):
    package = train(workshop, tmp_path / "math", max_steps=30, learning_rate=1e-2, license="CC0-1.0")
    report = ExpertPackage.open(package).manifest.training
    losses = report["validation_loss"]
    assert losses["own"]["after"] < losses["own"]["before"] - 0.2
    assert report["tokens"] == 30 * 5 * 32
    assert report["public_tokens"] == report["tokens"] // 10
    assert report["config"]["router"] == "log_odds"
    assert not list(tmp_path.glob(".*")), "the work folder is left behind"

    for block in composed_with(workshop, package).flexmoe_blocks():
        assert not torch.equal(block.experts["math"].up_proj.weight, block.experts["public"].up_proj.weight)
        assert block.router["math"].weight.abs().sum() > 0
        assert block.router["math"].bias.item() == 0.0


def test_an_expert_has_evidence_unless_it_is_asked_not_to(workshop, tmp_path):
    """Own text has digits, public text has letters: the table says so, and the calibration uses it."""
    package = train(workshop, tmp_path / "math", max_steps=1)
    evidence = ExpertPackage.open(package).manifest.evidence
    assert evidence["tokens"] == 99
    assert evidence["decays"] == list(EvidenceSettings().decays)
    row = composed_with(workshop, package).flexmoe_blocks()[0].router["math"]
    digit, letter = (load_tokenizer(workshop / "grafted").convert_tokens_to_ids(token) for token in "4h")
    assert row.table[digit] > 0 > row.table[letter]
    assert row.calibration[1:-2].sum() > 0
    for number, options in enumerate(({"evidence": "none"}, {"router": "lda"})):
        without = train(workshop, tmp_path / f"without-{number}", max_steps=1, **options)
        assert ExpertPackage.open(without).manifest.evidence is None
        assert not [name for name in weights(without) if name.endswith((".table", ".calibration"))]
    with pytest.raises(ValueError, match="evidence='unigram' is for rows that are fitted"):
        train(workshop, tmp_path / "refused", router="hidden_mean", evidence="unigram")


@pytest.mark.parametrize(
    ("router", "bias", "moving"),
    [
        ("log_odds", True, ("experts.math.",)),
        ("random", False, ("experts.math.", "router.math.weight")),
        ("random", True, ("experts.math.", "router.math.weight", "router.math.bias")),
    ],
)
def test_only_the_experts_parameters_change(workshop, tmp_path, monkeypatch, router, bias, moving):
    """Compares the trained model before and after: all other tensors keep their bits."""
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


def test_the_first_validation_is_of_the_untrained_expert(workshop, tmp_path, monkeypatch):
    fresh = train(workshop, tmp_path / "fresh")
    with monkeypatch.context() as patch:
        stop_after(patch, step=4)
        with pytest.raises(KeyboardInterrupt):
            train(workshop, tmp_path / "math", save_steps=4)
    anew = train(workshop, tmp_path / "math", resume=False)
    losses = [ExpertPackage.open(package).manifest.training["validation_loss"] for package in (fresh, anew)]
    assert losses[0] == losses[1]
    assert losses[1]["own"]["before"] != losses[1]["own"]["after"]


def test_the_expert_of_the_best_validation_is_kept_and_training_stops(workshop, tmp_path, monkeypatch):
    measured = {0: 5.0, 2: 4.0, 4: 3.0, 6: 3.5, 8: 3.2}
    states, shown = {}, []

    def measure(self, *_, **__):
        states[self.state.global_step] = {name: value.clone() for name, value in self.model.state_dict().items()}
        return torch.tensor(measured[self.state.global_step]), None, None

    monkeypatch.setattr(ExpertTrainer, "prediction_step", measure)
    package = train(workshop, tmp_path / "math", max_steps=12, eval_steps=2, patience=2, show=shown.append)
    trained = composed_with(workshop, package).state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in states[4].items())
    assert max(states) == 8
    assert any("no validation since that of step 4 was better" in line for line in shown)
    report = ExpertPackage.open(package).manifest.training
    assert (report["step"], report["tokens"]) == (4, 8 * 5 * 32)
    assert report["validation_loss"]["own"] == {"before": 5.0, "after": 3.0}


def test_an_expert_that_is_no_better_than_public_is_warned_of(workshop, tmp_path, monkeypatch):
    def measure(self, *_, **__):
        return torch.tensor(2.0 if self.state.global_step else 1.0), None, None

    monkeypatch.setattr(ExpertTrainer, "prediction_step", measure)
    with pytest.warns(UserWarning, match=r"no better than public: .* was 1\.0000 before training and is 2\.0000"):
        train(workshop, tmp_path / "math", max_steps=2)


@pytest.mark.parametrize("given", [{}, {"learning_rate": 0.5}])
def test_a_rate_that_is_too_high_is_lowered_or_warned_of(workshop, tmp_path, monkeypatch, given):
    monkeypatch.setattr(probe, "UNUSUAL", 0)
    monkeypatch.setattr(probe, "probe", lambda trainer, rates, work: {rate: max(1.0, 200 * rate) for rate in rates})
    shown: list[str] = []
    expected = "learning_rate=0.5 is too high for this anchor: after 12 steps" if given else None
    with pytest.warns(UserWarning, match=expected) if given else contextlib.nullcontext():
        package = train(workshop, tmp_path / "math", max_steps=2, show=shown.append, **given)
    chosen = RATE_OF_THE_WORKSHOP
    rate = ExpertPackage.open(package).manifest.training["config"]["learning_rate"]
    assert rate == (0.5 if given else chosen / probe.LOWER)
    assert any("is too high for this anchor" in line for line in shown) != bool(given)


def test_a_probe_measures_rates_and_leaves_the_expert_as_it_was(workshop, tmp_path, monkeypatch):
    found: dict[float, float] = {}

    def probed(self, *_, **__):
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        found.update(probe.probe(self, [1e-2, 1e-2, 1e3], tmp_path))
        assert all(torch.equal(value, before[name]) for name, value in self.model.state_dict().items())
        assert not any(value.grad is not None for value in self.model.parameters())
        raise KeyboardInterrupt

    monkeypatch.setattr(ExpertTrainer, "train", probed)
    with pytest.raises(TrainingInterrupted):
        train(workshop, tmp_path / "math")
    assert found[1e-2] < found[1e3], "the same rate gives the same loss, and a far too high one a higher loss"
    assert not list(tmp_path.glob("*.safetensors"))


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


def test_a_single_public_document(workshop, tmp_path):
    one = tmp_path / "one.txt"
    one.write_text("the sun rises in the east and sets in the west " * 10)
    package = train(workshop, tmp_path / "math", public_data=[one], max_steps=1)
    assert list(ExpertPackage.open(package).manifest.training["validation_loss"]) == ["own"]
    with pytest.raises(ValueError, match=r"The own text: 1 distinct document"):
        train_expert(workshop / "grafted", "math", [one], tmp_path / "other", progress=False, **FAST)


def test_default_sequence_length(workshop, tmp_path):
    package = train(workshop, tmp_path / "math", sequence_length=None, max_steps=1, validation_fraction=0)
    report = ExpertPackage.open(package).manifest.training
    assert report["config"]["sequence_length"] == 128
    assert report["tokens"] == 5 * 128


def test_checkpoints_hold_only_the_experts_parameters(workshop, tmp_path, monkeypatch):
    """Interrupted after step 4: the checkpoint's weights and optimiser state belong to math."""
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
def test_rows_trained_by_the_loss_change(workshop, tmp_path, router, bias):
    last, first = (
        train(workshop, tmp_path / f"{steps}", router=router, router_bias=bias, public_ratio=0, max_steps=steps)
        for steps in (9, 1)
    )
    row, bias_name = "layers.1.router.weight", "layers.1.router.bias"
    assert not torch.equal(weights(last)[row], weights(first)[row])
    assert (weights(last)[bias_name].item() != 0) == bias


def test_fitted_rows_do_not_change(workshop, tmp_path):
    last, first = (train(workshop, tmp_path / f"{steps}", router_bias=True, max_steps=steps) for steps in (6, 1))
    for key in ("weight", "bias", "calibration", "table"):
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


def test_a_low_rank_run_starts_from_the_gradient_once(workshop, tmp_path, monkeypatch):
    """Not when it is resumed: the checkpoint has the factors."""
    starts = []
    original = experts.initialize_from_gradient
    monkeypatch.setattr(experts, "initialize_from_gradient", lambda trainer: starts.append(original(trainer)))
    options = {"method": "low_rank", "rank": 2, "save_steps": 2, "max_steps": 3}
    with monkeypatch.context() as patch:
        stop_after(patch, step=2)
        with pytest.raises(KeyboardInterrupt):
            train(workshop, tmp_path / "math", **options)
    assert len(starts) == 1
    train(workshop, tmp_path / "math", **options)
    assert len(starts) == 1
    train(workshop, tmp_path / "full", max_steps=1)
    assert len(starts) == 1


def test_a_resumed_low_rank_run_gives_the_same_bits(workshop, tmp_path, monkeypatch):
    options = {"method": "low_rank", "rank": 2, "save_steps": 2}
    uninterrupted = train(workshop, tmp_path / "uninterrupted", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train(workshop, tmp_path / "stopped", **options)
    stopped = train(workshop, tmp_path / "stopped", **options)
    one, other = weights(uninterrupted), weights(stopped)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"method": "lora"}, "must be 'full' or 'low_rank'"),
        ({"rank": 4}, "only for method='low_rank'"),
        ({"method": "low_rank", "rank": 0}, "must be above 0"),
        ({"method": "low_rank", "rank": 33}, "exceeds the anchor's hidden size, 32"),
    ],
)
def test_invalid_ranks(workshop, tmp_path, options, fault):
    with pytest.raises(ValueError, match=fault):
        train(workshop, tmp_path / "math", **options)
    assert not (tmp_path / "math").exists()


def test_bfloat16_anchor_keeps_its_dtype(workshop, tmp_path):
    package = train(workshop, tmp_path / "math", model="bf16", max_steps=30, learning_rate=1e-2)
    assert weights(package)["layers.0.ffn.up_proj.weight"].dtype == torch.bfloat16
    assert weights(package)["layers.0.router.weight"].dtype == torch.float32
    losses = ExpertPackage.open(package).manifest.training["validation_loss"]["own"]
    assert losses["after"] < losses["before"] - 0.2


@pytest.mark.parametrize("has_instructions", [False, True])
def test_bfloat16_is_computed_in_where_the_cpu_can(workshop, tmp_path, monkeypatch, has_instructions):
    monkeypatch.setattr(experts, "has_instructions", lambda dtype: has_instructions)
    seen = []
    original = ExpertTrainer.train

    def train_watched(self, *args, **kwargs):
        seen.append((self.model.dtype, self.args.bf16))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ExpertTrainer, "train", train_watched)
    shown = []
    package = train(workshop, tmp_path / "math", model="bf16", max_steps=1, show=shown.append)
    assert seen == [(torch.bfloat16, True) if has_instructions else (torch.float32, False)]
    notes = [line for line in shown if "float32" in line]
    assert len(notes) == (0 if has_instructions else 1)
    assert all("this CPU has no instructions" in note and "--dtype bfloat16" in note for note in notes)
    assert weights(package)["layers.0.ffn.up_proj.weight"].dtype == torch.bfloat16
    composed = FlexMoeForCausalLM.from_pretrained(workshop / "bf16")
    composed.add_expert(package)


@pytest.mark.parametrize(("dtype", "stored"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_dtype_that_is_given_is_computed_and_stored_in(workshop, tmp_path, monkeypatch, dtype, stored):
    monkeypatch.setattr(experts, "has_instructions", lambda dtype: False)
    shown = []
    package = train(workshop, tmp_path / "math", model="bf16", max_steps=1, dtype=dtype, show=shown.append)
    assert weights(package)["layers.0.ffn.up_proj.weight"].dtype == stored
    assert not any("no instructions" in line for line in shown)


@pytest.mark.parametrize(("batch", "most", "part"), [(5, 1024, 5), (6, 100, 3), (5, 100, 1), (8, 10, 1)])
def test_a_cpu_takes_a_batch_in_parts(workshop, tmp_path, monkeypatch, batch, most, part):
    monkeypatch.setattr(experts, "CPU_TOKENS", most)
    seen = []
    original = ExpertTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        seen.append(len(inputs["input_ids"]))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ExpertTrainer, "compute_loss", compute_loss)
    train(workshop, tmp_path / "math", max_steps=2, batch_size=batch)
    assert seen == [part] * (2 * batch // part)


def test_parts_of_a_batch_train_the_same_expert(workshop, tmp_path, monkeypatch):
    single = train(workshop, tmp_path / "single", batch_size=6)
    monkeypatch.setattr(experts, "CPU_TOKENS", 64)
    parts = train(workshop, tmp_path / "parts", batch_size=6)
    for name, value in weights(single).items():
        assert torch.allclose(value, weights(parts)[name], atol=2e-4), name


def test_training_has_an_implementation_of_its_own_and_resets_it(workshop, tmp_path, monkeypatch):
    seen = []
    original = ExpertTrainer.training_step

    def training_step(self, *args, **kwargs):
        seen.append(self.model.get_experts_implementation()[""])
        return original(self, *args, **kwargs)

    def save_expert(self, *args, **kwargs):
        seen.append(self.config._experts_implementation)
        return save(self, *args, **kwargs)

    save = FlexMoeForCausalLM.save_expert
    monkeypatch.setattr(ExpertTrainer, "training_step", training_step)
    monkeypatch.setattr(FlexMoeForCausalLM, "save_expert", save_expert)
    package = train(workshop, tmp_path / "math", max_steps=1)
    assert seen[0] == "flexmoe_training"
    assert seen[-1] in (None, "auto")
    assert "flexmoe_training" not in (package / "expert_config.json").read_text()


def test_no_logits_of_a_whole_batch_are_computed(workshop, tmp_path, monkeypatch):
    rows = []
    original = next_token_loss._loss_and_gradient

    def loss_and_gradient(logits, *args):
        rows.append(len(logits))
        return original(logits, *args)

    monkeypatch.setattr(next_token_loss, "_loss_and_gradient", loss_and_gradient)
    monkeypatch.setattr(next_token_loss, "LOGITS", 42 * 99)
    train(workshop, tmp_path / "math", max_steps=1)
    assert rows
    assert max(rows) <= 42


def test_gradient_accumulation_and_checkpointing_change_nothing(workshop, tmp_path):
    single = train(workshop, tmp_path / "single", batch_size=10)
    halves = train(
        workshop,
        tmp_path / "halves",
        batch_size=5,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
    )
    for name, value in weights(single).items():
        # Adam divides small gradients by their own size, which amplifies rounding; a wrong mean would differ by 1e-2
        assert torch.allclose(value, weights(halves)[name], atol=2e-4), name


class HangAfterStep7(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 7:
            time.sleep(600)


def train_until_step_7(workshop: Path, out: Path, **options) -> None:
    init = ExpertTrainer.__init__

    def patched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.add_callback(HangAfterStep7)

    ExpertTrainer.__init__ = patched
    train(workshop, out, **options)


def test_resume_after_kill_gives_the_same_bits(workshop, tmp_path):
    """A separate process is killed (SIGKILL) after its checkpoint of step 4, with another one incomplete."""
    options = {"max_steps": 12, "save_steps": 4, "eval_steps": 3, "router": "random", "router_bias": True}
    uninterrupted = train(workshop, tmp_path / "uninterrupted", **options)
    work = tmp_path / ".math.training"
    # forked, because imports take seconds
    process = multiprocessing.get_context("fork").Process(
        target=train_until_step_7, args=(workshop, tmp_path / "math"), kwargs=options
    )
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not (work / "checkpoint-4" / "complete").exists():
            assert process.is_alive(), "the process ended"
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.05)
    finally:
        process.kill()
        process.join()
    assert not (tmp_path / "math").exists()
    (work / "checkpoint-8").mkdir()  # an incomplete checkpoint
    (work / "checkpoint-8" / "trainer_state.json").write_text("{")

    with pytest.raises(ValueError, match=r"with other values of: settings\.seed"):
        train(workshop, tmp_path / "math", **options, seed=1)
    resumed = train(workshop, tmp_path / "math", **options)
    assert weights(resumed).keys() == weights(uninterrupted).keys()
    for name, value in weights(uninterrupted).items():
        assert torch.equal(value, weights(resumed)[name]), name
    manifests = [ExpertPackage.open(package).manifest.training for package in (uninterrupted, resumed)]
    assert manifests[0] == manifests[1]


@pytest.fixture(scope="module")
def interrupted(workshop, tmp_path_factory) -> Path:
    """A folder with a copy of the model and of the own text, and a run that was interrupted after step 4 of 8."""
    root = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(workshop / "grafted", root / "grafted")
    shutil.copyfile(workshop / "own.jsonl", root / "own.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step=4)
        with pytest.raises(TrainingInterrupted, match=r"after step 4 of 8\. The checkpoint of step 4 is kept in"):
            train(root, root / "math", save_steps=4)
    return root


def change_weights(root: Path) -> None:
    (file,) = (root / "grafted").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def change_tokenizer(root: Path) -> None:
    file = root / "grafted" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    file.write_text(json.dumps(content))


def change_data(root: Path) -> None:
    lines = (root / "own.jsonl").read_text().splitlines(keepends=True)
    (root / "own.jsonl").write_text("".join(lines[:-1]))


def cut_checkpoint(root: Path) -> None:
    file = root / ".math.training" / "checkpoint-4" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.promise(
    "`train`",
    "resuming with another tokenizer, other data or weights, or a damaged checkpoint",
    "refused with the reason",
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_weights, r"of: weights \(the model's weights\)\. Give the same command"),
        (change_tokenizer, r"of: tokenizer \(the tokenizer, which reads other tokens in the same documents\)\."),
        (change_data, r"of: text \(the documents\)\."),
        (cut_checkpoint, r"checkpoint-4 is damaged: optimizer\.pt"),
    ],
)
def test_a_run_is_not_resumed_after_a_change(interrupted, tmp_path, change, message):
    root = shutil.copytree(interrupted, tmp_path / "copy")
    change(root)
    with pytest.raises(ValueError, match=message):
        train(root, root / "math", save_steps=4)
    assert (root / ".math.training" / "checkpoint-4").is_dir()
    assert not (root / "math").exists()


@pytest.mark.promise("`train`", "what will be done", "a summary, the expected duration, the losses in the last line")
def test_the_user_is_told_about_the_run(workshop, tmp_path, capsys, monkeypatch):
    rows = [json.loads(line) for line in (workshop / "own.jsonl").read_text().splitlines()]
    rows = [{"a": row["text"][:10], "b": row["text"][10:]} for row in rows] + [{"a": "x", "b": None}]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines: list[str] = []
    options = {**FAST, "text_template": "{a}{b}", "skip_empty": True, "max_steps": 7, "validation_fraction": 0.05}
    with pytest.warns(UserWarning, match="1 row.s. without text were skipped"):
        train_expert(
            workshop / "grafted", "math", [own], tmp_path / "math", progress=False, show=lines.append, **options
        )
    about = [line.partition(":")[0] for line in lines if not line.startswith("--")]
    assert about == ["Own text", "Public text", "Training", "Expected"]
    assert lines[2].startswith("--public-ratio 0.1 (")
    assert lines[3] == "--learning-rate 0.0078 (0.25 / hidden size 32)"
    assert "60 documents" in lines[0]
    assert "1 row(s) without text" in lines[0]
    assert "text:" not in capsys.readouterr().err
    monkeypatch.setattr("flexmoe.training.messages.MEASURED_STEPS", 1)
    train_expert(workshop / "grafted", "math", [workshop / "own.jsonl"], tmp_path / "other", **FAST)
    shown = capsys.readouterr().err
    assert re.search("Own text: .*\n.*Expected: .*Training math: 100%", shown, re.DOTALL)
    assert shown.splitlines()[-1].startswith("Loss per token on held-out text, before -> after: own ")


@pytest.mark.promise(
    "`train`, `evaluate`", "a text with a token that has no embedding", "refused with the token and the document"
)
def test_tokens_beyond_the_embedding_are_refused_before_training(workshop, tmp_path):
    model = shutil.copytree(workshop / "grafted", tmp_path / "model")
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens([f"<{number}>" for number in range(80)])  # the model has 99 rows
    tokenizer.save_pretrained(model)
    own = tmp_path / "own.txt"
    own.write_text("1 + 1 = 2 <79> and more " * 9)
    message = r"The own text: Document 1 holds the token '<79>' with the id 1\d\d, .* below 99 only"
    with pytest.raises(ValueError, match=message):
        train_expert(model, "math", [own], tmp_path / "math", progress=False, **{**FAST, "validation_fraction": 0})
    with pytest.raises(ValueError, match=r"The text of 'own': Document 1 holds the token '<79>'"):
        evaluate(model, {"own": [own]})


@pytest.mark.filterwarnings("ignore:learning_rate=1e.30 is too high")
def test_training_stops_if_the_loss_is_not_finite(workshop, tmp_path):
    with pytest.raises(
        ValueError, match=r"loss is (nan|inf) at step [2-8] of 8\. .*Lower the learning rate \(it is 1e\+30\)"
    ):
        train(workshop, tmp_path / "math", learning_rate=1e30, warmup_steps=0)
    assert not (tmp_path / "math").exists()
    train(workshop, tmp_path / "math", resume=False)


def test_errors(workshop, tmp_path):
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
    with pytest.raises(ValueError, match="no such router row method"):
        train(workshop, out, router="kmeans")
    with pytest.raises(ValueError, match="give at most one of them"):
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


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Makes training raise KeyboardInterrupt after the checkpoint of `step`."""
    from flexmoe.training.trainer import _MarkComplete

    on_save = _MarkComplete.on_save

    def interrupted(self, args, state, control, **kwargs):
        on_save(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(_MarkComplete, "on_save", interrupted)


class TestFittingTheRouterAgain:
    def test_an_old_expert_gets_what_training_gives(self, workshop, tmp_path):
        """The networks keep their bytes; row, table and calibration are those of training on the same text."""
        old = train(workshop, tmp_path / "old", max_steps=2, evidence="none")
        own = [workshop / "own.jsonl"]
        fitted = fit_router(old, workshop / "grafted", own, tmp_path / "fitted", progress=False, router_tokens=400)
        before, after = weights(old), weights(fitted)
        assert after.keys() - before.keys() == {
            "layers.0.router.table",
            *(f"layers.{layer}.router.calibration" for layer in (0, 1)),
        }
        assert all(torch.equal(before[name], after[name]) for name in before if ".ffn." in name)
        assert not torch.equal(before["layers.0.router.weight"], after["layers.0.router.weight"])
        assert ExpertPackage.open(fitted).manifest.evidence["kind"] == "unigram"
        composed_with(workshop, fitted)
        without = fit_router(fitted, workshop / "grafted", own, tmp_path / "without", progress=False, evidence="none")
        assert ExpertPackage.open(without).manifest.evidence is None
        assert weights(without).keys() == before.keys()

    def test_refusals(self, workshop, tmp_path):
        package = train(workshop, tmp_path / "math", max_steps=1)
        arguments = (workshop / "grafted", [workshop / "own.jsonl"], tmp_path / "out")
        with pytest.raises(ValueError, match="rows are trained by the loss"):
            fit_router(package, *arguments, router="hidden_mean")
        with pytest.raises(FileExistsError):
            fit_router(package, workshop / "grafted", [workshop / "own.jsonl"], package)
        with pytest.raises(ValueError, match="made for another anchor"):
            fit_router(package, workshop / "bf16", [workshop / "own.jsonl"], tmp_path / "out")
        assert not (tmp_path / "out").exists()
