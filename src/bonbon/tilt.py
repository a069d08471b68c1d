"""Tilts of the base model in reward-quantile space.

Let u in [0, 1] be the quantile of a completion's reward among the base model's completions for the
same prompt. A *tilt* is a density f on [0, 1]; the tilted policy is π(y) = π0(y) f(u(y)). Under the
base model u is uniform (for continuous rewards), so the tilted policy's win rate against the base
model is ∫ u f(u) du and its KL divergence from it is ∫ f(u) ln f(u) du, whatever the model, the
prompt or the reward. All KLs are in nats, all arithmetic is float64; nothing here needs torch.

Sources: Gui, Gârbacea, Veitch 2024 (arXiv 2406.00832): the tilt view, Theorem 1 (the optimal tilt)
and section 4 (BoNBoN's target). Beirami et al. 2024 (arXiv 2401.01879): discrete outcomes and the
KL estimator. Khalaf et al. 2025 (arXiv 2506.19248): best-of-Poisson.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ranks = NDArray[np.intp]

__all__ = [
    "TILTS",
    "BestOfN",
    "BestOfPoisson",
    "ExponentialTilt",
    "Identity",
    "Tilt",
    "WorstOfN",
    "best_of_n_bounds",
    "best_of_n_kl_estimate",
    "best_of_n_pmf",
    "best_of_n_rank_weights",
    "kl_pmf",
    "optimal_kl",
    "optimal_win_rate",
    "rank_targets",
    "rank_weights",
    "tilted_pmf",
    "win_rate_pmf",
]


@runtime_checkable
class Tilt(Protocol):
    """A density f on the reward quantile u in [0, 1]; an immutable value."""

    def __hash__(self) -> int: ...

    def win_rate(self) -> float:
        """Probability that the tilted policy beats the base model, a tie counting half: E_f[u]."""
        ...

    def kl(self) -> float:
        """KL(tilted ‖ base) in nats: E_f[ln f(u)]."""
        ...

    def log_density(self, u: ArrayLike) -> Floats:
        """ln f(u), elementwise; −inf where the density is 0."""
        ...

    def cdf(self, u: ArrayLike) -> Floats:
        """∫_0^u f, elementwise."""
        ...

    def quantile(self, p: ArrayLike) -> Floats:
        """The inverse of `cdf`, elementwise: a uniform p gives a draw from the tilt."""
        ...

    def rank_log_ratio(self, i: ArrayLike, j: ArrayLike, m: int) -> Floats:
        """E[ln f(U_(i)) − ln f(U_(j))] for the i-th and j-th smallest of m base samples (nats)."""
        ...

    def rank_log_density(self, m: int) -> Floats:
        """E[ln f(U_(i))] for the i-th smallest of m base samples, i = 1..m, shape (m,) (nats)."""
        ...


def _unit(u: ArrayLike, name: str) -> Floats:
    array = np.asarray(u, dtype=np.float64)
    if not np.all((array >= 0) & (array <= 1)):
        raise ValueError(f"{name} must lie in [0, 1]")
    return array


def _ranks(i: ArrayLike, j: ArrayLike, m: int) -> tuple[Ranks, Ranks]:
    low, high = np.asarray(i), np.asarray(j)
    for ranks in (low, high):
        if not np.all((ranks >= 1) & (ranks <= m) & (ranks == np.floor(ranks))):
            raise ValueError(f"ranks must be whole numbers in 1..{m} (1 is the smallest)")
    return low.astype(np.intp), high.astype(np.intp)


class _ByRank:
    """What every tilt has from its `rank_log_density`."""

    def rank_log_ratio(self: Tilt, i: ArrayLike, j: ArrayLike, m: int) -> Floats:
        low, high = _ranks(i, j, m)
        by_rank = self.rank_log_density(m)
        return np.asarray(by_rank[low - 1] - by_rank[high - 1])


@dataclass(frozen=True)
class Identity(_ByRank):
    """The base model itself: f(u) = 1."""

    def win_rate(self) -> float:
        return 0.5

    def kl(self) -> float:
        return 0.0

    def log_density(self, u: ArrayLike) -> Floats:
        return np.zeros_like(_unit(u, "u"))

    def cdf(self, u: ArrayLike) -> Floats:
        return _unit(u, "u")

    def quantile(self, p: ArrayLike) -> Floats:
        return _unit(p, "p")

    def rank_log_density(self, m: int) -> Floats:
        return np.zeros(m)


@dataclass(frozen=True)
class BestOfN(_ByRank):
    """The best of n draws: f(u) = n u^(n−1), for any real n ≥ 1."""

    n: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.n) and self.n >= 1):
            raise ValueError(f"best-of-n needs a finite n >= 1, got n = {self.n}")

    def win_rate(self) -> float:
        """n/(n+1)."""
        return self.n / (self.n + 1)

    def kl(self) -> float:
        """ln n − (n−1)/n nats."""
        return math.log(self.n) - (self.n - 1) / self.n

    def log_density(self, u: ArrayLike) -> Floats:
        u = _unit(u, "u")
        if self.n == 1:
            return np.zeros_like(u)
        with np.errstate(divide="ignore"):
            return np.asarray(math.log(self.n) + (self.n - 1) * np.log(u))

    def cdf(self, u: ArrayLike) -> Floats:
        """u^n."""
        return np.asarray(_unit(u, "u") ** self.n)

    def quantile(self, p: ArrayLike) -> Floats:
        return np.asarray(_unit(p, "p") ** (1 / self.n))

    def rank_log_density(self, m: int) -> Floats:
        """ln n + (n−1)(ψ(i) − ψ(m+1)); ranks m = n and 1 differ by BoNBoN's (n−1)·H_{n−1}."""
        # At whole numbers ψ(i) − ψ(m+1) is a difference of harmonic numbers.
        harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, m + 1))])
        return np.asarray(math.log(self.n) + (self.n - 1) * (harmonic[:-1] - harmonic[-1]))


