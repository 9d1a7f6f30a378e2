"""Training of one expert in isolation, where its data is: text files in, an expert package out.

The model has two experts: "public" (the anchor's own FFNs) and the owner's, a copy of them or a low-rank difference.

    1. text       own and public documents, split into training and validation documents, packed into sequences
    2. row        the router row, fitted on hidden states of the frozen anchor (`flexmoe.routers.rows`)
    3. networks   the owner's FFNs are trained through that row, with public text replayed; all else is frozen
    4. package    FFNs and row, with metadata of the training

Only the package leaves the owner. The same command resumes an interrupted run.

Does not cover the loop itself (`flexmoe.training.trainer`), or models that must be sharded to train.

Source: FlexOlmo, arXiv 2507.07024, for the two-expert objective; log-odds rows and public replay are FlexMoE's own.
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

from flexmoe.data import LONGEST_SEQUENCE, data_paths, pack, read_documents, read_public_sample, split_documents
from flexmoe.hub.client import resolve_folder
from flexmoe.io.folders import check_apart, check_new_folder
from flexmoe.modeling import PUBLIC, FlexMoeConfig, FlexMoeForCausalLM, check_expert_name
from flexmoe.packages.quantization import check_unquantized
from flexmoe.routers.hidden_states import RowText, fit_rows
from flexmoe.routers.rows import RowMethod, row_method
from flexmoe.training.trainer import (
    EXPERTS_PER_TOKEN,
    ExpertTrainer,
    Mixture,
    Sequences,
    enable_activation_checkpointing,
    last_checkpoint,
)

ROWS_FILE = "router_rows.safetensors"
RUN_FILE = "run.json"
LOW_RANK = 64  # the default rank of low-rank experts


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of `train_expert`. The defaults are those of the demo.

    The FlexOlmo paper's are `router="hidden_mean"` (or "embedding"), `router_bias=True`, `public_ratio=0`.

    Example:
        ```pycon
        >>> import flexmoe
        >>> settings = flexmoe.TrainingSettings(method="low_rank", rank=4, max_steps=2, sequence_length=32)
        >>> package = flexmoe.train_expert("grafted", "sums", ["problems.txt"], "sums-expert", settings=settings)
        >>> flexmoe.ExpertPackage.open(package).manifest.kind
        'low_rank'
        ```
    """

    method: Literal["full", "low_rank"] = "full"
    """What is trained: copies of public's FFNs, or low-rank differences from them."""
    rank: int | None = None
    """Rank of a low-rank expert, in every layer; None: `LOW_RANK`."""
    alpha: float | None = None
    """The differences of a low-rank expert are scaled by `alpha / rank`; None: by 1."""
    router: str = "log_odds"
    """Name in `ROUTER_ROWS`. Rows of log_odds and lda are fitted and then frozen; others are trained by the loss."""
    router_bias: bool = False
    router_tokens: int = 40_000
    """Tokens of own text, and as many of public text, on which a row is fitted."""
    embedder: str | None = None
    """A sentence-transformers model, for router="embedding"."""
    public_ratio: float = 0.4
    """Share of public sequences in the training data."""
    sequence_length: int | None = None
    """Tokens; None: `LONGEST_SEQUENCE`, or the anchor's limit if that is less."""
    batch_size: int = 8
    """Sequences per process and forward pass."""
    gradient_accumulation_steps: int = 1
    max_steps: int | None = None
    epochs: float | None = None
    """Passes over the own text; 1 if neither this nor `max_steps` is given."""
    learning_rate: float = 2e-3
    warmup_steps: int | None = None
    """None: 5 % of the steps."""
    lm_z_loss: float = 1e-5
    router_z_loss: float = 1e-3
    """Used only if rows are trained."""
    validation_fraction: float = 0.05
    """Share of the documents held out for validation, of own and of public text."""
    validation_tokens: int = 20_000
    """At most, of own and of public text each."""
    eval_steps: int | None = None
    """Steps between validations; None: only before and after training."""
    save_steps: int = 100
    seed: int = 0
    text_column: str = "text"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen model; "auto": as stored. Trained parameters are float32, with bfloat16 autocast if it is that."""
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        row_method(self.router)
        positive = ("router_tokens", "batch_size", "gradient_accumulation_steps", "learning_rate", "validation_tokens")
        for field in (*positive, "max_steps", "epochs", "eval_steps", "save_steps", "rank", "alpha"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(f"{field}={value}: must be above 0.")
        for field in ("public_ratio", "validation_fraction"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 0 and below 1.")
        if self.method not in ("full", "low_rank"):
            raise ValueError(f"method={self.method!r}: must be 'full' or 'low_rank'.")
        if self.method == "full" and (self.rank, self.alpha) != (None, None):
            raise ValueError(f"rank={self.rank}, alpha={self.alpha}: only for method='low_rank'.")
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError(f"max_steps={self.max_steps} and epochs={self.epochs}: give at most one of them.")
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
        name: of the expert.
        data: the owner's files (see `read_documents`).
        out: the package's folder. Beside it, `.<name of out>.training` holds checkpoints until the package is written.
        public_data: public text. Default: the sample stored with the graft.
        settings: how to train. Default: `TrainingSettings()`.
        license, data_statement, version: metadata of the package.
        overwrite: replace an existing `out`.
        resume: resume from the last checkpoint of the same command; False starts over.
        progress: show a progress bar on stderr.
        overrides: fields of `TrainingSettings` that replace those of `settings`.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        FileNotFoundError: no such model or file.
        ValueError: a taken name, no or too little text, no public text although it is needed, an `out` that is or
            contains an input, or checkpoints of another command beside `out`.
        TrainingDivergedError: the loss is not finite.

    Example:
        ```pycon
        >>> import flexmoe
        >>> options = {"license": "cc-by-4.0", "max_steps": 2, "sequence_length": 32}
        >>> package = flexmoe.train_expert("grafted", "sums", ["problems.txt"], "sums-expert", **options)
        >>> flexmoe.ExpertPackage.open(package).manifest.license
        'cc-by-4.0'
        ```
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
        metadata = {"license": license, "data_statement": data_statement, "version": version, "training": report}
        model.save_expert(name, out, overwrite=overwrite, **{key: value for key, value in metadata.items() if value})
        shutil.rmtree(work)
    trainer.accelerator.wait_for_everyone()
    return out


@dataclass(frozen=True)
class _Text:
    """Packed own and public text. `public` is None if not needed; `validation` is by side ("own", "public")."""

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
            f"{folder} has experts besides public ({others}). An expert is trained against the public anchor alone: "
            "give the model that `flexmoe graft` wrote."
        )
    return config


def _sequence_length(config: FlexMoeConfig, given: int | None) -> int:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if given is None:
        return LONGEST_SEQUENCE if longest is None else min(LONGEST_SEQUENCE, longest)
    if longest is not None and given > longest:
        raise ValueError(f"sequence_length={given}: the anchor takes at most {longest} tokens.")
    return given


def _rank(config: FlexMoeConfig, settings: TrainingSettings) -> int | None:
    if settings.method == "full":
        return None
    rank, hidden_size = settings.rank or LOW_RANK, config.get_text_config().hidden_size
    if rank > hidden_size:
        raise ValueError(
            f"rank={rank} exceeds the anchor's hidden size, {hidden_size}: the difference would be larger than a full "
            "expert. Give a smaller rank, or method='full'."
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
            f"no sample is stored with {folder}. Graft with --public-data, or give --public-data here."
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
    """(training, validation) documents. A single public document is not split and used for training only."""
    single = side == "public" and len(set(documents)) == 1
    try:
        return split_documents(documents, 0 if single else settings.validation_fraction, settings.seed)
    except ValueError as error:
        raise ValueError(f"The {side} text: {error}") from error


def _packed(
    what: str, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, settings: TrainingSettings
) -> torch.Tensor:
    assert settings.sequence_length is not None, "set once the anchor is known"
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
        use_cpu=not torch.accelerator.is_available(),  # explicit, else bf16 is refused on a CPU
        eval_strategy="steps" if text.validation and settings.eval_steps else "no",
        eval_steps=settings.eval_steps,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,  # while one is being written, the previous one is the last complete one
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
    """What must be equal for a run to resume from a checkpoint and end as if it had never been interrupted."""
    return {
        "name": name,
        "model": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "text": text.sha256,
        "processes": arguments.world_size,
        "settings": asdict(settings),
    }


def _open_work_folder(work: Path, identity: dict[str, Any], resume: bool, *, main: bool) -> None:
    """Creates the folder of a new run, or checks that an existing one is this run's and drops other checkpoints.

    Args:
        main: whether this is the process that may change the folder; the others run afterwards and only check.
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
        raise FileNotFoundError(f"{record} is missing. The processes of a run must share one file system.")
    before = {**asdict(TrainingSettings()), **known["settings"]}  # an older version had fewer settings
    settings = {f"settings.{key}" for key, value in identity["settings"].items() if before[key] != value}
    changed = settings | {key for key in identity.keys() - {"settings"} if known.get(key) != identity[key]}
    if changed:
        raise ValueError(
            f"{work} holds an interrupted run with other values of: {', '.join(sorted(changed))}. Give the same "
            "command to resume it, or resume=False (--no-resume) to start over."
        )
    if not main:
        return
    last = last_checkpoint(work)
    for folder in work.glob("checkpoint-*"):
        if folder != last:
            shutil.rmtree(folder)


