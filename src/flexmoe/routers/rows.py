"""Router rows: methods by which an owner fits, from its own text alone, the row that routes tokens to its expert.

Shapes: T tokens, H hidden size, D documents, W width of a sentence embedding.

Public's row is zero, so a row r scores "own" against "public". If each r_i is the log-odds log p_i(u) / p_public(u),
softmax(0, r_1, r_2, ...) over independently fitted rows is the posterior over owners. No function here sees another
owner's data, which makes the removal of an expert exact.

A method is a pure function, registered by one line. From own and from public text it gets what it `needs`:

    states      float [T, H]: FFN inputs of the frozen dense anchor, for one layer
    moments     `Moments` of them, for one layer
    embeddings  float [D, W]: one vector per document, the same for all layers
    nothing     None

and returns a `RouterRow`. A method that needs states also gets `start`, the logits of these tokens in another layer or
None: they are close to those of its own row, so it may start from them; and `folds` or None, with which its row has
`held_out`. Rows of methods that are `trained_by_loss` are initial values; those of other methods are final and stay
frozen while the expert is trained.

Does not cover collecting states (`flexmoe.routers.hidden_states`), training rows (`flexmoe.training.experts`) or the
prior of a composition (public's bias, `flexmoe compose --public-prior`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F

Needs = Literal["states", "moments", "embeddings", "nothing"]
Logits = tuple[torch.Tensor, ...]
"""Of own and of public tokens, [T] each."""
Folds = tuple[list[int], list[int]]
"""The numbers of own and of public tokens of consecutive folds; both lists are equally long, at least 2."""

RIDGE = 1e-3  # lambda of log_odds, on standardised inputs
SHRINKAGE = 0.1  # of lda's covariance towards its diagonal
CHUNK_ELEMENTS = 1 << 19  # of the states that are converted to float64 at a time
HELD_ELEMENTS = 1 << 22  # states of a side with at most so many are converted once
SAMPLE = 8  # tokens of each side per unit, on which log_odds is solved first
CONTRACTION = 0.1  # of Newton's decrement by a step; above it, the Hessian is computed again
CONVERGED = 1e-10  # Newton's decrement; the loss is then within half of it
MAX_STEPS = 200
MOST_LOGIT = 30.0  # of logits that are started from
PROJECTION_SEED = 0  # of the projection of embeddings: all owners must use the same one


@dataclass(frozen=True)
class RouterRow:
    """The logit of an expert is `<weight, u> + bias`. weight: float32 [H].

    `calibration` [1 + D + 1] is that of its evidence (`flexmoe.routers.evidence`), if it has one. `held_out`: of a row
    that was fitted with folds, the logits of its tokens, each by a row without the token's fold.
    """

    weight: torch.Tensor
    bias: float = 0.0
    calibration: torch.Tensor | None = None
    held_out: Logits | None = None

    def logits(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The logits float32 [T] of states, without evidence, on the states' device."""
        weight = self.weight.to(x_TH.device)
        return torch.cat([chunk.float() @ weight for (chunk,) in _chunks(x_TH)]) + self.bias


