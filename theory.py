"""The theorem, seen: what n samples say about prefix experts whose keys and values are free, and about shared ones.

    python theory.py        a minute or two on two cores; leaves out/theory/report.md and theory.png

Model. One query of one attention head: N token experts h_j that are known, L prefix experts that are not, and noise.
    Y_i = f_G*(X_i) + noise_i,    f_G(x) = sum_j g_j h_j(x) + sum_l g_l C p_V[l],
    g = softmax over [x' A_j x, (B p_K[l])' x + b[l]]
The unknown is the mixing measure G = sum_l exp(b[l]) delta_(p_K[l], p_V[l]), the prefix as a set of weighted atoms. p_K
moves the gate, p_V is the expert. A_j, h_j, B and C are known, W1 and W2 too, except for "learned":
    non-shared   p_K[l], p_V[l] free         shared    p_K[l] = p_V[l] = p[l]
    one-layer    p_K[l] = 2 tanh(W1 p[l]), p_V[l] = sinh(0.7 W2 p[l])        learned   the same, W1 and W2 fitted too

Estimator. G_n: least squares over all G of at most L' atoms. L' = L is the exact fit. As nobody knows L, L' > L is the
rule: several fitted atoms share one true atom.

Voronoi loss. V_j: the fitted atoms i to which the true atom j is the nearest. With dp = fitted - true,
    D(G, G*) = sum_j |sum_{i in V_j} exp(b_i) - exp(b*_j)| + sum_{i alone in V_j} exp(b_i) (|dp_K| + |dp_V|)
               + sum_{i not alone in V_j} exp(b_i) (|dp_K|^2 + |dp_V|^2),    shared: (|dp|) and (|dp|^2)
D = O(n^-1/2) then says that an atom alone in its cell is found at the rate n^-1/2, and atoms in company at n^-1/4.

Theorems (section 4), L' > L. Shared, one-layer: D(G_n, G*) = O(sqrt(log n / n)) in probability. Non-shared: with the
brackets |dp_K|^r + |dp_V|^r, any r >= 1 and any estimator, the worst G has E D >= c n^-1/2. As r is free, no power of n
bounds |dp|. Worst G, all estimators: the simulation has one of each. It can show that free values are not identified
and that no stable polynomial rate comes out; it cannot show a rate such as 1 / log n.

Why. f is linear in p_V. Split an atom into two of half the weight, one key, and values p_V + t and p_V - t: f is the
same for any t, so no amount of data can tell. If one vector makes key and value, the keys part as well: f moves like
t^2, and data that know f up to n^-1/2 know t up to n^-1/4.

Shapes: R fits side by side, M points x, N token experts, L' atoms (b, p_K, p_V) of 5 numbers, P parameters of a fit.
Source: Le et al., ICLR 2025, arXiv 2410.02200.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import jacrev, vmap
from tqdm import tqdm

from support.files import UsageError, exit_code, write
from support.report import png
from support.runs import run_lock
from train import BAR, Parser, add_options, opt

KINDS = {
    "non-shared": "tab:gray",
    "shared": "tab:blue",
    "one-layer": "tab:orange",
    "learned": "tab:green",
}
LENGTHS, STYLES = (1, 2, 3), {1: ":", 2: "--", 3: "-"}  # L', where L = 1
SIZES = [round(10 ** (2 + i / 2)) for i in range(7)]  # n, from 100 to 100,000
P, BIAS, NOISE = (
    (1.2, -0.8),
    0.5,
    0.1,
)  # the true p_K = p_V = p, so non-shared and shared have the same f
CHUNK = 17  # data sets side by side: more would leave the processor's cache
MISS = 0.2


@dataclass(frozen=True)
class Config:
    seed: int = opt(0, "decides the model, the data and the starts of the fits")
    reps: int = opt(50, "data sets per sample size")
    iterations: int = opt(
        1000, "Levenberg-Marquardt steps that a fit may take; also shown after 15 and 30 %% of them"
    )
    out: str = opt("out/theory", "folder of report.md and theory.png")

    @property
    def budgets(self) -> list[int]:
        return [round(self.iterations * share) for share in (0.15, 0.3, 1)]


@dataclass(frozen=True)
class World:
    """What is known: M points x, the tokens' scores and experts there, and the matrices."""

    x: Tensor  # (M, 2)
    A: Tensor  # (N, 2, 2)
    H: Tensor  # (N, 2, 2)
    B: Tensor  # (2, 2), as C, W1, W2
    C: Tensor
    W1: Tensor
    W2: Tensor

    @classmethod
    def draw(cls, seed: int, points: int = 400, n_token: int = 2) -> "World":
        """Uniform points in [-2, 2]^2, Gaussian A_j and H_j, random orthogonal B, C, W1, W2."""
        rng = np.random.default_rng([seed, 0])
        x, (A, H) = rng.uniform(-2, 2, (points, 2)), rng.normal(size=(2, n_token, 2, 2))
        orthogonal = [np.linalg.qr(rng.normal(size=(2, 2)))[0] for _ in range(4)]
        return cls(*map(torch.from_numpy, (x, 0.3 * A, H / 2**0.5, *orthogonal)))


