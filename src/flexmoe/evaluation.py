"""Evaluation of language models on text: loss per token and perplexity, per domain.

Shapes: N sequences, L tokens of each, V vocabulary.

Works for FlexMoE and dense models, so an anchor can be compared with models built on it. Does not cover tasks with
answers (use lm-evaluation-harness), or expert usage (`flexmoe.track_usage`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from flexmoe.data import (
    LONGEST_SEQUENCE,
    Documents,
    TokenizedText,
    check_template_is_used,
    cut_sequences,
    tokenize,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKEN_LOSS = Path(__file__).parent / "metrics" / "token_loss.py"
"""The `evaluate` module that aggregates losses; loaded by path, so no network is needed."""


@dataclass(frozen=True, kw_only=True)
class DomainScore:
    """The score on a domain: `loss` in nats per token, `perplexity` = e ** loss, and the amount of text."""

    loss: float
    perplexity: float
    tokens: int
    documents: int

    def to_dict(self) -> dict[str, float | int]:
        """The fields by name, as `--json` prints them."""
        return asdict(self)


def evaluate(
    model: str | Path | PreTrainedModel,
    data: Mapping[str, Sequence[str | Path]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    experts: Sequence[str] | None = None,
    num_experts_per_tok: int | None = None,
    sequence_length: int | None = None,
    batch_size: int = 8,
    text_column: str = "text",
    text_template: str | None = None,
    skip_empty: bool = False,
) -> dict[str, DomainScore]:
    """Scores a model on the text of each domain.

    Every token of a domain but the very first is predicted exactly once: documents are joined by the tokenizer's
    end-of-sequence token and split into sequences that overlap by one token.

    Args:
        model: a folder, a Hub id, or a loaded model, which stays on its device; others use a GPU if there is one.
        data: files per domain; see `flexmoe.data.Documents`.
        tokenizer: needed for a loaded model without a tokenizer in its folder.
        experts: the only active experts, including "public" if wanted; None: the model's active experts.
        num_experts_per_tok: k of the top-k; None: the model's.
        sequence_length: tokens per sequence; None: `LONGEST_SEQUENCE`, or the model's limit if that is less.
        batch_size: sequences per forward pass.
        text_column, text_template, skip_empty: how rows of tables become texts; see `flexmoe.data.Documents`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no domain, no text in one, a token that the model has no embedding for, nothing to predict, a loss
            that is NaN, `experts` or `num_experts_per_tok` for a dense model, or an argument out of range.

    Warns:
        UserWarning: rows without text were skipped; or the tokenizer is not the anchor's.

    Example:
        ```pycon
        >>> import flexmoe
        >>> scores = flexmoe.evaluate("model", {"math": ["problems.txt"]}, experts=["public", "math"])
        >>> sorted(scores["math"].to_dict())
        ['documents', 'loss', 'perplexity', 'tokens']
        ```
    """
    if not data:
        raise ValueError("No domain to evaluate: give at least one name with its files.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1.")
    documents = {
        name: Documents(files, column=text_column, template=text_template, skip_empty=skip_empty)
        for name, files in data.items()
    }
    check_template_is_used(documents.values())
    for domain in documents.values():
        domain.check()
    if isinstance(model, str | Path):
        model, tokenizer = _load(model, tokenizer)
    elif tokenizer is None:
        tokenizer = _tokenizer_beside(model)
    length = _sequence_length(model, sequence_length)
    forward = _forward_arguments(model, experts, num_experts_per_tok)
    texts = {name: _tokenized(name, domain, tokenizer, model) for name, domain in documents.items()}
    for domain in documents.values():
        if note := domain.skipped_note():
            warnings.warn(note, stacklevel=2)
    with _only(model, experts):
        return {name: _score(model, name, text, length, batch_size, forward) for name, text in texts.items()}


@torch.no_grad()
def token_losses(model: PreTrainedModel, input_ids: torch.Tensor, batch_size: int = 8, **forward: Any) -> torch.Tensor:
    """The loss of each token but the first of each sequence.

    Args:
        model: any causal language model; it is evaluated in eval mode, which is then restored.
        input_ids: int64 or int32 [N, L], L at least 2, without padding.
        batch_size: sequences per forward pass.
        forward: further arguments of the model's forward (`num_experts_per_tok=2`).

    Returns:
        float32 [N, L - 1] on the CPU, in nats; column i belongs to token i + 1.

    Raises:
        ValueError: `input_ids` has another shape.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must be [sequences, at least 2 tokens]; got {list(input_ids.shape)}.")
    was_training = model.training
    model.eval()
    try:
        batches = [
            _batch_losses(model, ids.to(model.device, torch.int64), forward) for ids in input_ids.split(batch_size)
        ]
    finally:
        model.train(was_training)
    return torch.cat(batches) if batches else torch.empty(0, input_ids.shape[1] - 1)


