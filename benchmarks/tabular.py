"""Exact figures of the objectives on policies small enough to enumerate, in float64.

    python benchmarks/tabular.py [--out docs/benchmarks-tabular.md] [--quick]

Writes one Markdown document of tables and prints it; minutes on one core, seconds with --quick. The
losses are those of `bonbon.objectives`. For unlimited data their expectation has a closed form,
which section D checks against the objectives on drawn groups.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import scipy.interpolate
import scipy.optimize
import scipy.stats
import torch
from numpy.typing import NDArray

from bonbon import tilt as tilts
from bonbon.groups.group import Group
from bonbon.objectives.catalogue import OBJECTIVES, GroupLogps, ObjectiveSettings
from bonbon.objectives.pairs import bon_target
from bonbon.objectives.ranks import log_density_targets
from bonbon.objectives.selection import Selector
from bonbon.tilt.base import Tilt
from bonbon.tilt.best_of_n import BestOfN
from bonbon.tilt.catalogue import TILTS
from bonbon.tilt.ranks import rank_targets, rank_weights

Floats = NDArray[np.float64]
Tensor = torch.Tensor
Loss = Callable[[Tensor], Tensor]  # of the outcomes' log-probabilities, or of parameters

M = 8  # draws a group
PAIRS = ("ipo_bon", "bonbon", "bonbon_dpo", "sft_bon")
REGRESSIONS = ("rank_regression", "rank_regression_pointwise", "rank_regression_huber")
RANKS = (*REGRESSIONS, "bonbon_ranks", "weighted_sft")
METHODS = [(name, "best_of_n") for name in PAIRS + RANKS] + [(name, "optimal") for name in RANKS]
BASELINES = [
    f"{kind}{pair}" for kind in ("dpo", "ipo") for pair in ("", "_best_random", "_random_pair")
]
BETAS = (0.02, 0.05, 0.1, 0.2, 0.5)
DELTAS = (1.0, 2.0, 4.0, 8.0)
WINS = tuple(0.5 + share * (BestOfN(M).win_rate() - 0.5) for share in (0.8, 1.0))
HIGHEST = 0.91  # ceilings are computed up to this win rate; best-of-8 has 0.889
ITERATIONS = 200  # most iterations of L-BFGS over drawn groups
EXACT_ITERATIONS = 1000  # the same for expected losses


@dataclass(frozen=True)
class Sizes:
    """The sizes of the computations."""

    seeds: int = 8
    groups: tuple[int, ...] = (100, 300, 1000, 10_000)
    middle: int = 1000  # the number of groups in tables with only one
    gradient_groups: int = 20_000
    tokens: int = 6
    length: int = 5
    sequence_groups: tuple[int, ...] = (1000, 10_000)
    sequence_seeds: int = 2


QUICK = Sizes(2, (100,), 100, 1000, 3, 4, (300,), 1)


# --- outcomes, policies, minimisation -------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """A policy's exact win rate against the base and KL from it in nats."""

    win: float
    kl: float

    @property
    def efficiency(self) -> float:
        """The least KL for this win rate / the KL spent."""
        return float(tilts.optimal_kl(self.win)) / self.kl if self.win > 0.5 else math.nan

    def __str__(self) -> str:
        return f"{self.win:.3f} / {self.kl:.2f} / {self.efficiency:.2f}"


@dataclass(frozen=True)
class World:
    """All outcomes of one prompt: base log-probabilities and distinct rewards, both (outcomes,)."""

    base: Tensor
    rewards: Tensor

    @cached_property
    def p(self) -> Floats:
        p = np.asarray(self.base.exp().numpy())
        return p / p.sum()

    @cached_property
    def quantiles(self) -> Floats:
        """The quantiles u(y) = P(reward below) + P(reward equal)/2 under the base."""
        order = np.argsort(self.rewards.numpy())
        u = np.empty_like(self.p)
        u[order] = np.cumsum(self.p[order]) - self.p[order] / 2
        return u

    def tilted(self, tilt: Tilt) -> Tensor:
        return torch.from_numpy(tilts.tilted_pmf(self.p, self.rewards.numpy(), tilt))

    def figures(self, log_ratios: Tensor | Floats) -> Figures:
        """Compute the figures of π ∝ π0 exp(log-ratio)."""
        q = (self.base + torch.as_tensor(log_ratios)).softmax(0).numpy()
        return Figures(tilts.win_rate_pmf(q, self.p, self.rewards.numpy()), tilts.kl_pmf(q, self.p))

    def draw(self, groups: int, seed: int) -> Tensor:
        """Draw indices of outcomes from the base, (groups, M)."""
        rng = np.random.default_rng(seed)
        return torch.from_numpy(rng.choice(len(self.p), (groups, M), p=self.p))


