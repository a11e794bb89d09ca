"""train.py with texts: the loss of targets, the optimizer, resuming, writing and scoring."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from data import load
from extras import sample
from extras.explain import attention_of
from gpt import GPT
from support import language
from support.language import Pair, Template, Text
from train import (
    Config,
    TunedModel,
    evaluate,
    learning_rate,
    load_backbone,
    main,
    make_optimizer,
    resolve,
    text_loss,
    train,
)

SOURCES = [
    "name : Zizzi | food : Thai",
    "name : Aromi | area : river",
    "name : Café É",
    "near : Bibimbap",
]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    """A file with a frozen GPT of random weights: bytes, D 32, 2 layers, 4 heads, 256 positions."""
    torch.manual_seed(0)
    gpt = GPT(vocab=257, context=256, dim=32, n_layer=2, n_head=4, encoding="bytes")
    for parameter in gpt.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("backbone") / "gpt.safetensors"
    save_file(gpt.state_dict(), path, {"gpt": json.dumps(gpt.sizes)})
    return str(path)


@pytest.fixture
def config(backbone, tmp_path) -> Config:
    """Twenty sources of one or two references each, of a user's own."""
    rows = [
        {"source": f"{source} {i}", "target": [f"It is {i}.", f"{i}, no more."][: 1 + i % 2]}
        for i in range(5)
        for source in SOURCES
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {
        "length": 4,
        "lr": 0.01,
        "epochs": 3,
        "batch": 4,
        "share": "deep",
        "beams": 2,
        "device": "cpu",
    }
    return resolve(Config(task=str(path), backbone=backbone, out=str(tmp_path / "run"), **words))


def test_the_loss_is_the_sum_over_a_text_s_targets_and_its_mean_over_texts(config):
    gpt, data = load_backbone(config), load(config.task, encoding="bytes")
    model = TunedModel(config, gpt, 0)
    prefix_kv = model.prefix_kv(gpt)
    for tokens, at, labels in data.batches("train", 4, seed=0):
        loss, count = text_loss(model, gpt, False, tokens, at, labels)
        logits = gpt(tokens, prefix_kv)  # (B, T, V)
        by_hand = [
            -F.log_softmax(logits[b, column], -1)[label]
            for b in range(len(tokens))
            for column, label in zip(at[b], labels[b], strict=True)
            if label >= 0
        ]
        torch.testing.assert_close(loss, sum(by_hand) / len(tokens), atol=1e-4, rtol=1e-5)
        assert count == len(by_hand)


def test_neither_labels_of_the_source_nor_padding_have_any_effect(config):
    gpt, data = load_backbone(config), load(config.task, encoding="bytes")
    model = TunedModel(config, gpt, 0)
    batches = list(data.batches("train", 4, seed=0))
    tokens, at, labels = max(
        batches, key=lambda batch: (batch[2] < 0).sum()
    )  # the one with most padding
    loss, _ = text_loss(model, gpt, False, tokens, at, labels)
    ends = (at.amax(1, keepdim=True) + 1).expand_as(tokens)  # (B, T): where a text's padding begins
    padding = torch.arange(tokens.shape[1]) >= ends
    assert padding.any()
    changed = tokens.masked_fill(padding, 65)
    torch.testing.assert_close(
        text_loss(model, gpt, False, changed, at, labels)[0], loss, atol=1e-6, rtol=1e-6
    )
    wider = F.pad(tokens, (0, 7), value=66), F.pad(at, (0, 3)), F.pad(labels, (0, 3), value=-100)
    torch.testing.assert_close(text_loss(model, gpt, False, *wider)[0], loss, atol=1e-5, rtol=1e-6)
    targets = torch.zeros_like(tokens, dtype=torch.bool)
    targets[torch.arange(len(at)).unsqueeze(1).expand_as(at)[labels >= 0], at[labels >= 0] + 0] = (
        True
    )
    assert not targets[:, 0].any()  # no label asks for what the source says
    source = tokens.clone()
    source[:, 1] = 67  # to change what the source *says* does change the loss
    assert (text_loss(model, gpt, False, source, at, labels)[0] - loss).abs() > 1e-4


def test_a_step_is_adamw_with_a_linear_decay_and_a_gradient_of_norm_one_at_most(config):
    assert [learning_rate(config, step, 4) for step in range(4)] == pytest.approx(
        [0.01, 0.0075, 0.005, 0.0025]
    )
    gpt, data = load_backbone(config), load(config.task, encoding="bytes")
    config = replace(config, epochs=1)
    result = train(config, gpt, data)
    torch.manual_seed(config.seed)
    model = TunedModel(config, gpt, 0)
    assert isinstance(make_optimizer(config, model), torch.optim.AdamW)
    first, second = (
        {n: torch.zeros_like(p) for n, p in model.named_parameters()} for _ in range(2)
    )
    steps = math.ceil(data.count("train") / 4)
    clipped = 0
    for t, batch in enumerate(data.batches("train", 4, config.seed, 0), 1):
        model.zero_grad()
        text_loss(model, gpt, False, *batch)[0].backward()
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        clipped += norm > 1
        for name, p in model.named_parameters():
            gradient = p.grad / max(norm.item(), 1.0)
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient.square()
            step = first[name] / (1 - 0.9**t) / ((second[name] / (1 - 0.999**t)).sqrt() + 1e-8)
            p.data -= 0.01 * (1 - (t - 1) / steps) * step  # weight decay is 0
    assert clipped > 0
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            dict(result.model.named_parameters())[name], p, atol=1e-4, rtol=1e-3
        )