def atoms(world: World, kind: str, theta: Tensor) -> Tensor:
    """The parameters of a fit (..., P) -> its atoms (..., L', 5): b, p_K, p_V. All that sharing is stands here."""
    W1, W2 = world.W1, world.W2
    if kind == "learned":
        W1, W2, theta = (
            theta[..., :4].unflatten(-1, (2, 2)),
            theta[..., 4:8].unflatten(-1, (2, 2)),
            theta[..., 8:],
        )
    if kind == "non-shared":
        return theta.unflatten(-1, (-1, 5))
    b, p = theta.unflatten(-1, (-1, 3)).split([1, 2], dim=-1)  # (..., L', 1), (..., L', 2)
    if kind == "shared":
        return torch.cat([b, p, p], dim=-1)
    return torch.cat([b, 2 * torch.tanh(p @ W1.mT), torch.sinh(0.7 * p @ W2.mT)], dim=-1)


def truth(world: World, kind: str, length: int = 1) -> Tensor:
    """The true parameters (P,), the atom cut into `length` equal ones; f is the same."""
    atom = [BIAS - np.log(length), *P, *(P if kind == "non-shared" else ())]
    theta = torch.tensor(atom * length, dtype=torch.float64)
    return (
        torch.cat([world.W1.flatten(), world.W2.flatten(), theta]) if kind == "learned" else theta
    )


def attention(world: World, fitted: Tensor) -> tuple[Tensor, Tensor]:
    """f_G at every point (R, 2, M) and the gates of the prefix experts (R, L', M), of atoms (R, L', 5)."""
    b, key, value = fitted.split([1, 2, 2], dim=-1)
    token = torch.einsum("md,jde,me->jm", world.x, world.A, world.x)  # (N, M): x' A_j x
    expert = torch.tanh(torch.einsum("jde,me->jdm", world.H, world.x))  # (N, 2, M): h_j(x)
    scores = torch.cat(
        [token.expand(len(fitted), -1, -1), key @ (world.x @ world.B).T + b], dim=1
    )  # (R, N + L', M)
    known, prefix = scores.softmax(dim=1).split(
        [len(token), fitted.shape[1]], dim=1
    )  # (R, N, M), (R, L', M)
    return torch.einsum("rjm,jdm->rdm", known, expert) + (value @ world.C.T).mT @ prefix, prefix