@dataclass(frozen=True)
class Policies:
    """A class of policies: `log_probs` maps `size` parameters to all outcomes' ln π; 0 is π0."""

    size: int
    log_probs: Loss


def minimise(loss: Loss, start: Tensor, iterations: int) -> Tensor:
    """Minimise a loss by L-BFGS from `start`, with at most so many iterations."""

    def value_and_gradient(x: Floats) -> tuple[float, Floats]:
        params = torch.from_numpy(x.copy()).requires_grad_()
        value = loss(params)
        return value.item(), torch.autograd.grad(value, params)[0].numpy()

    options: dict[str, float] = {"maxiter": iterations, "maxfun": 10 * iterations}
    options |= {"maxcor": 20, "ftol": 1e-9, "gtol": 1e-8}
    result = scipy.optimize.minimize(
        value_and_gradient, start.numpy(), jac=True, method="L-BFGS-B", options=options
    )
    return torch.from_numpy(result.x)


def fitted(
    world: World, policies: Policies, loss: Loss, iterations: int = EXACT_ITERATIONS
) -> Figures:
    """Compute the figures of the policy in the class that minimises `loss`."""
    start = torch.zeros(policies.size).double()
    params = minimise(lambda x: loss(policies.log_probs(x)), start, iterations)
    return world.figures(policies.log_probs(params) - world.base)


def ceiling(world: World, policies: Policies) -> Callable[[float], Figures]:
    """Compute the class's least KL for each win rate; NaN above its largest, or above `HIGHEST`.

    Maximises β·win − KL by exact gradients over a grid of β, each started at the last solution. A
    spline interpolates between these points, with dKL/dwin = β.
    """
    u, params = torch.from_numpy(world.quantiles), torch.zeros(policies.size).double()
    points = [(0.5, 0.0, 0.0)]
    for beta in map(float, np.geomspace(0.5, 200, 18)):

        def loss(x: Tensor, beta: float = beta) -> Tensor:
            log_probs = policies.log_probs(x)
            return (log_probs.exp() * (log_probs - world.base - beta * u)).sum()

        params = minimise(loss, params, EXACT_ITERATIONS)
        figures = world.figures(policies.log_probs(params) - world.base)
        if figures.win > points[-1][0] + 1e-4:
            points.append((figures.win, figures.kl, beta))
        if figures.win > HIGHEST:
            break
    spline = scipy.interpolate.CubicHermiteSpline(*np.array(points).T, extrapolate=False)
    return lambda win: Figures(win, float(spline(win)))


# --- drawn groups through the objectives ----------------------------------------------------------


def selected(world: World, draws: Tensor, select: Selector) -> Tensor:
    """Return the outcomes that an objective uses, (groups, completions), without tied groups."""
    rows, rewards = draws.tolist(), world.rewards[draws].tolist()
    texts, ids, numbers = (("",) * len(rows[0]), ((),) * len(rows[0]), (0.0,) * len(rows[0]))
    chosen = []
    for i, (row, scores) in enumerate(zip(rows, rewards, strict=True)):
        group = Group(str(i), "", (), texts, ids, numbers, texts, rewards=tuple(scores))
        kept = select(group)
        if kept is not None:
            chosen.append([row[k] for k in kept])
    return torch.tensor(chosen)


@dataclass(frozen=True)
class Batch:
    """Groups prepared for one objective: `index` holds the outcomes it uses."""

    name: str
    world: World
    index: Tensor
    settings: ObjectiveSettings

    def losses(self, logps: Tensor) -> Tensor:
        """Compute the objective's losses, (groups,), at log-probabilities (groups, completions)."""
        group = GroupLogps(logps, self.world.base[self.index], self.world.rewards[self.index])
        return OBJECTIVES[self.name].loss(group, self.settings)

    def loss(self, log_probs: Tensor) -> Tensor:
        """Compute the mean loss at a policy's log-probabilities of all outcomes."""
        return self.losses(log_probs[self.index]).mean()


def batch(world: World, draws: Tensor, name: str, settings: ObjectiveSettings) -> Batch:
    """Make a batch: all M draws for objectives of any tilt, M/n groups of n for the others."""
    objective = OBJECTIVES[name]
    groups = draws if objective.any_tilt else draws.reshape(-1, settings.n)
    return Batch(name, world, selected(world, groups, objective.select), settings)


def aimed(n: int, tilt: str = "best_of_n") -> ObjectiveSettings:
    return ObjectiveSettings(n=n, tilt=TILTS[tilt](n))


# --- expectations over groups ---------------------------------------------------------------------


def smoothed(values: Floats, u: Floats) -> Floats:
    """Compute Σ_i v_i B_i(u): values by rank, averaged over the rank of a draw with quantile u."""
    ranks = np.arange(len(values))
    return np.asarray(scipy.stats.binom.pmf(ranks, len(values) - 1, u[..., None]) @ values)


