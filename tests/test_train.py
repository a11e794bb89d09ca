"""train.py: the protocol, what may move and what may not, divergence, wrong input."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sweep
import train as train_module
from data import Dataset, Split, load
from gpt import GPT
from support import files
from train import (
    Config,
    TunedModel,
    default_settings,
    evaluate,
    image_loss,
    learning_rate,
    load_backbone,
    main,
    make_optimizer,
    parser,
    resolve,
    train,
)
from vit import ViT

ROOT = Path(__file__).parent.parent
QUICK = {"task": "digits", "fraction": 0.1, "epochs": 3, "length": 4, "lr": 1.0, "wd": 0.001}
METHODS = [{"share": share} for share in ("none", "simple", "linear", "deep")]
METHODS += [{"share": "deep", "shallow": True}, {"tune": "linear"}, {"tune": "full", "lr": 0.1}]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", image_size=32)


@pytest.fixture(scope="module")
def tiny() -> ViT:
    return load_backbone(Config())


def command(config: dict, out: Path) -> list[str]:
    words = [sys.executable, "train.py", "--out", str(out)]
    for name, value in config.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def outcome(folder: Path) -> tuple:
    """All that a finished run says, bit for bit."""
    names = sorted(p.name for p in folder.iterdir())
    return (
        names,
        (folder / "metrics.jsonl").read_bytes(),
        (folder / "prefix.safetensors").read_bytes()[-1000:],
    )


@pytest.mark.long
def test_runs_on_one_backbone_equal_the_same_runs_in_fresh_processes_bitwise(
    tiny, digits, tmp_path
):
    runs = [
        QUICK | METHODS[3],
        QUICK | METHODS[1],
        QUICK | {"lr": 1e30},
        QUICK | METHODS[3] | {"seed": 7},
    ]
    for i, run in enumerate(runs):
        here = train(Config(**run, out=str(tmp_path / f"here{i}")), tiny, digits)
        there = subprocess.run(
            command(run, tmp_path / f"there{i}"), cwd=ROOT, capture_output=True, text=True
        )
        assert there.returncode == (3 if i == 2 else 0), there.stderr
        rows = (tmp_path / f"there{i}" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row) for row in rows] == here.history
        assert here.status == ("diverged" if i == 2 else "done")
    assert outcome(tmp_path / "here0") == outcome(tmp_path / "there0")
    assert (
        outcome(tmp_path / "here0")[1] != outcome(tmp_path / "here3")[1]
    )  # another seed, another run


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tiny, digits, tmp_path):
    config = Config(**QUICK, share="simple", out=str(tmp_path / "whole"))
    whole = train(config, tiny, digits)
    config = replace(config, out=str(tmp_path / "parts"))
    assert train(config, tiny, digits, stop=1).status == "running"
    assert train(config, tiny, digits).history == whole.history
    again = train(config, tiny, digits)  # over: nothing is computed, the result is read back
    assert again.history == whole.history
    torch.testing.assert_close(again.model.head.weight, whole.model.head.weight, atol=0, rtol=0)
    torch.testing.assert_close(again.model.prefix.p, whole.model.prefix.p, atol=0, rtol=0)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(str(v) for v in m.values()))
def test_gradients_reach_all_that_is_trained_and_nothing_that_is_frozen(method, small_vit):
    config = resolve(
        Config(**method, length=3) if method.get("tune") != "full" else Config(**method)
    )
    torch.manual_seed(1)
    model = TunedModel(config, small_vit, classes=5)
    pixels, labels = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8), torch.arange(8) % 5
    image_loss(model, small_vit, False, pixels, labels)[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in small_vit.parameters())
    frozen = {id(p) for p in small_vit.parameters()}
    assert not frozen & {
        id(p) for group in make_optimizer(config, model).param_groups for p in group["params"]
    }


def test_training_leaves_the_backbone_as_it_was(digits, tmp_path):
    backbone = load_backbone(Config(tune="full"))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    result = train(Config(**QUICK, tune="full", out=str(tmp_path)), backbone, digits)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert not torch.equal(result.model.backbone.norm.weight, before["norm.weight"])
    # What full fine-tuning made is a backbone for others.
    tuned = ViT.load(str(tmp_path / "backbone.safetensors"))
    torch.testing.assert_close(tuned.norm.weight, result.model.backbone.norm.weight, atol=0, rtol=0)


def test_the_learning_rate_rises_for_a_tenth_of_the_steps_and_falls_to_zero_along_a_cosine():
    config = resolve(Config(lr=8.0, batch=64))  # a peak of 8 * 64 / 256
    rates = [learning_rate(config, step, 1000) for step in range(1000)]
    assert 0 < rates[0] < 0.05
    assert max(rates) == rates[100] == 2.0
    assert np.allclose(np.diff(rates[:100]), rates[1] - rates[0])  # a line
    assert rates[550] == pytest.approx(1.0)  # half-way down the cosine
    assert 0 < rates[-1] < 1e-4


def test_full_fine_tuning_and_the_probe_have_the_official_defaults_on_fgvc_and_vtab():
    def chosen(**options):
        config = resolve(Config(**options, device="cpu"))
        rates = [learning_rate(config, step, 1000) for step in range(1000)]
        return config.optimizer, config.batch, config.lr, rates.index(max(rates))

    for task in ("cub", "cars", "cifar", "dsprites_loc"):
        assert chosen(task=task, tune="full") == ("adamw", 384, 1e-4, 50)
        assert chosen(task=task, tune="linear") == ("sgd", 1024, 1.0, 100)
        assert chosen(task=task, tune="full", batch=8, lr=5e-3) == ("adamw", 8, 5e-3, 50)
        assert chosen(task=task, tune="full", optimizer="sgd")[0] == "sgd"
        assert chosen(task=task, share="deep")[:2] == ("sgd", 64)
    assert chosen(tune="full") == ("sgd", 64, 0.05, 100)  # digits keeps its own
    assert chosen(tune="linear") == ("sgd", 64, 5, 100)
    whose = {
        default_settings(Config(task="cub", **options)).whose
        for options in ({"share": "deep"}, {"share": "none", "shallow": True})
    }
    assert whose == {"published"}
    assert default_settings(Config(task="e2e", share="deep")).whose == "published"
    for others in (Config(), Config(task="cub", share="linear"), Config(task="cub", tune="full")):
        assert default_settings(others).whose == "the task's default"
    assert default_settings(Config(task="cub", backbone="tiny")).whose == "the task's default"

    # A sweep has one grid, so one optimizer and one batch, for every method.
    asked = sweep.Sweep(tasks=["cub"], methods=["full", "probe", "deep"], common={"device": "cpu"})
    for cell in sweep.cells(asked):
        config = sweep.grid(asked, cell)[0]
        assert (config.optimizer, config.batch) == ("sgd", 64)


def test_a_step_is_sgd_with_momentum_and_no_decay_on_the_head_bias(small_vit, tmp_path):
    rng = np.random.default_rng(0)
    part = Split.of(rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8), np.arange(12) % 3)
    data = Dataset(
        "digits", list("abc"), 16, False, "train", {"train": part, "val": part, "test": part}
    )
    config = resolve(Config(tune="linear", lr=2.0, wd=0.1, epochs=2, batch=6, out=str(tmp_path)))
    result = train(config, small_vit, data)

    torch.manual_seed(config.seed)
    head = TunedModel(config, small_vit, 3).head
    weight, bias = head.weight.detach(), head.bias.detach()
    momentum = torch.zeros_like(weight), torch.zeros_like(bias)
    step = 0
    for epoch in range(2):
        for pixels, labels in data.batches("train", 6, config.seed, epoch):
            rate = learning_rate(config, step, 4)
            x = small_vit(small_vit.normalise(pixels))  # (B, D)
            error = (F.softmax(x @ weight.T + bias, dim=1) - F.one_hot(labels, 3)) / len(
                labels
            )  # (B, C)
            gradients = error.T @ x + 0.1 * weight, error.sum(0)
            momentum = tuple(0.9 * m + g for m, g in zip(momentum, gradients, strict=True))
            weight, bias = weight - rate * momentum[0], bias - rate * momentum[1]
            step += 1
    torch.testing.assert_close(result.model.head.weight, weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.model.head.bias, bias, atol=1e-5, rtol=1e-5)


def test_the_head_starts_as_the_paper_s_and_evaluation_counts_right_answers(tiny, digits, tmp_path):
    config = resolve(Config(tune="linear", out=str(tmp_path)))
    torch.manual_seed(0)
    model = TunedModel(config, tiny, 10)
    assert model.head.weight.std().item() == pytest.approx(
        (2 / 10) ** 0.5, rel=0.1
    )  # kaiming normal, fan_out
    assert model.head.bias.abs().max() == 0
    right = 0
    for image, label in zip(
        *map(torch.cat, zip(*digits.batches("val", 50), strict=True)), strict=True
    ):
        logits = model.head(tiny(tiny.normalise(image[None])))
        right += int(logits.argmax() == label)
    assert evaluate(config, model, tiny, digits, "val") == pytest.approx(100 * right / 200)


@pytest.mark.parametrize(("final", "splits"), [(True, {"test": 1}), (False, {"val": 1})])
def test_only_the_split_that_the_protocol_names_is_evaluated_and_only_once(
    final, splits, tiny, digits, tmp_path, monkeypatch
):
    seen = {}
    original = train_module.evaluate

    def watched(config, model, backbone, data, split):
        seen[split] = seen.get(split, 0) + 1
        return original(config, model, backbone, data, split)

    monkeypatch.setattr(train_module, "evaluate", watched)
    result = train(Config(**QUICK, final=final, out=str(tmp_path)), tiny, digits)
    assert seen == splits
    assert set(result.metrics) == {"epoch", "loss", "train", "status", *splits}


@pytest.mark.slow
def test_bf16_losses_of_a_vit_b_wide_model_stay_within_two_percent_of_fp32():
    torch.manual_seed(0)
    vit = ViT(image=32, patch=16, dim=768, n_layer=2, n_head=12).requires_grad_(False)
    pixels, labels = (
        torch.randint(0, 256, (20, 16, 32, 32, 3), dtype=torch.uint8),
        torch.arange(16) % 8,
    )
    losses = {}
    for dtype in ("fp32", "bf16"):
        config = resolve(Config(share="deep", length=4, lr=0.1, dtype=dtype))
        backbone = vit if dtype == "fp32" else cast(vit)
        torch.manual_seed(0)
        model = TunedModel(config, backbone, 8).eval()  # no dropout: both see the same function
        optimizer, losses[dtype] = make_optimizer(config, model), []
        for batch in pixels:
            optimizer.param_groups[0]["lr"] = 0.0003
            loss, _ = image_loss(model, backbone, dtype == "bf16", batch, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[dtype].append(loss.item())
    np.testing.assert_allclose(losses["bf16"], losses["fp32"], rtol=0.02)
    assert losses["bf16"] != losses["fp32"]
    assert losses["fp32"][-1] < 0.9 * losses["fp32"][0]


def cast(vit: ViT) -> ViT:
    """The same weights as `load_backbone` holds them in bf16."""
    copy = ViT(**vit.sizes)
    copy.load_state_dict(vit.state_dict())
    copy.cast_frozen_weights()
    assert copy.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert copy.blocks[0].norm1.weight.dtype == torch.float32
    return copy.requires_grad_(False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(str(v) for v in m.values()))
def test_the_compiled_step_has_no_graph_break(method, small_vit):
    config = resolve(Config(**method))
    model = TunedModel(config, small_vit, 5)
    pixels, labels = torch.zeros(4, 16, 16, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(image_loss)(model, small_vit, True, pixels, labels)
    assert explained.graph_break_count == 0
    assert explained.graph_count == 1


@pytest.fixture
def graphs(monkeypatch) -> Callable[[], int]:
    """How many graphs torch.compile has made so far. They run as they are: nothing is lowered."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, dynamic: compiler(f, dynamic=dynamic, backend="eager")
    )
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_new_runs_do_not_compile_the_step_again(frozen, digits16, tmp_path, graphs):
    quick = QUICK | {"epochs": 2, "compile": True, "device": "cpu"}
    train(Config(**quick, out=str(tmp_path / "first")), frozen, digits16)
    first = graphs()
    second = Config(**quick | {"lr": 0.5}, seed=7, out=str(tmp_path / "second"))
    train(second, frozen, digits16)
    assert graphs() == first == 2  # one of training and one of evaluation
    train(Config(**quick, share="deep", out=str(tmp_path / "third")), frozen, digits16)
    assert graphs() > first


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_compiled_step_computes_what_the_eager_one_does(small_vit):
    model = TunedModel(resolve(Config(share="deep", length=3)), small_vit, 5).eval()
    pixels, labels = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8), torch.arange(8) % 5
    gradients = []
    for step in (image_loss, torch.compile(image_loss, dynamic=False)):
        model.zero_grad()
        step(model, small_vit, False, pixels, labels)[0].backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for compiled, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)


