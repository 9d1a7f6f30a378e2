"""Training one expert, alone, where its data is: text files in, an expert package out.

The model is a two-expert one: "public" (the anchor's own networks) and the owner's copy of them. In order:

    1. text       own and public documents, split by document, then packed into sequences
    2. row        the router row, fitted on the frozen anchor's states (`flexmoe.router_rows`)
    3. networks   the owner's networks learn through that row, with public text replayed; all else is frozen
    4. package    networks and row, with what there is to know about how they were made

Nothing but the package leaves the owner. A run that is killed goes on where it was when the same command is given
again.

Source: FlexOlmo, arXiv 2507.07024, for the two-expert objective; rows by log-odds and public replay are FlexMoE's own.
An expert is a network like public's, or a low-rank one, which learns nothing but its difference from public. NOT
covered: the loop itself (`flexmoe.expert_trainer`), models that need sharding to train.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments

from flexmoe.data import (
    LONGEST_SEQUENCE,
    data_paths,
    pack,
    read_documents,
    read_public_sample,
    split_documents,
)
from flexmoe.expert_trainer import EXPERTS_PER_TOKEN, ExpertTrainer, Mixture, Sequences, last_checkpoint
from flexmoe.hidden_states import RowText, fit_rows
from flexmoe.modeling import PUBLIC, FlexMoeConfig, FlexMoeForCausalLM, check_expert_name
from flexmoe.modeling.compat_flexmoe import enable_activation_checkpointing
from flexmoe.modeling.folders_flexmoe import check_apart, check_new_folder
from flexmoe.modeling.hub_flexmoe import resolve_folder
from flexmoe.modeling.quantization_flexmoe import check_unquantized
from flexmoe.router_rows import RowMethod, row_method

ROWS_FILE = "router_rows.safetensors"
RUN_FILE = "run.json"
LOW_RANK = 64  # of low-rank experts, unless a run asks for another


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How an expert is trained. The defaults are the recipe that the demo shows.

    The paper's recipe is `router="hidden_mean"` (or "embedding"), `router_bias=True`, `public_ratio=0`.
    """

    method: Literal["full", "low_rank"] = "full"
    """What is trained: copies of public's networks, or low-rank differences from them."""
    rank: int | None = None
    """Of a low-rank expert, in every layer; None: `LOW_RANK`."""
    alpha: float | None = None
    """Of a low-rank expert: its differences are scaled by `alpha / rank`; None: by 1."""
    router: str = "log_odds"
    """Name in `ROUTER_ROWS`. Rows of log_odds and lda are fitted and then frozen, others are trained by the loss."""
    router_bias: bool = False
    router_tokens: int = 40_000
    """Tokens of own text, and as many of public text, that a row is fitted on."""
    embedder: str | None = None
    """A sentence-transformers model, for router="embedding"."""
    public_ratio: float = 0.4
    """Share of public sequences in what is trained on."""
    sequence_length: int | None = None
    """Tokens; None: `LONGEST_SEQUENCE`, or what the anchor takes if that is less."""
    batch_size: int = 8
    """Sequences per process and forward pass."""
    gradient_accumulation_steps: int = 1
    max_steps: int | None = None
    epochs: float | None = None
    """Passes over the own text; 1 if `max_steps` is not given either."""
    learning_rate: float = 2e-3
    warmup_steps: int | None = None
    """None: a twentieth of the steps."""
    lm_z_loss: float = 1e-5
    router_z_loss: float = 1e-3
    """Only where rows are trained: a frozen row has nothing to learn from it."""
    validation_fraction: float = 0.05
    """Share of the documents that is held back, of own text and of public text."""
    validation_tokens: int = 20_000
    """Of each side, at most."""
    eval_steps: int | None = None
    """Validate every so many steps; before and after training in any case."""
    save_steps: int = 100
    seed: int = 0
    text_column: str = "text"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen model; "auto": as stored. What is trained is float32, cast where it is used under bfloat16."""
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        row_method(self.router)
        positive = ("router_tokens", "batch_size", "gradient_accumulation_steps", "learning_rate", "validation_tokens")
        for field in (*positive, "max_steps", "epochs", "eval_steps", "save_steps", "rank", "alpha"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(f"{field}={value}: must be more than 0.")
        for field in ("public_ratio", "validation_fraction"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 0 and less than 1.")
        if self.method not in ("full", "low_rank"):
            raise ValueError(f"method={self.method!r}: must be 'full' or 'low_rank'.")
        if self.method == "full" and (self.rank, self.alpha) != (None, None):
            raise ValueError(f"rank={self.rank}, alpha={self.alpha}: they are for method='low_rank'.")
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError(f"max_steps={self.max_steps} and epochs={self.epochs}: give one of them.")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}: must be 'auto', 'float32' or 'bfloat16'.")


def train_expert(
    grafted: str | Path,
    name: str,
    data: Sequence[str | Path],
    out: str | Path,
    *,
    public_data: Sequence[str | Path] | None = None,
    settings: TrainingSettings | None = None,
    license: str | None = None,
    data_statement: str | None = None,
    version: str = "1.0.0",
    overwrite: bool = False,
    resume: bool = True,
    progress: bool = True,
    **overrides: Any,
) -> Path:
    """Trains the expert `name` on an owner's text and writes it as a package; returns the package's folder.

    Args:
        grafted: folder or Hub id of a model that `flexmoe graft` wrote.
        data: the owner's files (see `read_documents`).
        out: the package's folder. Beside it, `.<name of out>.training` holds checkpoints until the package is there.
        public_data: public text; by default the sample that the graft keeps.
        license, data_statement, version: what the package says about itself.
        resume: go on from the last checkpoint of the same command; False begins anew.
        progress: a progress bar on stderr.
        overrides: fields of `TrainingSettings`, on top of `settings`.

    Raises:
        FileExistsError: `out` is there. FileNotFoundError: no such model or file.
        ValueError: a taken name, no text or too little, no public text where it is needed, an `out` that is or holds
            what is read, or checkpoints beside `out` that are those of another command. TrainingDivergedError, one of
            them: the loss is no number any more.
    """
    settings = replace(settings or TrainingSettings(), **overrides)
    out = check_new_folder(out, overwrite)
    folder = resolve_folder(grafted).path
    work = out.parent / f".{out.name}.training"
    read = [folder, *data_paths(data), *([] if public_data is None else data_paths(public_data))]
    for written in (out, work):
        check_apart(written, *read, *filter(None, [settings.embedder]))
    config = _checked_config(folder, name)
    settings = replace(
        settings,
        sequence_length=_sequence_length(config, settings.sequence_length),
        rank=_rank(config, settings),
    )
    text = _read_text(folder, config, data, public_data, settings)

    arguments = _training_arguments(work, text, config, settings, progress)
    with arguments.main_process_first(local=False, desc="preparing the run"):
        identity = _identity(folder, name, text, arguments, settings)
        _open_work_folder(work, identity, resume, main=arguments.process_index == 0)
    checkpoint = last_checkpoint(work)
    arguments.eval_on_start = bool(text.validation) and checkpoint is None
    model = _two_expert_model(folder, name, config, text, arguments, settings)
    trainer = _trainer(model, text, arguments, settings)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    report = _report(trainer, text, settings)
    if trainer.is_world_process_zero():
        for block in model.flexmoe_blocks():
            block.experts[name].to(next(block.experts[PUBLIC].parameters()).dtype)
        papers = {"license": license, "data_statement": data_statement, "version": version, "training": report}
        model.save_expert(name, out, overwrite=overwrite, **{key: value for key, value in papers.items() if value})
        shutil.rmtree(work)
    trainer.accelerator.wait_for_everyone()
    return out


@dataclass(frozen=True)
class _Text:
    """Both sides' text, packed. `public` is None where nothing needs it; validation holds the sides that have some."""

    own: RowText
    public: RowText | None
    validation: dict[str, torch.Tensor]
    sha256: str


