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
import sys
from functools import partial
from multiprocessing import cpu_count, get_context
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
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
MOST = 3  # L' is 1, 2 or 3, where L = 1; only with 3 the fits are also shown after fewer steps
SIZES = [round(10 ** (2 + i / 2)) for i in range(7)]  # n, from 100 to 100,000
P, BIAS, NOISE = (1.2, -0.8), 0.5, 0.1  # true p_K = p_V = P: No-share and Simple-share have one f
CHUNK = 17  # data sets side by side: more would leave the processor's cache
MISS = 0.2  # a fit whose values are off by more misses p_V

# What the fits of (kind, L', steps of the optimiser) are measured to be: (reps, sizes, 6).
Results = dict[tuple, np.ndarray]


class World(NamedTuple):
    """What is known: M points x, the tokens' scores and experts there, and the matrices."""

    x: Tensor  # (M, 2)
    A: Tensor  # (N, 2, 2)
    H: Tensor  # (N, 2, 2)
    B: Tensor  # (2, 2), as C, W1, W2
    C: Tensor
    W1: Tensor
    W2: Tensor


def draw_world(seed: int, points: int = 400) -> World:
    """Uniform points in [-2, 2]^2, Gaussian A_j and H_j, random orthogonal B, C, W1, W2."""
    rng = np.random.default_rng([seed, 0])
    x, (A, H) = rng.uniform(-2, 2, (points, 2)), rng.normal(size=(2, 2, 2, 2))
    orthogonal = [np.linalg.qr(rng.normal(size=(2, 2)))[0] for _ in range(4)]
    return World(*map(torch.from_numpy, (x, 0.3 * A, H / 2**0.5, *orthogonal)))


def experts(world: World, kind: str, theta: Tensor) -> Tensor:
    """Parameters (..., P) -> experts (..., L', 5): b, p_K, p_V. This is all that sharing is."""
    if kind == "No-share":
        return theta.unflatten(-1, (-1, 5))

    # A trained layer's two matrices stand in front.
    W1, W2 = world.W1, world.W2
    if kind == "shared by a trained layer":
        W1, W2 = theta[..., :8].unflatten(-1, (2, 2, 2)).unbind(-3)  # 2 x (..., 2, 2)
        theta = theta[..., 8:]

    # One vector p makes the key and the value.
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
    # Scores of the tokens, then of the prefix.
    b, key, value = fitted.split([1, 2, 2], dim=-1)
    token = torch.einsum("md,jde,me->jm", world.x, world.A, world.x)  # (N, M): x' A_j x
    prefix = key @ (world.x @ world.B).T + b  # (R, L', M)
    scores = torch.cat([token.expand(len(fitted), -1, -1), prefix], dim=1)  # (R, N + L', M)
    # One softmax gates them all.
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

    # What each point pulls at.
    root = weight.sqrt().unsqueeze(1)  # (R, 1, M)
    residual = ((y - f) * root).flatten(1)  # (R, 2 M)
    gate = (gate * root).unsqueeze(2)  # (R, L', 1, M)
    said = (fitted[..., 3:] @ world.C.T).unsqueeze(-1)  # (R, L', 2, 1): C p_V
    pull = gate * (said - f.unsqueeze(1))  # (R, L', 2, M): df / db

    # df / d experts: b and p_K move the gate, p_V what is said. In place, as copies take as long.
    scores = F.pad(world.x @ world.B, (1, 0), value=1.0).T.unsqueeze(1)  # (3, 1, M)
    jacobian = y.new_empty(*fitted.shape, *y.shape[1:])  # (R, L', 5, 2, M)
    torch.mul(pull.unsqueeze(2), scores, out=jacobian[:, :, :3])
    torch.mul(gate.unsqueeze(2), world.C.T.unsqueeze(2), out=jacobian[:, :, 3:])
    jacobian = jacobian.flatten(3).flatten(1, 2)  # (R, 5 L', 2 M)

    gradient = sharing.mT @ (jacobian @ residual.unsqueeze(-1))  # (R, P, 1)
    hessian = sharing.mT @ (jacobian @ jacobian.mT) @ sharing  # (R, P, P)
    return residual.square().sum(1), hessian, gradient.squeeze(-1)