def test_the_validation_loss_is_that_of_one_token_and_its_exponential_is_the_perplexity(config):
    gpt, data = load_backbone(config), load(config.task, encoding="bytes")
    result = train(config, gpt, data)
    total, count = 0.0, 0
    prefix_kv = result.model.prefix(gpt)
    for tokens, at, labels in data.batches("val", 1):
        logits = gpt(tokens, prefix_kv, at)[0]
        total += F.cross_entropy(logits, labels[0], reduction="sum").item()
        count += len(labels[0])
    assert evaluate(config, result.model, gpt, data, "val") == pytest.approx(
        total / count, rel=1e-5
    )
    assert result.metrics["val loss"] == pytest.approx(total / count, rel=1e-5)
    assert result.metrics["val perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert result.history[0]["val loss"] > result.metrics["val loss"]  # it learns


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped_and_leaves_the_same_texts(config, tmp_path):
    gpt, data = load_backbone(config), load(config.task, encoding="bytes")
    whole = train(config, gpt, data)
    parts = replace(config, out=str(tmp_path / "parts"))
    assert train(parts, gpt, data, stop=2).status == "running"
    assert train(parts, gpt, data).history == whole.history
    names = ("metrics.jsonl", "generated.jsonl")
    for name in names:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_the_test_set_is_written_once_per_source_with_its_references_and_scored(
    config, tmp_path, capsys
):
    words = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in vars(config).items()
        if k not in ("final", "shallow", "compile")
    ]
    assert main(words) == 0
    assert "BLEU" in capsys.readouterr().out
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "generated.jsonl").read_text().splitlines()
    ]
    data = load(config.task, encoding="bytes")
    assert [(row["source"], row["references"]) for row in rows] == [
        (p.source, p.references) for p in data.splits["test"]
    ]
    lengths = [len(row["source"]) for row in rows]
    assert lengths != sorted(lengths)  # the order of the test set is not that of the batches
    plain = (tmp_path / "run" / "generated.txt").read_text()
    assert plain == "".join(f"{row['output']}\n" for row in rows)
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"sacreBLEU", "rouge1", "rouge2", "rougeL", "status"} <= metrics.keys()
    assert (tmp_path / "run" / "curve.png").stat().st_size > 1000
    # And the run can be used: the same sources get the same texts.
    assert (
        sample.main(
            [str(tmp_path / "run"), rows[0]["source"], rows[1]["source"], "--beams", "2", "--json"]
        )
        == 0
    )
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in said] == [row["output"] for row in rows[:2]]
    (tmp_path / "sources.txt").write_text(f"{rows[0]['source']}\n")
    assert sample.main([str(tmp_path / "run"), str(tmp_path / "sources.txt"), "--explain"]) == 0
    assert (tmp_path / "run" / "explain-0.png").stat().st_size > 1000