@dataclass(frozen=True)
class WorstOfN(_ByRank):
    """The worst of n draws: f(u) = n (1−u)^(n−1), best-of-n seen from the other end."""

    n: float

    def __post_init__(self) -> None:
        BestOfN(self.n)

    def win_rate(self) -> float:
        """1/(n+1)."""
        return 1 / (self.n + 1)

    def kl(self) -> float:
        return BestOfN(self.n).kl()

    def log_density(self, u: ArrayLike) -> Floats:
        return BestOfN(self.n).log_density(1 - _unit(u, "u"))

    def cdf(self, u: ArrayLike) -> Floats:
        return 1 - BestOfN(self.n).cdf(1 - _unit(u, "u"))

    def quantile(self, p: ArrayLike) -> Floats:
        return 1 - BestOfN(self.n).quantile(1 - _unit(p, "p"))

    def rank_log_density(self, m: int) -> Floats:
        return BestOfN(self.n).rank_log_density(m)[::-1]


# Below this μ the closed forms of best-of-Poisson lose digits to cancellation; the series do not.
_SMALL_MU = 0.05


@dataclass(frozen=True)
class BestOfPoisson(_ByRank):
    """The best of 1 + Poisson(μ) draws: f(u) = (1 + μu) e^(μ(u−1)), for any μ ≥ 0.

    The mixture of `BestOfN(1 + k)` with Poisson weights, so 1 + μ draws on average; its win rate
    comes within 0.0002 of the largest one at its KL. Khalaf et al. 2025.
    """

    mu: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mu) and self.mu >= 0):
            raise ValueError(f"best-of-Poisson needs a finite mu >= 0, got mu = {self.mu}")

    def win_rate(self) -> float:
        """1 − 1/μ + (1 − e^(−μ))/μ²."""
        if self.mu < _SMALL_MU:
            return 1 - sum((-self.mu) ** k / math.factorial(k + 2) for k in range(9))
        return 1 - (1 + math.expm1(-self.mu) / self.mu) / self.mu

    def kl(self) -> float:
        """ln(1+μ) − 1 + ∫ e^(μ(u−1))/(1+μu) du nats (by parts, from ∫ f ln f)."""
        return _best_of_poisson_kl(self.mu)

    def log_density(self, u: ArrayLike) -> Floats:
        u = _unit(u, "u")
        return np.asarray(np.log1p(self.mu * u) + self.mu * (u - 1))

    def cdf(self, u: ArrayLike) -> Floats:
        """u e^(μ(u−1))."""
        u = _unit(u, "u")
        return np.asarray(u * np.exp(self.mu * (u - 1)))

    def quantile(self, p: ArrayLike) -> Floats:
        """W(μ p e^μ)/μ with Lambert's W, of which only the logarithm of its argument is taken."""
        from scipy.special import wrightomega  # the solution w of w + ln w = z

        p = _unit(p, "p")
        if self.mu < 1e-8:  # where ln μ would cost digits: u = p e^(μ(1−u)) to the first order
            return np.asarray(p * np.exp(self.mu * (1 - p)))
        with np.errstate(divide="ignore"):  # p = 0
            z = np.log(p) + (math.log(self.mu) + self.mu)
        return np.asarray(np.clip(wrightomega(z) / self.mu, 0, 1))

    def rank_log_density(self, m: int) -> Floats:
        """E[ln(1 + μU_(i))] + μ(i/(m+1) − 1), the first term by quadrature.

        By parts it is ∫ P(U_(i) > u) dt over t = ln(1 + μu) from 0 to ln(1 + μ): in t the
        integrand is smooth however large μ is.
        """
        mean = np.arange(1, m + 1) / (m + 1)
        if self.mu < 1e-8:  # ln(1 + μu) = μu to float64
            return np.asarray(self.mu * (2 * mean - 1))
        end = math.log1p(self.mu)
        # The more draws, the sharper a rank: ln U_(i) spreads by about 1/√i.
        t, weights = _panels(end, math.ceil(max(end, 1.0) * max(1.0, math.sqrt(m) / 4)))
        u = np.expm1(t) / self.mu
        k = np.arange(m)
        log_binomial = np.array([_log_binomial(m, int(below)) for below in k])
        log_counts = np.outer(k, np.log(u)) + np.outer(m - k, np.log1p(-u))
        # The i-th smallest lies above u when fewer than i draws lie below.
        above = np.cumsum(np.exp(log_binomial[:, None] + log_counts), axis=0)
        return np.asarray(above @ weights + self.mu * (mean - 1))