def normal_equations(
    world: World, kind: str, theta: Tensor, y: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    """Loss sum_m w_m |y_m - f(x_m)|^2 (R,), J'J (R, P, P), J'r (R, P), from theta (R, P), y (R, 2, M), weight (R, M).

    J = (df / d atoms) (d atoms / d theta): the first factor is the softmax's, the second is the sharing.
    """
    fitted = atoms(world, kind, theta)  # (R, L', 5)
    sharing = vmap(jacrev(partial(atoms, world, kind)))(theta).flatten(1, 2)  # (R, 5 L', P)
    f, gate = attention(world, fitted)
    root = weight.sqrt().unsqueeze(1)  # (R, 1, M)
    residual = ((y - f) * root).flatten(1)  # (R, 2 M)
    gate = (gate * root).unsqueeze(2)  # (R, L', 1, M)
    pull = gate * (
        (fitted[..., 3:] @ world.C.T).unsqueeze(-1) - f.unsqueeze(1)
    )  # (R, L', 2, M): df / db
    scores = torch.cat([torch.ones_like(world.x[:, :1]), world.x @ world.B], dim=1).T.unsqueeze(
        1
    )  # (3, 1, M)
    jacobian = y.new_empty(
        *fitted.shape, *y.shape[1:]
    )  # (R, L', 5, 2, M); filled in place, as copies cost more
    torch.mul(pull.unsqueeze(2), scores, out=jacobian[:, :, :3])  # by b and p_K
    torch.mul(gate.unsqueeze(2), world.C.T.unsqueeze(2), out=jacobian[:, :, 3:])  # by p_V
    jacobian = jacobian.flatten(3).flatten(1, 2)  # (R, 5 L', 2 M)
    gradient = sharing.mT @ (jacobian @ residual.unsqueeze(-1))  # (R, P, 1)
    return (
        residual.square().sum(1),
        sharing.mT @ (jacobian @ jacobian.mT) @ sharing,
        gradient.squeeze(-1),
    )


def fit(world: World, kind: str, data: Sequence[Tensor], theta: Tensor, budgets: list[int]) -> list:
    """Projected Levenberg-Marquardt from theta (R, P), all fits at once; after every budget (theta, who still moves).

    A fit ends when 12 steps in a row have not lowered its loss by 1e-10 of it. A parameter that the wall of the box
    holds back is left out of the step.
    """
    box = torch.full(
        theta.shape[1:], 3.0, dtype=torch.float64
    )  # |b| <= 2, all other parameters within 3
    box[8 if kind == "learned" else 0 :: 5 if kind == "non-shared" else 3] = 2.0
    theta = theta.clamp(-box, box)
    snapshots: list[tuple[Tensor, Tensor]] = []
    result, alive = theta.clone(), torch.arange(len(theta))
    damping, idle = torch.full((len(theta),), 0.01, dtype=torch.float64), torch.zeros(len(theta))
    state = [theta, *normal_equations(world, kind, theta, *data), damping, idle, *data]
    for i in range(1, budgets[-1] + 1):
        theta, loss, hessian, gradient, damping, idle, *data = state
        free = (theta.abs() < box) | (theta * gradient < 0)  # (R, P)
        ridge = (
            damping[:, None] * hessian.diagonal(dim1=1, dim2=2) + 1e-14
        )  # (R, P): a step scales with its parameter
        damped = hessian * (free[:, :, None] & free[:, None]) + torch.diag_embed(
            torch.where(free, ridge, 1.0)
        )
        trial = (theta + torch.linalg.solve(damped, gradient * free)).clamp(-box, box)
        tried = [trial, *normal_equations(world, kind, trial, *data)]
        better = tried[1] < loss
        pairs = zip(tried, state[:4], strict=True)
        kept = [
            torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old) for new, old in pairs
        ]
        damping = torch.where(better, damping / 3, damping * 4).clamp(1e-12, 1e12)
        idle = torch.where(tried[1] < loss * (1 - 1e-10), 0, idle + 1)
        result[alive] = kept[0]
        moves = idle < 12
        state = [part[moves] for part in (*kept, damping, idle, *data)]
        alive = alive[moves]
        while len(snapshots) < len(budgets) and (i == budgets[len(snapshots)] or not len(alive)):
            snapshots.append((result.clone(), torch.isin(torch.arange(len(result)), alive)))
        if not len(alive):
            break
    return snapshots


