"""A metric for `evaluate`: mean loss per token and perplexity, from log-probabilities of tokens.

It is loaded by path (`evaluate.load(<this file>)`), without network access. `evaluate` copies the file to its modules
cache, so it must not import FlexMoE. Does not cover running a model (`flexmoe.evaluation`).
"""

import math

import datasets
import evaluate
import numpy as np

DESCRIPTION = """\
Loss: the mean negative log-likelihood of the tokens, in nats per token. All tokens have equal weight, independent of
the lengths of the sequences. Perplexity: the exponential of the loss.
"""

INPUTS_DESCRIPTION = """
Args:
    predictions: for each sequence, the log-probabilities (natural logarithm) of its tokens, without the first token.
        Sequences may differ in length.

Returns:
    loss (nats per token), perplexity (inf on overflow), tokens (number of tokens).

Raises:
    ValueError: there are no tokens, or a log-probability is NaN or positive.

Examples:
    >>> token_loss = evaluate.load("src/flexmoe/metrics/token_loss.py")
    >>> token_loss.compute(predictions=[[-0.5, -1.5], [-1.0]])
    {'loss': 1.0, 'perplexity': 2.718281828459045, 'tokens': 3}
"""

ROUNDING = 1e-3
"""The largest value above zero accepted as a log-probability: the rounding error of a half-precision log-softmax."""


class TokenLoss(evaluate.Metric):
    """Mean negative log-likelihood per token, and its exponential."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _compute(self, predictions: list[list[float]]) -> dict[str, float | int]:
        log_probabilities = np.concatenate([np.asarray(row, dtype=np.float64) for row in predictions])
        if log_probabilities.size == 0:
            raise ValueError("No token to score: all sequences in `predictions` are empty.")
        if not (log_probabilities <= ROUNDING).all():
            raise ValueError(
                "`predictions` must hold log-probabilities (at most 0); "
                f"got {log_probabilities[~(log_probabilities <= ROUNDING)][0]}."
            )
        loss = float(-log_probabilities.mean())
        try:
            perplexity = math.exp(loss)
        except OverflowError:
            perplexity = math.inf
        return {"loss": loss, "perplexity": perplexity, "tokens": int(log_probabilities.size)}
