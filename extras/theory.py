"""The theorem, seen: what samples tell about prefix experts with free or shared keys and values.

    python -m extras.theory    a report and two figures in out/theory, after two minutes of one core

Model. One query x of one attention head. The N token experts h_j are known, the L prefix experts
are not, and the output is seen with noise:
    Y_i = f_G*(X_i) + noise_i,    f_G(x) = sum_j g_j h_j(x) + sum_l g_l C p_V[l],
    g = softmax over [x' A_j x, (B p_K[l])' x + b[l]]
The unknown is the mixing measure G = sum_l exp(b[l]) delta_(p_K[l], p_V[l]): the prefix as a set of
weighted experts. p_K moves the gate, p_V is what the expert says. A_j, h_j, B and C are known.
    No-share                    p_K[l], p_V[l] free
    Simple-share                p_K[l] = p_V[l] = p[l]; B and C make key and value of it
    shared by a fixed layer     p_K[l] = 2 tanh(W1 p[l]), p_V[l] = sinh(0.7 W2 p[l])
    shared by a trained layer   the same, but W1 and W2 are fitted too, as in Deep-share

Estimator. G_n: least squares over all G of at most L' experts. L' = L is the exact fit. Nobody
knows L, so L' > L in practice: several fitted experts stand for one true expert.

Voronoi loss. V_j: the fitted experts i whose nearest true expert is j. With dp = fitted - true,
    D(G, G*) = sum_j |sum_{i in V_j} exp(b_i) - exp(b*_j)|
               + sum_{i alone in V_j} exp(b_i) (|dp_K| + |dp_V|)
               + sum_{i not alone in V_j} exp(b_i) (|dp_K|^2 + |dp_V|^2)
(Simple-share: |dp|, |dp|^2). D = O(n^-1/2): n^-1/2 for an expert alone, n^-1/4 in company.

Theorems (section 4), L' > L. Simple-share, fixed layer: D(G_n, G*) = O(sqrt(log n / n)) in
probability. No-share: with the brackets |dp_K|^r + |dp_V|^r, any r >= 1 and any estimator, the
worst G has E D >= c n^-1/2. Since r is free, no power of n bounds |dp|. What one G and one
estimator can show of this, and what they cannot, is in docs/theory.md.

Why. f is linear in p_V. Split an expert into two of half the weight, with one key and with the
values p_V + t and p_V - t: f is the same for any t, so no amount of data can tell. If one vector
makes key and value, the keys move apart as well. Then f changes like t^2, and data that determine
f up to n^-1/2 determine t up to n^-1/4.

Shapes: R fits side by side, M points x, N token experts, L' fitted experts (b, p_K, p_V) of 5
numbers each, P parameters of a fit. Source: Le et al., ICLR 2025, arXiv 2410.02200.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends import backend_agg  # noqa: F401  else savefig imports it, deaf to Ctrl-C
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import jacrev, vmap
from tqdm import tqdm

# How a fit makes keys and values; its colour and line width in every figure (thin lines on top).
KINDS = {
    "No-share": ("tab:gray", 2.2),
    "Simple-share": ("tab:blue", 1.4),
    "shared by a fixed layer": ("tab:orange", 4.0),
    "shared by a trained layer": ("tab:green", 1.8),
}
FIXED = list(KINDS)[:3]  # the kinds that the theorems cover
LENGTHS = (1, 2, 3)  # L', where L = 1
MOST = LENGTHS[-1]  # only these fits are also shown after fewer steps
SIZES = [round(10 ** (2 + i / 2)) for i in range(7)]  # n, from 100 to 100,000
P, BIAS, NOISE = (1.2, -0.8), 0.5, 0.1  # true p_K = p_V = P: No-share and Simple-share have one f
CHUNK = 17  # data sets side by side: more would leave the processor's cache
MISS = 0.2  # a fit whose values are off by more misses p_V

Job = tuple[str, int, int]  # kind, L', steps of the optimiser
Results = dict[Job, np.ndarray]  # (reps, sizes, 5)


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


def experts(world: World, kind: str, theta: Tensor) -> Tensor:
    """Parameters (..., P) -> experts (..., L', 5): b, p_K, p_V. This is all that sharing is."""
    if kind == "No-share":
        return theta.unflatten(-1, (-1, 5))
    W1, W2 = world.W1, world.W2
    if kind == "shared by a trained layer":
        # its two matrices stand in front
        matrices, theta = theta[..., :8].unflatten(-1, (2, 2, 2)), theta[..., 8:]
        W1, W2 = matrices[..., 0, :, :], matrices[..., 1, :, :]
    b, p = theta.unflatten(-1, (-1, 3)).split([1, 2], dim=-1)  # (..., L', 1), (..., L', 2)
    if kind == "Simple-share":
        return torch.cat([b, p, p], dim=-1)
    return torch.cat([b, 2 * torch.tanh(p @ W1.mT), torch.sinh(0.7 * p @ W2.mT)], dim=-1)


def truth(world: World, kind: str, length: int = 1) -> Tensor:
    """The true parameters (P,), the expert cut into `length` equal ones; f is the same."""
    expert = [BIAS - np.log(length), *P, *(P if kind == "No-share" else ())]
    theta = torch.tensor(expert * length, dtype=torch.float64)
    if kind == "shared by a trained layer":
        return torch.cat([world.W1.flatten(), world.W2.flatten(), theta])
    return theta


def attention(world: World, fitted: Tensor) -> tuple[Tensor, Tensor]:
    """f_G (R, 2, M) at every point and the prefix experts' gates (R, L', M), of (R, L', 5)."""
    # scores of the tokens, then of the prefix
    b, key, value = fitted.split([1, 2, 2], dim=-1)
    token = torch.einsum("md,jde,me->jm", world.x, world.A, world.x)  # (N, M): x' A_j x
    prefix = key @ (world.x @ world.B).T + b  # (R, L', M)
    scores = torch.cat([token.expand(len(fitted), -1, -1), prefix], dim=1)  # (R, N + L', M)
    # one softmax gates them all
    token_gate, gate = scores.softmax(dim=1).split([len(token), fitted.shape[1]], dim=1)
    expert = torch.tanh(torch.einsum("jde,me->jdm", world.H, world.x))  # (N, 2, M): h_j(x)
    f = torch.einsum("rjm,jdm->rdm", token_gate, expert) + (value @ world.C.T).mT @ gate
    return f, gate


def normal_equations(
    world: World, kind: str, theta: Tensor, y: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    """Loss sum_m w_m |y_m - f(x_m)|^2 (R,), J'J (R, P, P), J'r (R, P); y (R, 2, M), weight (R, M).

    J = (df / d experts) (d experts / d theta): the softmax's factor, and that of the sharing.
    """
    fitted = experts(world, kind, theta)  # (R, L', 5)
    sharing = vmap(jacrev(partial(experts, world, kind)))(theta).flatten(1, 2)  # (R, 5 L', P)
    f, gate = attention(world, fitted)

    # what each point pulls at
    root = weight.sqrt().unsqueeze(1)  # (R, 1, M)
    residual = ((y - f) * root).flatten(1)  # (R, 2 M)
    gate = (gate * root).unsqueeze(2)  # (R, L', 1, M)
    said = (fitted[..., 3:] @ world.C.T).unsqueeze(-1)  # (R, L', 2, 1): C p_V
    pull = gate * (said - f.unsqueeze(1))  # (R, L', 2, M): df / db
    one = torch.ones_like(world.x[:, :1])
    scores = torch.cat([one, world.x @ world.B], dim=1).T.unsqueeze(1)  # (3, 1, M)

    # df / d experts, filled in place, as copies cost more
    jacobian = y.new_empty(*fitted.shape, *y.shape[1:])  # (R, L', 5, 2, M)
    torch.mul(pull.unsqueeze(2), scores, out=jacobian[:, :, :3])  # by b and p_K
    torch.mul(gate.unsqueeze(2), world.C.T.unsqueeze(2), out=jacobian[:, :, 3:])  # by p_V
    jacobian = jacobian.flatten(3).flatten(1, 2)  # (R, 5 L', 2 M)

    gradient = sharing.mT @ (jacobian @ residual.unsqueeze(-1))  # (R, P, 1)
    hessian = sharing.mT @ (jacobian @ jacobian.mT) @ sharing  # (R, P, P)
    return residual.square().sum(1), hessian, gradient.squeeze(-1)


def fit(
    world: World, kind: str, data: Sequence[Tensor], theta: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Projected Levenberg-Marquardt from theta (R, P): the fits, and which of them still move (R,).

    All fits run at once. A fit ends when 12 steps in a row have not lowered its loss by 1e-10 of
    it. A parameter that a wall of the box holds back is left out of the step.
    """
    # the box: |b| <= 2, all other parameters within 3
    box = torch.full(theta.shape[1:], 3.0, dtype=torch.float64)
    first = 8 if kind == "shared by a trained layer" else 0
    box[first :: 5 if kind == "No-share" else 3] = 2.0
    theta = theta.clamp(-box, box)

    result, alive = theta.clone(), torch.arange(len(theta))
    damping, idle = torch.full((len(theta),), 0.01, dtype=torch.float64), torch.zeros(len(theta))
    state = [theta, *normal_equations(world, kind, theta, *data), damping, idle, *data]
    for _ in range(steps):
        if not len(alive):
            break
        # a damped step; ridge: it scales with each parameter
        theta, loss, hessian, gradient, damping, idle, *data = state
        free = (theta.abs() < box) | (theta * gradient < 0)  # (R, P)
        ridge = damping[:, None] * hessian.diagonal(dim1=1, dim2=2) + 1e-14  # (R, P)
        damped = hessian * (free[:, :, None] & free[:, None])  # (R, P, P)
        damped = damped + torch.diag_embed(torch.where(free, ridge, 1.0))
        trial = (theta + torch.linalg.solve(damped, gradient * free)).clamp(-box, box)

        # keep it where it lowers the loss: less damping; else the old values: more damping
        tried = [trial, *normal_equations(world, kind, trial, *data)]
        better = tried[1] < loss
        for j, new in enumerate(tried):
            tall = better.view(-1, *[1] * (new.dim() - 1))
            state[j] = torch.where(tall, new, state[j])
        state[4] = torch.where(better, damping / 3, damping * 4).clamp(1e-12, 1e12)
        state[5] = torch.where(tried[1] < loss * (1 - 1e-10), 0, idle + 1)

        # fits that have ended leave
        result[alive] = state[0]
        moves = state[5] < 12
        state, alive = [part[moves] for part in state], alive[moves]
    return result, torch.isin(torch.arange(len(result)), alive)


def voronoi_loss(fitted: Tensor, true: Tensor, one_vector: bool) -> Tensor:
    """D of experts (R, L', 5) from the true ones (L, 5): (R,). one_vector: count |dp| once."""
    # distances, and who is nearest to whom
    delta = fitted[:, :, None, 1:] - true[:, 1:]  # (R, L', L, 4)
    key, value = delta[..., :2].norm(dim=-1), delta[..., 2:].norm(dim=-1)  # (R, L', L)
    cell = torch.eye(len(true))[(key**2 + value**2).argmin(-1)]  # (R, L', L): 1 where i is in V_j
    # the first power for an expert alone in its cell, the second for experts that share one
    alone, together = (key, key**2) if one_vector else (key + value, key**2 + value**2)
    error = torch.where(cell.sum(1, keepdim=True) == 1, alone, together)
    mass = fitted[..., :1].exp() * cell  # (R, L', L)
    return (mass.sum(1) - true[:, 0].exp()).abs().sum(1) + (mass * error).sum((1, 2))


def measure(world: World, kind: str, theta: Tensor) -> Tensor:
    """Of every fit (R, 4): D; weighted rms errors of p_K and of p_V; rms error of f."""
    fitted = experts(world, kind, theta)  # (R, L', 5)
    true = experts(world, kind, truth(world, kind))  # (1, 5)
    loss = voronoi_loss(fitted, true, kind == "Simple-share")
    weight = fitted[..., 0].softmax(1)  # (R, L'): exp(b_i) / sum exp(b)
    squares = (fitted - true).square()
    key = (squares[..., 1:3].sum(-1) * weight).sum(1).sqrt()  # (R,)
    value = (squares[..., 3:].sum(-1) * weight).sum(1).sqrt()
    difference = attention(world, fitted)[0] - attention(world, true[None])[0]  # (R, 2, M)
    return torch.stack([loss, key, value, difference.square().sum(1).mean(1).sqrt()], dim=1)


def sample(world: World, kind: str, length: int, seed: int, reps: range) -> tuple[Tensor, ...]:
    """Data of all sizes, and starts: y (R, 2, M), weight (R, M), theta (R, P); R = reps x sizes.

    X is uniform on M points, so the mean Y at a point and the point's share of the samples hold all
    that n samples tell. A start is the truth plus N(0, 0.5^2), the same for every n.
    """
    f = attention(world, experts(world, kind, truth(world, kind))[None])[0][0].numpy()  # (2, M)
    start = truth(world, kind, length).numpy()  # (P,)
    rows = []  # (y, weight, theta)
    for rep in reps:
        rng = np.random.default_rng([seed, 1, rep])  # the same noise for all kinds and L'
        theta = np.random.default_rng([seed, 2, rep]).normal(start, 0.5)
        for n in SIZES:
            counts = rng.multinomial(n, np.full(len(world.x), 1 / len(world.x)))  # (M,)
            y = f + NOISE * rng.normal(size=f.shape) / np.sqrt(counts.clip(1))  # (2, M)
            rows.append((y, counts / n, theta))
    return tuple(torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))


def work(config: argparse.Namespace, job: Job) -> np.ndarray:
    """All fits of a job: (reps, sizes, 5), the four of `measure` and whether a fit still moves."""
    torch.set_num_threads(1)  # matrices this small would only wait for a second thread
    kind, length, steps = job
    world, parts = World.draw(config.seed), []
    for first in range(0, config.reps, CHUNK):
        reps = range(first, min(first + CHUNK, config.reps))
        *data, start = sample(world, kind, length, config.seed, reps)
        theta, moves = fit(world, kind, data, start, steps)
        parts.append(torch.cat([measure(world, kind, theta), moves[:, None]], dim=1))
    return torch.cat(parts).view(config.reps, len(SIZES), 5).numpy()


def simulate(config: argparse.Namespace) -> Results:
    """All jobs. The numbers do not depend on the number of processes."""
    jobs = [(kind, MOST, steps) for steps in config.budgets for kind in KINDS]
    jobs += [(kind, length, config.iterations) for length in LENGTHS[:-1] for kind in KINDS]
    # workers inherit that Ctrl-C is ignored: it is for this process, which then ends them
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with get_context("spawn").Pool(min(os.cpu_count() or 1, 8)) as pool:
        signal.signal(signal.SIGINT, before)
        found = pool.imap(partial(work, config), jobs)
        return dict(zip(jobs, tqdm(found, "fits", len(jobs), disable=None), strict=True))


def slopes(errors: np.ndarray, middle: Callable = np.mean) -> tuple[float, float]:
    """Slope of log middle(error) on log n and its bootstrap error; errors (reps, sizes)."""
    x = np.log(SIZES) - np.log(SIZES).mean()
    chosen = np.random.default_rng(0).integers(len(errors), size=(500, len(errors)))
    means = np.stack([middle(errors, axis=0), *middle(errors[chosen], axis=1)])  # (501, sizes)
    fitted = np.log(means) @ x / (x @ x)
    return fitted[0], fitted[1:].std()


def split(world: World, kind: str, shifts: Tensor) -> Tensor:
    """The true expert cut in two, the halves moved apart by +-t, for every t of (R,): (R, P)."""
    theta = truth(world, kind, 2)
    apart = torch.zeros_like(theta).view(2, -1)
    apart[:, -2:] = torch.tensor([[0.6, 0.8], [-0.6, -0.8]])  # the last two: p_V if free, else p
    return theta + shifts[:, None] * apart.flatten()


def table(results: Results) -> str:
    """Slopes of every job."""
    heads = "L' | kind | steps | D, median | D | p_K | p_V | prediction | theorem for D"
    heads += " | last D, p_V, prediction | misses p_V | still moving"
    lines = [f"| {heads} |", "|---" * 12 + "|"]
    for kind, length, steps in sorted(results, key=lambda job: (job[1], list(KINDS).index(job[0]))):
        found = results[kind, length, steps]
        fitted = [slopes(found[..., 0], np.median), *(slopes(found[..., i]) for i in range(4))]
        cells = [str(length), kind, str(steps), *(f"{s:.2f} ± {error:.2f}" for s, error in fitted)]
        theorem = {"No-share": "no power of n", "shared by a trained layer": "-"}.get(kind, "-0.5")
        cells.append(theorem if length > 1 else "-")
        cells.append(", ".join(f"{error:.2g}" for error in found[:, -1, [0, 2, 3]].mean(0)))
        cells += [f"{(found[:, -1, 2] > MISS).mean():.0%}", f"{found[..., 4].mean():.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def text(config: argparse.Namespace, results: Results) -> str:
    return f"""# The theorem, seen

Slopes of log error on log n, n from {SIZES[0]:,} to {SIZES[-1]:,}, {config.reps} data sets each,
seed {config.seed}, ± bootstrap standard error. D is the Voronoi loss, median and mean; p_K, p_V and
prediction are mean rms errors of the keys, of the values and of f. Theorem: its rate, without
log n. Last: mean errors at the largest n. Misses p_V: fits whose values are off by more than {MISS}
there. Still moving: fits of all n that ran out of steps.

{table(results)}

A slope is evidence of a rate only if more steps leave it as it is. The theorem on No-share is about
the worst truth and all estimators. This is one truth and one optimiser: it can show that p_V is not
identified, but no rate.
"""


def plot(axes: Axes, x: Sequence, found: Mapping[str, Sequence], dots: str = "-") -> None:
    """A line per kind. Thin lines lie on thick ones, so none is hidden."""
    for kind, y in found.items():
        colour, width = KINDS[kind]
        axes.plot(x, y, dots, color=colour, lw=width, zorder=9 - width, label=kind, clip_on=False)


def draw_unseen(axes: Axes, title: str, seed: int) -> None:
    """How f changes when the two halves of an expert move apart."""
    world, shifts = World.draw(seed), torch.logspace(-3, 0, 31, dtype=torch.float64)
    plot(axes, shifts, {k: measure(world, k, split(world, k, shifts))[:, 3] for k in FIXED})
    axes.set(title=title, xscale="log", yscale="log", ylabel="rms change of the output f")
    axes.set(xlabel="t: one expert is cut into two, moved by +t and -t")
    axes.text(0.001, 1e-15, "the output stays the same (rounding errors)")


def draw_errors(axes: Axes, title: str, results: Results, column: int, steps: int) -> None:
    """A mean error against n; dotted where the number of experts is known."""
    for length, dots in ((1, ":"), (MOST, "-")):
        plot(axes, SIZES, {k: results[k, length, steps][..., column].mean(0) for k in FIXED}, dots)
    axes.set(title=title, xscale="log", yscale="log", xlabel="samples n")


def draw(config: argparse.Namespace, results: Results) -> dict[str, Figure]:
    """theorem.png, the gist in two panels, and theory.png, the whole story in six."""
    steps = config.iterations
    small = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = small.subplots(1, 2)
    draw_unseen(left, "A  What no output can see", config.seed)
    draw_errors(right, "B  What more samples find: error of the values", results, 2, steps)

    whole = Figure(figsize=(13, 8), layout="constrained")
    unseen, value, prediction, missing, loss, slope = whole.subplots(2, 3).flat
    draw_unseen(unseen, "1  Why: f cannot see free values move", config.seed)
    draw_errors(value, "2  Values: rms error of p_V", results, 2, steps)
    draw_errors(prediction, "3  Predictions: rms error of f", results, 3, steps)
    prediction.set_ylim(value.get_ylim())
    draw_errors(loss, "5  Distance of all experts: Voronoi loss D", results, 0, steps)

    missed = {k: 100 * (results[k, MOST, steps][..., 2] > MISS).mean(0) for k in KINDS}
    plot(missing, SIZES, missed)
    title = f"4  % of fits with values off by more than {MISS}"
    missing.set(title=title, xscale="log", xlabel="samples n", ylim=(0, 100))

    found = {k: [slopes(results[k, MOST, n][..., 0])[0] for n in config.budgets] for k in FIXED}
    plot(slope, config.budgets, found)
    slope.axhline(-0.5, color="black", lw=0.8)
    slope.text(config.budgets[0], -0.48, "theorem for shared vectors: -1/2")
    slope.set(title="6  Slope of D on n: does it hold?", ylim=(-1, 0))
    slope.set(xlabel="steps of the optimiser", xticks=config.budgets)

    for figure, axes in ((small, left), (whole, missing)):
        figure.suptitle(
            "The true prefix has one expert. Solid lines: three experts are fitted. Dotted: one."
        )
        figure.legend(handles=axes.lines, loc="outside lower center", ncols=len(KINDS))
    return {"theory.png": whole, "theorem.png": small}


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Save all of a file or nothing: under a temporary name, then renamed."""
    temporary = path.with_name(f".part-{path.name}")
    try:
        save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class UsageError(Exception):
    """A mistake that the user can fix."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def options(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = partial(parser.add_argument, type=int)
    add("--seed", default=0, help="decides the model, the data and the starts of the fits")
    add("--reps", default=50, help="data sets per sample size")
    add("--iterations", default=1000, help="steps of a fit; also shown: 15 %% and 30 %% of them")
    add("--out", default="out/theory", type=Path, help="folder of the report and the two figures")
    config = parser.parse_args(argv)
    for name, least in (("seed", 0), ("reps", 2), ("iterations", 10)):
        if getattr(config, name) < least:
            raise UsageError(f"--{name} is {getattr(config, name)}; it must be at least {least}")
    config.budgets = [round(config.iterations * share) for share in (0.15, 0.3, 1)]
    return config


def main(argv: list[str] | None = None) -> int:
    try:
        config = options(argv)
        config.out.mkdir(parents=True, exist_ok=True)
        results = simulate(config)
        report, figures = text(config, results), draw(config, results)
        write(config.out / "report.md", partial(Path.write_text, data=report, encoding="utf-8"))
        for name, figure in figures.items():
            write(config.out / name, partial(figure.savefig, dpi=110))
        print(f"{report}\n{config.out}: report.md, {', '.join(figures)}")
        return 0
    except KeyboardInterrupt:
        print("stopped before all files were written", file=sys.stderr)
        return 130
    except UsageError as error:
        print("error:", error, file=sys.stderr)
    except OSError as error:
        reason = f"{config.out} cannot be used ({error.strerror})"
        print(f"error: {reason}; choose another --out", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