def voronoi_loss(fitted: Tensor, true: Tensor, shared: bool) -> Tensor:
    """D of atoms (R, L', 5) from the true ones (L, 5): (R,)."""
    delta = fitted[:, :, None, 1:] - true[:, 1:]  # (R, L', L, 4)
    key, value = delta[..., :2].norm(dim=-1), delta[..., 2:].norm(dim=-1)  # (R, L', L)
    cell = torch.eye(len(true))[
        (key**2 + value**2).argmin(-1)
    ]  # (R, L', L): 1 where atom i is in V_j
    mass = fitted[..., :1].exp() * cell  # (R, L', L)
    alone, together = (key, key**2) if shared else (key + value, key**2 + value**2)
    error = torch.where(cell.sum(1, keepdim=True) == 1, alone, together)
    return (mass.sum(1) - true[:, 0].exp()).abs().sum(1) + (mass * error).sum((1, 2))


def measure(world: World, kind: str, theta: Tensor) -> Tensor:
    """Of every fit (R, 4): D; rms errors of p_K and p_V over its atoms, by their weights; rms error of f over x."""
    fitted = atoms(world, kind, theta)  # (R, L', 5)
    true = atoms(world, kind, truth(world, kind))  # (1, 5)
    share = fitted[..., 0].softmax(1)  # (R, L'): exp(b_i) / sum exp(b)
    squares = (fitted - true).square()
    key, value = (
        (squares[..., part].sum(-1) * share).sum(1).sqrt() for part in (slice(1, 3), slice(3, 5))
    )
    error = (
        (attention(world, fitted)[0] - attention(world, true[None])[0])
        .square()
        .sum(1)
        .mean(1)
        .sqrt()
    )
    return torch.stack([voronoi_loss(fitted, true, kind == "shared"), key, value, error], dim=1)


def sample(
    world: World, kind: str, length: int, seed: int, reps: range, noise: float = NOISE
) -> tuple[Tensor, ...]:
    """Data sets of all sizes, and starts: y (R, 2, M), weight (R, M), theta (R, P), where R = reps x sizes.

    X is uniform on M points, so the mean Y at a point and the point's share of the samples say all that n samples say.
    A start is the truth plus N(0, 0.5^2), the same for every n.
    """
    f = attention(world, atoms(world, kind, truth(world, kind))[None])[0][0].numpy()  # (2, M)
    rows = []  # (y, weight, theta)
    for rep in reps:
        rng = np.random.default_rng(
            [seed, 1, rep]
        )  # of the data, so that all kinds and L' have the same noise
        start = np.random.default_rng([seed, 2, rep]).normal(
            truth(world, kind, length).numpy(), 0.5
        )  # (P,)
        for n in SIZES:
            counts = rng.multinomial(n, np.full(len(world.x), 1 / len(world.x)))  # (M,)
            rows.append(
                (f + noise * rng.normal(size=f.shape) / np.sqrt(counts.clip(1)), counts / n, start)
            )
    return tuple(torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))


def work(task: tuple[Config, str, int, range]) -> np.ndarray:
    """Some data sets, fitted and measured: (budgets, reps, sizes, 5), the 4 of `measure` and whether it still moves."""
    torch.set_num_threads(1)  # matrices this small would only wait for a second thread
    config, kind, length, reps = task
    world = World.draw(config.seed)
    *data, theta = sample(world, kind, length, config.seed, reps)
    snapshots = fit(world, kind, data, theta, config.budgets)
    parts = [
        torch.cat([measure(world, kind, theta), moves[:, None]], dim=1)
        for theta, moves in snapshots
    ]
    return torch.stack(parts).view(len(parts), len(reps), len(SIZES), -1).numpy()


