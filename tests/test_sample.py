"""sample.py and explain.py: it predicts as train.py does, and its pictures show what they say."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train as protocol
from data import ASSETS, TASKS, Dataset, load
from extras.explain import (
    altered,
    attention_of,
    cosines,
    effective_rank,
    last_layer,
    prefix_share,
    rollout,
)
from extras.sample import Run, load_run, main, untrained
from support import runs as run_folder
from support.files import UsageError
from support.images import stratified
from train import Config, TunedModel, load_backbone, train

QUICK = {"task": "digits", "fraction": 0.2, "epochs": 2, "length": 4, "lr": 2.5, "wd": 0.0}


def train_and_watch(config: Config, data: Dataset) -> dict[str, torch.Tensor]:
    """Train. What the last evaluation used and found: "kv", and "logits" (797, 10) of test."""
    used, found = [], []
    loss_of, logits_of = protocol.image_loss, TunedModel.logits

    def loss(model, *rest, prefix_kv=None):
        used.append(prefix_kv)
        return loss_of(model, *rest, prefix_kv=prefix_kv)

    def logits(model, features):
        found.append(logits_of(model, features).detach())
        return logits_of(model, features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "image_loss", loss)
        patch.setattr(TunedModel, "logits", logits)
        train(config, load_backbone(config), data)
    return {"kv": used[-1], "logits": torch.cat(found[-13:])}  # 12 batches of 64, one of 29


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Finished runs on digits, and in NAME.pt what the last evaluation of each used and found."""
    folder, data = tmp_path_factory.mktemp("runs"), load("digits", image_size=32)
    methods = {
        "deep": {"share": "deep"},
        "none": {"share": "none"},
        "simple": {"share": "simple"},
        "bf16": {"share": "simple", "dtype": "bf16"},
        "full": {"tune": "full", "lr": 0.05, "epochs": 5},
    }
    for name, method in methods.items():
        config = Config(**QUICK | method, out=str(folder / name), device="cpu")
        torch.save(train_and_watch(config, data), folder / f"{name}.pt")
    return {name: folder / name for name in methods}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """The 797 test digits as PNG files named after their label, in the order of the split."""
    folder = tmp_path_factory.mktemp("pictures")
    with np.load(ASSETS / "digits.npz") as file:
        images, labels = file["images"], file["labels"]
    for n, i in enumerate(stratified(labels, seed=0)[1000:]):
        Image.fromarray((images[i].astype(np.uint16) * 255 // 16).astype(np.uint8)).save(
            folder / f"{n:04}-{labels[i]}.png"
        )
    return folder


def said(capsys, *words: str) -> list[dict]:
    assert main([*map(str, words), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", ["deep", "none", "full"])
def test_predictions_on_exported_images_equal_the_evaluation_of_the_training(
    name, runs, pictures, capsys, monkeypatch
):
    sizes, logits = [], Run.logits
    monkeypatch.setattr(Run, "logits", lambda run, x: (sizes.append(len(x)), logits(run, x))[1])
    lines = said(capsys, runs[name], pictures)
    assert sizes == [64] * 12 + [29]  # as training evaluates
    assert len(lines) == 797
    right = sum(
        max(line["classes"], key=line["classes"].get) == line["image"][-5] for line in lines
    )
    metrics = json.loads((runs[name] / "metrics.jsonl").read_text().splitlines()[-1])
    assert 100 * right / 797 == metrics["test"]
    assert 15 < metrics["test"] < 99  # neither chance nor perfect, so the equality says something
    assert all(
        len(line["classes"]) == 5 and sum(line["classes"].values()) <= 1.0001 for line in lines
    )


def test_a_run_needs_no_data_set_and_no_name_of_a_task(runs, pictures, tmp_path, capsys):
    moved = shutil.copytree(runs["deep"], tmp_path / "moved")
    facts = run_folder.metadata(moved)
    facts["config"]["task"] = "a folder that is gone"
    known = {name: json.dumps(value) for name, value in facts.items()}
    save_file(load_file(moved / "prefix.safetensors"), moved / "prefix.safetensors", known)
    some = sorted(pictures.iterdir())[:3]
    assert [line["classes"] for line in said(capsys, moved, *some)] == [
        line["classes"] for line in said(capsys, runs["deep"], *some)
    ]


def test_an_unreadable_file_is_named_and_skipped(runs, pictures, tmp_path, capsys):
    whole = sorted(pictures.iterdir())[0]
    (tmp_path / "a.png").write_bytes(b"no image")
    shutil.copy(whole, tmp_path / "b.png")
    assert main([str(runs["deep"]), str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert "b.png: " in out
    assert "skipped: " in err
    assert "a.png" in err


def test_the_shares_of_prefix_and_tokens_sum_to_one_and_without_a_prefix_nothing_changes(
    runs, small_vit
):
    run, images = load_run(runs["deep"]), torch.randn(3, 3, 32, 32)
    attn_weights = attention_of(run.backbone, images, run.prefix_kv)
    share = prefix_share(attn_weights, tokens=17)  # (layers, B, H)
    assert share.shape == (8, 3, 4)
    on_tokens = torch.stack([w[:, :, 0, 4:].sum(-1) for w in attn_weights])
    torch.testing.assert_close(share + on_tokens, torch.ones_like(share))
    assert share.min() > 0
    empty = run.prefix_kv[..., :0, :]  # L = 0
    for look in (last_layer, rollout):
        without = look(attention_of(run.backbone, images, None), 17)
        torch.testing.assert_close(
            look(attention_of(run.backbone, images, empty), 17), without, atol=0, rtol=0
        )
        torch.testing.assert_close(without.sum(-1), torch.ones(3))
        assert (look(attn_weights, 17) - without).abs().max() > 1e-4


def test_maps_are_upright(runs):
    """Attention to one patch alone lights up the place of that patch: the top right corner."""
    tokens, corner = 17, 1 + 3  # CLS, then the first row of four patches
    attn_weights = [torch.full((1, 2, tokens, tokens), 1e-6) for _ in range(2)] + [
        torch.full((1, 2, 1, tokens), 1e-6)
    ]
    for gate in attn_weights:
        gate[..., corner] = 1.0
    for look in (last_layer, rollout):
        seen = look(attn_weights, tokens)[0, 1:].view(4, 4)
        assert seen.argmax() == 3
    image = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    image[:, :8, 24:] = 255  # the model's own first layer sees it in the same place
    vit = load_run(runs["deep"]).backbone
    patches = vit.patch_embed(vit.normalise(image)).flatten(2).mT  # (B, N - 1, D)
    assert (patches - patches.median(1, keepdim=True).values).norm(dim=-1).argmax() == 3


def test_pictures_are_drawn_for_images_and_for_experts(runs, pictures, tmp_path, capsys):
    (line,) = said(
        capsys, runs["none"], sorted(pictures.iterdir())[0], "--explain", "--out", tmp_path
    )
    with Image.open(line["picture"]) as drawn:
        assert min(drawn.size) > 400
    *lines, line = said(capsys, runs["deep"], runs["none"], "--experts", "--out", tmp_path)
    assert [each["method"] for each in lines] == ["Deep-share", "No-share"]
    with Image.open(line["picture"]) as drawn:
        assert min(drawn.size) > 400
    assert {path.name for path in tmp_path.iterdir()} == {"experts.png", "explain-0000-2.png"}


def test_the_effective_rank_counts_directions_and_cosines_compare_all_pairs():
    assert effective_rank(torch.eye(5, 8)) == pytest.approx(5)
    assert effective_rank(torch.ones(5, 8)) == pytest.approx(1, abs=1e-3)
    assert 1.1 < effective_rank(torch.eye(5, 8) + 1) < 4.9
    a, b = torch.randn(3, 8), torch.randn(4, 8)
    expected = torch.tensor([[(x @ y / x.norm() / y.norm()).item() for y in b] for x in a])
    torch.testing.assert_close(cosines(a, b), expected)


@pytest.mark.parametrize(
    ("case", "sentence"),
    {
        "not a run": "is not the folder of a finished run",
        "unfinished": "is not the folder of a finished run",
        "other backbone": "has other weights than the one",
        "missing backbone": "the backbone 'gone.safetensors' cannot be used",
        "damaged": "is not the folder of a finished run",
        "empty folder": "is named; give images or folders",
        "missing image": "none of the images could be read",
        "only bad images": "none of the images could be read",
        "no image": "is named; give images or folders",
        "no prefix to explain": "has no prefix",
        "no experts": "has no prefix",
        "no prefix to export": "has no prefix",
        "unknown option": "--explian",
    }.items(),
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    case, sentence, runs, pictures, tmp_path, capsys
):
    deep, image = str(runs["deep"]), str(sorted(pictures.iterdir())[0])
    other = load_backbone(Config(backbone="scratch"))
    save_file(other.state_dict(), tmp_path / "other.safetensors", {"vit": json.dumps(other.sizes)})
    for name in ("empty", "damaged", "bad"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged" / "prefix.safetensors").write_bytes(
        (runs["deep"] / "prefix.safetensors").read_bytes()[:300]
    )
    (tmp_path / "bad" / "x.png").write_bytes(b"no image")
    words = {
        "not a run": [str(tmp_path / "nowhere"), image],
        "unfinished": [str(tmp_path / "empty"), image],
        "other backbone": [deep, image, "--backbone", str(tmp_path / "other.safetensors")],
        "missing backbone": [deep, image, "--backbone", "gone.safetensors"],
        "damaged": [str(tmp_path / "damaged"), image],
        "empty folder": [deep, str(tmp_path / "empty")],
        "missing image": [deep, str(tmp_path / "nowhere.png")],
        "only bad images": [deep, str(tmp_path / "bad")],
        "no image": [deep],
        "no prefix to explain": [str(runs["full"]), image, "--explain"],
        "no experts": [str(runs["full"]), "--experts"],
        "no prefix to export": [str(runs["full"]), "--export", str(tmp_path / "new.pth")],
        "unknown option": [deep, image, "--explian"],
    }[case]
    assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert sentence in error


def test_predict_takes_a_path_a_picture_an_array_and_a_mixed_list(runs, pictures):
    run, paths = load_run(runs["deep"]), sorted(pictures.iterdir())[:3]
    opened = [Image.open(path) for path in paths]  # a PIL image that is read closes its file
    arrays = [np.asarray(image) for image in opened]
    expected = run.predict(paths)
    assert [list(chances) == sorted(chances, key=chances.get)[::-1] for chances in expected] == [
        True
    ] * 3
    assert set(expected[0]) == set(run.classes)
    assert sum(expected[0].values()) == pytest.approx(1)
    assert run.predict(opened) == run.predict(arrays) == expected
    assert run.predict([str(paths[0]), opened[1], arrays[2]]) == expected
    assert run.predict(paths[0]) == run.predict(opened[0]) == run.predict([paths[0]])
    assert run.predict([]) == []
    assert expected[0] != expected[1]


def test_an_image_that_cannot_be_read_is_named_in_one_error(runs, pictures, tmp_path):
    run, whole = load_run(runs["deep"]), sorted(pictures.iterdir())[0]
    (tmp_path / "broken.png").write_bytes(whole.read_bytes()[:60])
    cut = Image.open(tmp_path / "broken.png")
    for images, named in (
        ([whole, tmp_path / "broken.png"], "broken.png"),
        ([whole, tmp_path / "gone.png"], "gone.png"),
        ([whole, cut], "image 1 "),
        ([np.zeros((8, 8, 7), np.uint8)], "image 0 "),
        ([np.zeros((8, 8), np.float32)], "image 0 "),
    ):
        with pytest.raises(UsageError, match=named):
            run.predict(images)
    cut.close()
    with pytest.raises(UsageError, match="is a run on images"):
        run.generate(["name : Aromi"])


RELOAD = """
import json, sys
from pathlib import Path
from extras.sample import load_run
pictures, *folders = sys.argv[1:]
for folder in folders:
    found = load_run(folder, device="cpu").predict(sorted(Path(pictures).iterdir()))
    print(json.dumps(found))
"""
BAKED = ("deep", "none", "simple", "bf16")


@pytest.mark.slow
def test_a_new_process_predicts_bit_for_bit_what_the_training_ended_with(runs, pictures, tmp_path):
    """With the keys and values of the file, and made anew from a file that lacks them."""
    folders = [runs[name] for name in BAKED] + [tmp_path / name for name in BAKED]
    for whole, folder in zip(folders, folders[len(BAKED) :], strict=False):
        shutil.copytree(whole, folder)
        state, facts = run_folder.read_weights(folder / "prefix.safetensors")
        del state["prefix_kv"]
        strings = {name: json.dumps(value) for name, value in facts.items()}
        save_file(state, folder / "prefix.safetensors", strings)
    command = [sys.executable, "-c", RELOAD, str(pictures), *map(str, [*folders, runs["full"]])]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    ran = subprocess.run(
        command, cwd=ASSETS.parent, env=os.environ | threads, stdout=subprocess.PIPE, check=True
    )
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    for name, images in zip([*BAKED, *BAKED, "full"], found, strict=True):
        expected = torch.load(runs[name].with_suffix(".pt"))["logits"].softmax(-1).tolist()
        assert [[chances[str(i)] for i in range(10)] for chances in images] == expected, name
    assert found[0] != found[1]


@pytest.mark.parametrize("name", BAKED)
def test_the_file_keeps_the_keys_and_values_of_the_last_evaluation_bit_for_bit(name, runs):
    kept = load_file(runs[name] / "prefix.safetensors")["prefix_kv"]
    used = torch.load(runs[name].with_suffix(".pt"))["kv"]
    assert kept.shape == (8, 2, 4, 4, 8)  # (depth, 2, H, L, Dh)
    assert kept.is_contiguous()
    assert kept.dtype == used.dtype
    assert torch.equal(kept, used)
    assert torch.equal(load_run(runs[name]).prefix_kv, used)


def test_two_runs_share_one_batch_each_with_its_own_prefix_and_head(runs):
    deep, none = load_run(runs["deep"]), load_run(runs["none"])
    pixels = load("digits", image_size=32).batches("test", 4)
    pixels, _ = next(pixels)  # (4, 32, 32, 3)
    separate = [deep.logits(pixels[:2]), none.logits(pixels[2:])]
    kv = torch.stack([deep.prefix_kv] * 2 + [none.prefix_kv] * 2, dim=2)  # (depth, 2, 4, H, L, Dh)
    features = deep.backbone(deep.backbone.normalise(pixels), kv)  # (4, D)
    together = [deep.model.head(features[:2]), none.model.head(features[2:])]
    torch.testing.assert_close(together, separate, atol=1e-5, rtol=0)  # another batch size
    assert not torch.allclose(deep.logits(pixels[2:]), separate[1], atol=1e-2)


def test_the_same_experts_in_another_order_and_a_mean_of_equal_experts_change_nothing(runs):
    kv = load_run(runs["deep"]).prefix_kv
    changed = altered(kv)
    assert all(value.shape == kv.shape for value in list(changed.values())[:3])
    equal = altered(kv[..., :1, :].expand_as(kv))
    for value in list(equal.values())[:3]:
        torch.testing.assert_close(value, equal["as trained"])
    keys, values = changed["with values rotated among keys"].unbind(1)
    assert torch.equal(keys, kv[:, 0])
    assert torch.equal(values[:, :, 1], kv[:, 1, :, 0])
    assert not torch.equal(values, kv[:, 1])


def test_experts_are_tested_as_trained_and_altered_if_the_data_are_there(
    runs, tmp_path, capsys, monkeypatch
):
    run, _ = said(capsys, runs["deep"], "--experts", "--out", tmp_path)
    metrics = json.loads((runs["deep"] / "metrics.jsonl").read_text().splitlines()[-1])
    assert run["test accuracy"]["as trained"] == metrics["test"]
    assert len(run["test accuracy"]) == 4
    gone = replace(TASKS["digits"], here=lambda root: False)
    monkeypatch.setitem(TASKS, "digits", gone)
    assert main([str(runs["deep"]), "--experts", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "%" not in out
    assert err.count("no test accuracies") == 1
    assert "data.py digits" in err


def test_no_picture_overwrites_another_of_this_call_or_an_earlier_one(
    runs, pictures, tmp_path, capsys
):
    some = sorted(pictures.iterdir())[:2]
    for name, path in zip("ab", some, strict=True):
        (tmp_path / name).mkdir()
        shutil.copy(path, tmp_path / name / "00.png")
    inputs = [tmp_path / "a" / "00.png", tmp_path / "b" / "00.png"]
    lines = [
        line
        for _ in range(2)
        for line in said(capsys, runs["deep"], *inputs, "--explain", "--out", tmp_path)
    ]
    drawn = [Path(line["picture"]).read_bytes() for line in lines]
    assert len({line["picture"] for line in lines}) == 4
    assert drawn[0] == drawn[2] != drawn[1]


def test_before_training_the_grey_line_is_the_prefix_that_the_run_started_from(tmp_path):
    config = Config(**QUICK | {"lr": 1e-9, "share": "deep", "out": str(tmp_path), "device": "cpu"})
    train(config, load_backbone(config), load("digits", image_size=32))
    run = load_run(tmp_path)
    torch.testing.assert_close(untrained(run), run.prefix_kv, atol=1e-6, rtol=0)
    other = replace(run, config=replace(run.config, seed=43))
    assert not torch.allclose(untrained(other), run.prefix_kv, atol=1e-3)


def test_the_timm_snippet_of_the_docs_computes_the_same_logits(runs, tmp_path, monkeypatch):
    page = (ASSETS.parent / "docs" / "using.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "timm" in block]
    assert len(code.strip().splitlines()) <= 25
    run = load_run(runs["deep"])
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 8, "num_heads": 4}
    plain = timm.models.VisionTransformer(**sizes, num_classes=0).eval()
    plain.load_state_dict(run.backbone.state_dict())
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: plain)
    pixels, _ = next(load("digits", image_size=32).batches("test", 5))
    known = {"images": run.backbone.normalise(pixels)}
    (tmp_path / "RUN").symlink_to(runs["deep"])
    monkeypatch.chdir(tmp_path)
    without = plain(known["images"])
    exec(code, known)
    torch.testing.assert_close(known["logits"], run.logits(pixels), atol=1e-4, rtol=0)
    assert not torch.allclose(plain(known["images"]), without, atol=1e-2)
