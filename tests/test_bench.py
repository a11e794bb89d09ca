"""bench.py measures the same work on both sides; and what must hold for a GPU, as far as a CPU can tell."""

import json
import re
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import vit
from data import UsageError, load
from extras import bench, peers
from extras.bench import main
from extras.measure import Apart, Calls, formula_alone, timed
from gpt import GPT
from prefix import SHARE
from train import Config, TunedModel, image_loss, make_optimizer, resolve, text_loss, train
from vit import ViT

WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "masked_select",
    "equal",
)  # what needs a value from the GPU


def names_of(run: Callable[[], object]) -> list[str]:
    """Names of all operations, in order."""
    with Calls(re.compile(".*")) as made:
        run()
    return [call.func.overloadpacket.__name__ for call in made.calls]


def vision_step(share: str) -> list[str]:
    small = ViT(image=32, patch=16, dim=128, n_layer=2, n_head=2).requires_grad_(False)
    small.cast_frozen_weights()
    config = resolve(Config(share=share, length=3, lr=0.1, wd=0.1))
    model = TunedModel(config, small, 5)
    optimizer = make_optimizer(config, model)
    pixels, labels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8), torch.arange(4)

    def step():
        image_loss(model, small, True, pixels, labels)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return names_of(step)


@pytest.mark.parametrize("share", SHARE)
def test_no_operation_of_an_image_step_waits_for_the_gpu(share):
    names = vision_step(share)
    assert len(names) > 100
    assert not set(names) & set(WAITS)


def test_no_operation_of_a_text_step_waits_for_the_gpu():
    config = resolve(Config(task="e2e", share="deep", length=3))
    gpt = GPT(vocab=30, context=40, dim=16, n_layer=2, n_head=2).requires_grad_(False)
    model = TunedModel(config, gpt, 0)
    optimizer = make_optimizer(config, model)
    tokens, at, labels = (
        torch.randint(30, (2, 9)),
        torch.tensor([[4, 5, 6], [3, 4, 4]]),
        torch.tensor([[1, 2, 3], [4, 5, -100]]),
    )

    def step():
        text_loss(model, gpt, False, tokens, at, labels)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    names = names_of(step)
    assert len(names) > 100
    assert not set(names) & set(WAITS)
    assert set(names_of(lambda: torch.ones(1).item())) & set(WAITS)  # it would have been seen


def test_attention_inputs_are_what_the_flash_kernel_takes(monkeypatch):
    seen = []

    def watched(q, k, v, mask=None, **rest):
        seen.append((q, k, v, mask))
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).to(q.dtype)

    monkeypatch.setattr(
        vit, "attention", lambda q, k, v, mask=None, attn_weights=None: watched(q, k, v, mask)
    )
    vision_step("deep")
    assert len(seen) == 2
    for q, k, v, mask in seen:
        assert mask is None
        for tensor in (q, k, v):
            assert tensor.dtype == torch.bfloat16
            assert tensor.shape[-1] == 64
            assert tensor.stride(-1) == 1
        assert k.is_contiguous()
        assert v.is_contiguous()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_last_batch_that_is_filled_up_trains_and_counts_as_if_it_were_not(
    compiled, small_vit, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: f)
    data = load("digits", image_size=16)
    words = {
        "fraction": 0.1,
        "epochs": 2,
        "length": 3,
        "shallow": True,
        "lr": 1.0,
        "wd": 0.0,
    }  # 100 images; no dropout
    runs = [
        train(Config(**words, compile=c, out=str(tmp_path / f"{c}")), small_vit, data)
        for c in (compiled, False)
    ]
    assert [row.keys() for row in runs[0].history] == [row.keys() for row in runs[1].history]
    for row, other in zip(*(run.history for run in runs), strict=True):
        assert [row[key] for key in ("loss", "train")] == pytest.approx(
            [other[key] for key in ("loss", "train")]
        )
    assert runs[0].metrics["test"] == runs[1].metrics["test"]
    torch.testing.assert_close(runs[0].prefix.p, runs[1].prefix.p, atol=1e-5, rtol=1e-4)


def test_the_peer_computes_the_same_loss_and_gradients_and_a_difference_is_noticed(monkeypatch):
    monkeypatch.setattr(bench, "ViT", lambda: ViT(image=32, patch=16, dim=64, n_layer=2, n_head=2))
    create = peers.timm.create_model
    sizes = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2}
    monkeypatch.setattr(
        peers.timm, "create_model", lambda name, **rest: create(name, **rest | sizes)
    )
    peer = bench.peer_model()
    pixels, labels = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8), torch.arange(4)
    peer.check_equal(*bench.our_model("fp32", peer=peer)[1:], pixels, labels)
    _, *ours = bench.our_model("fp32", peer=peer)
    ours[0].prefix.p.data[0] += 0.1
    with pytest.raises(AssertionError):
        peer.check_equal(*ours, pixels, labels)


def test_candidates_take_turns_and_the_best_round_counts():
    turns, naps = [], iter([0.03, 0.02, 0.04])
    times = timed(
        {"a": lambda: turns.append("a"), "b": lambda: (turns.append("b"), time.sleep(next(naps)))},
        2,
    )
    assert "".join(turns) == "ababab"
    assert 0.02 <= times["b"] < 0.03  # the first round, 0.03 s, only warms up


def take(mb: int) -> Callable[[], None]:
    """What allocates and fills so much memory; or fails, if it is asked for none."""
    if not mb:
        raise UsageError("nothing to take")

    def run():
        torch.ones(mb * 250_000)

    return run


def test_a_candidate_runs_in_a_process_of_its_own_which_knows_its_memory_and_whose_faults_are_raised_here():
    little, run = Apart(take, 1), Apart(take, 200)
    little()
    run()
    run()
    assert 0 <= little.peak < 100
    assert 190 <= run.peak < 300  # a little was free before
    with pytest.raises(UsageError, match="nothing to take"):
        Apart(take, 0)()


def test_the_formula_alone_repeats_products_attention_and_norms_and_leaves_copies_out():
    x, w = torch.randn(2, 3, 4, requires_grad=True), torch.randn(4, 4)

    def step():
        y = F.layer_norm(F.gelu(F.linear(x, w)), (4,))
        torch.cat([y, F.scaled_dot_product_attention(y, y, y).double().float()]).softmax(-1)[
            0, 0, 0
        ].backward()

    names = names_of(formula_alone(lambda: step))
    assert {"mm", "gelu", "native_layer_norm", "_softmax"} <= set(names)
    assert {"gelu_backward", "native_layer_norm_backward", "_softmax_backward_data"} <= set(names)
    assert not {"cat", "_to_copy", "copy_", "select_backward", "view", "t"} & set(names)
    assert "cat" in names_of(step)


@pytest.mark.slow
def test_a_row_prints_its_ratios_and_writes_them_as_json(tmp_path, capsys):
    assert main(["data", "--rounds", "1", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    said = capsys.readouterr().out
    assert f"{figures['input: cache / decoding']:.1f} x" in said
    assert figures["input: cache / decoding"] > 5


@pytest.mark.parametrize(
    ("words", "sentence"),
    {
        "vitt": "no row 'vitt'; rows: vit",
        "--rounds 0": "--rounds is 0; it must be positive",
    }.items(),
)
def test_wrong_input_is_one_sentence_and_exit_code_2(words, sentence, capsys):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