def simulate(config: Config) -> dict[tuple[str, int], np.ndarray]:
    """All fits: (kind, L') -> (budgets, reps, sizes, 5). The numbers do not depend on the number of processes."""
    chunks = [range(i, min(i + CHUNK, config.reps)) for i in range(0, config.reps, CHUNK)]
    keys = [(kind, length) for length in LENGTHS[::-1] for kind in KINDS]  # the long ones first
    tasks = [(config, *key, chunk) for key in keys for chunk in chunks]
    deaf = (
        signal.signal,
        (signal.SIGINT, signal.SIG_IGN),
    )  # Ctrl-C is for the parent, which then ends the workers
    with get_context("spawn").Pool(min(os.cpu_count() or 1, 8), *deaf) as pool:
        parts = iter(list(tqdm(pool.imap(work, tasks), "fits", len(tasks), **BAR)))
        return {key: np.concatenate([next(parts) for _ in chunks], axis=1) for key in keys}


def slopes(errors: np.ndarray, middle: Callable = np.mean, draws: int = 500) -> tuple[float, float]:
    """Slope of log middle(error) on log n and its bootstrap standard error over data sets, of errors (reps, sizes)."""
    x = np.log(SIZES) - np.log(SIZES).mean()
    chosen = np.random.default_rng(0).integers(len(errors), size=(draws, len(errors)))
    means = np.stack(
        [middle(errors, axis=0), *middle(errors[chosen], axis=1)]
    )  # (1 + draws, sizes)
    fitted = np.log(means) @ x / (x @ x)
    return fitted[0], fitted[1:].std()


def split(world: World, kind: str, shifts: Tensor) -> Tensor:
    """The true atom cut in two, and the halves moved apart by +-t, for every t of (R,): parameters (R, P)."""
    theta = truth(world, kind, 2)
    apart = torch.zeros_like(theta).view(2, -1)
    apart[:, -2:] = torch.tensor(
        [[0.6, 0.8], [-0.6, -0.8]]
    )  # the last two numbers of an atom: p_V if free, else p
    return theta + shifts[:, None] * apart.flatten()


