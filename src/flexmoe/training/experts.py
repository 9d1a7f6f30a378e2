"""Training of one expert in isolation, where its data is: text files in, an expert package out.

The model has two experts: "public" (the anchor's own FFNs) and the owner's, a copy of them or a low-rank difference.

    1. text       own and public documents, split into training and validation documents, packed into sequences
    2. row        the router row, fitted on hidden states of the frozen anchor (`flexmoe.routers.rows`)
    3. networks   the owner's FFNs are trained through that row, with public text replayed; all else is frozen
    4. package    FFNs and row, with metadata of the training

Only the package leaves the owner. The same command resumes an interrupted run.

Does not cover the settings that follow from anchor, text and machine (`flexmoe.training.defaults`), the loop itself
(`trainer`), the preparation of text (`text`), checkpoints (`resume`), or models that must be sharded to train.

Source: FlexOlmo, arXiv 2507.07024, for the two-expert objective; log-odds rows and public replay are FlexMoE's own.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from flexmoe.cpu.linear import has_instructions
from flexmoe.data import (
    Documents,
    check_output_apart,
    check_template_is_used,
    data_paths,
    read_public_sample,
)
from flexmoe.hub.client import resolve_folder
from flexmoe.io.dense import load_causal_lm
from flexmoe.io.folders import check_apart, check_new_folder
from flexmoe.modeling import PUBLIC, FlexMoeConfig, FlexMoeForCausalLM, check_expert_name
from flexmoe.packages.quantization import check_unquantized
from flexmoe.routers.evidence import Evidence, EvidenceSettings
from flexmoe.routers.hidden_states import fit_rows
from flexmoe.routers.rows import RowMethod, row_method
from flexmoe.tokenization import load_tokenizer
from flexmoe.training.best import KeepBest, best_of, load_best, trained_parameters, validations
from flexmoe.training.defaults import Situation, choose, shown, usual_rate
from flexmoe.training.low_rank import initialize_from_gradient
from flexmoe.training.messages import Interruptible, Show, losses, steps_summary, text_summary, to_stderr
from flexmoe.training.mixing import IMPLEMENTATION
from flexmoe.training.probe import is_worth_probing, probed_rate
from flexmoe.training.resume import (
    ROWS_FILE,
    identify,
    last_checkpoint,
    load_rows,
    open_work_folder,
    save_rows,
    step_of,
    work_folder,
)
from flexmoe.training.settings import ChosenSettings, TrainingSettings
from flexmoe.training.text import OWN, PUBLIC_SIDE, SplitText, TrainingText, pack_text, read_sides
from flexmoe.training.trainer import (
    EXPERTS_PER_TOKEN,
    ExpertTrainer,
    Mixture,
    Sequences,
    enable_activation_checkpointing,
)

CPU_TOKENS = 1024  # of a forward pass on a CPU: more are not faster there, and need more memory


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
    show: Show | None = None,
    **overrides: Any,
) -> Path:
    """Trains the expert `name` on an owner's text and writes it as a package; returns the package's folder.

    Args:
        grafted: folder or Hub id of a model that `flexmoe graft` wrote.
        name: of the expert.
        data: the owner's files, folders and patterns, or data sets on the Hub (see `flexmoe.data.Documents`).
        out: the package's folder. Beside it, `.<name of out>.training` holds checkpoints until the package is written.
        public_data: public text. Default: the sample stored with the graft.
        settings: how to train. Default: `TrainingSettings()`.
        license, data_statement, version: metadata of the package.
        overwrite: replace an existing `out`.
        resume: resume from the last checkpoint of the same command; False starts over.
        progress: show a progress bar on stderr.
        show: called with each line for the user: a summary of the text and the steps, and the expected duration. None:
            with `progress`, they are written to stderr, and the losses after training, too.
        overrides: fields of `TrainingSettings` that replace those of `settings`.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        FileNotFoundError: no such model or file.
        TypeError: a value of the text column is not a text.
        ValueError: a taken name, no or too little text, a file or row that cannot be read, a token without an
            embedding, no public text although it is needed, an `out` that is, contains or is in an input, or beside
            `out` an interrupted run with another command, data, tokenizer or model, or a damaged checkpoint.
        TrainingDivergedError: the loss is not finite.
        TrainingInterrupted: a KeyboardInterrupt (Ctrl-C) that says what was kept.

    Warns:
        UserWarning: there is little text, rows without text were skipped, or the tokenizer is not the anchor's.

    Example:
        ```pycon
        >>> import flexmoe
        >>> options = {"license": "cc-by-4.0", "max_steps": 2, "sequence_length": 32}
        >>> package = flexmoe.train_expert("grafted", "sums", ["problems.txt"], "sums-expert", **options)
        >>> flexmoe.ExpertPackage.open(package).manifest.license
        'cc-by-4.0'
        ```
    """
    given = replace(settings or TrainingSettings(), **overrides)
    out = check_new_folder(out, overwrite)
    folder = resolve_folder(grafted).path
    work = work_folder(out)
    config = checked_config(folder, name)
    sides = sides_of(folder, config, data, public_data, given)
    read = [*data, *(public_data or ())]
    for written in (out, work):
        check_apart(written, folder, *data_paths(read), *filter(None, [given.embedder]))
        check_output_apart(written, read)
    _check_limits(config, given)
    texts = read_sides(
        sides,
        load_tokenizer(folder),
        validation_fraction=given.validation_fraction,
        seed=given.seed,
        vocab_size=config.get_text_config().vocab_size,
        keep_documents=row_method(given.router).needs == "embeddings",
    )
    chosen, choices = choose(given, situation(config, texts))
    text = pack_text(
        texts,
        sequence_length=chosen.sequence_length,
        validation_tokens=chosen.validation_tokens,
        seed=chosen.seed,
    )
    for note in _notes(text, sides):
        warnings.warn(note, stacklevel=2)

    arguments = _training_arguments(work, text, config, chosen, progress)
    _open_run(folder, name, text, arguments, chosen, resume)
    say = show or (to_stderr if progress else None)
    if say is None or arguments.process_index != 0:
        say = _nothing
    for line in (*text_summary(text), *_dtype_note(config, chosen), *shown(choices)):
        say(line)
    with Interruptible(work, chosen.save_steps) as run:
        trainer = _train(folder, name, config, text, arguments, chosen, say, run)
        report = _report(trainer, text, chosen)
        if trainer.is_world_process_zero():
            for block in trainer.model.flexmoe_blocks():
                block.experts[name].to(_package_dtype(config, chosen))
            metadata = {"license": license, "data_statement": data_statement, "version": version, "training": report}
            trainer.model.save_expert(
                name, out, overwrite=overwrite, **{key: value for key, value in metadata.items() if value}
            )
            shutil.rmtree(work)
            if show is None and progress:
                to_stderr(losses(report))
    trainer.accelerator.wait_for_everyone()
    return out


def _notes(text: TrainingText, sides: Mapping[str, Documents | Sequence[str]]) -> list[str]:
    """Warnings on the text."""
    read = [documents for documents in sides.values() if isinstance(documents, Documents)]
    return [note for note in (*(documents.skipped_note() for documents in read), text.few()) if note]


def _open_run(
    folder: Path,
    name: str,
    text: TrainingText,
    arguments: TrainingArguments,
    settings: ChosenSettings,
    resume: bool,
) -> None:
    """Opens the work folder, first in the main process; see `open_work_folder`."""
    is_main = arguments.process_index == 0
    with arguments.main_process_first(local=False, desc="preparing the run"):
        identity = identify(
            folder,
            name=name,
            text=text.sha256,
            tokens=text.tokens_sha256,
            processes=arguments.world_size,
            settings=asdict(settings),
            main=is_main,
        )
        open_work_folder(Path(arguments.output_dir), identity, asdict(TrainingSettings()), resume, main=is_main)


def _train(
    folder: Path,
    name: str,
    config: FlexMoeConfig,
    text: TrainingText,
    arguments: TrainingArguments,
    settings: ChosenSettings,
    show: Show,
    run: Interruptible,
) -> ExpertTrainer:
    """Trains from the last checkpoint, or from the start; the model is then that of the best validation."""
    checkpoint = last_checkpoint(run.work)
    arguments.eval_on_start = bool(text.validation) and checkpoint is None
    model = _two_expert_model(folder, name, config, text, arguments, settings)
    implementation = model.config._experts_implementation
    if arguments.device.type == "cpu":
        model.set_experts_implementation(IMPLEMENTATION)
    trainer = _trainer(model, text, arguments, settings, name, show)
    run.trainer = trainer
    if settings.method == "low_rank" and checkpoint is None:
        initialize_from_gradient(trainer)
    show(_steps_summary(trainer, text, checkpoint))
    usual = usual_rate(settings, config.get_text_config().hidden_size)
    if OWN in text.validation and is_worth_probing(settings.learning_rate, settings.max_steps, usual=usual):
        with arguments.main_process_first(local=False, desc="probing the learning rate"):
            is_given = settings.learning_rate != usual
            arguments.learning_rate = probed_rate(trainer, run.work, given=is_given, show=show)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if text.validation:
        _take_best(trainer, run.work, settings)
    model.config._experts_implementation = implementation
    return trainer


def _take_best(trainer: ExpertTrainer, work: Path, settings: ChosenSettings) -> None:
    """Copies the parameters of the best validation into the model, after a last validation."""
    step = trainer.state.global_step
    if validations(trainer.state.log_history)[-1].step < step:
        trainer.evaluate()
    measured = validations(trainer.state.log_history)
    best = best_of(measured, settings.public_ratio)
    assert best is not None, "there is a validation after the last step"
    trainer.accelerator.wait_for_everyone()
    if best.step < step:
        load_best(work, trained_parameters(trainer.accelerator.unwrap_model(trainer.model)), best.step)
    start = measured[0].losses[OWN]
    if best.losses[OWN] >= start:
        warnings.warn(
            f"The expert is no better than public: the loss on held-out own text was {start:.4f} before training and "
            f"is {best.losses[OWN]:.4f}. Give more text, or lower the learning rate "
            f"({trainer.args.learning_rate:g}).",
            stacklevel=3,
        )


def checked_config(folder: Path, name: str) -> FlexMoeConfig:
    """The config of a model that has no expert yet. ValueError: it is another kind of model, or has experts."""
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


def _check_limits(config: FlexMoeConfig, settings: TrainingSettings) -> None:
    """Refuses given settings that the anchor is too small for."""
    text_config = config.get_text_config()
    longest, hidden_size = getattr(text_config, "max_position_embeddings", None), text_config.hidden_size
    if longest is not None and settings.sequence_length is not None and settings.sequence_length > longest:
        raise ValueError(f"sequence_length={settings.sequence_length}: the anchor takes at most {longest} tokens.")
    if settings.rank is not None and settings.rank > hidden_size:
        raise ValueError(
            f"rank={settings.rank} exceeds the anchor's hidden size, {hidden_size}: the difference would be larger "
            "than a full expert. Give a smaller rank, or method='full'."
        )


def situation(config: FlexMoeConfig, read: Mapping[str, SplitText]) -> Situation:
    """What the settings that were not given follow from."""
    text_config = config.get_text_config()
    parts = [len(part) for text in read.values() for part in (text.training, text.validation)]
    return Situation(
        hidden_size=text_config.hidden_size,
        longest_sequence=getattr(text_config, "max_position_embeddings", None),
        own_tokens=len(read[OWN].training),
        shortest_text=min(filter(None, parts), default=0),
        accelerator=torch.accelerator.is_available(),
        processes=int(os.environ.get("WORLD_SIZE", 1)),  # as torchrun and accelerate set it
    )


def sides_of(
    folder: Path,
    config: FlexMoeConfig,
    data: Sequence[str | Path],
    public_data: Sequence[str | Path] | None,
    settings: TrainingSettings,
) -> dict[str, Documents | Sequence[str]]:
    """The documents by side, of which the beginnings are read and checked."""
    files = {OWN: data, **({} if public_data is None else {PUBLIC_SIDE: public_data})}
    read = {
        side: Documents(
            given, column=settings.text_column, template=settings.text_template, skip_empty=settings.skip_empty
        )
        for side, given in files.items()
    }
    check_template_is_used(read.values())
    for documents in read.values():
        documents.check()
    sides: dict[str, Documents | Sequence[str]] = {**read}
    if public_data is None and config.public_sample is not None:
        sides[PUBLIC_SIDE] = read_public_sample(folder, config.public_sample)
    elif public_data is None and (settings.public_ratio != 0 or row_method(settings.router).needs != "nothing"):
        needs = (
            "public_ratio above 0" if row_method(settings.router).needs == "nothing" else f"router={settings.router!r}"
        )
        raise ValueError(
            f"{needs} needs public text, and no sample is stored with {folder}. Graft with --public-data "
            "(public_data=...), or give it here."
        )
    return sides


def _training_arguments(
    work: Path, text: TrainingText, config: FlexMoeConfig, settings: ChosenSettings, progress: bool
) -> TrainingArguments:
    part = _sequences_at_a_time(settings)
    return TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=part,
        per_device_eval_batch_size=max(part, _most_sequences(settings)),
        gradient_accumulation_steps=settings.batch_size // part * settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        bf16=runs_in_bfloat16(config, settings),
        use_cpu=not torch.accelerator.is_available(),  # explicit, else bf16 is refused on a CPU
        eval_strategy="steps" if text.validation else "no",
        eval_steps=settings.eval_steps,
        save_strategy="steps",
        save_steps=settings.save_steps,
        max_steps=settings.max_steps,
        warmup_steps=settings.warmup_steps,
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


def _sequences_at_a_time(settings: ChosenSettings) -> int:
    """Sequences of a forward pass in training: the largest divisor of `batch_size` that fits in one."""
    most = _most_sequences(settings)
    return max(size for size in range(1, settings.batch_size + 1) if size <= most and settings.batch_size % size == 0)


def _most_sequences(settings: ChosenSettings) -> int:
    """Sequences that fit in a forward pass: `batch_size`, and on a CPU as many as have `CPU_TOKENS`."""
    return settings.batch_size if torch.accelerator.is_available() else max(1, CPU_TOKENS // settings.sequence_length)


def runs_in_bfloat16(config: FlexMoeConfig, settings: ChosenSettings) -> bool:
    """Whether the anchor is computed in bfloat16, not float32. ValueError: it is stored in float16."""
    if settings.dtype != "auto":
        return settings.dtype == "bfloat16"
    stored = _stored_dtype(config)
    if stored == "float16":
        raise ValueError("The anchor is stored in float16, whose range is too small to train in. Set dtype='float32'.")
    return stored == "bfloat16" and (torch.accelerator.is_available() or has_instructions(torch.bfloat16))


def _dtype_note(config: FlexMoeConfig, settings: ChosenSettings) -> list[str]:
    """A line if "auto" computes in another dtype than the anchor's."""
    if settings.dtype != "auto" or _stored_dtype(config) != "bfloat16" or runs_in_bfloat16(config, settings):
        return []
    return [
        "Computing in float32: the anchor is stored in bfloat16, for which this CPU has no instructions, so it would "
        "be several times slower (dtype='auto'; --dtype bfloat16 needs less memory). The expert is stored in bfloat16."
    ]


