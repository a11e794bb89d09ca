"""train.py --start: what VPT-deep or peft trained is a prefix's first values, bit for bit."""

import json
import os
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from test_vit import prompts_as_tokens

from data import load
from extras.adapter import export_peft
from support.files import UsageError
from support.runs import fingerprint, read_prompts
from train import Config, load_backbone, main, resolve, train
from vit import ViT, from_timm

D, LAYERS, L = 16, 3, 5
# A step this small moves no bit of the prompts.
STILL = {"epochs": 1, "fraction": 0.1, "lr": 1e-30, "wd": 0.0, "device": "cpu", "final": False}
SIMPLE = {"share": "simple", **STILL}


@pytest.fixture(scope="module")
def source() -> timm.models.VisionTransformer:
    """A small ViT of timm with every parameter random."""
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": D, "depth": LAYERS, "num_heads": 2}
    made = timm.models.VisionTransformer(num_classes=0, **sizes).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    return made


@pytest.fixture(scope="module")
def vit(source) -> ViT:
    made = from_timm(source, "small").requires_grad_(False)
    made.fingerprint = fingerprint(made)
    return made


def of_vpt(seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    """What VPT-deep writes into prompt_epN.pth."""
    draw = np.random.default_rng(seed).normal
    arrays = {"shallow_prompt": draw(size=(1, L, D)), "deep_prompt": draw(size=(LAYERS - 1, L, D))}
    return {name: array.astype(dtype) for name, array in arrays.items()}


def state_dict(prompts: dict[str, np.ndarray]) -> OrderedDict:
    """The same prompts in a whole state dict of VPT."""
    name = "enc.transformer.prompt_embeddings"
    state = OrderedDict({"enc.transformer.encoder_norm.weight": torch.ones(D)})
    state[name] = torch.from_numpy(prompts["shallow_prompt"])
    state[name.replace("prompt_e", "deep_prompt_e")] = torch.from_numpy(prompts["deep_prompt"])
    return state | {"head.last_layer.weight": torch.zeros(3, D)}


def started(prompts, vit, data, tmp_path, **options):
    torch.save(prompts, tmp_path / "prompt_ep100.pth")
    settings = SIMPLE | {"start": str(tmp_path / "prompt_ep100.pth"), "out": str(tmp_path / "run")}
    return train(Config(**settings | options), vit, data)


@pytest.mark.parametrize("form", ["prompt_epN.pth", "state dict", "checkpoint", "parallel"])
def test_prompts_of_vpt_deep_give_what_they_gave_as_tokens(form, source, vit, digits16, tmp_path):
    arrays = of_vpt()
    written = arrays if form == "prompt_epN.pth" else state_dict(arrays)
    if form == "checkpoint":
        written = {"model": written, "epoch": 100}
    if form == "parallel":
        written = {f"module.{name}": value for name, value in written.items()}
    model = started(written, vit, digits16, tmp_path).model.eval()
    prompts = np.concatenate([*arrays.values()])  # (layers, L, D)
    assert np.array_equal(model.prefix.p.detach().numpy(), prompts)  # written back: the same arrays
    images = torch.randn(4, 3, 16, 16)
    theirs = prompts_as_tokens(source, images, torch.from_numpy(prompts).unsqueeze(1))
    ours = vit(images, model.prefix_kv(vit))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert not torch.allclose(vit(images), theirs, atol=1e-2)  # the prompts are heard


def test_a_file_that_numpy_1_wrote_is_read_too(tmp_path):
    torch.save(of_vpt(), tmp_path / "new.pth")
    with (
        zipfile.ZipFile(tmp_path / "new.pth") as new,
        zipfile.ZipFile(old := tmp_path / "old.pth", "w") as file,
    ):
        for name in new.namelist():
            file.writestr(name, new.read(name).replace(b"numpy._core.", b"numpy.core."))
    assert b"numpy.core.multiarray\n_reconstruct" in old.read_bytes()
    assert torch.equal(read_prompts(str(old)), read_prompts(str(tmp_path / "new.pth")))


def test_the_length_is_the_file_s_and_may_be_said(tmp_path):
    torch.save(of_vpt(), tmp_path / "prompt_ep100.pth")
    config = Config(task="cub", share="simple", start=str(tmp_path / "prompt_ep100.pth"))
    assert resolve(config).length == L
    assert resolve(replace(config, length=7)).length == 7
    assert "prompt_ep100" in resolve(config).out != resolve(replace(config, start="")).out


def shorter(prompts: dict) -> dict:
    return {name: array[:, :, :8] for name, array in prompts.items()}


WRONG = {  # what is in the file, the run's options, and what its sentence says
    "VPT-shallow": (
        {"shallow_prompt": of_vpt()["shallow_prompt"]},
        {},
        "VPT-shallow are no prefix",
    ),
    "projected": (
        state_dict(of_vpt()) | {"enc.transformer.prompt_proj.weight": torch.zeros(D, 8)},
        {},
        "projected from another width",
    ),
    "another width": (
        shorter(of_vpt()),
        {},
        r"shape \(3, 5, 8\), but this run trains \(3, 5, 16\)",
    ),
    "another length": (of_vpt(), {"length": 4}, r"\(3, 5, 16\), but this run trains \(3, 4, 16\)"),
    "no prompts": ({"weight": torch.zeros(3)}, {}, "KeyError: 'shallow_prompt'"),
    "a tensor": (torch.zeros(3), {}, "cannot be used"),
    "objects": (
        {name: array.astype(object) for name, array in of_vpt().items()},
        {},
        "cannot be used",
    ),
    "another method": (of_vpt(), {"share": "deep"}, "--share simple in all layers"),
    "the first layer": (of_vpt(), {"shallow": True}, "--share simple in all layers"),
    "no prefix": (of_vpt(), {"tune": "linear"}, "--share simple in all layers"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_prompts_that_are_no_such_prefix_are_refused_in_a_sentence(kind, vit, digits16, tmp_path):
    prompts, options, expected = WRONG[kind]
    with pytest.raises(UsageError, match=expected) as refused:
        started(prompts, vit, digits16, tmp_path, **options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


class Payload:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle_is_not_run(vit, digits16, tmp_path):
    for hostile in (Payload(tmp_path / "ran"), of_vpt() | {"more": Payload(tmp_path / "ran")}):
        with pytest.raises(UsageError, match="cannot be used"):
            started(hostile, vit, digits16, tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "prompt_ep100.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # so it would have run


def test_a_run_knows_the_prompts_that_it_started_from(vit, digits16, tmp_path):
    first = started(of_vpt(), vit, digits16, tmp_path)
    again = started({"model": state_dict(of_vpt())}, vit, digits16, tmp_path)
    assert again.history == first.history  # the same prompts, however they are written
    for other in (of_vpt(seed=1), of_vpt(dtype=np.float16)):
        with pytest.raises(UsageError, match=r"holds a run with another start \(.*prompts differ"):
            started(other, vit, digits16, tmp_path)
    with pytest.raises(UsageError, match="holds a run with another start"):
        started(of_vpt(), vit, digits16, tmp_path, start="", length=L)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("texts") / "pairs.jsonl"
    rows = [{"source": f"name : {n}", "target": f"It is {n}."} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_prefix_of_peft_starts_no_share_bit_for_bit(texts, tmp_path, capsys):
    settings = STILL | {"task": texts, "backbone": "scratch_gpt", "fraction": 1.0}
    gpt = load_backbone(Config(**settings))
    prefix_kv = torch.randn(gpt.n_layer, 2, gpt.n_head, L, gpt.dim // gpt.n_head)
    export_peft(prefix_kv, gpt, "gpt2", tmp_path / "adapter")
    config = Config(**settings, start=str(tmp_path / "adapter"), out=str(tmp_path / "run"))
    model = train(config, gpt, load(texts, **gpt.inputs)).model.eval()
    assert torch.equal(model.prefix_kv(gpt), prefix_kv)
    assert torch.equal(model.prefix.p[0], prefix_kv.permute(3, 0, 1, 2, 4).reshape(L, -1))

    # What does not fit is refused.
    words = ["--task", texts, "--backbone", "scratch_gpt", "--start", str(tmp_path / "adapter")]
    for options, expected in (
        (["--share", "simple"], "a prefix of peft --share none"),
        (["--length", "4"], "but this run trains (1, 4, 1024)"),
        (["--start", str(tmp_path)], "or the folder of a peft prefix"),
        (["--start", "nowhere.pth", "--share", "simple"], "--start nowhere.pth cannot be used"),
    ):
        assert main([*words, *options, "--out", str(tmp_path / "other")]) == 2
        assert expected in capsys.readouterr().err
