"""What tests/gpu checks, each as a function of a device, so that a CPU can rehearse it.

A function returns what was found; tests/gpu and test_gpu_rehearsal.py say what it must be.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from processes import Started
from torch import Tensor
from torch.profiler import profile

import sweep
import train
from data import load
from support.runs import batches
from train import (
    Config,
    TunedModel,
    load_backbone,
    loss_function,
    make_optimizer,
    resolve,
    train_step,
)

TASKS = {"images": "digits", "texts": "restaurants"}
METHODS = ("none", "simple", "deep", "probe")


def steps(kind: str, device: str, dtype: str = "fp32", compiled: bool = False) -> Iterator[Tensor]:
    """The losses of a run's steps, one after another, none of them read.

    Dropout is off: a CPU and a GPU draw other masks.
    """
    config = resolve(Config(task=TASKS[kind], share="deep", device=device, dtype=dtype))
    config = replace(config, compile=compiled)
    backbone = load_backbone(config)
    data = load(config.task, **backbone.inputs)

    # The same start on every device.
    torch.manual_seed(config.seed)
    model = TunedModel(config, backbone, len(data.classes)).to(device)
    model.prefix.dropout = 0.0
    optimizer = make_optimizer(config, model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 if data.text else 0.1
    loss_of, clip = loss_function(config, data), 1.0 if data.text else None
    for epoch in range(100):
        for _, batch in batches(config, data, "train", seed=config.seed, epoch=epoch):
            yield train_step(loss_of, model, backbone, dtype == "bf16", optimizer, batch, clip)[0]


def losses(kind: str, device: str, dtype: str = "fp32", count: int = 20) -> Tensor:
    """The first losses, on the CPU."""
    return torch.stack(list(islice(steps(kind, device, dtype), count))).cpu()


def attention_kernels(step: Callable[[], object]) -> set[str]:
    """The names of the kernels of attention that a training step takes, after a first one."""
    step()
    with profile() as profiled:
        step()
    names = {event.name for event in profiled.events()}
    return {name for name in names if name.startswith("aten::_scaled_dot_product_")}


def graphs(device: str, backbone: str, folder: Path) -> list[tuple[int, int]]:
    """Of six tasks, with four methods in turn: the graphs of a first run and of a second one."""
    counters = torch._dynamo.utils.counters
    worker = sweep.Worker(1)
    words = ["--backbone", backbone, "--device", device, "--compile", "--data-dir", str(folder)]
    todo = sweep.parse([*words, "--epochs", "1", "--batch", "8", "--out", str(folder / "out")])
    found = []
    for classes in range(2, 8):
        # A task of its own number of classes.
        images = folder / f"task{classes}"
        for i in range(10 * classes):
            path = images / str(i % classes) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (i, i, i)).save(path)

        # Two runs that differ in their learning rate.
        method = METHODS[classes % 4]
        task = replace(todo, tasks=[str(images)], methods=[method], length=[3])
        (cell,) = sweep.cells(task)
        made = []
        for lr in (1.0, 0.5):
            counters.clear()
            config = sweep.one_run(todo, cell, lr=lr, wd=0.0, final=False)
            assert worker.run(config)["status"] == "done"
            made.append(counters["stats"]["unique_graphs"])
        found.append(tuple(made))
    return found


def killed_and_resumed(device: str, folder: Path) -> list[list[dict]]:
    """The metrics of a run that was killed and went on, and of one that was not."""
    words = ["--task", "digits", "--shared", "--epochs", "12", "--device", device, "--no-compile"]
    killed, whole = folder / "killed", folder / "whole"
    process = Started("train", *words, "--out", killed)
    while process.runs() and not (killed / "state.pt").exists():
        time.sleep(0.01)
    process.stop()
    process.end()
    assert (killed / "state.pt").exists(), "the run was over before it was killed"
    for out in (killed, whole):
        code, said = Started("train", *words, "--out", out).end()
        assert code == 0, said
    return [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (killed, whole)
    ]


def out_of_memory(device: str, folder: Path) -> tuple[int, str]:
    """Where full fine-tuning does not fit: the exit code of a run, the report of a sweep.

    The caller sees to it that there is too little memory.
    """
    words = ["--device", device, "--no-compile", "--epochs", "1", "--batch", "1000"]
    alone = train.main([*words, "--tune", "full", "--out", str(folder / "alone")])
    grid = ["--methods", "full", "probe", "--lr", "0.1", "--wd", "0", "--seed", "1"]
    assert sweep.main([*words, *grid, "--workers", "1", "--out", str(folder / "sweep")]) == 0
    return alone, (folder / "sweep" / "digits" / "report.md").read_text()


def written(device: str) -> list[list[int]]:
    """What beam search writes for some of the shipped GPT's own task."""
    config = resolve(Config(task="restaurants", device=device, dtype="fp32"))
    gpt = load_backbone(config)
    data = load(config.task, **gpt.inputs)
    prompts = data.prompts("test")[:16]
    return gpt.generate(prompts, beams=5, **data.decoding)