def population_regression(world: World, targets: Floats, centred: bool) -> Loss:
    """Return E(h − s)² with s = Σ t_i B_i(u), up to a constant; the variance if `centred`.

    Centring in a group of m multiplies h by 1 − 1/m. `rank_regression` multiplies its targets by
    the same, so both cancel; its loss is twice this one.
    """
    p, s = torch.from_numpy(world.p), torch.from_numpy(smoothed(targets, world.quantiles))

    def loss(log_probs: Tensor) -> Tensor:
        residuals = log_probs - world.base - s
        return p @ (residuals - p @ residuals if centred else residuals) ** 2

    return loss


def population_ipo(world: World, n: int) -> Loss:
    """Return E(h_b − h_w − c)²; best and worst quantiles have density n(n−1)(u − v)^(n−2).

    The powers of u − v are expanded, so that cumulative sums in order of reward suffice.
    """
    order = torch.from_numpy(np.argsort(world.quantiles))
    u, p = (torch.from_numpy(x)[order] for x in (world.quantiles, world.p))
    target, best, worst = bon_target(n), n * u ** (n - 1), n * (1 - u) ** (n - 1)
    signed = [math.comb(n - 2, k) * (-1) ** k for k in range(n - 1)]

    def loss(log_probs: Tensor) -> Tensor:
        ph = p * (log_probs - world.base)[order]
        below = [torch.cumsum(ph * u**k, 0) - ph * u**k for k in range(n - 1)]
        products = [c * (ph * u ** (n - 2 - k)) @ below[k] for k, c in enumerate(signed)]
        crossed = n * (n - 1) * torch.stack(products).sum()
        return (best + worst) @ (ph**2 / p) - 2 * crossed - 2 * target * (best - worst) @ ph

    return loss


def population_sft(world: World, tilt: Tilt) -> Loss:
    """Return the expected `weighted_sft`: cross-entropy to π0 · Σ w_i B_i(u)."""
    target = torch.from_numpy(world.p * smoothed(rank_weights(tilt, M), world.quantiles))
    return lambda log_probs: -(target @ log_probs)


def reverse_kl(world: World, tilt: Tilt) -> Loss:
    """Return KL(π ‖ tilted), the loss of on-policy learning (vBoN)."""
    density = torch.from_numpy(tilt.log_density(world.quantiles))
    return lambda log_probs: log_probs.exp() @ (log_probs - world.base - density)


def weighted_reverse_kl(world: World, draws: Tensor, tilt: Tilt) -> Loss:
    """Return the mean of e^h (h − 1 − t) over base draws, with importance weights e^h = π/π0.

    It estimates KL(π ‖ tilted). Its gradient is e^h (h − t) ∇h: the pointwise regression's,
    weighted by the policy.
    """
    base, t = world.base[draws], log_density_targets(world.rewards[draws], tilt)

    def loss(log_probs: Tensor) -> Tensor:
        h = log_probs[draws] - base
        return (h.exp() * (h - 1 - t)).mean()

    return loss


# --- A: unlimited data, a continuum of outcomes ---------------------------------------------------


@cache
def continuum(outcomes: int = 1000) -> World:
    """Return equally likely outcomes in order of reward, which approximate a continuum."""
    base = torch.full((outcomes,), -math.log(outcomes)).double()
    return World(base, torch.arange(outcomes).double())


@cache
def ipo_minimiser(n: int) -> Figures:
    """Minimise IPO's quadratic loss by its normal equations, a weighted graph's Laplacian."""
    u = continuum().quantiles
    joint = np.tril(np.ones((len(u), len(u))), -1) * np.abs(u[:, None] - u) ** (n - 2)
    edges, pull = joint + joint.T, joint.sum(axis=1) - joint.sum(axis=0)
    laplacian = np.diag(edges.sum(axis=1)) - edges
    scale = 1 / np.sqrt(edges.sum(axis=1)[1:])  # middle ranks have almost no weight at large n
    scaled = scale[:, None] * laplacian[1:, 1:] * scale
    h = scale * np.linalg.solve(scaled, scale * bon_target(n) * pull[1:])
    return continuum().figures(np.concatenate([[0.0], h]))


def unlimited(n: int, m: int) -> list[str]:
    """Compute a row of section A."""
    world, tilt = continuum(), BestOfN(n)
    plain = tilt.rank_log_density(m)
    shapes = (plain, plain * m / (m - 1), rank_targets(tilt, m))
    pointwise = population_regression(world, plain, centred=False)
    return [
        str(n),
        str(m),
        str(Figures(tilt.win_rate(), tilt.kl())),
        str(ipo_minimiser(n)) if n == m else "",
        str(world.figures(np.log(smoothed(rank_weights(tilt, m), world.quantiles)))),
        str(fitted(world, free_logits(world), pointwise)),
        *(str(world.figures(smoothed(shape, world.quantiles))) for shape in shapes),
    ]


