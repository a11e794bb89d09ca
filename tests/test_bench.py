"""The benchmark measures the same work on both sides; and what a CPU can tell about a GPU."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from memory import foreseen, kept_for_backward, take
from torch.utils._python_dispatch import TorchDispatchMode

import vit
from data import load
from extras import bench
from extras.bench import main
from extras.measure import measure
from gpt import GPT
from prefix import SHARE
from support.files import UsageError
from train import Config, TunedModel, image_loss, make_optimizer, resolve, text_loss, train
from vit import ViT

WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "masked_select",
    "equal",
)  # what needs a value from the GPU


class Names(TorchDispatchMode):
    """Remembers the names of all operations, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


def names_of(run: Callable[[], object]) -> list[str]:
    """Names of all operations, in order."""
    with Names() as made:
        run()
    return made.names


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
    torch.testing.assert_close(runs[0].model.prefix.p, runs[1].model.prefix.p, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("who", ["peer", "modern peer", "prompts as tokens"])
def test_a_peer_computes_the_same_loss_and_gradients_and_a_difference_is_noticed(who, monkeypatch):
    make, method = bench.SIDES[who]
    sizes = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2}
    monkeypatch.setitem(bench.SIDES, who, (partial(make, **sizes), method))
    small = partial(ViT, image=32, patch=16, dim=64, n_layer=2, n_head=2)
    batch = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8), torch.arange(4)
    monkeypatch.setattr(bench, "ViT", small)
    bench.check_equal(who, batch)
    monkeypatch.setattr(bench, "ViT", partial(small, eps=0.01))
    with pytest.raises(AssertionError):
        bench.check_equal(who, batch)


@pytest.mark.slow
def test_the_page_foresees_the_memory_that_autograd_keeps(monkeypatch):
    # The kernel of CUDA keeps what the fused one keeps, but a CPU takes the other in bf16.
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(vit, "attention", lambda q, k, v, **rest: fused(q.contiguous(), k, v))
    for length, (image, *batches) in foreseen().items():
        loss_of, _, model, backbone = bench.sides("ours", length)
        backbone.cast_frozen_weights()
        every = [*model.parameters(), *backbone.parameters()]
        forward = partial(loss_of, model.train(), backbone, True, *bench.images(4))
        assert kept_for_backward(forward, every) / 4 / 1e6 == pytest.approx(image, rel=0.02)
        trained = sum(parameter.numel() for parameter in model.parameters())
        fixed = sum(parameter.nbytes for parameter in every) + 8 * trained  # gradients, momenta
        for batch, foreseen_gb in zip((64, 128, 256), batches, strict=True):
            assert fixed / 1e9 + batch * image / 1e3 == pytest.approx(foreseen_gb, abs=0.1)
    assert set(foreseen()) == {10, 200}


@pytest.mark.slow
def test_a_candidate_has_a_process_of_its_own_whose_memory_and_faults_are_known_here():
    runs = {"little": partial(take, 1), "much": partial(take, 200)}
    seconds, memory = measure(runs, rounds=1, at_least=0.01)
    assert 0 <= memory["little"] < 100
    assert 190 <= memory["much"] < 300
    assert seconds["little"] < seconds["much"]
    with pytest.raises(UsageError, match="nothing to take"):
        measure({"none": partial(take, 0)}, rounds=1)


@pytest.mark.slow
def test_a_row_prints_its_ratios(capsys):
    assert main(["data", "--rounds", "1"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| decoded once")]
    assert float(line.split(" | ")[3].strip(" |")) < 0.2


@pytest.mark.parametrize(
    ("words", "sentence"),
    {
        "vitt": "no row 'vitt'; rows: vit",
        "--rounds 0": "--rounds is 0; it must be positive",
        "--batch 0": "--batch is 0; it must be positive",
    }.items(),
)
def test_wrong_input_is_one_sentence_and_exit_code_2(words, sentence, capsys):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
