"""The training loop of one expert: which sequences it sees, its loss, and what a checkpoint of it holds.

Shapes: B sequences in a batch, L tokens of each, T = B * L, V vocabulary.

A transformers Trainer, so mixed precision, gradient accumulation, DDP and `accelerate launch` are its own. NOT
covered: choosing settings, reading text and writing the package (`flexmoe.training`), and sharded training (FSDP,
DeepSpeed).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from flexmoe.next_token_loss import next_token_loss

EXPERTS_PER_TOKEN = 2  # own and public: every token goes through both, the router only mixes
CHECKPOINT_WEIGHTS = "trained.safetensors"
CHECKPOINT_COMPLETE = "complete"


class Mixture(Dataset):
    """Own and public sequences in the order in which training sees them; sequence i is a function of the seed and i.

    Among any n sequences in a row, public ones are `public_ratio * n`, rounded up or down: a quota, not a chance. Each
    side is shuffled and passed through as often as it takes. own, public: int64 [N, L].
    """

    def __init__(
        self, own: torch.Tensor, public: torch.Tensor | None, *, public_ratio: float, length: int, seed: int
    ) -> None:
        counts = (torch.arange(length + 1, dtype=torch.float64) * public_ratio + 1e-9).floor().long()
        self._is_public = counts[1:] > counts[:-1]
        self.public_count = int(counts[-1])
        self._sides = (own, own if public is None else public)
        self._index = torch.empty(length, dtype=torch.int64)  # which sequence of its side
        self._index[~self._is_public] = _shuffled(len(own), length - self.public_count, seed)
        self._index[self._is_public] = _shuffled(len(self._sides[1]), self.public_count, seed + 1)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._sides[int(self._is_public[item])][self._index[item]]}


class Sequences(Dataset):
    """Sequences [N, L] in their order, for validation."""

    def __init__(self, input_ids: torch.Tensor) -> None:
        self._input_ids = input_ids

    def __len__(self) -> int:
        return len(self._input_ids)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._input_ids[item]}


class TrainingDivergedError(ValueError):
    """The loss is no number any more; the message names the step and what to do."""


class ExpertTrainer(Trainer):
    """Trains what has `requires_grad`, and keeps only that in optimiser and checkpoints.

    Args, beyond Trainer's own: `lm_z_loss` and `router_z_loss` are the weights of the two z-losses.

    Raises: TrainingDivergedError at the first step whose loss is not finite; ValueError under FSDP or DeepSpeed.
    """

    def __init__(self, *args: Any, lm_z_loss: float, router_z_loss: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("Experts train with DDP or on one device; FSDP and DeepSpeed are not supported yet.")
        self.lm_z_loss = lm_z_loss
        self.router_z_loss = router_z_loss
        for callback in (ProgressCallback, PrinterCallback):  # both print dictionaries to stdout
            self.remove_callback(callback)
        if not self.args.disable_tqdm:
            self.add_callback(_Progress)
        self.add_callback(_MarkComplete)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor:
        outputs = model(
            input_ids=inputs["input_ids"],
            use_cache=False,
            num_experts_per_tok=EXPERTS_PER_TOKEN,
            output_router_logits=self.router_z_loss > 0,
        )
        loss = next_token_loss(outputs.logits, inputs["input_ids"], self.lm_z_loss)
        if self.router_z_loss > 0:
            loss = loss + self.router_z_loss * outputs.z_loss
        if not torch.isfinite(loss):
            raise TrainingDivergedError(
                f"The training loss is {loss.item()} at step {self.state.global_step + 1} of {self.state.max_steps}. "
                f"Training stopped and wrote no package. Lower the learning rate (it is {self.args.learning_rate:g}), "
                "add warm-up steps, or train in float32; begin anew with resume=False (--no-resume)."
            )
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None, None]:
        """Validation counts the cross-entropy alone."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(
                input_ids=inputs["input_ids"], use_cache=False, num_experts_per_tok=EXPERTS_PER_TOKEN
            ).logits
            targets = inputs["input_ids"][:, 1:].flatten()
            return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets), None, None

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # a Mixture is in its order already

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's own walks all modules at every step

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
        save_file(trained, folder / CHECKPOINT_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / CHECKPOINT_WEIGHTS)
        trained = {name: value for name, value in (model or self.model).named_parameters() if value.requires_grad}
        if saved.keys() != trained.keys():
            odd = ", ".join(sorted(saved.keys() ^ trained.keys())[:3])
            raise ValueError(f"{resume_from_checkpoint} belongs to another run: it differs in {odd}.")
        with torch.no_grad():
            for name, value in saved.items():
                trained[name].copy_(value)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{CHECKPOINT_COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class _MarkComplete(TrainerCallback):
    """A kill while a checkpoint is written leaves one without this mark, and it is not resumed from."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process writes its own random state
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / CHECKPOINT_COMPLETE).touch()


class _Progress(ProgressCallback):
    """Trainer's progress bar on stderr, with the losses in it instead of dictionaries printed around it."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

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
    """`count` indices below `size`: one permutation after the other."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-count // size)
    return torch.cat([torch.randperm(size, generator=generator) for _ in range(passes)] or [torch.empty(0).long()])[
        :count
    ]