def polynomial_minimiser(name: str, n: int, m: int) -> Floats:
    """Minimise the objective itself over normalised h = Σ a_i B_i(u), by quadrature.

    Ordered quantiles are U_(k) = U_(k+1) z_k with density Π k z_k^(k−1) on the unit cube. Gauss's
    rule with 8 nodes a side is exact for the squares of these polynomials.
    """
    nodes, weights = np.polynomial.legendre.leggauss(8)
    z = np.array(list(itertools.product((nodes + 1) / 2, repeat=m)))
    mass = np.array(list(itertools.product(weights / 2, repeat=m)))
    k = np.arange(1, m + 1)
    density = torch.from_numpy((mass * k * z ** (k - 1)).prod(axis=1))
    u = np.cumprod(z[:, ::-1], axis=1)[:, ::-1].copy()
    rows, grid = (
        torch.from_numpy(np.stack([smoothed(one, x) for one in np.eye(m)], axis=-1))
        for x in (u, continuum().quantiles)
    )

    def normalised(a: Tensor) -> Tensor:
        return a - (continuum().base + grid @ a).logsumexp(0)

    def loss(a: Tensor) -> Tensor:
        h = rows @ normalised(a)
        group = GroupLogps(h, torch.zeros_like(h), torch.from_numpy(u))
        return density @ OBJECTIVES[name].loss(group, aimed(n))

    return np.asarray(normalised(minimise(loss, torch.zeros(m).double(), EXACT_ITERATIONS)).numpy())


# --- B: one prompt, 400 outcomes ------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A world with features of its outcomes, (outcomes, features)."""

    world: World
    features: Tensor


@cache
def prompt(seed: int, outcomes: int = 400, features: int = 24) -> Prompt:
    """Make a Dirichlet(5, …) base, with normal features that make half the reward's variance."""
    rng = np.random.default_rng([seed, 1])
    p = rng.dirichlet(np.full(outcomes, 5.0))
    phi = rng.standard_normal((outcomes, features))
    rewards = phi.sum(axis=1) / math.sqrt(features) + rng.standard_normal(outcomes)
    world = World(torch.from_numpy(np.log(p)), torch.from_numpy(rewards))
    return Prompt(world, torch.from_numpy(phi))


def free_logits(world: World) -> Policies:
    return Policies(len(world.base), lambda x: (world.base + x).log_softmax(0))


def linear(world: World, features: Tensor) -> Policies:
    """Return the policies ln π = ln π0 + θ·φ + const."""
    return Policies(features.shape[1], lambda x: (world.base + features @ x).log_softmax(0))


CLASSES: dict[str, Callable[[Prompt], Policies]] = {
    "Free logits": lambda x: free_logits(x.world),
    "24 features": lambda x: linear(x.world, x.features),
}


def mean_and_error(values: Sequence[float]) -> str:
    if np.isnan(values).any():
        return "-"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.3f}"


def averaged(runs: Sequence[Figures]) -> str:
    """Format means ± standard errors; no efficiency if a run has a win rate of ½ or less."""
    columns = ([f.win for f in runs], [f.kl for f in runs], [f.efficiency for f in runs])
    return " / ".join(map(mean_and_error, columns))


@dataclass(frozen=True)
class Trial:
    """Minimisers of objectives over drawn groups, one a seed, in one of `CLASSES`."""

    kind: str
    sizes: Sizes

    def runs(self, name: str, groups: int, settings: ObjectiveSettings) -> list[Figures]:
        figures = []
        for seed in range(self.sizes.seeds):
            world, policies = prompt(seed).world, CLASSES[self.kind](prompt(seed))
            draws = world.draw(max(self.sizes.groups), seed)[:groups]
            loss = batch(world, draws, name, settings).loss
            figures.append(fitted(world, policies, loss, ITERATIONS))
        return figures

    def few_groups(self, name: str, settings: ObjectiveSettings) -> list[str]:
        return [averaged(self.runs(name, g, settings)) for g in self.sizes.groups]

    def best_beta(self, name: str) -> list[str]:
        """Return the most efficient β of the grid, among those that recover 0.8 on average."""
        tried = []
        for beta in BETAS:
            runs = self.runs(name, self.sizes.middle, replace(aimed(M), beta=beta))
            if np.mean([f.win for f in runs]) >= WINS[0]:
                tried.append((np.mean([f.efficiency for f in runs]), f"{beta:g}", averaged(runs)))
        return [name, *max(tried, default=(0.0, "none", ""))[1:]]

    def ceiling(self) -> list[str]:
        prompts = [prompt(seed) for seed in range(self.sizes.seeds)]
        ceilings = [ceiling(x.world, CLASSES[self.kind](x)) for x in prompts]
        return [mean_and_error([least(win).efficiency for least in ceilings]) for win in WINS]