def _best_of_poisson_kl(mu: float) -> float:
    if mu < _SMALL_MU:
        partial = np.cumsum([math.factorial(i) for i in range(16)])
        terms = ((-mu) ** k * (partial[k] / math.factorial(k + 1) - 1 / k) for k in range(2, 16))
        return float(sum(terms))
    # In s = μ(1−u); beyond s = 50 the integrand is nothing in float64.
    end = min(mu, 50.0)
    s, weights = _panels(end, math.ceil(end))
    rest = float(weights @ (np.exp(-s) / (1 + (mu - s)))) / mu
    return math.log1p(mu) - 1 + rest


def _log_binomial(m: int, k: int) -> float:
    return math.lgamma(m + 1) - math.lgamma(k + 1) - math.lgamma(m - k + 1)


def _panels(length: float, count: int) -> tuple[Floats, Floats]:
    """Gauss–Legendre points and weights on `count` equal panels of [0, length]."""
    nodes, weights = np.polynomial.legendre.leggauss(32)
    width = length / count
    points = width * (np.arange(count)[:, None] + (nodes + 1) / 2)
    return points.ravel(), np.tile(width / 2 * weights, count)


# Below this |β| the closed forms of the exponential tilt lose digits to cancellation; their Taylor
# series are exact to float64 there.
_SMALL_BETA = 0.05


