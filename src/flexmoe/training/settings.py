"""The settings of a training run, and which values they may have.

Does not cover what they are if nobody gives them (`flexmoe.training.defaults`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flexmoe.data import RowFormat
from flexmoe.routers.rows import row_method

_POSITIVE = (
    "router_tokens",
    "batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "validation_tokens",
    "max_steps",
    "epochs",
    "eval_steps",
    "patience",
    "save_steps",
    "rank",
    "alpha",
)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of `train_expert`. Those that are None follow from the anchor, the text and the machine
    (`flexmoe.training.defaults`).

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
    """Rank of a low-rank expert, in every layer."""
    alpha: float | None = None
    """The differences of a low-rank expert are scaled by `alpha / rank`; None: by 1."""
    router: str = "log_odds"
    """Name in `ROUTER_ROWS`. Rows of log_odds and lda are fitted and then frozen; others are trained by the loss."""
    router_bias: bool = False
    evidence: Literal["unigram", "none"] | None = None
    """Whether the router also reads the tokens so far, by a table of scores (docs/evidence.md). None: "unigram" with
    router="log_odds", "none" with others."""
    router_tokens: int | None = None
    """At most, of own text, and as many of public text, on which a row is fitted."""
    embedder: str | None = None
    """A sentence-transformers model, for router="embedding"."""
    public_ratio: float | None = None
    """Share of public sequences in the training data."""
    sequence_length: int | None = None
    """Tokens."""
    batch_size: int | None = None
    """Sequences per process and forward pass; a CPU takes them in parts, whose gradients are added."""
    gradient_accumulation_steps: int = 1
    max_steps: int | None = None
    epochs: float | None = None
    """Passes over the own text, instead of `max_steps`."""
    learning_rate: float | None = None
    """At its peak."""
    warmup_steps: int | None = None
    lm_z_loss: float = 1e-5
    router_z_loss: float = 1e-3
    """Used only if rows are trained."""
    validation_fraction: float = 0.05
    """Share of the documents held out for validation, of own and of public text."""
    validation_tokens: int | None = None
    """At most, of own and of public text each."""
    eval_steps: int | None = None
    """Steps between validations."""
    patience: int = 3
    """Training stops after so many validations without a lower loss; the expert is that of the best one."""
    save_steps: int = 100
    seed: int = 0
    text_column: str = "text"
    """Column of tables that holds the text, own and public."""
    text_template: str | None = None
    """A text made of several columns instead: "{title}\\n{body}"."""
    skip_empty: bool = False
    """Leave out rows without text (null) instead of raising an error; they are counted."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen model; "auto": as stored, but float32 on a CPU without instructions for bfloat16. Trained
    parameters are float32, with bfloat16 autocast if it is that."""
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        row_method(self.router)
        RowFormat.of(self.text_column, self.text_template)
        for field in _POSITIVE:
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(f"{field}={value}: must be above 0.")
        for field in ("public_ratio", "validation_fraction"):
            share = getattr(self, field)
            if share is not None and not 0 <= share < 1:
                raise ValueError(f"{field}={share}: must be at least 0 and below 1.")
        if self.evidence not in (None, "unigram", "none"):
            raise ValueError(f"evidence={self.evidence!r}: must be 'unigram' or 'none'.")
        if self.evidence == "unigram" and not self.has_evidence:
            raise ValueError(
                "evidence='unigram' is for rows that are fitted on hidden states and then frozen, as with "
                f"router='log_odds'; router={self.router!r}."
            )
        if self.method not in ("full", "low_rank"):
            raise ValueError(f"method={self.method!r}: must be 'full' or 'low_rank'.")
        if self.method == "full" and (self.rank, self.alpha) != (None, None):
            raise ValueError(f"rank={self.rank}, alpha={self.alpha}: only for method='low_rank'.")
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError(f"max_steps={self.max_steps} and epochs={self.epochs}: give at most one of them.")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}: must be 'auto', 'float32' or 'bfloat16'.")

    @property
    def has_evidence(self) -> bool:
        """Whether the expert gets evidence beside its row."""
        method = row_method(self.router)
        return self.evidence != "none" and method.needs == "states" and not method.trained_by_loss


@dataclass(frozen=True, kw_only=True)
class ChosenSettings(TrainingSettings):
    """Settings of one run, in which everything that training needs has a value."""

    public_ratio: float
    sequence_length: int
    batch_size: int
    max_steps: int
    learning_rate: float
    warmup_steps: int
    router_tokens: int
    validation_tokens: int
    eval_steps: int
