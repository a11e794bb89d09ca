"""extras/theory.py: an attention head, an estimator that finds what it can, the paper's loss."""

import ast
import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from extras import theory
from extras.theory import (
    FIXED,
    KINDS,
    SIZES,
    World,
    attention,
    draw_world,
    experts,
    fit,
    main,
    measure,
    normal_equations,
    sample,
    slopes,
    split,
    truth,
    voronoi_loss,
)
from prefix import Prefix
from vit import Attention
from vit import attention as attention_of_vit


@pytest.fixture
def world() -> World:
    return draw_world(seed=0, points=60)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def somewhere(world, kind, length, fits=4) -> Tensor:
    """Parameters (R, P) near the truth, no two alike."""
    theta = truth(world, kind, length)
    return theta + 0.3 * torch.randn(
        fits, len(theta), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def test_the_model_is_an_attention_head_of_vit_py_with_a_prefix(world):
    """A token is (x, 1, A_j x, h_j(x)): W_q reads (x, 1), W_k A_j x, W_v h_j. So b meets the 1."""
    (fitted,) = experts(world, "No-share", somewhere(world, "No-share", 3, fits=1))  # (L', 5)
    x, dim = world.x, 7
    pairs = zip(world.A, world.H, strict=True)
    tokens = [
        torch.cat([x, torch.ones(len(x), 1), x @ A.T, torch.tanh(x @ H.T)], 1) for A, H in pairs
    ]
    head = Attention(dim, n_head=1).double().requires_grad_(False)
    for parameter in head.parameters():
        parameter.zero_()
    head.proj.weight.copy_(torch.eye(dim))
    w_q, w_k, w_v = head.qkv.weight.view(3, dim, dim)
    w_q[:3, :3] = torch.eye(3).double() * dim**0.5  # attention divides by sqrt(Dh)
    w_k[:2, 3:5] = torch.eye(2)
    w_v[:2, 5:] = torch.eye(2)
    b, key, value = fitted.split([1, 2, 2], dim=1)
    prefix = torch.zeros(2, 1, 3, dim, dtype=torch.float64)  # (2, H, L, Dh)
    prefix[0, 0, :, :3] = torch.cat([key @ world.B.T, b], 1)
    prefix[1, 0, :, :2] = value @ world.C.T
    gates = []  # asks for the attention that is written out
    written_out = partial(attention_of_vit, attn_weights=gates)
    out = head(torch.stack(tokens, 1), prefix, written_out)[:, 0, :2]  # (M, 2)
    f, gate = attention(world, fitted[None])
    torch.testing.assert_close(f[0].T, out, atol=1e-12, rtol=0)
    torch.testing.assert_close(gate[0].T, gates[0][:, 0, 0, :3], atol=1e-12, rtol=0)
    prefix[0, 0, :, 2] = 0  # without b
    assert not torch.allclose(f[0].T, head(torch.stack(tokens, 1), prefix)[:, 0, :2], atol=1e-3)


TRUE = rows([0, 0, 0, 0, 0], [math.log(2), 10, 0, 0, 10])  # two experts of mass 1 and 2


def test_the_voronoi_loss_is_zero_at_the_truth_in_any_order_and_only_there():
    assert voronoi_loss(torch.stack([TRUE, TRUE.flip(0)]), TRUE).tolist() == [0, 0]
    moved = TRUE + rows([0, 0, 0, 0, 0.1])
    assert voronoi_loss(moved[None], TRUE).item() == pytest.approx(0.1 * (1 + 2))


def test_the_voronoi_loss_counts_a_lone_expert_linearly_and_experts_in_one_cell_by_squares():
    alone = rows([math.log(1.5), 3, 4, 0, 1])  # |dp_K| 5, |dp_V| 1 from the first
    # |dp_K| 2 and |dp_V| 3 from the second
    pair = rows([math.log(0.5), 10, 2, 0, 10], [0, 10, 0, 3, 10])
    loss = voronoi_loss(torch.cat([alone, pair])[None], TRUE).item()
    assert loss == pytest.approx(0.5 + 1.5 * (5 + 1) + abs(0.5 + 1 - 2) + 0.5 * 2**2 + 1 * 3**2)
    # A cell is empty.
    assert voronoi_loss(alone[None], TRUE).item() == pytest.approx(0.5 + 1.5 * (5 + 1) + 2)


def test_the_voronoi_loss_of_simple_share_counts_its_one_vector_once(world):
    true, half = truth(world, "Simple-share"), math.log(0.5)
    lone = true + rows([0, 3, 4])
    pair = (true.repeat(2) + rows([half, 3, 4, half, 0, 2]).flatten())[None]
    mass = math.exp(theory.BIAS)
    assert measure(world, "Simple-share", lone)[0, 0].item() == pytest.approx(mass * 5)
    loss = measure(world, "Simple-share", pair)[0, 0].item()
    assert loss == pytest.approx(mass * (0.5 * 25 + 0.5 * 4))
    free = experts(world, "Simple-share", lone)  # as free experts, key and value count
    assert voronoi_loss(free, experts(world, "Simple-share", true)).item() == pytest.approx(
        mass * 10
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimator_s_gradient_and_matrix_are_those_of_finite_differences(kind, world):
    theta = somewhere(world, kind, 2)  # (R, P)
    y, weight, _ = (part[:4] for part in sample(world, kind, 2, seed=0, reps=range(1)))

    def residual(theta):
        f = attention(world, experts(world, kind, theta))[0]
        return ((y - f) * weight.sqrt()[:, None]).flatten(1)  # (R, 2 M)

    steps = 1e-6 * torch.eye(theta.shape[1], dtype=torch.float64)
    columns = [(residual(theta - step) - residual(theta + step)) / 2e-6 for step in steps]
    jacobian = torch.stack(columns, dim=1)  # (R, P, 2 M), of f
    loss, hessian, gradient = normal_equations(world, kind, theta, y, weight)
    torch.testing.assert_close(loss, residual(theta).square().sum(1))
    torch.testing.assert_close(
        gradient, (jacobian @ residual(theta).unsqueeze(-1)).squeeze(-1), atol=1e-8, rtol=1e-6
    )
    torch.testing.assert_close(hessian, jacobian @ jacobian.mT, atol=1e-8, rtol=1e-6)
    assert not torch.allclose(
        gradient, normal_equations(world, kind, theta, y + 1, weight)[2], atol=1e-3
    )


@pytest.mark.parametrize("kind", FIXED)
def test_data_without_noise_give_the_parameters_back(kind, world, monkeypatch):
    *noisy, start = sample(world, kind, 1, seed=0, reps=range(2))
    monkeypatch.setattr(theory, "NOISE", 0.0)
    *data, start = sample(world, kind, 1, seed=0, reps=range(2))
    true = truth(world, kind).expand_as(start)
    theta, moves = fit(world, kind, data, start, 200)
    torch.testing.assert_close(theta, true, atol=1e-7, rtol=0)
    assert not moves.any()
    assert not torch.allclose(start, true, atol=0.1)  # it had something to find
    assert not torch.allclose(fit(world, kind, noisy, start, 200)[0], true, atol=1e-3)


def test_fits_stay_in_the_box_and_never_get_worse(world):
    *data, start = sample(world, "No-share", 3, seed=0, reps=range(2))
    far = 3 * start
    first, last = (fit(world, "No-share", data, far, steps)[0] for steps in (1, 60))
    assert last.abs().max() <= 3
    assert last.view(-1, 3, 5)[..., 0].abs().max() <= 2
    losses = [normal_equations(world, "No-share", theta, *data)[0] for theta in (first, last)]
    assert (losses[1] <= losses[0]).all()
    assert far.abs().max() > 3


def test_free_values_can_drift_apart_unseen_and_shared_ones_move_f_by_the_square(world):
    shifts = rows(0.01, 0.1, 1)
    loss, _, value, change, missed = measure(world, "No-share", split(world, "No-share", shifts)).T
    torch.testing.assert_close(value, shifts)
    torch.testing.assert_close(loss, math.exp(theory.BIAS) * shifts**2)
    assert change.max() < 1e-14
    assert missed.tolist() == [0, 0, 100]  # a value off by more than 0.2 is missed
    for kind in ("Simple-share", "shared by a fixed layer"):
        change = measure(world, kind, split(world, kind, shifts))[:, 3]
        assert (change[1] / change[0]).item() == pytest.approx(100, rel=0.05)
        assert change[2] > 0.1


def test_a_trained_layer_can_make_one_key_with_two_values(world):
    """If the p[l] are linearly independent, W1 p and W2 p are any vectors: flat again."""
    (true,) = experts(
        world, "shared by a fixed layer", truth(world, "shared by a fixed layer")
    )  # (5,)
    p, apart = rows([1.2, -0.8], [-0.5, 1.5]), rows([0.6, 0.8], [-0.6, -0.8])  # (L', 2)
    W1 = torch.linalg.solve(p, (true[1:3].expand(2, 2) / 2).atanh()).T
    W2 = torch.linalg.solve(p, (true[3:] + apart).asinh() / 0.7).T
    b = torch.full((2, 1), theory.BIAS - math.log(2), dtype=torch.float64)
    theta = torch.cat([W1.flatten(), W2.flatten(), torch.cat([b, p], 1).flatten()])
    fitted = experts(world, "shared by a trained layer", theta[None])  # (1, 2, 5)
    torch.testing.assert_close(
        attention(world, fitted)[0], attention(world, true[None, None])[0], atol=1e-12, rtol=0
    )
    assert voronoi_loss(fitted, true[None]).item() == pytest.approx(math.exp(theory.BIAS))
    assert torch.linalg.det(W1).abs() < 1e-12  # an invertible W1 would move the keys apart


def test_deep_share_makes_any_keys_and_values_of_as_many_vectors_as_its_hidden_width_and_one():
    def distance(length):
        prefix = Prefix(1, 1, 64, length, "deep", hidden=12, init_scale=1.0).double()
        hidden = (
            (prefix.p[0] @ prefix.map[0].weight[0] + prefix.map[0].bias[0]).tanh().detach()
        )  # (L, 12)
        hidden = torch.cat([hidden, torch.ones(length, 1)], 1)  # A2 and a2 act on this
        wanted = torch.randn(length, 128).double()  # keys and values
        return (hidden @ torch.linalg.lstsq(hidden, wanted).solution - wanted).abs().max()

    torch.manual_seed(0)
    assert max(distance(5), distance(13)) < 1e-8
    assert distance(14) > 0.01


def test_the_data_are_means_of_n_samples(world):
    y, weight, _ = sample(world, "Simple-share", 1, seed=0, reps=range(40))
    f = attention(world, experts(world, "Simple-share", truth(world, "Simple-share"))[None])[0]
    n = rows(*SIZES).repeat(40)[:, None]
    torch.testing.assert_close(weight.sum(1), torch.ones(len(y), dtype=torch.float64))
    counts = n * weight
    seen = (counts > 0).unsqueeze(1).expand_as(y)
    noise = ((y - f) * counts.sqrt().unsqueeze(1))[seen]
    assert noise.std().item() == pytest.approx(0.1, rel=0.02)
    assert not seen.all()  # with 100 samples some points have none
    again, other = (sample(world, "Simple-share", 1, seed=seed, reps=range(40)) for seed in (0, 1))
    assert torch.equal(y, again[0])
    assert not any(
        torch.allclose(one, two) for one, two in zip(again, other, strict=True)
    )  # data and starts


def test_a_slope_is_that_of_the_power_law_and_its_error_that_of_its_spread():
    power = np.tile(np.array(SIZES) ** -0.5, (20, 1))
    assert slopes(power) == (pytest.approx(-0.5), pytest.approx(0))
    scatter = power * np.exp(np.random.default_rng(0).normal(size=power.shape))
    slope, error = slopes(scatter)
    assert 0.01 < error < 0.2
    assert abs(slope + 0.5) < 3 * error


def test_the_seed_decides_every_number(threads):
    def found(seed):
        return theory.work(Namespace(seed=seed, reps=2), ("No-share", 2, 20))

    first = found(0)
    assert first.shape == (2, len(SIZES), 6)
    assert np.array_equal(first, found(0))
    assert not np.allclose(first, found(1))


def test_chunks_of_data_sets_come_back_in_order(threads, monkeypatch):
    config, job = Namespace(seed=0, reps=3), ("Simple-share", 1, 10)
    whole = theory.work(config, job)
    monkeypatch.setattr(theory, "CHUNK", 2)
    np.testing.assert_allclose(theory.work(config, job), whole, rtol=1e-6)
    assert not np.allclose(whole[0], whole[2])


@pytest.mark.slow
def test_the_command_writes_a_table_and_figures_with_the_numbers_of_a_single_process(
    tmp_path, capsys, threads
):
    out = tmp_path / "new" / "theory"
    assert main(["--reps", "2", "--iterations", "10", "--out", str(out)]) == 0
    report = Path(out, "report.md").read_text(encoding="utf-8")
    assert report in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"report.md", "theorem.png", "theory.png"}
    for name in ("theorem.png", "theory.png"):
        assert Path(out, name).read_bytes().startswith(b"\x89PNG")
    jobs = [("No-share", 3, 2), ("Simple-share", 3, 10), ("shared by a trained layer", 1, 10)]
    alone = {job: theory.work(Namespace(seed=0, reps=2), job) for job in jobs}
    lines = theory.report(Namespace(seed=0, reps=2), alone).splitlines()
    assert report.count("\n| ") == 1 + 20
    assert set(lines) < set(report.splitlines())
    alone["Simple-share", 3, 10] = 2 * alone["Simple-share", 3, 10] ** 2
    lines = theory.report(Namespace(seed=0, reps=2), alone).splitlines()
    assert not set(lines) < set(report.splitlines())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--reps 1", "--reps is 1; it must be at least 2"),
        ("--iterations 3", "--iterations is 3; it must be at least 10"),
        ("--seed -1", "--seed is -1; it must be at least 0"),
        ("--reps many", "invalid int value: 'many'"),
        ("--rep 5", "unrecognized arguments: --rep 5"),
        ("--out TAKEN", "taken cannot be used (File exists); choose another --out"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(words, sentence, tmp_path, capsys):
    (tmp_path / "taken").touch()
    with pytest.raises(SystemExit) as end:
        main(words.replace("TAKEN", str(tmp_path / "taken")).split())
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert sentence in err.splitlines()[-1]
    assert not out


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    def torn(figure, path, dpi):
        Path(path).write_text("half")
        raise KeyboardInterrupt

    (tmp_path / "report.md").write_text("old")
    results = {(kind, 3, 10): np.ones((2, len(SIZES), 6)) for kind in KINDS}
    monkeypatch.setattr(theory, "simulate", lambda config: results)
    monkeypatch.setattr(theory, "panels", lambda config, results: [])
    monkeypatch.setattr(theory.Figure, "savefig", torn)
    assert main(["--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "stopped before all files were written\n"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_it_imports_nothing_of_the_repository():
    tree = ast.parse(Path(theory.__file__).read_text(encoding="utf-8"))
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    tops = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert tops == {"matplotlib", "numpy", "torch", "tqdm"}


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_says_so(tmp_path):
    command = [sys.executable, "-m", "extras.theory", "--out", str(tmp_path / "out")]
    root = Path(theory.__file__).parents[1]
    process = subprocess.Popen(
        command, cwd=root, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / "out").exists():
        time.sleep(0.1)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    assert process.communicate(timeout=60)[1] == "stopped before all files were written\n"
    assert process.returncode == 130
    assert not any((tmp_path / "out").iterdir())