def _checked_config(folder: Path, name: str) -> FlexMoeConfig:
    check_expert_name(name)
    config = FlexMoeConfig.from_pretrained(folder)
    if config.model_type != "flexmoe" or not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a FlexMoE model. Make one from a dense model with `flexmoe graft`.")
    check_unquantized(config, folder, "trained on")
    if name in config.expert_names:
        raise ValueError(f"The name {name!r} is taken: {folder} has {', '.join(config.expert_names)}. Choose another.")
    if config.expert_names != [PUBLIC]:
        others = ", ".join(config.expert_names[1:])
        raise ValueError(
            f"{folder} has experts besides public ({others}). An owner trains against the public anchor alone: give "
            "the model that `flexmoe graft` wrote."
        )
    return config


def _sequence_length(config: FlexMoeConfig, asked: int | None) -> int:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return LONGEST_SEQUENCE if longest is None else min(LONGEST_SEQUENCE, longest)
    if longest is not None and asked > longest:
        raise ValueError(f"sequence_length={asked}: the anchor takes at most {longest} tokens.")
    return asked


def _rank(config: FlexMoeConfig, settings: TrainingSettings) -> int | None:
    if settings.method == "full":
        return None
    rank, hidden_size = settings.rank or LOW_RANK, config.get_text_config().hidden_size
    if rank > hidden_size:
        raise ValueError(
            f"rank={rank} is more than the anchor's hidden size, {hidden_size}: the difference would be larger than a "
            "full expert. Give a smaller one, or method='full'."
        )
    return rank