def _stored_dtype(config: FlexMoeConfig) -> str:
    """The dtype that the anchor is stored in, such as "bfloat16"."""
    return str(config.dtype or (config.anchor or {}).get("dtype")).removeprefix("torch.")


def _package_dtype(config: FlexMoeConfig, settings: ChosenSettings) -> torch.dtype:
    """The dtype of the package's networks: the anchor's with "auto", else that of the settings."""
    is_bfloat16 = (_stored_dtype(config) if settings.dtype == "auto" else settings.dtype) == "bfloat16"
    return torch.bfloat16 if is_bfloat16 else torch.float32


def _two_expert_model(
    folder: Path,
    name: str,
    config: FlexMoeConfig,
    text: TrainingText,
    arguments: TrainingArguments,
    settings: ChosenSettings,
) -> FlexMoeForCausalLM:
    """The model with the experts "public" and `name`, its row fitted, gradients only for the parameters to train."""
    dtype = torch.bfloat16 if runs_in_bfloat16(config, settings) else torch.float32
    model = load_causal_lm(folder, FlexMoeForCausalLM, dtype=dtype).to(arguments.device)
    method = row_method(settings.router)
    with arguments.main_process_first(local=False, desc="fitting router rows"):
        shown = not arguments.disable_tqdm and arguments.process_index == 0
        rows = _rows(Path(arguments.output_dir) / ROWS_FILE, model, method, text, settings, shown)
    if settings.gradient_checkpointing:
        enable_activation_checkpointing(model)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)  # a low-rank expert is initialised at random
        evidence = EvidenceSettings().record(len(rows["table"])) if "table" in rows else None
        model.add_expert_copy(name, rank=settings.rank, alpha=settings.alpha, evidence=evidence)
    model.freeze_except(name, rows=method.trained_by_loss)
    with torch.no_grad():
        for layer, block in enumerate(model.flexmoe_blocks()):
            block.experts[name].float()  # the optimiser's master weights
            block.router[PUBLIC].bias.zero_()  # the prior is set by compositions
            for key, tensor in block.router[name].state_dict().items():
                value = rows[key] if key == "table" else rows[key][layer]
                tensor.copy_(value.view_as(tensor))
            if not settings.router_bias:
                block.router[name].bias.requires_grad_(False)
    return model