@dataclass(frozen=True)
class ExponentialTilt(_ByRank):
    """The optimal tilt, f(u) = β e^(βu) / (e^β − 1): the largest win rate at its KL (Theorem 1).

    A negative β prefers low rewards; β = 0 is the base model.
    """

    beta: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.beta):
            raise ValueError(f"the exponential tilt needs a finite beta, got {self.beta}")

    def win_rate(self) -> float:
        """1/(1 − e^(−β)) − 1/β."""
        return _exponential_win_rate(self.beta)

    def kl(self) -> float:
        """β·win − ln((e^β − 1)/β) nats."""
        return _exponential_kl(self.beta)

    # A negative β is the mirror image of a positive one, f(u; β) = f(1 − u; −β), and in the
    # positive form e^(−β) underflows harmlessly where e^β would overflow.

    def log_density(self, u: ArrayLike) -> Floats:
        u = _unit(u, "u")
        if self.beta < 0:
            return ExponentialTilt(-self.beta).log_density(1 - u)
        if self.beta == 0:
            return np.zeros_like(u)
        return np.asarray(self.beta * (u - 1) - math.log(-math.expm1(-self.beta) / self.beta))

    def cdf(self, u: ArrayLike) -> Floats:
        u = _unit(u, "u")
        if self.beta < 0:
            return 1 - ExponentialTilt(-self.beta).cdf(1 - u)
        if self.beta == 0:
            return u
        share = np.expm1(-self.beta * u) / math.expm1(-self.beta)
        return np.asarray(np.exp(self.beta * (u - 1)) * share)

    def quantile(self, p: ArrayLike) -> Floats:
        p = _unit(p, "p")
        if self.beta < 0:
            return 1 - ExponentialTilt(-self.beta).quantile(1 - p)
        if self.beta == 0:
            return p
        if self.beta < 1:  # p + (1 − p) e^(−β) is close to 1 here and would lose digits
            u = 1 + np.log1p((1 - p) * math.expm1(-self.beta)) / self.beta
        else:
            with np.errstate(divide="ignore"):  # p = 0 with an underflown e^(−β)
                u = 1 + np.log(p + (1 - p) * math.exp(-self.beta)) / self.beta
        return np.asarray(np.clip(u, 0, 1))

    def rank_log_density(self, m: int) -> Floats:
        """ln f at E[U_(i)] = i/(m + 1), since ln f is linear in u."""
        return self.log_density(np.arange(1, m + 1) / (m + 1))

    @classmethod
    def with_win_rate(cls, win_rate: float) -> ExponentialTilt:
        """The tilt of that win rate at the least KL. Raises ValueError outside (0, 1)."""
        if not 0 < win_rate < 1:
            raise ValueError(f"win_rate must lie in (0, 1), got {win_rate}")
        beta = _beta_of_win_rate(max(win_rate, 1 - win_rate))
        return cls(beta if win_rate >= 0.5 else -beta)


def _exponential_win_rate(beta: float) -> float:
    if abs(beta) < _SMALL_BETA:
        return 0.5 + beta / 12 - beta**3 / 720 + beta**5 / 30240
    if beta < 0:
        return 1 - _exponential_win_rate(-beta)
    return -1 / math.expm1(-beta) - 1 / beta


def _exponential_kl(beta: float) -> float:
    beta = abs(beta)  # f(u; −β) = f(1−u; β)
    if beta < _SMALL_BETA:
        return beta**2 / 24 - beta**4 / 960 + beta**6 / 36288
    decayed = math.exp(-beta)
    return beta * decayed / -math.expm1(-beta) - 1 - math.log1p(-decayed) + math.log(beta)