def _read_text(
    folder: Path,
    config: FlexMoeConfig,
    data: Sequence[str | Path],
    public_data: Sequence[str | Path] | None,
    settings: TrainingSettings,
) -> _Text:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sides = {"own": read_documents(data, column=settings.text_column)}
    if public_data is not None:
        sides["public"] = read_documents(public_data, column=settings.text_column)
    elif config.public_sample is not None:
        sides["public"] = read_public_sample(folder, config.public_sample)
    elif settings.public_ratio > 0 or row_method(settings.router).needs != "nothing":
        raise ValueError(
            f"Training needs public text (public_ratio={settings.public_ratio:g}, router={settings.router!r}), and "
            f"{folder} keeps no sample of it. Graft with --public-data, or give --public-data here."
        )
    training: dict[str, RowText] = {}
    validation: dict[str, torch.Tensor] = {}
    for side, documents in sides.items():
        kept, held = _split(side, documents, settings)
        training[side] = RowText(kept, _packed(f"{side} training text", kept, tokenizer, settings))
        if held:
            validation[side] = _validation_sample(
                _packed(f"{side} validation text", held, tokenizer, settings), settings
            )
    digest = hashlib.sha256(json.dumps(sides).encode()).hexdigest()
    return _Text(training["own"], training.get("public"), validation, digest)


def _split(side: str, documents: Sequence[str], settings: TrainingSettings) -> tuple[list[str], list[str]]:
    """(training, validation) documents. Public text that is a single document goes unvalidated: it can't be split."""
    alone = side == "public" and len(set(documents)) == 1
    try:
        return split_documents(documents, 0 if alone else settings.validation_fraction, settings.seed)
    except ValueError as error:
        raise ValueError(f"The {side} text: {error}") from error


def _packed(
    what: str, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, settings: TrainingSettings
) -> torch.Tensor:
    assert settings.sequence_length is not None, "decided once the anchor is known"
    try:
        return pack(documents, tokenizer, settings.sequence_length)
    except ValueError as error:
        raise ValueError(f"The {what} (validation_fraction={settings.validation_fraction:g}): {error}") from error


