"""Router rows: how an owner, alone, makes the vector that says "this token is mine".

Shapes: T tokens, H hidden size, D documents, W width of a sentence embedding.

Public's row is zero, so a row r is a score of "mine" against "public", and softmax(0, r_1, r_2, ...) over rows made
apart is the posterior of all owners when each r_i is the log-odds log p_i(u) / p_public(u). No function here sees
another owner's data: that is what makes removing an owner exact.

A method is one pure function and one line of registration. It gets what it `needs`, from own and from public text:

    states      float [T, H]: FFN inputs of the frozen dense anchor, for one layer
    moments     `Moments` of them, for one layer
    embeddings  float [D, W]: one vector per document, the same for all layers
    nothing     None

and returns a `RouterRow`. Rows of methods that are `trained_by_loss` are a start; the others are final and stay
frozen while the expert trains through them.

NOT covered: collecting states (`flexmoe.hidden_states`), training rows (`flexmoe.training`), the prior of a
composition (public's bias, `flexmoe compose --public-prior`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F

Needs = Literal["states", "moments", "embeddings", "nothing"]

RIDGE = 1e-3  # lambda of log_odds, on standardised inputs
SHRINKAGE = 0.1  # of lda's covariance towards its diagonal
CHUNK = 16_384  # tokens turned to fp64 at a time
MAX_NEWTON_STEPS = 100
PROJECTION_SEED = 0  # of embedding's projection: every owner must use the same one


@dataclass(frozen=True)
class RouterRow:
    """The logit of an expert is `<weight, u> + bias`. weight: float32 [H]."""

    weight: torch.Tensor
    bias: float = 0.0


class Moments:
    """Mean [H] and covariance [H, H] of a stream of vectors, fp64, in one pass and without holding the stream."""

    def __init__(self, hidden_size: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._sum = torch.zeros(hidden_size, dtype=torch.float64, device=device)
        self._outer = torch.zeros(hidden_size, hidden_size, dtype=torch.float64, device=device)

    def update(self, x_TH: torch.Tensor) -> None:
        """Takes in vectors [T, H] of any float dtype."""
        for chunk in x_TH.split(CHUNK):
            x = chunk.double()
            self.count += len(x)
            self._sum += x.sum(0)
            self._outer += x.T @ x

    @property
    def mean(self) -> torch.Tensor:
        """fp64 [H]."""
        return self._sum / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """fp64 [H, H], normalised by the count."""
        return self._outer / self.count - torch.outer(self.mean, self.mean)


class FitRow(Protocol):
    """A function that makes a row of what its method needs, see the module's docstring."""

    def __call__(self, own, public, *, hidden_size: int, bias: bool, generator: torch.Generator) -> RouterRow: ...  # type: ignore[no-untyped-def]


@dataclass(frozen=True)
class RowMethod:
    """One way to make a row: `fit(own, public, *, hidden_size, bias, generator)`."""

    name: str
    fit: FitRow
    needs: Needs
    trained_by_loss: bool


ROUTER_ROWS: dict[str, RowMethod] = {}


def router_row(name: str, *, needs: Needs, trained_by_loss: bool) -> Callable[[FitRow], FitRow]:
    """Registers a function as a way to make rows: `flexmoe train --router NAME`."""

    def register(fit: FitRow) -> FitRow:
        if name in ROUTER_ROWS:
            raise ValueError(f"Router row {name!r} is registered already.")
        ROUTER_ROWS[name] = RowMethod(name, fit, needs, trained_by_loss)
        return fit

    return register


def row_method(name: str) -> RowMethod:
    """The registered method of that name. Raises: ValueError that lists what there is."""
    if name not in ROUTER_ROWS:
        raise ValueError(f"router={name!r}: no such way to make a router row. There are: {', '.join(ROUTER_ROWS)}.")
    return ROUTER_ROWS[name]


@router_row("log_odds", needs="states", trained_by_loss=False)
def log_odds(
    own: torch.Tensor, public: torch.Tensor, *, hidden_size: int, bias: bool, generator: torch.Generator
) -> RouterRow:
    """Logistic regression "own against public", solved by Newton's method in fp64.

    With a bias z = (u - mean_pub) / std_pub, without one z = u / rms_pub; the minimum over v (and an unpenalised
    intercept a) of 1/2 E_own[softplus(-s)] + 1/2 E_pub[softplus(s)] + lambda/2 |v|^2 with s = <v, z> + a. Each side
    weighs one half however many tokens it has. own, public: [T, H], any float dtype, on any device with fp64.
    """
    problem = _LogisticRegression(own, public, intercept=bias)
    solution = problem.solve()
    weight = solution[:hidden_size] / problem.scale
    intercept = (solution[hidden_size] - weight @ problem.centre).item() if bias else 0.0
    return RouterRow(weight.float(), intercept)