# --- C: gradient noise ----------------------------------------------------------------------------


def outcome_gradients(made: Batch, per: int) -> Tensor:
    """Compute gradients in the logits at the base, averaged over `per` groups, (…, outcomes).

    With c_i = ∂loss/∂ln π(y_i) a group's gradient is Σ_i c_i (e_{y_i} − π0).
    """
    at_base = made.world.base[made.index].requires_grad_()
    (c,) = torch.autograd.grad(made.losses(at_base).sum(), at_base)
    gradients = torch.zeros(len(c), len(made.world.base)).double().scatter_add_(1, made.index, c)
    gradients -= c.sum(1, keepdim=True) * made.world.base.exp()
    whole = len(c) // per * per
    return gradients[:whole].reshape(-1, per, gradients.shape[1]).mean(1)


def noise_to_signal(gradients: Tensor) -> float:
    """Compute tr Cov(g) / ‖E g‖² over groups; the estimate of ‖E g‖² is unbiased."""
    noise = gradients.var(dim=0).sum()
    return float(noise / ((gradients.mean(0) ** 2).sum() - noise / len(gradients)))


def gradient_noise(name: str, settings: ObjectiveSettings, sizes: Sizes) -> list[str]:
    """Compute noise / signal for logits and features, Euclidean and whitened by π0's Fisher matrix.

    For free logits that matrix is diag π0 − π0 π0ᵀ and gradients sum to 0, so ‖g‖² is Σ g²/π0.
    """
    world, phi = prompt(0).world, prompt(0).features
    draws = world.draw(sizes.gradient_groups, seed=1)
    per = 1 if OBJECTIVES[name].any_tilt else M // settings.n
    free = outcome_gradients(batch(world, draws, name, settings), per)
    p, u = world.base.exp(), torch.from_numpy(world.quantiles)
    centred = phi - p @ phi
    root = torch.linalg.cholesky(centred.T @ (p[:, None] * centred))
    natural = free / p.sqrt()
    natural_linear = torch.linalg.solve_triangular(root, (free @ phi).T, upper=False).T
    wanted, mean = p.sqrt() * (p @ u - u), natural.mean(0)
    cosine = float(wanted @ mean / (wanted.norm() * mean.norm()))
    figures = [noise_to_signal(g) for g in (free, natural, free @ phi, natural_linear)]
    return [*(f"{x:.1f}" for x in figures), f"{cosine:.3f}"]


# --- D: autoregressive policies -------------------------------------------------------------------


@dataclass(frozen=True)
class Sequences:
    """All sequences of tokens, with rewards.

    `base[t]` is ln π0(token | prefix), (tokens^t, tokens), prefixes in lexical order.
    """

    base: tuple[Tensor, ...]
    rewards: Tensor

    @property
    def tokens(self) -> int:
        return self.base[0].shape[1]

    @cached_property
    def world(self) -> World:
        return World(joint(self.base), self.rewards)

    def marginals(self, q: Tensor) -> list[Tensor]:
        """Compute the probabilities of all prefixes of 0, 1, …, length tokens."""
        return [q.reshape(self.tokens**t, -1).sum(1) for t in range(len(self.base) + 1)]


def joint(conditionals: Iterable[Tensor]) -> Tensor:
    """Compute ln π of all sequences."""
    total = torch.zeros(1).double()
    for table in conditionals:
        total = (total[:, None] + table).flatten()
    return total


def all_sequences(tokens: int, length: int, seed: int = 0) -> Sequences:
    """Make a base conditioned on the last two tokens, with rewards of tokens, pairs and noise."""
    rng = np.random.default_rng(seed)
    table = torch.from_numpy(rng.standard_normal((tokens + 1, tokens + 1, tokens))).log_softmax(2)
    y = np.array(list(itertools.product(range(tokens), repeat=length)))
    base = []
    for t in range(length):
        prefixes = np.full((tokens**t, 2 + t), tokens)
        prefixes[:, 2:] = y[:: tokens ** (length - t), :t]
        base.append(table[prefixes[:, -2], prefixes[:, -1]])
    p = joint(base).exp().numpy()
    single = rng.standard_normal((length, tokens))
    double = rng.standard_normal((length, length, tokens, tokens))
    pairs = itertools.combinations(range(length), 2)
    parts = [
        np.sum([single[t, y[:, t]] for t in range(length)], axis=0),
        np.sum([double[s, t, y[:, s], y[:, t]] for s, t in pairs], axis=0),
        rng.standard_normal(len(y)),
    ]
    variances = [p @ (part - p @ part) ** 2 for part in parts]
    shares = zip((0.4, 0.4, 0.2), parts, variances, strict=True)
    rewards = np.sum(
        [math.sqrt(share / variance) * part for share, part, variance in shares], axis=0
    )
    return Sequences(tuple(base), torch.from_numpy(rewards))