def _validation_sample(sequences: torch.Tensor, settings: TrainingSettings) -> torch.Tensor:
    count = max(1, settings.validation_tokens // sequences.shape[1])
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(settings.seed))
    return sequences[order[:count]]


def _training_arguments(
    work: Path, text: _Text, config: FlexMoeConfig, settings: TrainingSettings, progress: bool
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        bf16=_runs_in_bfloat16(config, settings),
        use_cpu=not torch.accelerator.is_available(),  # said, or bf16 is refused on a CPU
        eval_strategy="steps" if text.validation and settings.eval_steps else "no",
        eval_steps=settings.eval_steps,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,  # while one is written, the one before is the last that is whole
        logging_steps=10,
        logging_nan_inf_filter=False,
        seed=settings.seed,
        report_to="none",
        disable_tqdm=not progress,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )
    batch = settings.batch_size * settings.gradient_accumulation_steps * arguments.world_size
    own_per_step = batch * (1 - settings.public_ratio)
    steps = settings.max_steps or math.ceil((settings.epochs or 1) * len(text.own.sequences) / own_per_step)
    arguments.max_steps = steps
    arguments.warmup_steps = steps // 20 if settings.warmup_steps is None else settings.warmup_steps
    return arguments


def _runs_in_bfloat16(config: FlexMoeConfig, settings: TrainingSettings) -> bool:
    if settings.dtype != "auto":
        return settings.dtype == "bfloat16"
    stored = str(config.dtype or (config.anchor or {}).get("dtype")).removeprefix("torch.")
    if stored == "float16":
        raise ValueError("The anchor is stored in float16, whose range is too small to train in. Set dtype='float32'.")
    return stored == "bfloat16"


def _identity(
    folder: Path, name: str, text: _Text, arguments: TrainingArguments, settings: TrainingSettings
) -> dict[str, Any]:
    """What must be the same for a run to go on from another's checkpoint and end as if it had never stopped."""
    return {
        "name": name,
        "model": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "text": text.sha256,
        "processes": arguments.world_size,
        "settings": asdict(settings),
    }


def _open_work_folder(work: Path, identity: dict[str, Any], resume: bool, *, main: bool) -> None:
    """Makes the folder for a new run, or checks that what is there is this run's and drops unfinished checkpoints.

    `main`: this is the process that may change it; any other comes afterwards, and only checks.
    """
    record = work / RUN_FILE
    known = _known_run(record)
    if main and (known is None or not resume):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        unfinished = record.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(identity, indent=2))
        os.replace(unfinished, record)
        return
    if known is None:
        raise FileNotFoundError(f"{record} is not there. The processes of a run must share one file system.")
    before = {**asdict(TrainingSettings()), **known["settings"]}  # an older version knew fewer
    settings = {f"settings.{key}" for key, value in identity["settings"].items() if before[key] != value}
    changed = settings | {key for key in identity.keys() - {"settings"} if known.get(key) != identity[key]}
    if changed:
        raise ValueError(
            f"{work} holds a run that was stopped, with other values of: {', '.join(sorted(changed))}. Give the same "
            "command to go on with it, or resume=False (--no-resume) to begin anew."
        )
    if not main:
        return
    last = last_checkpoint(work)
    for folder in work.glob("checkpoint-*"):
        if folder != last:
            shutil.rmtree(folder)


def _known_run(record: Path) -> dict[str, Any] | None:
    """What a run was; None if none began here, or it was cut short before it could say what it is."""
    try:
        known = json.loads(record.read_text())
    except (FileNotFoundError, ValueError):  # of JSON and of UTF-8
        return None
    return known if isinstance(known, dict) and isinstance(known.get("settings"), dict) else None