def test_a_folder_with_another_run_or_damaged_files_is_refused_and_left_alone(
    tiny, digits, tmp_path, capsys, monkeypatch
):
    config = Config(**QUICK, out=str(tmp_path))
    train(config, tiny, digits, stop=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    words = command(QUICK, tmp_path)[2:]
    for change, expected in (
        (["--length", "5"], "length 4 (not 5)"),
        (["--share", "deep"], "share none (not deep)"),
    ):
        assert main([*words, *change]) == 2
        assert expected in capsys.readouterr().err
    monkeypatch.setattr(files, "PAUSE", 0)
    assert main([*words, "--task", "fashion_mnist", "--data-dir", str(tmp_path / "none")]) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    capsys.readouterr()
    state = tmp_path / "state.pt"
    state.write_bytes(state.read_bytes()[:200])
    assert main(words) == 2
    assert "cannot be resumed" in capsys.readouterr().err
    torch.save({"model": {"head.weight": torch.zeros(3, 3)}, "optimizer": {}, "history": []}, state)
    assert main(words) == 2  # of another shape
    assert "cannot be resumed" in capsys.readouterr().err


def test_a_divergent_run_says_so_exits_with_3_and_does_not_disturb_the_next(
    capsys, tmp_path, tiny, digits
):
    words = command(QUICK | {"lr": 1e6, "share": "deep", "epochs": 30}, tmp_path / "wild")[2:]
    assert main(words) == 3
    assert "diverged in epoch" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "wild" / "metrics.jsonl").read_text().splitlines()[-1])["status"]
        == "diverged"
    )
    assert main(words) == 3  # and again, without training
    after = train(Config(**QUICK, out=str(tmp_path / "after")), tiny, digits)
    alone = train(Config(**QUICK, out=str(tmp_path / "alone")), load_backbone(Config()), digits)
    assert after.history == alone.history