def _known_run(record: Path) -> dict[str, Any] | None:
    """The identity of the run in a folder; None if there is none, or it was interrupted before it was recorded."""
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
    """The model with the experts "public" and `name`, its row fitted, gradients only for the parameters to train."""
    dtype = torch.bfloat16 if _runs_in_bfloat16(config, settings) else torch.float32
    model = FlexMoeForCausalLM.from_pretrained(folder, dtype=dtype).to(arguments.device)
    method = row_method(settings.router)
    with arguments.main_process_first(local=False, desc="fitting router rows"):
        rows = _rows(Path(arguments.output_dir) / ROWS_FILE, model, method, text, settings)
    if settings.gradient_checkpointing:
        enable_activation_checkpointing(model)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)  # a low-rank expert is initialised at random
        model.add_expert_copy(name, rank=settings.rank, alpha=settings.alpha)
    model.freeze_except(name, rows=method.trained_by_loss)
    with torch.no_grad():
        for block, weight, bias in zip(model.flexmoe_blocks(), rows["weight"], rows["bias"], strict=True):
            block.experts[name].float()  # the optimiser's master weights
            block.router[PUBLIC].bias.zero_()  # the prior is set by compositions
            block.router[name].weight.copy_(weight)
            block.router[name].bias.copy_(bias)
            if not settings.router_bias:
                block.router[name].bias.requires_grad_(False)
    return model


def _rows(
    file: Path, model: FlexMoeForCausalLM, method: RowMethod, text: _Text, settings: TrainingSettings
) -> dict[str, torch.Tensor]:
    """ "weight" [layers, H] and "bias" [layers]; fitted once per run and stored, so a resumed run has the same."""
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
    """The training record of the package's manifest; it holds no paths, file names or text."""
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