@dataclass(frozen=True)
class ContextTables:
    """Policies that add a table to the base's logits; `rows[t]`: the rows of t-token prefixes."""

    name: str
    space: Sequences
    rows: tuple[Tensor, ...]

    def conditionals(self, params: Tensor) -> list[Tensor]:
        table = params.reshape(-1, self.space.tokens)
        levels = zip(self.space.base, self.rows, strict=True)
        return [(base + table[rows]).log_softmax(1) for base, rows in levels]

    @cached_property
    def policies(self) -> Policies:
        size = (1 + int(max(rows.max() for rows in self.rows))) * self.space.tokens
        return Policies(size, lambda x: joint(self.conditionals(x)))


def capacities(space: Sequences) -> list[ContextTables]:
    """List classes of growing capacity; prefixes shorter than the context have their own rows."""
    v, steps = space.tokens, range(len(space.base))
    starts = [sum(v**s for s in range(t)) for t in range(len(space.base) + 1)]

    def last(k: int) -> tuple[Tensor, ...]:
        return tuple(starts[min(t, k)] + torch.arange(v**t) % v ** min(t, k) for t in steps)

    by_position = tuple(rows + t * starts[3] for t, rows in enumerate(last(2)))
    return [
        ContextTables("none", space, last(0)),
        ContextTables("last token", space, last(1)),
        ContextTables("last two", space, last(2)),
        ContextTables("last two, position", space, by_position),
        ContextTables("whole prefix", space, last(len(space.base))),
    ]


def token_credits(space: Sequences, tilt: Tilt) -> list[Tensor]:
    """Compute V(y_≤t) − V(y_<t) by prefix and token; V = ln E[f(u) | prefix] under the base."""
    tilted, base = (space.marginals(q) for q in (space.world.tilted(tilt), space.world.base.exp()))
    values = [(a / b).log() for a, b in zip(tilted, base, strict=True)]
    return [b.reshape(-1, space.tokens) - a[:, None] for a, b in itertools.pairwise(values)]


def with_credit(tables: ContextTables, tilt: Tilt, weights: Tensor, iterations: int) -> Figures:
    """Minimise Σ_y weight(y) Σ_t (ln π/π0(y_t | y_<t) − ΔV_t)²."""
    space, masses = tables.space, tables.space.marginals(weights)[1:]
    targets = [a + b for a, b in zip(space.base, token_credits(space, tilt), strict=True)]

    def loss(params: Tensor) -> Tensor:
        levels = zip(masses, tables.conditionals(params), targets, strict=True)
        return torch.stack([mass @ (a - b).flatten() ** 2 for mass, a, b in levels]).sum()

    params = minimise(loss, torch.zeros(tables.policies.size).double(), iterations)
    return space.world.figures(tables.policies.log_probs(params) - space.world.base)


def sequence_methods(world: World) -> dict[tuple[str, str], Loss]:
    """Return the expected losses over groups of M from the base, and on-policy learning's."""
    methods = {("ipo_bon", "best_of_n"): population_ipo(world, M)}
    for name in ("best_of_n", "optimal"):
        tilt, targets = TILTS[name](M), rank_targets(TILTS[name](M), M)
        methods["rank_regression", name] = population_regression(world, targets, centred=True)
        pointwise = population_regression(world, targets, centred=False)
        methods["rank_regression_pointwise", name] = pointwise
        methods["weighted_sft", name] = population_sft(world, tilt)
        methods["on-policy reverse KL", name] = reverse_kl(world, tilt)
    return methods


def expectation_check(world: World, name: str, loss: Loss, scale: float) -> list[str]:
    """Compare the loss's change from the base to a random policy, on groups and by formula."""
    made = batch(world, world.draw(20_000, seed=2), name, aimed(M))
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal(len(world.base)))
    away = (world.base + noise).log_softmax(0)
    change = made.losses(away[made.index]) - made.losses(world.base[made.index])
    error = change.std() / math.sqrt(len(change))
    formula = scale * (loss(away) - loss(world.base))
    return [name, f"{change.mean():.3f} ± {error:.3f}", f"{formula:.3f}"]