def test_the_command_line_has_every_option_with_its_help():
    text = " ".join(parser().format_help().split())
    for option in fields(Config):
        assert f"--{option.name.replace('_', '-')}" in text
        assert " ".join(option.metadata["help"].split()[:3]) in text
    assert Config(**vars(parser().parse_args(["--shared"]))) == Config(share="deep")
    assert Config(**vars(parser().parse_args([]))) == Config()


def test_the_head_computes_in_fp32_under_autocast(small_vit):
    model = TunedModel(resolve(Config(tune="linear")), small_vit, 200)
    pixels = torch.randint(0, 256, (50, 16, 16, 3), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.classify(small_vit, pixels, None)  # (B, C)
        features = small_vit(small_vit.normalise(pixels))  # (B, D)
    assert torch.equal(logits, model.head(features.float()))
    assert not torch.equal(logits.bfloat16().float(), logits)  # what rounding would lose


def test_a_text_run_compiles_two_graphs_though_a_batch_has_one_text(tmp_path, graphs, capsys):
    pairs = [{"source": f"name {i}" * (1 + i % 3), "target": f"It is {i}."} for i in range(27)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    quick = {"task": str(path), "epochs": 2, "batch": 7, "lr": 1e-3, "final": False}
    config = Config(**quick, device="cpu", out=str(tmp_path / "eager"))
    torch.manual_seed(0)
    backbone = GPT(vocab=257, dim=16, n_layer=2, n_head=2, encoding="bytes").requires_grad_(False)
    data = load(config.task, **backbone.inputs)
    assert data.count("train") % 7 == 1
    eager = train(config, backbone, data)
    capsys.readouterr()
    compiled = train(replace(config, compile=True, out=str(tmp_path / "compiled")), backbone, data)
    assert capsys.readouterr().err.split("\r")[1].endswith("compiling the step, once]")
    assert graphs() == 2  # of training and of evaluation
    for ours, theirs in zip(compiled.history, eager.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_your_texts_on_the_small_gpt_start_with_the_rates_that_are_good_for_it(tmp_path):
    (tmp_path / "mine.jsonl").write_text("")
    mine = {"task": str(tmp_path / "mine.jsonl"), "backbone": "tiny_gpt"}
    assert resolve(Config(**mine)).lr == 0.3
    assert resolve(Config(**mine, share="deep")).lr == 2e-3
    assert resolve(Config(**mine | {"backbone": "gpt2"})).lr == 1e-4
