"""The training loop of one expert: the order of sequences, the loss, and the contents of a checkpoint.

Shapes: B sequences in a batch, L tokens of each, N sequences in all, V vocabulary.

It is a transformers Trainer, which provides mixed precision, gradient accumulation, DDP and `accelerate launch`. Does
not cover settings, reading text and writing the package (`flexmoe.training.experts`), or sharded training (FSDP,
DeepSpeed).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from flexmoe.training.best import trained_parameters
from flexmoe.training.head import HeadCall, capture_states, head_call
from flexmoe.training.messages import Show, TimeEstimate
from flexmoe.training.next_token_loss import next_token_loss, next_token_loss_of_states
from flexmoe.training.resume import seal_checkpoint

EXPERTS_PER_TOKEN = 2  # own and public: every token is processed by both, the router only weighs them
CHECKPOINT_WEIGHTS = "trained.safetensors"


class Mixture(Dataset):
    """Own and public sequences in training order; sequence i is a function of the seed and i.

    Among any n consecutive sequences, `public_ratio * n` are public, rounded up or down: a quota, not a probability.
    Each side is shuffled and repeated as often as needed.

    Args:
        own, public: int32 or int64 [N, L]; `public` may be None if `public_ratio` is 0.
        public_ratio: share of public sequences, at least 0 and below 1.
        length: number of sequences.
        seed: of the order.
    """

    def __init__(
        self, own: torch.Tensor, public: torch.Tensor | None, *, public_ratio: float, length: int, seed: int
    ) -> None:
        counts = (torch.arange(length + 1, dtype=torch.float64) * public_ratio + 1e-9).floor().long()
        self._is_public = counts[1:] > counts[:-1]
        self._counts = counts
        self._sides = (own, own if public is None else public)
        self._index = torch.empty(length, dtype=torch.int64)  # position within its side
        public_count = int(counts[-1])
        self._index[~self._is_public] = _shuffled(len(own), length - public_count, seed)
        self._index[self._is_public] = _shuffled(len(self._sides[1]), public_count, seed + 1)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def public_count(self) -> int:
        """The number of public sequences."""
        return self.public_among(len(self))

    def public_among(self, sequences: int) -> int:
        """The number of public sequences among the first ones."""
        return int(self._counts[sequences])

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._sides[int(self._is_public[item])][self._index[item]].long()}


class Sequences(Dataset):
    """Sequences [N, L], int32 or int64, in order, for validation."""

    def __init__(self, input_ids: torch.Tensor) -> None:
        self._input_ids = input_ids

    def __len__(self) -> int:
        return len(self._input_ids)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._input_ids[item].long()}


class TrainingDivergedError(ValueError):
    """The loss is NaN or infinite; the message gives the step and what to change."""


class ExpertTrainer(Trainer):
    """Trains the parameters that require gradients, and keeps only those in optimiser and checkpoints.

    Args:
        lm_z_loss, router_z_loss: weights of the two z-losses.
        expert: its name, for the progress bar.
        show: shows a line to the user.
        Others are Trainer's.

    Raises:
        TrainingDivergedError: at the first step whose loss is not finite.
        ValueError: under FSDP or DeepSpeed.
    """

    def __init__(
        self, *args: Any, lm_z_loss: float, router_z_loss: float, expert: str, show: Show, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("Experts train with DDP or on one device; FSDP and DeepSpeed are not supported yet.")
        self.lm_z_loss = lm_z_loss
        self.router_z_loss = router_z_loss
        with self.accelerator.autocast():
            self.head: HeadCall | None = head_call(self.model)
        for callback in (ProgressCallback, PrinterCallback):  # both print to stdout
            self.remove_callback(callback)
        bar = None
        if not self.args.disable_tqdm:
            bar = _Progress(expert)
            self.add_callback(bar)
        self.add_callback(TimeEstimate(show if bar is None else bar.above(show)))
        self.add_callback(_MarkComplete)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor:
        loss = self.training_loss(model, inputs["input_ids"])
        if not torch.isfinite(loss):
            raise TrainingDivergedError(
                f"The training loss is {loss.item()} at step {self.state.global_step + 1} of {self.state.max_steps}. "
                f"Training stopped and wrote no package. Lower the learning rate (it is {self.args.learning_rate:g}), "
                "add warm-up steps, or train in float32; start over with resume=False (--no-resume)."
            )
        return loss

    def training_loss(self, model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """The loss that is minimised: cross-entropy and z-losses, also where it is not finite."""
        with self.compute_loss_context_manager():
            loss, outputs = self._next_token_loss(
                model, input_ids, self.lm_z_loss, output_router_logits=self.router_z_loss > 0
            )
            return loss + self.router_z_loss * outputs.z_loss if self.router_z_loss > 0 else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None, None]:
        """The validation loss: cross-entropy without z-losses."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, _ = self._next_token_loss(model, inputs["input_ids"], z_loss=0.0)
        return loss, None, None

    def _next_token_loss(
        self, model: nn.Module, input_ids: torch.Tensor, z_loss: float, **options: Any
    ) -> tuple[torch.Tensor, Any]:
        """The loss and the model's output, whose logits are those of the last token where the head runs on its own."""
        options |= {"input_ids": input_ids, "use_cache": False, "num_experts_per_tok": EXPERTS_PER_TOKEN}
        if self.head is None:
            outputs = model(**options)
            return next_token_loss(outputs.logits, input_ids, z_loss), outputs
        anchor = self.accelerator.unwrap_model(model).anchor
        with capture_states(anchor) as captured:  # a hook, because DDP has to see the call of the model
            outputs = model(logits_to_keep=1, **options)
        states = captured[0].last_hidden_state
        vocabulary = outputs.logits.shape[-1]
        with self.accelerator.autocast():
            return next_token_loss_of_states(states, input_ids, self.head, z_loss, vocabulary), outputs

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # a Mixture is shuffled already

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's implementation walks all modules at every step

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        trained = {name: value.detach() for name, value in trained_parameters(model).items()}
        save_file(trained, folder / CHECKPOINT_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / CHECKPOINT_WEIGHTS)
        trained = trained_parameters(model or self.model)
        if saved.keys() != trained.keys():
            differing = ", ".join(sorted(saved.keys() ^ trained.keys())[:3])
            raise ValueError(f"{resume_from_checkpoint} belongs to another run: it differs in {differing}.")
        with torch.no_grad():
            for name, value in saved.items():
                trained[name].copy_(value)