def sequence_rows(
    space: Sequences, classes: Sequence[ContextTables], groups: int, sizes: Sizes
) -> Iterable[list[str]]:
    """Yield the rows of minimisers over drawn groups; credit uses all draws and the exact V."""
    world = space.world
    draws = [world.draw(groups, seed) for seed in range(sizes.sequence_seeds)]

    def row(name: str, tilt: str, runs: Sequence[Sequence[Figures]]) -> list[str]:
        means = [np.mean([(f.win, f.kl) for f in figures], axis=0) for figures in runs]
        return [name, tilt, *(str(Figures(float(win), float(kl))) for win, kl in means)]

    made: dict[tuple[str, str], list[Loss]] = {
        (name, tilt): [batch(world, d, name, aimed(M, tilt)).loss for d in draws]
        for name, tilt in SEQUENCE_METHODS
    }
    optimal = TILTS["optimal"](M)
    made["weighted reverse KL", "optimal"] = [weighted_reverse_kl(world, d, optimal) for d in draws]
    for (name, tilt), losses in made.items():
        yield row(
            name,
            tilt,
            [[fitted(world, c.policies, x, ITERATIONS) for x in losses] for c in classes],
        )
    counts = [torch.bincount(d.flatten(), minlength=len(world.base)).double() for d in draws]
    runs = [[with_credit(c, optimal, k / k.sum(), ITERATIONS) for k in counts] for c in classes]
    yield row("credit", "optimal", runs)


SEQUENCE_METHODS = (
    ("ipo_bon", "best_of_n"),
    ("rank_regression", "best_of_n"),
    ("rank_regression", "optimal"),
    ("rank_regression_pointwise", "optimal"),
    ("weighted_sft", "best_of_n"),
)


# --- the document ---------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def section_a() -> Iterable[str]:
    yield f"""## A. With unlimited data
The minimisers of the losses over groups of m base draws, for continuous rewards ({len(continuum().base)} equally
likely outcomes; win rates within 0.001). *Plain* targets are E[ln f(U_(i))]; *calibrated* targets are
those of `bonbon.tilt.rank_targets`. The probabilities that plain targets describe sum to less
than 1. A pointwise regression puts the rest where it costs least; *rescaled* distributes it in
proportion instead. Centring multiplies plain targets by m/(m−1)."""
    header = ["n", "m", "best-of-n", "ipo_bon", "weighted_sft", "plain, pointwise"]
    header += ["plain, rescaled", "plain, centred", "calibrated, either"]
    yield table(header, [unlimited(n, m) for n in (2, 4, 8, 32) for m in (2, 4, 8, 16, 32)])
    yield """The objectives minimised numerically over polynomials Σ a_i B_i(u), n = m = 4,
and the closed form:"""
    rows = {"closed form": rank_targets(BestOfN(4), 4)}
    rows |= {name: polynomial_minimiser(name, 4, 4) for name in REGRESSIONS[:2]}
    cells = [[name, *(f"{x:.4f}" for x in a)] for name, a in rows.items()]
    yield table(["", "a_1", "a_2", "a_3", "a_4"], cells)


def section_b(sizes: Sizes) -> Iterable[str]:
    yield f"""## B. With few groups
One prompt, 400 outcomes, base probabilities from Dirichlet(5, …), groups of {M} from the base policy.
L-BFGS minimises each loss, starting from the base policy, with at most {ITERATIONS} iterations. With free
logits, an outcome that is in no group keeps its logit unless a likelihood moves it; `dpo` has no
minimum there, so the limit on iterations is early stopping. Means and standard errors are over {sizes.seeds}
seeds, each with its own prompt and groups. There are two classes of policies: one free logit per
outcome, and ln π = ln π0 + θ·φ with 24 normal features that explain half of the reward's variance.
The highest possible efficiency is 1 with free logits. With features, at the win rates that recover
0.8 and 1.0 of best-of-{M}'s gain, it is {" and ".join(Trial("24 features", sizes).ceiling())}."""
    triple = "win rate / KL / efficiency"
    counts = [f"{g:,} groups" for g in sizes.groups]
    for trial in (Trial(kind, sizes) for kind in CLASSES):
        yield f"### {trial.kind}, n = {M}"
        rows = [[name, tilt, *trial.few_groups(name, aimed(M, tilt))] for name, tilt in METHODS]
        yield table(["objective", "tilt", *counts], rows)
        yield f"Huber's δ, {sizes.middle:,} groups:"
        settings = [replace(aimed(M), delta=delta) for delta in DELTAS]
        runs = [trial.runs(REGRESSIONS[2], sizes.middle, s) for s in settings]
        rows = [[f"{s.delta:g}", averaged(x)] for s, x in zip(settings, runs, strict=True)]
        yield table(["δ", triple], rows)
        yield f"Other n, {sizes.middle:,} groups (at n = 4 the pairs come from both halves of each group):"
        rows = [
            [str(n), name, tilt, averaged(trial.runs(name, sizes.middle, aimed(n, tilt)))]
            for n, (name, tilt) in itertools.product((4, 32), METHODS)
            if n <= M or OBJECTIVES[name].any_tilt
        ]
        yield table(["n", "objective", "tilt", triple], rows)
        yield f"""Baselines, {sizes.middle:,} groups: the β in {BETAS} with the highest efficiency,
among those that recover 0.8 on average:"""
        yield table(["objective", "β", triple], [trial.best_beta(name) for name in BASELINES])