def _solve_increasing(f: Callable[[float], float], value: float, low: float, high: float) -> float:
    """The root of an increasing function, by bisection to float64 precision.

    Our own loop, because importing scipy.optimize alone would spend a third of the half second that
    `bonbon frontier` may take.
    """
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if f(middle) < value:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _optimal_win_rate(kl: float) -> float:
    if kl == 0:
        return 0.5
    # KL grows as ln β − 1, so the solution lies below e^(kl + 2).
    beta = _solve_increasing(_exponential_kl, kl, 0.0, math.exp(min(kl + 2, 700)))
    return _exponential_win_rate(beta)


def _optimal_kl(win_rate: float) -> float:
    if win_rate == 1:
        return math.inf
    if win_rate == 0.5:
        return 0.0
    edge = max(win_rate, 1 - win_rate)
    return math.inf if edge == 1 else _exponential_kl(_beta_of_win_rate(edge))


def _beta_of_win_rate(win_rate: float) -> float:
    """The β ≥ 0 of a win rate in [½, 1)."""
    if win_rate == 0.5:
        return 0.0
    # 1 − win tends to 1/β and never exceeds it, so the solution lies below 1/(1 − win).
    return _solve_increasing(_exponential_win_rate, win_rate, 0.0, 1 / (1 - win_rate) + 1)


def optimal_win_rate(kl: ArrayLike) -> Floats:
    """The largest win rate any rank-based policy reaches at `kl` nats (elementwise).

    Raises ValueError for a negative or non-finite KL.
    """
    kls = np.asarray(kl, dtype=np.float64)
    if not np.all(np.isfinite(kls) & (kls >= 0)):
        raise ValueError("kl must be finite and >= 0")
    return np.asarray(np.vectorize(_optimal_win_rate, otypes=[np.float64])(kls))


def optimal_kl(win_rate: ArrayLike) -> Floats:
    """The least KL in nats with which any rank-based policy reaches `win_rate` (elementwise).

    A win rate under one half costs what its mirror image costs; 0 and 1 cost infinity.
    Raises ValueError outside [0, 1].
    """
    rates = _unit(win_rate, "win_rate")
    return np.asarray(np.vectorize(_optimal_kl, otypes=[np.float64])(rates))


# --- discrete outcomes ----------------------------------------------------------------------------


def _checked_pmf(p: ArrayLike, r: ArrayLike) -> tuple[Floats, Floats]:
    probabilities, rewards = np.asarray(p, dtype=np.float64), np.asarray(r, dtype=np.float64)
    if probabilities.ndim != 1 or probabilities.shape != rewards.shape:
        raise ValueError("p and r must be vectors of one length")
    if np.any(probabilities < 0) or not np.isclose(probabilities.sum(), 1, atol=1e-9):
        raise ValueError("p must be non-negative and sum to 1")
    if not np.all(np.isfinite(rewards)):
        raise ValueError("rewards must be finite")
    return probabilities, rewards


def _levels(p: Floats, r: Floats) -> tuple[NDArray[np.intp], Floats, Floats, Floats]:
    """Each outcome's reward level, and each level's probability and CDF just below and at it."""
    _, level = np.unique(r, return_inverse=True)
    mass: Floats = np.bincount(level, weights=p).astype(np.float64)
    upper: Floats = np.clip(np.cumsum(mass), 0, 1)
    upper[-1] = 1.0
    lower = np.concatenate([[0.0], upper[:-1]])
    return level, mass, lower, upper


def tilted_pmf(p: ArrayLike, r: ArrayLike, tilt: Tilt) -> Floats:
    """The tilted distribution over finitely many outcomes, exactly.

    A reward level that the base model reaches with CDF F (F⁻ just below) gets the tilt's mass on
    (F⁻, F]; outcomes that tie share it in proportion to `p`.

    Args:
        p: base probabilities, shape (outcomes,).
        r: rewards, shape (outcomes,).
    """
    probabilities, rewards = _checked_pmf(p, r)
    level, mass, lower, upper = _levels(probabilities, rewards)
    tilted = tilt.cdf(upper) - tilt.cdf(lower)
    ratio = np.divide(tilted, mass, out=np.zeros_like(mass), where=mass > 0)
    return np.asarray(probabilities * ratio[level])