def _rows(
    file: Path,
    model: FlexMoeForCausalLM,
    method: RowMethod,
    text: TrainingText,
    settings: ChosenSettings,
    progress: bool,
) -> dict[str, torch.Tensor]:
    """As `fitted_router`, which is called once per run, so that a resumed run has the same rows."""
    if not file.is_file():
        save_rows(file, fitted_router(model, method, text, settings, progress))
    return load_rows(file)


def fitted_router(
    model: FlexMoeForCausalLM, method: RowMethod, text: TrainingText, settings: ChosenSettings, progress: bool
) -> dict[str, torch.Tensor]:
    """An expert's router: "weight" [layers, H], "bias" [layers]; with evidence "calibration" [layers, D + 3] and
    "table" [V]."""
    evidence = None
    if settings.has_evidence and text.public is not None:
        vocab_size = model.config.get_text_config().vocab_size
        evidence = Evidence(text.own.sequences, text.public.sequences, vocab_size, EvidenceSettings())
    rows = fit_rows(
        model,
        method,
        text.own,
        text.public,
        tokens=settings.router_tokens,
        bias=settings.router_bias,
        seed=settings.seed,
        embedder=settings.embedder,
        evidence=evidence,
        progress=progress,
    )
    tensors = {"weight": torch.stack([row.weight for row in rows]), "bias": torch.tensor([row.bias for row in rows])}
    if evidence is not None:
        calibrations = [row.calibration for row in rows if row.calibration is not None]
        tensors |= {"calibration": torch.stack(calibrations), "table": evidence.table}
    return tensors