def fit(
    world: World, kind: str, data: list[Tensor], theta: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Projected Levenberg-Marquardt from theta (R, P): the fits, and which of them still move (R,).

    All fits run at once. A fit ends when 12 steps in a row have not lowered its loss by 1e-10 of
    it. A parameter that a wall of the box holds back is left out of the step.
    """
    # The box: |b| <= 2, all other parameters within 3.
    box = torch.full_like(theta[0], 3.0)
    first = 8 if kind == "shared by a trained layer" else 0
    box[first :: 5 if kind == "No-share" else 3] = 2.0
    theta = theta.clamp(-box, box)

    # What changes, of all fits; `damping` and `idle` count from here on.
    damping, idle = torch.full_like(theta[:, 0], 0.01), torch.zeros_like(theta[:, 0])
    state = (theta, *normal_equations(world, kind, theta, *data), damping, idle)
    for _ in range(steps):
        # Only the fits that still move go on.
        moving = (idle < 12).nonzero().squeeze(1)
        if not len(moving):
            break
        now, loss, hessian, gradient, damp, waited, y, weight = (
            part[moving] for part in (*state, *data)
        )

        # A damped step. The ridge scales with each parameter.
        free = (now.abs() < box) | (now * gradient < 0)  # (R, P)
        ridge = damp[:, None] * hessian.diagonal(dim1=1, dim2=2) + 1e-14  # (R, P)
        damped = hessian * (free[:, :, None] & free[:, None])  # (R, P, P)
        damped = damped + torch.diag_embed(torch.where(free, ridge, 1.0))
        trial = (now + torch.linalg.solve(damped, gradient * free)).clamp(-box, box)

        # A lower loss: take the step, damp the next one less. Else: stay, and damp it more.
        tried = normal_equations(world, kind, trial, y, weight)
        better = tried[0] < loss
        for kept, new in zip(state, (trial, *tried), strict=False):
            kept[moving[better]] = new[better]
        damping[moving] = torch.where(better, damp / 3, damp * 4).clamp(1e-12, 1e12)
        idle[moving] = torch.where(tried[0] < loss * (1 - 1e-10), 0, waited + 1)
    return theta, idle < 12


def voronoi_loss(fitted: Tensor, true: Tensor) -> Tensor:
    """D of experts (R, L', 1 + 2 V) from the true ones (L, 1 + 2 V): (R,).

    An expert is b and V vectors: p_K and p_V, or only the p of Simple-share, which counts once.
    """
    # Distances, and who is nearest to whom.
    delta = fitted[:, :, None, 1:] - true[:, 1:]  # (R, L', L, 2 V)
    distance = delta.unflatten(-1, (-1, 2)).norm(dim=-1)  # (R, L', L, V)
    cell = torch.eye(len(true))[distance.square().sum(-1).argmin(-1)]  # (R, L', L): 1 if i in V_j

    # The first power for an expert alone in its cell, the second for experts that share one.
    alone = (cell.sum(1, keepdim=True) == 1).unsqueeze(-1)  # (R, 1, L, 1)
    error = torch.where(alone, distance, distance.square()).sum(-1)  # (R, L', L)
    mass = fitted[..., :1].exp() * cell  # (R, L', L)
    return (mass.sum(1) - true[:, 0].exp()).abs().sum(1) + (mass * error).sum((1, 2))


def measure(world: World, kind: str, theta: Tensor) -> Tensor:
    """Of every fit (R, 5): D; weighted rms errors of p_K, p_V; rms error of f; 100 if it misses."""
    fitted = experts(world, kind, theta)  # (R, L', 5)
    true = experts(world, kind, truth(world, kind))  # (1, 5)
    free = 3 if kind == "Simple-share" else 5  # b and p, or b, p_K and p_V
    loss = voronoi_loss(fitted[..., :free], true[:, :free])

    # Keys and values, weighted by exp(b_i) / sum exp(b).
    weight = fitted[..., :1].softmax(1)  # (R, L', 1)
    squares = (fitted - true)[..., 1:].square().unflatten(-1, (2, 2)).sum(-1)  # (R, L', 2)
    key, value = (squares * weight).sum(1).sqrt().T  # 2 x (R,)

    difference = attention(world, fitted)[0] - attention(world, true[None])[0]  # (R, 2, M)
    prediction = difference.square().sum(1).mean(1).sqrt()  # (R,)
    return torch.stack([loss, key, value, prediction, 100.0 * (value > MISS)], dim=1)


def sample(world: World, kind: str, length: int, seed: int, reps: range) -> list[Tensor]:
    """Data of all sizes, and starts: y (R, 2, M), weight (R, M), theta (R, P); R = reps x sizes.

    X is uniform on M points, so the mean Y at a point and the point's share of the samples hold all
    that n samples tell. A start is the truth plus N(0, 0.5^2), the same for every n.
    """
    f = attention(world, experts(world, kind, truth(world, kind))[None])[0][0].numpy()  # (2, M)
    start = truth(world, kind, length).numpy()  # (P,)

    # Starts and noise have random numbers of their own, the same for all kinds and L'.
    rows = []  # (y, weight, theta)
    for rep in reps:
        rng = np.random.default_rng([seed, 1, rep])
        theta = np.random.default_rng([seed, 2, rep]).normal(start, 0.5)
        for n in SIZES:
            counts = rng.multinomial(n, np.full(len(world.x), 1 / len(world.x)))  # (M,)
            y = f + NOISE * rng.normal(size=f.shape) / np.sqrt(counts.clip(1))  # (2, M)
            rows.append((y, counts / n, theta))
    return [torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True)]


def work(config: argparse.Namespace, job: tuple) -> np.ndarray:
    """All fits of a job: (reps, sizes, 6), the five of `measure`, and 100 if a fit still moves."""
    torch.set_num_threads(1)  # matrices this small would only wait for a second thread
    kind, length, steps = job
    world, parts = draw_world(config.seed), []
    for first in range(0, config.reps, CHUNK):
        reps = range(config.reps)[first : first + CHUNK]
        *data, start = sample(world, kind, length, config.seed, reps)
        theta, moves = fit(world, kind, data, start, steps)
        parts.append(torch.cat([measure(world, kind, theta), 100 * moves[:, None]], dim=1))
    return torch.cat(parts).unflatten(0, (config.reps, -1)).numpy()


def simulate(config: argparse.Namespace) -> Results:
    """All jobs, the longest first. The number of processes changes no number."""
    jobs = [(kind, length, config.iterations) for length in range(1, MOST) for kind in KINDS]
    jobs += [(kind, MOST, steps) for kind in KINDS for steps in config.budgets]
    jobs.reverse()

    # Workers inherit that Ctrl-C is ignored: it is for this process, which then ends them.
    before = signal(SIGINT, SIG_IGN)
    with get_context("spawn").Pool(min(cpu_count(), 8)) as pool:
        signal(SIGINT, before)
        found = pool.imap(partial(work, config), jobs)
        return dict(zip(jobs, tqdm(found, "fits", len(jobs), disable=None), strict=True))


def slopes(errors: np.ndarray) -> tuple[float, float]:
    """Slope of log mean(error) on log n and its bootstrap error; errors (reps, sizes)."""
    chosen = np.random.default_rng(0).integers(len(errors), size=(500, len(errors)))
    means = np.stack([errors.mean(0), *errors[chosen].mean(1)])  # (501, sizes)
    slope = np.polyfit(np.log(SIZES), np.log(means).T, 1)[0]  # (501,)
    return slope[0], slope[1:].std()


def split(world: World, kind: str, shifts: Tensor) -> Tensor:
    """The true expert cut in two, the halves moved apart by +-t, for every t of (R,): (R, P)."""
    theta = truth(world, kind, 2)
    apart = torch.zeros_like(theta).view(2, -1)
    apart[:, -2:] = torch.tensor([[0.6, 0.8], [-0.6, -0.8]])  # the last two: p_V if free, else p
    return theta + shifts[:, None] * apart.flatten()


def report(config: argparse.Namespace, results: Results) -> str:
    """The text of report.md, with a line for every job."""
    lines = ""
    for (kind, length, steps), found in reversed(results.items()):
        rates = " | ".join("{:.2f} ± {:.2f}".format(*slopes(found[..., i])) for i in range(4))
        loss, _, value, prediction, missed, _ = found[:, -1].mean(0)  # at the largest n
        lines += (
            f"| {length} | {kind} | {steps} | {rates} | {loss:.2g}, {value:.2g}, {prediction:.2g}"
            f" | {missed:.0f}% | {found[..., 5].mean():.0f}% |\n"
        )
    return f"""# The theorem, seen

Slopes of log error on log n, n from {SIZES[0]:,} to {SIZES[-1]:,}, {config.reps} data sets each,
seed {config.seed}, ± bootstrap standard error. D is the mean Voronoi loss; p_K, p_V and prediction
are mean rms errors of the keys, of the values and of f. Last: mean errors at the largest n. Misses:
fits whose values are off by more than {MISS} there. Moving: fits of all n that ran out of steps.

The theorem, for L' > 1 and without log n: D has slope -1/2 for Simple-share and a fixed layer; no
power of n bounds it for No-share. It does not cover a trained layer.

| L' | kind | steps | D | p_K | p_V | prediction | last D, p_V, prediction | misses | moving |
|---|---|---|---|---|---|---|---|---|---|
{lines}
A slope is evidence of a rate only if more steps leave it as it is. The theorem on No-share is about
the worst truth and all estimators. This is one truth and one optimiser: it can show that p_V is not
identified, but no rate.
"""


def panels(config: argparse.Namespace, results: Results) -> list[tuple]:
    """What the figures show: title, name of x, x, lines by kind and L', ends of the y axis."""
    budgets, steps = config.budgets, config.iterations

    def mean(column: int, kinds: list[str] = FIXED) -> dict:
        jobs = [(kind, length) for kind in kinds for length in (1, MOST)]
        return {(k, length): results[k, length, steps][..., column].mean(0) for k, length in jobs}

    # Panel 1: f, when an expert is cut in two and the halves move apart.
    world, shifts = draw_world(config.seed), torch.logspace(-3, 0, 31, dtype=torch.float64)
    change = {(k, 2): measure(world, k, split(world, k, shifts))[:, 3] for k in FIXED}
    slope = {(k, MOST): [slopes(results[k, MOST, n][..., 0])[0] for n in budgets] for k in FIXED}
    missed, decades = mean(4, list(KINDS)), (1e-4, 10)
    by_t, by_n = "t: one expert is cut into two, moved by +t and -t", "samples n"
    return [
        ("1  Why: change of the output f (1e-16: none)", by_t, shifts, change, (1e-17, 10)),
        ("2  Values: rms error of p_V", by_n, SIZES, mean(2), decades),
        ("3  Predictions: rms error of f", by_n, SIZES, mean(3), decades),
        (f"4  % of fits with values off by more than {MISS}", by_n, SIZES, missed, (0, 100)),
        ("5  Distance of all experts: Voronoi loss D", by_n, SIZES, mean(0), decades),
        ("6  Slope of D on n (theorem: -1/2)", "steps of the fit", budgets, slope, (-1, 0)),
    ]


def draw(shown: list[tuple], rows: int, columns: int) -> Figure:
    """The first panels, in a grid. Thin lines lie on thick ones, so none is hidden."""
    figure, legend = Figure(figsize=(4.4 * columns, 4.2 * rows), layout="constrained"), {}
    for axes, panel in zip(figure.subplots(rows, columns).flat, shown, strict=False):
        title, name, x, lines, (low, high) = panel
        for (kind, length), y in lines.items():
            colour, width = KINDS[kind]
            dots = ":" if length == 1 else "-"
            (legend[kind],) = axes.plot(
                x, y, dots, c=colour, lw=width, zorder=9 - width, clip_on=False
            )
        scale = "log" if low > 0 else "linear"
        axes.set(title=title, xlabel=name, xscale="log", yscale=scale, ylim=(low, high))
        axes.grid(alpha=0.3)
    figure.suptitle("The true prefix has one expert. Solid: three experts are fitted. Dotted: one.")
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=len(legend))
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The theorem, seen.", allow_abbrev=False)
    add = partial(parser.add_argument, type=int)
    add("--seed", default=0, help="decides the model, the data and the starts of the fits")
    add("--reps", default=50, help="data sets per sample size")
    add("--iterations", default=1000, help="steps of a fit; also shown: 15 %% and 30 %% of them")
    add("--out", default="out/theory", type=Path, help="folder of the report and the two figures")
    config = parser.parse_args(argv)
    for name, least in (("seed", 0), ("reps", 2), ("iterations", 10)):
        value = getattr(config, name)
        if value < least:
            parser.error(f"--{name} is {value}; it must be at least {least}")

    config.budgets = [round(config.iterations * share) for share in (0.15, 0.3, 1)]
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        results = simulate(config)
        text, shown = report(config, results), panels(config, results)
        # Files are written beside their places, then moved: none is ever half there.
        with TemporaryDirectory(dir=config.out) as folder:
            Path(folder, "report.md").write_text(text, encoding="utf-8")
            draw(shown, 1, 2).savefig(Path(folder, "theorem.png"), dpi=110)
            draw(shown, 2, 3).savefig(Path(folder, "theory.png"), dpi=110)
            for path in Path(folder).iterdir():
                path.replace(config.out / path.name)
        print(f"{text}\n{config.out}: report.md, theory.png, theorem.png")
        return 0
    except KeyboardInterrupt:
        print("stopped before all files were written", file=sys.stderr)
        return 130
    except OSError as error:
        parser.error(f"{config.out} cannot be used ({error.strerror}); choose another --out")


if __name__ == "__main__":
    sys.exit(main())