def best_of_n_pmf(p: ArrayLike, r: ArrayLike, n: float) -> Floats:
    """The law of the best of n draws: π(y) = p(y)/p(level) · (F^n − F⁻^n), ties shared by `p`.

    Beirami et al. 2024, Lemma 1, extended to ties. For `p` and `r` see `tilted_pmf`.
    """
    return tilted_pmf(p, r, BestOfN(n))


def win_rate_pmf(q: ArrayLike, p: ArrayLike, r: ArrayLike) -> float:
    """P(reward of a draw from q > reward of a draw from p), a tie counting half."""
    challenger, rewards = _checked_pmf(q, r)
    base, _ = _checked_pmf(p, r)
    level, _, lower, upper = _levels(base, rewards)
    return float(np.sum(challenger * ((lower + upper) / 2)[level]))


def kl_pmf(q: ArrayLike, p: ArrayLike) -> float:
    """KL(q ‖ p) in nats; infinite where q has mass that p has not."""
    challenger, base = np.asarray(q, dtype=np.float64), np.asarray(p, dtype=np.float64)
    some = challenger > 0
    if np.any(base[some] <= 0):
        return math.inf
    return float(np.sum(challenger[some] * np.log(challenger[some] / base[some])))


def best_of_n_bounds(n: float) -> tuple[float, float]:
    """Upper bounds on best-of-n's win rate and KL for any rewards: (n/(n+1), ln n − (n−1)/n).

    Both are reached for continuous rewards; ties and repeated outcomes only lower them
    (Beirami et al. 2024, Theorem 1).
    """
    tilt = BestOfN(n)
    return tilt.win_rate(), tilt.kl()


