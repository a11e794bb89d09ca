"""adapter.py: peft and VPT compute with an exported prefix what we compute."""

import gzip
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from data import load
from extras.adapter import export_peft
from extras.sample import Run, export, load_run, main
from gpt import GPT, converted
from prefix import SHARE, Prefix
from support.files import UsageError
from support.runs import read_prompts, read_weights
from train import Config, load_backbone, train

VOCAB, D, H, LAYERS, L = 97, 32, 4, 3, 5


@pytest.fixture(scope="module")
def pair() -> tuple[GPT2LMHeadModel, GPT]:
    """A small random GPT-2 of transformers, and ours with the same weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": D, "n_layer": LAYERS, "n_head": H}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    for parameter in theirs.requires_grad_(False).parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    ours = GPT(VOCAB, 64, D, LAYERS, H)
    ours.load_state_dict(converted(theirs.state_dict()))
    return theirs, ours.requires_grad_(False)


def random_prefix(gpt: GPT, share: str, shallow: bool = False) -> torch.Tensor:
    torch.manual_seed(1)
    options = {"shallow": shallow, "per_layer": False, "init_scale": gpt.prefix_init_scale}
    prefix = Prefix(LAYERS, H, D, L, share, dropout=0.0, **options)
    return prefix(gpt).detach()  # (depth, 2, H, L, Dh)


@pytest.mark.filterwarnings("ignore")  # of peft and transformers, about each other
@pytest.mark.parametrize("share", SHARE)
def test_pefts_forward_pass_on_an_exported_prefix_equals_ours(share, pair, tmp_path):
    theirs, ours = pair
    prefix_kv = random_prefix(ours, share)
    export_peft(prefix_kv, ours, "gpt2", tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].shape == (
        L,
        LAYERS * 2 * D,
    )
    tokens = torch.randint(1, VOCAB, (2, 9))
    expected = ours(tokens, prefix_kv)
    adapted = PeftModel.from_pretrained(theirs, tmp_path).eval()
    found = adapted(tokens).logits.detach()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(theirs(tokens).logits, expected, atol=1e-2)


def test_a_prompt_is_written_on_with_its_own_prefix_in_a_batch_of_several(pair):
    _, gpt = pair
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7]]
    prefixes = [random_prefix(gpt, "none"), random_prefix(gpt, "deep"), random_prefix(gpt, "deep")]
    options = {"beams": 3, "max_new": 12, "eos": 0}
    together = gpt.generate(prompts, torch.stack(prefixes, dim=2), **options)
    alone = [
        gpt.generate([prompt], prefix_kv, **options)[0]
        for prompt, prefix_kv in zip(prompts, prefixes, strict=True)
    ]
    assert together == alone
    assert together[0] != together[2]  # one prompt, two prefixes


def test_a_shallow_prefix_is_refused(pair, tmp_path):
    with pytest.raises(UsageError, match="--shallow"):
        export_peft(random_prefix(pair[1], "none", shallow=True), pair[1], "gpt2", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def text_run(tmp_path_factory) -> Path:
    """A finished run on texts, Deep-share with L = 3."""
    folder = tmp_path_factory.mktemp("text")
    rows = [{"source": f"name : {n}", "target": f"It is {n}."} for n in range(20)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"task": str(folder / "pairs.jsonl"), "backbone": "tiny_gpt", "epochs": 1}
    settings |= {"share": "deep", "length": 3, "final": False, "device": "cpu"}
    config = Config(**settings, out=str(folder / "run"))
    backbone = load_backbone(config)
    train(config, backbone, load(config.task, **backbone.inputs))
    return folder / "run"


def test_the_command_exports_a_text_run_and_refuses_what_has_no_such_prefix(
    text_run, tmp_path, capsys
):
    run, new = load_run(text_run), tmp_path / "adapter"
    assert main([str(text_run), "--export", str(new)]) == 0
    assert json.loads((new / "adapter_config.json").read_text())["num_virtual_tokens"] == 3
    kept = load_file(new / "adapter_model.safetensors")["prompt_embeddings"]
    depth, n_head = run.backbone.n_layer, run.backbone.n_head
    back = kept.view(3, depth, 2, n_head, -1).permute(1, 2, 3, 0, 4)
    assert torch.equal(back, run.prefix_kv)
    assert torch.equal(read_prompts(str(new)), kept[None])  # --start takes it back
    with pytest.raises(UsageError, match="is a run on text"):
        run.predict(["a.png"])
    (tmp_path / "file").write_text("")
    assert main([str(text_run), "--export", str(tmp_path / "file")]) == 2
    assert "choose another folder" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no prompts of VPT-deep"):
        export(run, tmp_path / "prompt_ep1.pth")


def test_a_prefix_for_texts_is_kept_as_it_is_and_writes_the_same_anew(text_run, tmp_path):
    shutil.copytree(text_run, tmp_path / "run")
    state, facts = read_weights(text_run / "prefix.safetensors")
    baked = state.pop("prefix_kv")
    strings = {name: json.dumps(value) for name, value in facts.items()}
    save_file(state, tmp_path / "run" / "prefix.safetensors", strings)
    older, run = load_run(tmp_path / "run"), load_run(text_run)
    assert torch.equal(older.prefix_kv, baked)
    assert torch.equal(run.prefix_kv, baked)
    for each in (older, run):
        each.metadata["template"]["longest"] = 8  # tokens are enough here
    assert older.generate("name : 3", beams=1) == run.generate(["name : 3"], beams=1)


def test_sources_are_read_as_training_reads_them(text_run, tmp_path, capsys, monkeypatch):
    run = load_run(text_run)
    monkeypatch.setattr("extras.sample.load_run", lambda *words: run)
    monkeypatch.setattr(Run, "write", lambda run, sources, beams: [([], [], s) for s in sources])
    plain = "\ufeffname : 1\r\n\r\nname :\u20282 \n".encode()
    rows = "".join(json.dumps({"source": source}) + "\r\n" for source in ("name : 1", "name :  2"))
    for name, content in {
        "a.txt": plain,
        "b.TXT": plain,
        "c.jsonl": rows.encode("utf-8-sig"),
        "d.jsonl.gz": gzip.compress(rows.encode()),
        "-": b"",
    }.items():
        monkeypatch.setattr("sys.stdin", io.StringIO(plain.decode()))
        path = name if name == "-" else tmp_path / name
        if name != "-":
            path.write_bytes(content)
        assert main([str(text_run), str(path), "--json"]) == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(line["source"], line["text"]) for line in found] == [
            ("name : 1", "name : 1"),
            ("name : 2", "name : 2"),
        ], name


ARRAYS = [np.ndarray, np.dtype, type(np.dtype("f4")), np.zeros(0).__reduce__()[0]]


def test_the_prompts_of_a_simple_share_run_are_vpts_file_and_make_its_keys_and_values(
    tmp_path, capsys
):
    settings = {"task": "digits", "share": "simple", "length": 3, "epochs": 2, "fraction": 0.05}
    config = Config(**settings, out=str(tmp_path / "run"), device="cpu")
    backbone = load_backbone(config)
    train(config, backbone, load("digits", image_size=32))
    capsys.readouterr()

    # A file gets its name from the user, one in a folder from VPT: the number of epochs is in it.
    file, folder = tmp_path / "own.pth", tmp_path / "new"
    for target, written in ((file, file), (folder, folder / "prompt_ep2.pth")):
        assert main([config.out, "--export", str(target)]) == 0
        assert str(written) in capsys.readouterr().out
        with torch.serialization.safe_globals(ARRAYS):
            arrays = torch.load(written, weights_only=True)
        assert {name: value.shape for name, value in arrays.items()} == {
            "shallow_prompt": (1, 3, 32),
            "deep_prompt": (7, 3, 32),
        }
        assert all(type(value) is np.ndarray for value in arrays.values())

    # timm's layers make the run's keys and values of them, as they do of a token.
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 8, "num_heads": 4}
    vit = timm.models.VisionTransformer(**sizes, num_classes=0)
    vit.load_state_dict(backbone.state_dict())
    prompts = torch.from_numpy(np.concatenate([arrays["shallow_prompt"], arrays["deep_prompt"]]))
    run = load_run(config.out)
    assert torch.equal(prompts, run.model.prefix.p)
    assert torch.equal(read_prompts(str(written)), prompts)  # --start takes it back
    for block, prompt, expected in zip(vit.blocks, prompts, run.prefix_kv, strict=True):
        _, k, v = block.attn.qkv(block.norm1(prompt)).view(3, 3, 4, 8).permute(1, 2, 0, 3)
        torch.testing.assert_close(torch.stack([k, v]), expected, atol=1e-5, rtol=0)

    # A prompt in the first layer alone lives on in VPT, so it is no prefix.
    for other in ({"shallow": True}, {"share": "deep"}, {"tune": "linear"}):
        with pytest.raises(UsageError, match="has no prompts of VPT-deep"):
            export(replace(run, config=replace(run.config, **other)), Path("x.pth"))