def table(config: Config, results: dict) -> str:
    """Slopes of every kind and L' after the last step, and of the largest L' after fewer."""
    heads = "L' | kind | steps | D, median | D | p_K | p_V | prediction | theorem for D | last D, p_V, prediction"
    lines = [f"| {heads} | misses p_V | still moving |", "|---" * 12 + "|"]
    for (kind, length), fits in sorted(results.items(), key=lambda item: item[0][1]):
        theorem = (
            {"non-shared": "no power of n", "learned": "-"}.get(kind, "-0.5") if length > 1 else "-"
        )
        for steps, found in list(zip(config.budgets, fits, strict=True))[
            0 if length == LENGTHS[-1] else -1 :
        ]:
            fitted = [slopes(found[..., 0], np.median), *(slopes(found[..., i]) for i in range(4))]
            cells = [
                str(length),
                kind,
                str(steps),
                *(f"{slope:.2f} ± {error:.2f}" for slope, error in fitted),
                theorem,
            ]
            cells += [", ".join(f"{error:.2g}" for error in found[:, -1, [0, 2, 3]].mean(0))]
            cells += [
                f"{share:.0%}" for share in ((found[:, -1, 2] > MISS).mean(), found[..., 4].mean())
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def text(config: Config, results: dict) -> str:
    return f"""# The theorem, seen

Slopes of log error on log n, n from {SIZES[0]:,} to {SIZES[-1]:,}, {config.reps} data sets each, seed {config.seed},
± bootstrap standard error. D: Voronoi loss, median and mean. p_K, p_V, prediction: mean rms error of keys, values, f.
Theorem: its rate, log n aside. Last: mean errors at the largest n. Misses p_V: fits with values off by over
{MISS} there. Still moving: fits of all n that ran out of steps.

{table(config, results)}

A slope is evidence of a rate only if more steps leave it as it is. The theorem on non-shared prefixes is about the
worst truth and all estimators. Here are one truth and one optimiser: they can show that p_V is not identified, no rate.
"""


def draw(config: Config, results: dict) -> Figure:
    """The story: why; values beside predictions; how many fits miss; the Voronoi loss; what the slopes depend on."""
    figure = Figure(figsize=(11.8, 6.9), layout="constrained")
    (flat, value, prediction), (missing, loss, budget) = figure.subplots(2, 3)
    world, shifts = World.draw(config.seed), torch.logspace(-3, 0, 31, dtype=torch.float64)
    for kind, colour in list(KINDS.items())[:3]:
        distance, _, _, change = measure(world, kind, split(world, kind, shifts)).T
        flat.loglog(shifts, change, color=colour, label=f"{kind}: rms change of f")
        flat.loglog(shifts, distance, "--", color=colour, label=f"{kind}: Voronoi loss D")
        for column, style, name in ((0, "o-", "D"), (2, "s--", "p_V")):
            found = np.transpose([slopes(fits[..., column]) for fits in results[kind, LENGTHS[-1]]])
            budget.errorbar(
                config.budgets, *found, fmt=style, color=colour, label=f"{kind}: {name}", capsize=3
            )
        for (axes, column), length in product(((value, 2), (prediction, 3), (loss, 0)), LENGTHS):
            errors = results[kind, length][-1, ..., column]  # (reps, sizes)
            label = f"{kind}, slope {slopes(errors)[0]:.2f}" if length == LENGTHS[-1] else None
            axes.loglog(SIZES, errors.mean(0), STYLES[length], color=colour, label=label)
    for (kind, colour), length in product(KINDS.items(), LENGTHS[1:]):
        missed = 100 * (results[kind, length][-1, ..., 2] > MISS).mean(0)  # (sizes,)
        missing.semilogx(
            SIZES,
            missed,
            STYLES[length],
            color=colour,
            label=kind if length == LENGTHS[-1] else None,
        )
    for rate, name in ((-0.5, "D"), (-0.25, "p_V")):
        budget.axhline(
            rate,
            color="black",
            linewidth=0.8,
            linestyle=":",
            label=f"shared, theorem: {name} {rate:g}",
        )
    flat.set(
        title="1  Why: f cannot see free values drift apart",
        xlabel="t: one atom becomes two, at +t and -t",
    )
    value.set(title="2  Values", xlabel="samples n", ylabel="mean rms error of p_V")
    prediction.set(
        title="3  Predictions",
        xlabel="samples n",
        ylabel="mean rms error of f",
        ylim=value.get_ylim(),
    )
    missing.set(
        title="4  Fits that miss p_V",
        xlabel="samples n",
        ylabel=f"% off by more than {MISS}",
        ylim=(-4, 130),
    )
    loss.set(title="5  Voronoi loss", xlabel="samples n", ylabel="mean D")
    budget.set(
        title="6  Slopes, L' = 3: do they hold?",
        xlabel="steps",
        ylabel="slope on n ± s.e.",
        ylim=(-1.1, None),
    )
    for axes in figure.axes:
        axes.legend(fontsize=7.5, ncols=2 if axes in (missing, budget) else 1)
    figure.suptitle(
        "One true prefix expert, L' fitted: 1 (dotted), 2 (dashed), 3 (solid); slopes of log error on log n"
    )
    return figure


def run(config: Config) -> None:
    for name, least in (("seed", 0), ("reps", 2), ("iterations", 10)):
        if getattr(config, name) < least:
            raise UsageError(f"--{name} is {getattr(config, name)}; it must be at least {least}")
    folder = Path(config.out)
    with run_lock(folder):
        results = simulate(config)
        write(folder / "report.md", text(config, results).encode())
        write(folder / "theory.png", png(draw(config, results)))
    print(f"{text(config, results)}\n{folder / 'report.md'}, {folder / 'theory.png'}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    add_options(parser, Config)
    return exit_code(
        lambda: run(Config(**vars(parser.parse_args(argv)))), "stopped; nothing was written"
    )


if __name__ == "__main__":
    sys.exit(main())