class Moments:
    """Mean [H] and covariance [H, H] of a stream of vectors, in float64, in one pass and constant memory."""

    def __init__(self, hidden_size: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._sum = torch.zeros(hidden_size, dtype=torch.float64, device=device)
        self._outer = torch.zeros(hidden_size, hidden_size, dtype=torch.float64, device=device)

    def update(self, x_TH: torch.Tensor) -> None:
        """Adds vectors [T, H] of any floating-point dtype."""
        for (chunk,) in _chunks(x_TH):
            x = chunk.double()
            self.count += len(x)
            self._sum += x.sum(0)
            self._outer += x.T @ x

    @property
    def mean(self) -> torch.Tensor:
        """float64 [H]."""
        return self._sum / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """float64 [H, H], normalised by the count."""
        return self._outer / self.count - torch.outer(self.mean, self.mean)


class FitRow(Protocol):
    """The function of a method; see the module's docstring."""

    def __call__(self, own, public, *, hidden_size: int, bias: bool, generator: torch.Generator) -> RouterRow: ...  # type: ignore[no-untyped-def]


@dataclass(frozen=True)
class RowMethod:
    """A method to fit a row: `fit(own, public, *, hidden_size, bias, generator)`, and `start`, `folds` with states."""

    name: str
    fit: FitRow
    needs: Needs
    trained_by_loss: bool


ROUTER_ROWS: dict[str, RowMethod] = {}


def router_row(name: str, *, needs: Needs, trained_by_loss: bool) -> Callable[[FitRow], FitRow]:
    """Registers a function as a method: `flexmoe train --router NAME`."""

    def register(fit: FitRow) -> FitRow:
        if name in ROUTER_ROWS:
            raise ValueError(f"Router row {name!r} is registered already.")
        ROUTER_ROWS[name] = RowMethod(name, fit, needs, trained_by_loss)
        return fit

    return register


def row_method(name: str) -> RowMethod:
    """The registered method of that name. ValueError: there is none; lists those that exist."""
    if name not in ROUTER_ROWS:
        raise ValueError(f"router={name!r}: no such router row method. Available: {', '.join(ROUTER_ROWS)}.")
    return ROUTER_ROWS[name]


@router_row("log_odds", needs="states", trained_by_loss=False)
def log_odds(
    own: torch.Tensor,
    public: torch.Tensor,
    *,
    hidden_size: int,
    bias: bool,
    generator: torch.Generator,
    start: Logits | None = None,
    folds: Folds | None = None,
) -> RouterRow:
    """Logistic regression of own against public states, solved by Newton's method in float64.

    With a bias z = (u - mean_pub) / std_pub, without one z = u / rms_pub; the minimum over v (and an unpenalised
    intercept a) of 1/2 E_own[softplus(-s)] + 1/2 E_pub[softplus(s)] + lambda/2 |v|^2 with s = <v, z> + a. Each side
    has the weight 1/2, whatever its number of tokens.

    Args:
        own, public: [T, H], any floating-point dtype, on any device with float64.
        start: logits of these tokens that are close to the solution's; the solution does not depend on them.
        folds: of these tokens. The solution without a fold is that of a step of Newton's method from the solution.
    """
    problem = _LogisticRegression(own, public, intercept=bias)
    solution = problem.solve(start)
    weight = solution[:hidden_size] / problem.scale
    intercept = (solution[hidden_size] - weight @ problem.centre).item() if bias else 0.0
    held_out = None if folds is None else problem.held_out(solution, folds)
    return RouterRow(weight.float(), intercept, held_out=held_out)


@router_row("lda", needs="moments", trained_by_loss=False)
def lda(own: Moments, public: Moments, *, hidden_size: int, bias: bool, generator: torch.Generator) -> RouterRow:
    """Linear discriminant: the log-odds of two Gaussians with a common covariance S, from moments alone.

    With a bias: w = S^-1 d and b = -<w, m>, with d the difference of the means and m their midpoint. Without one, the
    direction is that of the best linear regression through the origin, R^-1 d with R the uncentred second moments, and
    the length is such that <w, d> = <w, S w>: a step along w changes the log-odds as for the two Gaussians.
    S and R: the mean of both sides, shrunk by 0.1 towards the diagonal.
    """
    difference, midpoint = own.mean - public.mean, (own.mean + public.mean) / 2
    pooled = (own.covariance + public.covariance) / 2
    if bias:
        weight = _solve_shrunk(pooled, difference)
        return RouterRow(weight.float(), -(weight @ midpoint).item())
    second = pooled + (torch.outer(own.mean, own.mean) + torch.outer(public.mean, public.mean)) / 2
    weight = _solve_shrunk(second, difference)
    length = (weight @ difference) / (weight @ pooled @ weight).clamp_min(1e-300)
    return RouterRow((length * weight).float())


@router_row("hidden_mean", needs="moments", trained_by_loss=True)
def hidden_mean(
    own: Moments, public: Moments, *, hidden_size: int, bias: bool, generator: torch.Generator
) -> RouterRow:
    """FlexOlmo's hidden-state variant (arXiv 2507.07024): the row is initialised with the mean of the owner's states.

    Each mean is normalised to length 1, like the document embeddings of the paper's main variant: states of post-norm
    anchors are large, and the loss does not correct a row that starts with logits in the hundreds. In the paper,
    public's row is the mean of its own states; here it is zero, and the softmax over differences from public's row is
    the same.
    """
    return RouterRow((F.normalize(own.mean, dim=0) - F.normalize(public.mean, dim=0)).float())


@router_row("embedding", needs="embeddings", trained_by_loss=True)
def embedding(
    own: torch.Tensor, public: torch.Tensor, *, hidden_size: int, bias: bool, generator: torch.Generator
) -> RouterRow:
    """FlexOlmo's rows (arXiv 2507.07024, section 3.3): the mean of document embeddings, one vector for all layers.

    Relative to public's mean, as in `hidden_mean`. If the embedder's width W is not H, a fixed random isometry (the
    same for all owners) maps one space into the other.
    """
    difference = own.double().mean(0) - public.double().mean(0)
    return RouterRow(_project(difference, hidden_size).float())


@router_row("random", needs="nothing", trained_by_loss=True)
def random(own: None, public: None, *, hidden_size: int, bias: bool, generator: torch.Generator) -> RouterRow:
    """A baseline: normal with standard deviation 0.02, transformers' default initialisation of linear layers."""
    return RouterRow(torch.randn(hidden_size, generator=generator) * 0.02)


def embed_documents(documents: Sequence[str], embedder: str, limit: int = 1000, *, seed: int = 0) -> torch.Tensor:
    """Embeddings float32 [D, W] of `limit` randomly chosen documents, or of all if there are fewer; on the CPU.

    Files are often ordered by topic or date, so the first documents would not be representative.

    Args:
        documents: the texts.
        embedder: a sentence-transformers model, a folder or a Hub id.
        limit: the maximum number of documents.
        seed: of the choice.

    Raises:
        ImportError: sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer  # an extra, and slow to import
    except ImportError as error:
        raise ImportError("router='embedding' needs a sentence embedder: pip install 'flexmoe[embedding]'.") from error
    drawn = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
    sample = [documents[index] for index in drawn.tolist()]
    vectors = SentenceTransformer(embedder).encode(sample, convert_to_tensor=True)
    return vectors.float().cpu()


class _LogisticRegression:
    """The optimisation problem of `log_odds`; data stays in its own dtype and is converted by chunks, unless it is
    little.

    Values and gradients are computed in float64, as products of the states with a vector. The Hessian, the only large
    product, is computed in float32, factorised, and kept for as long as the steps with it converge fast: an inexact
    Hessian changes the number of steps, not the solution of `solve`.
    """

    def __init__(self, own: torch.Tensor, public: torch.Tensor, *, intercept: bool) -> None:
        for side, states in (("own", own), ("public", public)):
            if not len(states) or not all(torch.isfinite(chunk).all() for (chunk,) in _chunks(states)):
                raise ValueError(f"The anchor's states on {side} text are empty or not finite; no row can be fitted.")
        own, public = (states.double() if states.numel() <= HELD_ELEMENTS else states for states in (own, public))
        self.sides: tuple[tuple[torch.Tensor, float, float], ...]  # states, sign, share of a token
        self.sides = ((own, 1.0, 0.5 / len(own)), (public, -1.0, 0.5 / len(public)))
        self.intercept = intercept
        mean, square = _mean_and_square(public)
        self.centre = mean if intercept else torch.zeros_like(mean)
        deviation = (square - self.centre**2).clamp_min(0).sqrt()
        # a unit that is constant on public text has no scale of its own: that of the others, or of the values
        common = next(
            (size for size in (deviation.mean(), square.mean().sqrt()) if size > 0), torch.ones_like(mean[0])
        )
        self.scale = torch.where(deviation > 1e-9 * deviation.max(), deviation, common)
        self.ridge = torch.full((len(mean) + intercept,), RIDGE, dtype=torch.float64, device=own.device)
        if intercept:
            self.ridge[-1] = 0.0

    def solve(self, start: Logits | None = None) -> torch.Tensor:
        """The solution, float64 [H] or [H + 1], the intercept last."""
        if start is not None:  # beyond the limit, the Hessian vanishes
            device = self.scale.device
            start = tuple(side.to(device, torch.float64).clamp(-MOST_LOGIT, MOST_LOGIT) for side in start)
        theta = self._start() if start is None else self._step_from(start)
        value, gradient, logits = self._value_and_gradient(theta)
        if start is not None and not value < math.log(2):  # no better than a row of zeros
            theta = self._start()
            value, gradient, logits = self._value_and_gradient(theta)
        factor, before, size = None, math.inf, 1.0
        for _ in range(MAX_STEPS):
            if factor is not None:
                step, decrement = _newton_step(gradient, factor)
            if factor is None or size < 1 or decrement > CONTRACTION * before:
                factor = self._factor(logits)
                step, decrement = _newton_step(gradient, factor)
            if decrement < CONVERGED:
                return theta - step
            size, before = 1.0, decrement
            while True:
                next_value, next_gradient, next_logits = self._value_and_gradient(theta - size * step)
                if next_value <= value - 1e-4 * size * decrement + 1e-12 or size < 1e-6:
                    break
                size /= 2
            theta, value, gradient, logits = theta - size * step, next_value, next_gradient, next_logits
        raise ArithmeticError(f"log_odds: Newton's method did not converge in {MAX_STEPS} steps.")

    def held_out(self, theta: torch.Tensor, folds: Folds, dtype: torch.dtype = torch.float32) -> Logits:
        """The logits of the tokens, each by the solution without its fold; `theta` is the solution with all.

        That solution is one step of Newton's method away, whose Hessian is of products in `dtype`.
        """
        sides = [self._part(index, states) for index, (states, *_) in enumerate(self.sides)]
        of_sides = [side._terms(theta, dtype) for side in sides]
        found: list[list[torch.Tensor]] = [[] for _ in sides]
        split = (states.split(sizes) for (states, *_), sizes in zip(self.sides, folds, strict=True))
        for fold in zip(*split, strict=True):
            parts = [self._part(index, states) for index, states in enumerate(fold)]
            gradient, hessian = self.ridge * theta, self.ridge.diag()
            for part, side, of_side in zip(parts, self.sides, of_sides, strict=True):
                of_part = part._terms(theta, dtype)
                more = len(side[0]) / (len(side[0]) - len(part.sides[0][0]))  # of the others' share without the fold
                gradient = gradient + more * (of_side[0] - of_part[0])
                hessian += more * (of_side[1] - of_part[1])
            factor, failed = torch.linalg.cholesky_ex(hessian, check_errors=dtype == torch.float64)
            if failed:
                return self.held_out(theta, folds, torch.float64)
            step, _ = _newton_step(gradient, factor)
            for logits, part in zip(found, parts, strict=True):
                logits += part._value_and_gradient(theta - step)[2]
        own, public = (torch.cat(logits) for logits in found)
        return own, public

    def _part(self, index: int, states: torch.Tensor) -> _LogisticRegression:
        """What these states, of one side, add to the loss."""
        part = copy.copy(self)
        part.sides = ((states, *self.sides[index][1:]),)
        part.ridge = torch.zeros_like(self.ridge)
        return part

    def _terms(self, theta: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient and Hessian."""
        _, gradient, logits = self._value_and_gradient(theta)
        return gradient, self._hessian(logits, dtype)

    def _start(self) -> torch.Tensor:
        """The solution for a sample of the states if there are many, else zero."""
        count = SAMPLE * len(self.ridge)
        if all(len(states) < 4 * count for states, *_ in self.sides):
            return torch.zeros_like(self.ridge)
        own, public = (states[:: max(1, len(states) // count)] for states, *_ in self.sides)
        sample = _LogisticRegression(own, public, intercept=self.intercept)
        theta = sample.solve()
        weight = theta[: len(self.scale)] / sample.scale
        theta[: len(self.scale)] = weight * self.scale
        if self.intercept:
            theta[-1] += weight @ (self.centre - sample.centre)
        return theta

    def _step_from(self, start: Logits) -> torch.Tensor:
        """The result of a step of Newton's method from a function that has these logits."""
        pull, total = torch.zeros_like(self.scale), self.scale.new_zeros(())
        for (states, sign, share), logits in zip(self.sides, start, strict=True):
            for chunk, score in _chunks(states, logits):
                probability = torch.sigmoid(score)
                wrong = torch.sigmoid(-sign * score) * sign
                target = (probability * (1 - probability) * score + wrong) * share
                pull += chunk.double().T @ target
                total += target.sum()
        right = torch.zeros_like(self.ridge)
        right[: len(self.scale)] = (pull - total * self.centre) / self.scale
        if self.intercept:
            right[-1] = total
        return torch.cholesky_solve(right[:, None], self._factor(start))[:, 0]

    def _value_and_gradient(self, theta: torch.Tensor) -> tuple[float, torch.Tensor, Logits]:
        """With the logits of all tokens."""
        weight = theta[: len(self.scale)] / self.scale
        shift = (theta[-1] if self.intercept else 0.0) - self.centre @ weight
        value = 0.5 * (self.ridge * theta**2).sum()
        slope, total = torch.zeros_like(self.scale), torch.zeros_like(value)
        logits = []
        for states, sign, share in self.sides:
            found = []
            for (chunk,) in _chunks(states):
                x = chunk.double()
                found.append(x @ weight + shift)
                score = sign * found[-1]
                wrong = torch.sigmoid(-score) * (sign * share)  # the probability of the other class
                value = value + F.softplus(-score).sum() * share
                slope -= x.T @ wrong
                total -= wrong.sum()
            logits.append(torch.cat(found))
        gradient = self.ridge * theta
        gradient[: len(self.scale)] += (slope - total * self.centre) / self.scale
        if self.intercept:
            gradient[-1] += total
        return value.item(), gradient, tuple(logits)

    def _factor(self, logits: Logits) -> torch.Tensor:
        """The Cholesky factor of the Hessian, float64."""
        factor, failed = torch.linalg.cholesky_ex(self._hessian(logits, torch.float32))
        # where own states are far larger than public ones, rounding exceeds the ridge
        return torch.linalg.cholesky(self._hessian(logits, torch.float64)) if failed else factor

    def _hessian(self, logits: Logits, dtype: torch.dtype) -> torch.Tensor:
        """float64, of products in `dtype`."""
        hessian = self.ridge.diag()
        centre, scale = self.centre.to(dtype), self.scale.to(dtype)
        for (states, _, share), side in zip(self.sides, logits, strict=True):
            for chunk, score in _chunks(states, side):
                z = (chunk.to(dtype) - centre) / scale
                z = F.pad(z, (0, 1), value=1.0) if self.intercept else z
                probability = torch.sigmoid(score.to(dtype))
                z *= (probability * (1 - probability) * share).sqrt_()[:, None]
                hessian += z.T @ z
        return hessian


def _newton_step(gradient: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Newton's step for a Hessian with this Cholesky factor, and its decrement."""
    step = torch.cholesky_solve(gradient[:, None], factor)[:, 0]
    return step, (gradient @ step).item()


def _chunks(states: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Consecutive rows, few enough that a copy of states stays in the cache and that memory is reused."""
    size = max(1, CHUNK_ELEMENTS // states.shape[1])
    yield from zip(*(tensor.split(size) for tensor in (states, *others)), strict=True)


def _mean_and_square(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means float64 [H] of states and of their squares."""
    total, square = torch.zeros(2, states.shape[1], dtype=torch.float64, device=states.device).unbind()
    for (chunk,) in _chunks(states):
        x = chunk.double()
        total, square = total + x.sum(0), square + (x * x).sum(0)
    return total / len(states), square / len(states)


def _solve_shrunk(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    diagonal = matrix.diagonal()
    diagonal = diagonal.clamp_min(1e-12 * diagonal.mean().clamp_min(1e-288))  # dead units have no variance
    factor = torch.linalg.cholesky((1 - SHRINKAGE) * matrix + SHRINKAGE * diagonal.diag())
    return torch.cholesky_solve(vector[:, None], factor)[:, 0]


def _project(vector: torch.Tensor, hidden_size: int) -> torch.Tensor:
    width = len(vector)
    if width == hidden_size:
        return vector
    generator = torch.Generator().manual_seed(PROJECTION_SEED)
    gaussian = torch.randn(max(width, hidden_size), min(width, hidden_size), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(gaussian).Q  # orthonormal columns
    return basis @ vector if width < hidden_size else basis.T @ vector