def best_of_n_kl_estimate(logprobs: ArrayLike, n: float) -> Floats:
    """Beirami et al.'s estimate of best-of-n's KL, one value per returned completion (nats).

    With ε the base probability of the returned completion,
    (1−ε)^n (ln n + (n−1) ln(1−ε) − (n−1)/n) + (1−(1−ε)^n) ln((1−(1−ε)^n)/ε); average it over
    returned completions (arXiv 2401.01879, section 5). It never exceeds ln n − (n−1)/n.

    Args:
        logprobs: ln ε of each returned completion under the base model.
    """
    BestOfN(n)
    log_eps = np.asarray(logprobs, dtype=np.float64)
    if np.any(np.isnan(log_eps)) or np.any(log_eps > 1e-9):
        raise ValueError("log-probabilities must be numbers <= 0")
    eps = np.exp(np.minimum(log_eps, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        log_other = np.log1p(-eps)  # ln(1 − ε)
        none = np.exp(n * log_other)  # no other draw equals the returned one
        first = np.where(none > 0, none * (math.log(n) + (n - 1) * log_other - (n - 1) / n), 0.0)
        some = -np.expm1(n * log_other)
        second = np.where(eps > 0, some * np.log(np.where(eps > 0, some / eps, 1.0)), 0.0)
    return np.asarray(first + second)


def best_of_n_rank_weights(m: int, n: int) -> Floats:
    """P(the i-th smallest of m draws is the best of a random n-subset), i = 1..m.

    C(i−1, n−1)/C(m, n). Raises ValueError unless 1 ≤ n ≤ m.
    """
    if not 1 <= n <= m:
        raise ValueError(f"need 1 <= n <= m, got n = {n}, m = {m}")
    subsets = math.comb(m, n)
    return np.array([math.comb(i - 1, n - 1) / subsets for i in range(1, m + 1)])


# --- what the ranks of m draws tell of a tilt -----------------------------------------------------


def rank_weights(tilt: Tilt, m: int) -> Floats:
    """The weight that each rank of m base draws gets in an average over the tilt; they sum to m.

    For best-of-n with a whole n ≤ m these are m·C(i−1, n−1)/C(m, n): what a random n-subset's best
    is, on average over all subsets, so weighted means are unbiased for best-of-n (Rao-Blackwell);
    worst-of-n mirrors them. Any other tilt has no such weights (given its quantile u a draw's
    weight is a polynomial in u of degree m−1) and gets the tilt of the m draws themselves, its mass
    on ((i−1)/m, i/m]: consistent as m grows.
    """
    n = getattr(tilt, "n", math.inf)
    if isinstance(tilt, BestOfN | WorstOfN) and n == int(n) and n <= m:
        exact = m * best_of_n_rank_weights(m, int(n))
        return exact if isinstance(tilt, BestOfN) else exact[::-1]
    return np.asarray(m * np.diff(tilt.cdf(np.arange(m + 1) / m)))


@lru_cache(maxsize=64)
def rank_targets(tilt: Tilt, m: int) -> Floats:
    """Log-density targets by rank, t_1..t_m (nats), whose regression has the tilt's win rate.

    A draw with quantile u has rank i among m with probability B_i(u) = C(m−1, i−1) u^(i−1)
    (1−u)^(m−i), so whoever regresses its log-density ratio on targets t ends at Σ t_i B_i(u), a
    Bernstein smoothing. No t of finite length undoes that smoothing for a ln u, so for few draws
    the expected log-density E[ln f(U_(i))] falls short (at n = m = 2 it wins 0.582, not 0.667).
    Here it is stretched, t_i = c·E[ln f(U_(i))] − ln Z, by the one c with which the regression wins
    exactly as often as the tilt does; Z makes it a density. For best-of-n c is 2.15 at n = m = 2,
    1.10 at 4, 1.0007 at 8; the KL is at most best-of-n's in all cases measured, as the smoothed
    density is the flatter one. For the exponential tilt c = (m+1)/(m−1) and nothing is lost.

    For tilts monotone in u. Raises ValueError for m < 2, or for a tilt whose density is too sharp
    to be integrated (best-of-n from n of about 25,000 on).
    """
    if m < 2:
        raise ValueError(f"ranks need m >= 2 draws, got {m}")
    shape = tilt.rank_log_density(m)
    shape = shape - shape.max()
    nodes, weights = np.polynomial.legendre.leggauss(256)
    u, weights = (nodes + 1) / 2, weights / 2
    if abs(weights @ np.exp(tilt.log_density(u)) - 1) > 1e-3:
        raise ValueError(f"{tilt} is too sharp for targets by rank")
    i = np.arange(m)
    log_binomial = math.lgamma(m) - np.array([math.lgamma(k + 1) + math.lgamma(m - k) for k in i])
    log_bernstein = log_binomial[:, None] + np.outer(i, np.log(u)) + np.outer(i[::-1], np.log1p(-u))
    smoothed = shape @ np.exp(log_bernstein)

    def density(c: float) -> Floats:
        return weights * np.exp(c * (smoothed - smoothed.max()))

    def gain(c: float) -> float:
        mass = density(c)
        return abs(float(mass @ u / mass.sum()) - 0.5)

    wanted = abs(tilt.win_rate() - 0.5)
    c = _solve_increasing(gain, wanted, 0.0, 16.0) if wanted > 0 else 1.0
    log_z = math.log(density(c).sum()) + c * float(smoothed.max())
    targets = np.asarray(c * shape - log_z)
    targets.setflags(write=False)  # it is cached
    return targets


# What a configuration selects from: the tilt that goes with best-of-n.
TILTS: dict[str, Callable[[float], Tilt]] = {
    "best_of_n": BestOfN,
    "optimal": lambda n: ExponentialTilt.with_win_rate(BestOfN(n).win_rate()),
    "worst_of_n": WorstOfN,
}