@router_row("lda", needs="moments", trained_by_loss=False)
def lda(own: Moments, public: Moments, *, hidden_size: int, bias: bool, generator: torch.Generator) -> RouterRow:
    """Linear discriminant: the log-odds of two Gaussians that share one covariance S, from moments alone.

    With a bias: w = S^-1 d and b = -<w, m>, d the difference of the means and m midway between them. Without one the
    direction is that of the best linear regression through the origin, R^-1 d with R the uncentred second moments; its
    length is such that a step along it changes the log-odds by what the two Gaussians say, <w, d> = <w, S w>.
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
    """FlexOlmo's hidden-state variant (arXiv 2507.07024): a row starts at the mean of the owner's states.

    Each mean is scaled to length 1, as the document embeddings that stand there in the paper's main variant are:
    states of post-norm anchors are long, and a row that begins with logits in the hundreds is never mended by the
    loss.
    There public has the mean of its own states as a row; here public's row is zero, and the softmax over differences
    to public's row is the same softmax.
    """
    return RouterRow((F.normalize(own.mean, dim=0) - F.normalize(public.mean, dim=0)).float())


@router_row("embedding", needs="embeddings", trained_by_loss=True)
def embedding(
    own: torch.Tensor, public: torch.Tensor, *, hidden_size: int, bias: bool, generator: torch.Generator
) -> RouterRow:
    """FlexOlmo's rows (arXiv 2507.07024, section 3.3): the mean of document embeddings, one vector for all layers.

    Relative to public's mean, as in `hidden_mean`. Where the embedder's width W is not H, a fixed random isometry (the
    same for every owner) carries one space into the other.
    """
    difference = own.double().mean(0) - public.double().mean(0)
    return RouterRow(_project(difference, hidden_size).float())


@router_row("random", needs="nothing", trained_by_loss=True)
def random(own: None, public: None, *, hidden_size: int, bias: bool, generator: torch.Generator) -> RouterRow:
    """A baseline: normal with standard deviation 0.02, transformers' usual start of a linear layer."""
    return RouterRow(torch.randn(hidden_size, generator=generator) * 0.02)


def embed_documents(documents: Sequence[str], embedder: str, limit: int = 1000, *, seed: int = 0) -> torch.Tensor:
    """Embeddings float [D, W] of `limit` documents, drawn by the seed, or of all if there are no more.

    `embedder`: a sentence-transformers model, a folder or a Hub id. Files often have an order (by topic, by date), so
    the first documents would not stand for the others.

    Raises: ImportError when sentence-transformers is not installed.
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
    """The problem that `log_odds` states; data stays in its own dtype and goes through fp64 chunk by chunk."""

    def __init__(self, own: torch.Tensor, public: torch.Tensor, *, intercept: bool) -> None:
        for side, states in (("own", own), ("public", public)):
            if not len(states) or not torch.isfinite(states).all():
                raise ValueError(f"The anchor's states on {side} text are empty or not finite; no row can be fitted.")
        self.sides = ((own, 1.0), (public, -1.0))
        self.intercept = intercept
        mean, square = _mean_and_square(public)
        self.centre = mean if intercept else torch.zeros_like(mean)
        spread = (square - self.centre**2).clamp_min(0).sqrt()
        # a unit that public text never moves has no scale of its own
        self.scale = torch.where(spread > 1e-9 * spread.max(), spread, spread.mean().clamp_min(1e-30))
        self.ridge = torch.full((len(mean) + intercept,), RIDGE, dtype=torch.float64, device=own.device)
        if intercept:
            self.ridge[-1] = 0.0

    def solve(self) -> torch.Tensor:
        """fp64 [H] or [H + 1], the intercept last."""
        theta = torch.zeros_like(self.ridge)
        for _ in range(MAX_NEWTON_STEPS):
            value, gradient, hessian = self._derivatives(theta)
            step = torch.linalg.solve(hessian, gradient)
            decrement = (gradient @ step).item()
            if decrement < 1e-10:  # convergence is quadratic: this last step leaves nothing
                return theta - step
            size = 1.0
            while size > 1e-6 and self._value(theta - size * step) > value - 1e-4 * size * decrement + 1e-12:
                size /= 2
            theta = theta - size * step
        raise ArithmeticError(f"log_odds: Newton's method did not settle in {MAX_NEWTON_STEPS} steps.")

    def _rows(self) -> Iterator[tuple[torch.Tensor, float, float]]:
        """(standardised rows fp64 [t, H or H + 1], their class +1 or -1, the weight of a row) in chunks."""
        for states, sign in self.sides:
            for chunk in states.split(CHUNK):
                z = (chunk.double() - self.centre) / self.scale
                yield F.pad(z, (0, 1), value=1.0) if self.intercept else z, sign, 0.5 / len(states)

    def _value(self, theta: torch.Tensor) -> float:
        data = sum(weight * F.softplus(-sign * (z @ theta)).sum() for z, sign, weight in self._rows())
        return float(data + 0.5 * (self.ridge * theta**2).sum())

    def _derivatives(self, theta: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
        value = 0.5 * (self.ridge * theta**2).sum()
        gradient, hessian = self.ridge * theta, self.ridge.diag()
        for z, sign, weight in self._rows():
            score = sign * (z @ theta)
            wrong = torch.sigmoid(-score)  # the probability given to the other class
            value = value + weight * F.softplus(-score).sum()
            gradient = gradient - weight * sign * (z.T @ wrong)
            hessian = hessian + z.T @ (z * (weight * wrong * (1 - wrong))[:, None])
        return value.item(), gradient, hessian


def _mean_and_square(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 mean [H] of states and of their squares."""
    total = square = torch.zeros(states.shape[1], dtype=torch.float64, device=states.device)
    for chunk in states.split(CHUNK):
        x = chunk.double()
        total, square = total + x.sum(0), square + (x * x).sum(0)
    return total / len(states), square / len(states)


def _solve_shrunk(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    diagonal = matrix.diagonal()
    diagonal = diagonal.clamp_min(1e-12 * diagonal.mean().clamp_min(1e-288))  # a dead unit has no variance
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