def _batch_losses(model: PreTrainedModel, ids_NL: torch.Tensor, forward: dict[str, Any]) -> torch.Tensor:
    logits_NLV = model(input_ids=ids_NL, use_cache=False, **forward).logits
    # One sequence at a time: the float32 logits of a batch would need more memory than the forward pass.
    rows = [
        F.cross_entropy(logits_LV[:-1].float(), ids_L[1:], reduction="none")
        for logits_LV, ids_L in zip(logits_NLV, ids_NL, strict=True)
    ]
    return torch.stack(rows).cpu()


def _score(
    model: PreTrainedModel,
    name: str,
    text: TokenizedText,
    length: int,
    batch_size: int,
    forward: dict[str, Any],
) -> DomainScore:
    import evaluate as hf_evaluate  # a second to import, and its name is this module's own function

    metric = hf_evaluate.load(str(TOKEN_LOSS))
    # in pairs, so at most the last end-of-sequence token is dropped
    stream_T = cut_sequences(text.tokens, 2, len(text)).flatten()
    for sequences in _windows(stream_T, length):
        for ids in sequences.split(batch_size):
            losses = token_losses(model, ids, batch_size, **forward)
            if not losses.isfinite().all():
                raise ValueError(
                    f"The model's loss on {name!r} is not finite: its weights or its dtype are at fault. `flexmoe "
                    "inspect` shows row norms; evaluating with --expert (experts=...) finds the expert that causes it."
                )
            metric.add_batch(predictions=list((-losses).numpy()))
    result = metric.compute()
    return DomainScore(documents=len(text), **result)


def _tokenized(
    name: str, documents: Documents, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> TokenizedText:
    try:
        return tokenize(documents, tokenizer, vocab_size=model.config.get_text_config().vocab_size)
    except ValueError as error:
        raise ValueError(f"The text of {name!r}: {error}") from error


def _windows(stream: torch.Tensor, length: int) -> list[torch.Tensor]:
    """The stream as sequences that overlap by one token: [N, length], and the remainder as [1, shorter]."""
    complete = (len(stream) - 1) // (length - 1)
    windows = [stream.unfold(0, length, length - 1)] if complete else []
    rest = stream[complete * (length - 1) :]
    return [*windows, rest[None]] if len(rest) > 1 else windows


def _load(
    source: str | Path, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from flexmoe.hub.client import resolve_folder
    from flexmoe.io.dense import load_causal_lm
    from flexmoe.tokenization import load_tokenizer

    folder = resolve_folder(source).path
    model = load_causal_lm(folder, dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, tokenizer or load_tokenizer(folder)


def _tokenizer_beside(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    from flexmoe.tokenization import load_tokenizer

    if not model.name_or_path or not Path(model.name_or_path).is_dir():
        raise ValueError("The model was not loaded from a folder with a tokenizer: give one with tokenizer=.")
    return load_tokenizer(model.name_or_path)


def _sequence_length(model: PreTrainedModel, given: int | None) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # None: ALiBi, state space ...
    if given is None:
        return min(LONGEST_SEQUENCE, limit or LONGEST_SEQUENCE)
    if given < 2 or (limit is not None and given > limit):
        raise ValueError(f"sequence_length={given}: this model takes from 2 to {limit or 'any number of'} tokens.")
    return given


def _forward_arguments(
    model: PreTrainedModel, experts: Sequence[str] | None, num_experts_per_tok: int | None
) -> dict[str, Any]:
    if model.config.model_type != "flexmoe" and not (experts is None and num_experts_per_tok is None):
        raise ValueError(
            f"This is a dense {model.config.model_type} model without experts. "
            "Leave out experts and num_experts_per_tok, or give a FlexMoE model."
        )
    return {} if num_experts_per_tok is None else {"num_experts_per_tok": num_experts_per_tok}


def _only(model: PreTrainedModel, experts: Sequence[str] | None) -> AbstractContextManager[Any]:
    return nullcontext() if experts is None else model.only_experts(*experts)