def _trainer(
    model: FlexMoeForCausalLM,
    text: TrainingText,
    arguments: TrainingArguments,
    settings: ChosenSettings,
    name: str,
    show: Show,
) -> ExpertTrainer:
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    mixture = Mixture(
        text.own.sequences,
        None if text.public is None else text.public.sequences,
        public_ratio=settings.public_ratio,
        length=arguments.max_steps * batch,
        seed=settings.seed,
    )
    trainer = ExpertTrainer(
        model=model,
        args=arguments,
        train_dataset=mixture,
        eval_dataset={side: Sequences(sequences) for side, sequences in text.validation.items()},
        lm_z_loss=settings.lm_z_loss,
        router_z_loss=settings.router_z_loss if row_method(settings.router).trained_by_loss else 0.0,
        expert=name,
        show=show,
    )
    trainer.add_callback(
        KeepBest(
            Path(arguments.output_dir),
            text.validation.keys(),
            public_ratio=settings.public_ratio,
            patience=settings.patience,
            show=show,
        )
    )
    return trainer


def _nothing(line: str) -> None:
    """Shows no line."""


def _steps_summary(trainer: ExpertTrainer, text: TrainingText, checkpoint: Path | None) -> str:
    steps = trainer.args.max_steps
    return steps_summary(
        text,
        steps=steps,
        sequences_per_step=len(trainer.train_dataset) // steps,
        public_sequences=trainer.train_dataset.public_count,
        resumed_at=0 if checkpoint is None else step_of(checkpoint),
    )


def _report(trainer: ExpertTrainer, text: TrainingText, settings: ChosenSettings) -> dict[str, Any]:
    """The training record of the package's manifest; it holds no paths, file names or text."""
    state, mixture = trainer.state, trainer.train_dataset
    measured = validations(state.log_history)
    best = best_of(measured, settings.public_ratio)
    after = best.losses if best else {}
    config = {**asdict(settings), "epochs": None, "learning_rate": trainer.args.learning_rate}
    if settings.embedder is not None:
        config["embedder"] = Path(settings.embedder).name
    length = text.own.sequences.shape[1]
    sequences = len(mixture) // state.max_steps * state.global_step
    return {
        "tokens": sequences * length,
        "public_tokens": mixture.public_among(sequences) * length,
        "step": best.step if best else state.global_step,
        "k": EXPERTS_PER_TOKEN,
        "seed": settings.seed,
        "config": config,
        "validation_loss": {side: {"before": measured[0].losses[side], "after": loss} for side, loss in after.items()},
    }