def test_the_shares_of_prefix_and_tokens_sum_to_one_in_a_gpt_too(config):
    gpt, data = load_backbone(config), load(config.task, encoding="bytes")
    train(config, gpt, data)
    run = sample.load_run(config.out)
    attn_weights = attention_of(run.backbone, torch.arange(9)[None], run.prefix_kv)
    for gate in attn_weights:  # (1, H, T, L + T)
        assert gate.shape[-1] == 4 + 9
        torch.testing.assert_close(
            gate[..., :4].sum(-1) + gate[..., 4:].sum(-1), torch.ones(gate.shape[:-1])
        )
        assert (gate[0, 0, :, 4:].triu(1) == 0).all()  # and nothing sees what comes after it


@pytest.mark.parametrize(
    ("words", "sentence"),
    {
        "--tune linear": "is for images, not for",
        "--backbone tiny": "no GPT 'tiny'",
        "--beams 0": "--beams is 0; it must be positive",
        "--task nowhere.jsonl": "no task 'nowhere.jsonl'",
    }.items(),
)
def test_wrong_input_is_one_sentence_and_exit_code_2(words, sentence, config, capsys):
    assert main([f"--task={config.task}", f"--out={config.out}", *words.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert sentence in error


def test_a_task_with_a_text_that_is_too_long_is_refused_before_it_is_trained(
    config, tmp_path, capsys
):
    path = Path(config.task)
    path.write_text(
        path.read_text() + json.dumps({"source": "x" * 200, "target": "It is long."}) + "\n"
    )
    words = [f"--task={path}", f"--backbone={config.backbone}", f"--out={config.out}", "--length=4"]
    assert main(words) == 2
    error = capsys.readouterr().err  # 200, two spaces, bos, 100 - 1
    assert "1 of 21 texts of" in error
    assert "do not fit: the longest needs 302 of 252 positions ('xxxx" in error
    assert "take a backbone with a longer context" in error
    assert "--length" not in error  # a shorter prefix would be no help
    assert not Path(config.out).exists()


def test_a_source_that_is_too_long_and_a_missing_source_are_one_sentence(config, capsys, tmp_path):
    train(config, load_backbone(config), load(config.task, encoding="bytes"))
    capsys.readouterr()
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    for words, sentence in {
        ("x" * 300,): "the longest needs ",
        (): "no source is given",
        (str(tmp_path / "bad.jsonl"),): 'no {"source": "..."}',
    }.items():
        assert sample.main([config.out, *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert sentence in error


@pytest.mark.slow
@pytest.mark.parametrize(("share", "lr"), [("deep", 0.008), ("none", 0.1)])
def test_a_prefix_alone_makes_the_shipped_gpt_repeat_16_texts_exactly(share, lr, tmp_path):
    rng, foods = random.Random(1), ("Italian", "Indian", "Thai", "French")
    names = sorted({language.name(rng) for _ in range(60)})[:16]
    rows = [
        {
            "source": f"restaurant : {name} | food : {foods[i % 4]}",
            "target": f"{name} serves {foods[i % 4]} food.",
        }
        for i, name in enumerate(names)
    ]
    assert len(rows) == 16
    pairs = [Pair(row["source"], [row["target"]]) for row in rows]
    data = Text(
        "16 texts",
        "bytes",
        Template(longest=40),
        {"train": pairs, "val": pairs[:2], "test": pairs},
    )
    words = {
        "share": share,
        "lr": lr,
        "length": 10,
        "epochs": 60,
        "batch": 16,
        "beams": 1,
        "device": "cpu",
    }
    config = resolve(Config(task="restaurants", out=str(tmp_path), **words))
    gpt = load_backbone(config)
    result = train(config, gpt, data)
    written = [json.loads(line) for line in (tmp_path / "generated.jsonl").read_text().splitlines()]
    assert {row["source"]: row["output"] for row in written} == {
        row["source"]: row["target"] for row in rows
    }
    assert result.history[0]["loss"] > 0.5  # it could not before
    assert all(parameter.grad is None for parameter in gpt.parameters())