def enable_activation_checkpointing(model: PreTrainedModel, **kwargs: Any) -> None:
    """Recomputes layers in the backward pass; `kwargs` go to torch's `checkpoint`.

    transformers 5.23 names it `activation_checkpointing_enable` and deprecates `gradient_checkpointing_enable`, the
    only name in earlier versions.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs or None)


class _MarkComplete(TrainerCallback):
    """Marks a checkpoint as complete; one without the mark was interrupted and is not resumed from."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process writes its own RNG state
        if state.is_world_process_zero:
            seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class _Progress(ProgressCallback):
    """Trainer's progress bars on stderr with labels, and the losses as a postfix instead of printed dictionaries."""

    def __init__(self, expert: str) -> None:
        super().__init__()
        self._expert = expert
        self._shown: dict[str, str] = {}

    def above(self, show: Show) -> Show:
        """`show` for lines that appear above the bars."""

        def shown(line: str) -> None:
            if self.training_bar is None:
                show(line)
                return
            with type(self.training_bar).external_write_mode(file=sys.stderr):
                show(line)

        return shown

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(f"Training {self._expert}")

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description("Validation")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        names = {"loss": "loss", "eval_own_loss": "own", "eval_public_loss": "public"}
        self._shown |= {names[key]: f"{value:.3f}" for key, value in (logs or {}).items() if key in names}
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.set_postfix(self._shown)


def _shuffled(size: int, count: int, seed: int) -> torch.Tensor:
    """`count` indices below `size`, as consecutive permutations."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-count // size)
    return torch.cat([torch.randperm(size, generator=generator) for _ in range(passes)] or [torch.empty(0).long()])[
        :count
    ]
