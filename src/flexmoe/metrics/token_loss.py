"""An `evaluate` module: mean loss per token and perplexity, from the log-probabilities of a text's tokens.

It is loaded by path (`evaluate.load(<this file>)`), so it needs no network. `evaluate` copies the file into its
modules cache, which is why it imports nothing of FlexMoE. Does NOT cover running a model: `flexmoe.evaluation` does.
"""

import math

import datasets
import evaluate
import numpy as np

DESCRIPTION = """\
Loss: minus the mean natural logarithm of the probabilities that a model gave to a text's tokens, in nats per token,
every token weighing the same however the text was cut into sequences. Perplexity: e to the power of the loss.
"""

INPUTS_DESCRIPTION = """
Args:
    predictions: per sequence, the natural logarithms of the probabilities of its tokens (the first token of a text has
        none). Sequences may differ in length.

Returns:
    loss (nats per token), perplexity (inf where e ** loss overflows), tokens (how many were counted).

Raises:
    ValueError: no token, or a log-probability that is not a number or above zero.

Examples:
    >>> token_loss = evaluate.load("src/flexmoe/metrics/token_loss.py")
    >>> token_loss.compute(predictions=[[-0.5, -1.5], [-1.0]])
    {'loss': 1.0, 'perplexity': 2.718281828459045, 'tokens': 3}
"""

ROUNDING = 1e-3
"""How far above zero a log-probability may be: half-precision log-softmax overshoots by this much."""


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
            raise ValueError("No token to score: the sequences in `predictions` are all empty.")
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