def section_c(sizes: Sizes) -> Iterable[str]:
    yield f"""## C. Gradient noise
The noise tr Cov(g)/‖E g‖² of a group's gradient g at the base policy, for one of B's prompts and
{sizes.gradient_groups:,} groups of {M}: a mean over that many groups has as much noise as signal. *Natural* means in the
metric of the inverse Fisher matrix of the base policy. At n = 4, one pair is taken from each half of a
group, and the two are averaged. The cosine is between the mean gradient and the gradient of the win
rate, in the natural metric of free logits."""
    settings = [(name, aimed(n, tilt), tilt) for name, tilt in METHODS for n in (4, M)]
    settings += [(name, aimed(M), "") for name in BASELINES]
    rows = [[name, t, str(s.n), *gradient_noise(name, s, sizes)] for name, s, t in settings]
    header = ["objective", "tilt", "n", "free logits", "free, natural"]
    yield table([*header, "features", "features, natural", "cosine"], rows)


def section_d(sizes: Sizes) -> Iterable[str]:
    space = all_sequences(sizes.tokens, sizes.length)
    world, classes, best = space.world, capacities(space), BestOfN(M)
    credited = joint(a + b for a, b in zip(space.base, token_credits(space, best), strict=True))
    target = world.tilted(best)
    off = float((credited.exp() - target).abs().max())
    yield f"""## D. Autoregressive policies
All {len(world.base):,} sequences of {sizes.length} tokens from a vocabulary of {sizes.tokens}. The base policy depends on the last two
tokens. The reward is a sum of scores of single tokens, of every pair of positions, and of a random
term for each sequence, with variances in the proportion 2 : 2 : 1. Two draws from the base policy are
equal with probability {float(world.p @ world.p):.4f}.

Best-of-{M} here is {world.figures(target.log() - world.base)}. The policy whose tokens have
log-ratios V(y_≤t) − V(y_<t), V = ln E[f(u) | prefix], is {world.figures(credited - world.base)};
its probabilities differ from best-of-{M}'s by at most {off:.0e}.

A check of the expected losses that are used below: the change of each loss from the base policy to a
random policy, measured on 20,000 drawn groups and computed by formula."""
    methods = sequence_methods(world)
    scales = {"ipo_bon": 1, "rank_regression": 2, "rank_regression_pointwise": 1, "weighted_sft": 1}
    rows = [expectation_check(world, k, methods[k, "best_of_n"], s) for k, s in scales.items()]
    yield table(["objective", "on groups", "by formula"], rows)
    least = [ceiling(world, c.policies) for c in classes]
    yield """Each policy adds a table to the base policy's logits, with one row per context. The ceiling is the
policy of a class with the least KL at the win rates that recover 0.8 and 1.0 of best-of-n's gain:"""
    pairs = list(zip(classes, least, strict=True))
    rows = [[c.name, f"{c.policies.size:,}", *(str(at(win)) for win in WINS)] for c, at in pairs]
    yield table(["context", "parameters", "at 0.8", "at 1.0"], rows)
    yield """With unlimited data: the minimisers of the expected losses. The number in brackets is the ceiling's
efficiency at the same win rate. *Credit* regresses the log-ratio of every token on the exact
V(y_≤t) − V(y_<t)."""
    header = ["objective", "tilt", *(c.name for c in classes)]
    figures = {k: [fitted(world, c.policies, loss) for c in classes] for k, loss in methods.items()}
    for name in ("best_of_n", "optimal"):
        figures["credit", name] = [
            with_credit(c, TILTS[name](M), world.base.exp(), EXACT_ITERATIONS) for c in classes
        ]
    rows = [
        [*k, *(f"{f} ({at(f.win).efficiency:.2f})" for f, at in zip(cells, least, strict=True))]
        for k, cells in figures.items()
    ]
    yield table(header, rows)
    for groups in sizes.sequence_groups:
        yield f"""With {groups:,} groups of {M}, means over {sizes.sequence_seeds} draws,
at most {ITERATIONS} iterations. *Weighted reverse KL* is the loss of on-policy learning, computed on draws
from the base policy: e^h (h − 1 − t):"""
        yield table(header, sequence_rows(space, classes, groups, sizes))


def document(sizes: Sizes) -> Iterable[str]:
    yield """# Exact figures on policies that can be enumerated
Written by `benchmarks/tabular.py`. Each policy is shown as win rate / KL in nats / KL efficiency: its
exact win rate against the base policy, where a tie counts half; its exact KL from the base policy; and
the least KL for that win rate, divided by its KL."""
    yield from section_a()
    yield from section_b(sizes)
    yield from section_c(sizes)
    yield from section_d(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks-tabular.md"))
    parser.add_argument("--quick", action="store_true", help="small sizes, for a trial")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = []
    for part in document(QUICK if args.quick else Sizes()):
        print(part + "\n", flush=True)
        parts.append(part)
    args.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