def _two_expert_model(
    folder: Path,
    name: str,
    config: FlexMoeConfig,
    text: _Text,
    arguments: TrainingArguments,
    settings: TrainingSettings,
) -> FlexMoeForCausalLM:
    """Public and `name`, with the row in place and gradients only for what is to be trained."""
    dtype = torch.bfloat16 if _runs_in_bfloat16(config, settings) else torch.float32
    model = FlexMoeForCausalLM.from_pretrained(folder, dtype=dtype).to(arguments.device)
    method = row_method(settings.router)
    with arguments.main_process_first(local=False, desc="fitting router rows"):
        rows = _rows(Path(arguments.output_dir) / ROWS_FILE, model, method, text, settings)
    if settings.gradient_checkpointing:
        enable_activation_checkpointing(model)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)  # a low-rank expert begins with random numbers
        model.add_expert_copy(name, rank=settings.rank, alpha=settings.alpha)
    model.freeze_except(name, rows=method.trained_by_loss)
    with torch.no_grad():
        for block, weight, bias in zip(model.flexmoe_blocks(), rows["weight"], rows["bias"], strict=True):
            block.experts[name].float()  # the master copy that the optimiser steps on
            block.router[PUBLIC].bias.zero_()  # the prior belongs to compositions
            block.router[name].weight.copy_(weight)
            block.router[name].bias.copy_(bias)
            if not settings.router_bias:
                block.router[name].bias.requires_grad_(False)
    return model


def _rows(
    file: Path, model: FlexMoeForCausalLM, method: RowMethod, text: _Text, settings: TrainingSettings
) -> dict[str, torch.Tensor]:
    """weight [layers, H] and bias [layers]; fitted once per run, so that one that goes on has the very same."""
    if not file.is_file():
        rows = fit_rows(
            model,
            method,
            text.own,
            text.public,
            tokens=settings.router_tokens,
            bias=settings.router_bias,
            seed=settings.seed,
            embedder=settings.embedder,
        )
        stacked = {
            "weight": torch.stack([row.weight for row in rows]),
            "bias": torch.tensor([row.bias for row in rows]),
        }
        unfinished = file.with_suffix(".unfinished")
        save_file(stacked, unfinished)
        os.replace(unfinished, file)
    return load_file(file)


def _trainer(
    model: FlexMoeForCausalLM, text: _Text, arguments: TrainingArguments, settings: TrainingSettings
) -> ExpertTrainer:
    batch = settings.batch_size * settings.gradient_accumulation_steps * arguments.world_size
    mixture = Mixture(
        text.own.sequences,
        None if text.public is None else text.public.sequences,
        public_ratio=settings.public_ratio,
        length=arguments.max_steps * batch,
        seed=settings.seed,
    )
    return ExpertTrainer(
        model=model,
        args=arguments,
        train_dataset=mixture,
        eval_dataset={side: Sequences(sequences) for side, sequences in text.validation.items()},
        lm_z_loss=settings.lm_z_loss,
        router_z_loss=settings.router_z_loss if row_method(settings.router).trained_by_loss else 0.0,
    )


def _report(trainer: ExpertTrainer, text: _Text, settings: TrainingSettings) -> dict[str, Any]:
    """What the package's manifest says about the training: no path, no text, no file name."""
    after = trainer.evaluate() if text.validation else {}
    history = trainer.state.log_history
    validation = {}
    for side in text.validation:
        key = f"eval_{side}_loss"
        before = next(entry[key] for entry in history if key in entry)
        validation[side] = {"before": before, "after": after[key]}
    steps = trainer.args.max_steps
    config = {**asdict(settings), "max_steps": steps, "epochs": None, "warmup_steps": trainer.args.warmup_steps}
    if settings.embedder is not None:
        config["embedder"] = Path(settings.embedder).name
    length = text.own.sequences.shape[1]
    return {
        "tokens": len(trainer.train_dataset) * length,
        "public_tokens": trainer.train_dataset.public_count * length,
        "k": EXPERTS_PER_TOKEN,
        "seed": settings.seed,
        "config": config,
        "validation_loss": validation,
    }
