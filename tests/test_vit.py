"""vit.py: equal to timm on the same weights, and to the mixture of experts with a prefix."""

import json
import math
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from memory import kept_for_backward
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from prefix import SHARE, Prefix
from vit import Attention, Block, ViT, attention, from_timm


def mixture_of_experts(q, k, v, prefix_k, prefix_v):
    """The paper's formula for one head, as loops: a query mixes L constant and N token experts."""
    out = torch.zeros_like(q)
    for i in range(len(q)):
        experts = [*prefix_v, *v]
        scores = [math.exp(q[i] @ key / math.sqrt(len(key))) for key in [*prefix_k, *k]]
        for score, expert in zip(scores, experts, strict=True):
            out[i] += score / sum(scores) * expert
    return out


def written(q, k, v, mask=None):
    """The form that is written out; it runs wherever its weights are wanted."""
    return attention(q, k, v, mask, attn_weights=[])


@pytest.mark.parametrize("form", [written, attention])
def test_both_forms_of_attention_mix_token_experts_and_prefix_experts(form):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 5, 8)  # 3 x (N, Dh)
    prefix_k, prefix_v = torch.randn(2, 4, 8)  # 2 x (L, Dh)
    out = form(
        q[None, None], torch.cat([prefix_k, k])[None, None], torch.cat([prefix_v, v])[None, None]
    )[0, 0]
    expected = mixture_of_experts(q, k, v, prefix_k, prefix_v)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)  # fp32, another order of sums
    swapped = mixture_of_experts(q, k, v, prefix_v, prefix_k)
    assert not torch.allclose(out, swapped, atol=1e-3)


def test_an_expert_that_is_masked_is_an_expert_that_is_absent():
    q, k, v = torch.randn(3, 2, 1, 5, 8)  # 3 x (B, H, N, Dh)
    mask = torch.tensor([True, True, False, True, False]).expand(5, 5)
    for form in (written, attention):
        torch.testing.assert_close(form(q, k, v, mask), form(q, k[:, :, mask[0]], v[:, :, mask[0]]))
        assert not torch.allclose(form(q, k, v, mask), form(q, k, v), atol=1e-3)


def test_gates_are_shown_when_asked_for_sum_to_one_and_change_nothing(small_vit):
    images, prefix, attn_weights = torch.randn(4, 3, 16, 16), torch.randn(3, 2, 2, 6, 8), []
    torch.testing.assert_close(
        small_vit(images, prefix, attn_weights), small_vit(images, prefix), atol=1e-5, rtol=1e-5
    )
    *early, last = [gate.shape for gate in attn_weights]
    assert early == [(4, 2, 5, 11)] * 2
    assert last == (4, 2, 1, 11)  # CLS alone
    for gate in attn_weights:
        torch.testing.assert_close(gate.sum(-1), torch.ones(gate.shape[:-1]))
        assert gate[..., :6].sum(-1).min() > 0


def test_a_prefix_enters_the_attention_layer_as_experts_of_every_head(small_vit):
    attn, x = small_vit.blocks[0].attn, torch.randn(2, 5, 16)
    prefix = torch.randn(2, 2, 3, 8)  # (key or value, H, L, Dh)
    out = attn(x, prefix)
    q, k, v = (x @ attn.qkv.weight.T + attn.qkv.bias).split(16, dim=-1)  # 3 x (B, N, D)
    for b in range(2):
        by_head = [
            mixture_of_experts(
                *(t[b, :, 8 * h : 8 * h + 8] for t in (q, k, v)), prefix[0, h], prefix[1, h]
            )
            for h in range(2)
        ]
        expected = torch.cat(by_head, dim=-1) @ attn.proj.weight.T + attn.proj.bias  # (N, D)
        torch.testing.assert_close(out[b], expected, atol=1e-5, rtol=0)


def random_timm(name, **options):
    """A timm model all of whose parameters, biases and norms too, are random."""
    model = timm.create_model(name, num_classes=0, **options).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224.orig_in21k", "vit_tiny_patch16_384", "vit_small_patch32_224"]
)
def test_outputs_equal_timm_s(name):
    source = random_timm(name, depth=2)
    vit = from_timm(source, name)
    images = torch.randn(1, 3, vit.image_size, vit.image_size)
    with torch.no_grad():
        theirs = source(images)  # (B, D)
        torch.testing.assert_close(vit(images), theirs, atol=1e-5, rtol=1e-5)
        vit.blocks[-1].mlp.fc2.bias[0] += 1.0
        assert not torch.allclose(vit(images), theirs, atol=1e-3)


def prompts_as_tokens(source, images, prompts, keep=False):
    """VPT: timm's ViT with prompts (layers, B or 1, L, D) between CLS and patches -> (B, D).

    VPT-deep throws their outputs away after every layer; with `keep` (VPT-shallow) they go on.
    """
    x = source.patch_embed(images)
    x = torch.cat([source.cls_token.expand(len(x), -1, -1), x], dim=1) + source.pos_embed
    for i, block in enumerate(source.blocks):
        count = prompts.shape[2] if i < len(prompts) else 0
        if count:
            x = torch.cat([x[:, :1], prompts[i].expand(len(x), -1, -1), x[:, 1:]], dim=1)
        x = block(x)
        if not keep:
            x = torch.cat([x[:, :1], x[:, 1 + count :]], dim=1)
    return source.norm(x)[:, 0]


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_tiny_patch16_384", "vit_small_patch32_224"]
)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_simple_share_is_vpt_deep(name, dropout, monkeypatch):
    source = random_timm(name, depth=4).requires_grad_(False)
    vit, B, L = from_timm(source, name).requires_grad_(False), 2, 5
    prefix = Prefix(vit.n_layer, vit.n_head, vit.dim, L, "simple", init_scale=1.0, dropout=dropout)
    images = torch.randn(B, 3, vit.image_size, vit.image_size)

    def outputs_and_gradient(form):
        torch.manual_seed(3)  # one mask per sample, on the prompt, in both forms
        out = form()
        return out, torch.autograd.grad(out.square().sum(), prefix.p)[0]

    def as_tokens():
        prompts = F.dropout(prefix.p.unsqueeze(1).expand(-1, B, -1, -1), dropout)
        return prompts_as_tokens(source, images, prompts)

    theirs, their_gradient = outputs_and_gradient(as_tokens)
    ours, gradient = outputs_and_gradient(lambda: vit(images, prefix(vit, B)))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient, their_gradient, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ours, vit(images), atol=1e-3)  # the prompts are heard
    monkeypatch.setattr(Block, "keys_values", lambda self, x: self.attn.keys_values(x))
    assert not torch.allclose(vit(images, prefix(vit, B)), theirs, atol=1e-3)  # without LayerNorm


def test_vpt_shallow_is_no_prefix_for_its_prompts_live_on():
    source = random_timm("vit_tiny_patch16_224").requires_grad_(False)
    vit, images = from_timm(source, "vit_tiny_patch16_224"), torch.randn(2, 3, 224, 224)
    prefix = Prefix(12, 3, 192, 5, "simple", shallow=True, init_scale=1.0)
    prompts = prefix.p.unsqueeze(1)  # (1, 1, L, D)
    ours = vit(images, prefix(vit))
    assert not torch.allclose(prompts_as_tokens(source, images, prompts, True), ours, atol=1e-3)
    thrown_away = prompts_as_tokens(source, images, prompts)  # after the first layer
    torch.testing.assert_close(thrown_away, ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, "not CLS"),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": ""}, "no class token"),
        ("vit_tiny_patch16_224", {"init_values": 1e-5}, "layer scale"),
        ("vit_tiny_patch16_224", {"global_pool": "map"}, "pooling head"),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, "reads the mean"),
        ("vit_tiny_patch16_224", {"reg_tokens": 4}, "register tokens"),
        ("vit_tiny_patch16_224", {"pre_norm": True}, "a norm before the blocks"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, "norms of queries and keys"),
        ("vit_tiny_patch16_224", {"act_layer": "quick_gelu"}, "other outputs"),
        ("vit_tiny_patch16_224", {"no_embed_class": True}, "pos_embed"),
        ("vit_tiny_patch16_224", {"qkv_bias": False}, "qkv.bias"),
        ("deit_tiny_distilled_patch16_224", {}, "distillation token"),
        ("resnet18", {}, "is a ResNet"),
    ],
)
def test_a_model_that_is_not_a_plain_vit_is_refused_in_one_sentence(name, options, reason):
    source = timm.create_model(name, num_classes=0, **options)
    with pytest.raises(ValueError, match=reason) as error:
        from_timm(source, name)
    assert "\n" not in str(error.value)


def test_a_model_with_the_same_weights_but_other_arithmetic_is_refused():
    source = random_timm("vit_tiny_patch16_224")
    source.norm.eps = 1.0  # no weight tells of it; only the outputs do
    with pytest.raises(ValueError, match="other outputs"):
        from_timm(source, "vit_tiny_patch16_224")


def flax_checkpoint(path, dim=192, n_layer=12, n_head=3, patch=16, image=224):
    """A random file in the layout of ViT-B_16.npz, of the shape of timm's vit_tiny_patch16_224."""
    rng, head = np.random.default_rng(0), dim // n_head
    shapes = {
        "embedding/kernel": (patch, patch, 3, dim),
        "embedding/bias": (dim,),
        "cls": (1, 1, dim),
        "Transformer/posembed_input/pos_embedding": (1, (image // patch) ** 2 + 1, dim),
        "Transformer/encoder_norm/scale": (dim,),
        "Transformer/encoder_norm/bias": (dim,),
        "pre_logits/kernel": (dim, dim),
        "pre_logits/bias": (dim,),
        "head/kernel": (dim, 21843),
        "head/bias": (21843,),
    }
    for i in range(n_layer):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{norm}/scale": (dim,), f"{block}/{norm}/bias": (dim,)}
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            shapes |= {
                f"{attention}/{part}/kernel": (dim, n_head, head),
                f"{attention}/{part}/bias": (n_head, head),
            }
        shapes |= {f"{attention}/out/kernel": (n_head, head, dim), f"{attention}/out/bias": (dim,)}
        shapes |= {
            f"{block}/MlpBlock_3/Dense_0/kernel": (dim, 4 * dim),
            f"{block}/MlpBlock_3/Dense_0/bias": (4 * dim,),
        }
        shapes |= {
            f"{block}/MlpBlock_3/Dense_1/kernel": (4 * dim, dim),
            f"{block}/MlpBlock_3/Dense_1/bias": (dim,),
        }
    np.savez(
        path,
        **{name: 0.05 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()},
    )


def test_the_original_checkpoint_loads_as_timm_loads_it(tmp_path):
    path = tmp_path / "ViT.npz"
    flax_checkpoint(path)
    source = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    source.load_pretrained(str(path))
    vit, images = ViT.load(str(path)), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(vit(images), source(images), atol=1e-5, rtol=1e-5)
        assert vit(images).std() > 0.01


def blocks_one_by_one(vit, images, *layers):
    """All tokens after the final norm (B, N, D); `layers` are the blocks' prefixes."""
    x = vit.patch_embed(images).flatten(2).mT
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + vit.pos_embed
    for block, prefix in zip(vit.blocks, layers, strict=True):
        x = block(x, prefix)
    return vit.norm(x)


def test_the_cls_only_last_block_changes_nothing_with_a_prefix(small_vit):
    images, prefix = torch.randn(4, 3, 16, 16), torch.randn(3, 2, 2, 6, 8)
    whole = blocks_one_by_one(small_vit, images, *prefix)[:, 0]
    torch.testing.assert_close(small_vit(images, prefix), whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(small_vit(images), whole, atol=1e-3)


def test_a_prefix_per_sample_equals_each_sample_alone_with_its_prefix(small_vit):
    images = torch.randn(3, 3, 16, 16)
    prefix = torch.randn(3, 2, 3, 2, 6, 8)  # (depth, 2, B, H, L, Dh)
    alone = torch.cat([small_vit(images[b : b + 1], prefix[:, :, b]) for b in range(3)])
    torch.testing.assert_close(small_vit(images, prefix), alone, atol=1e-5, rtol=1e-5)


def test_a_shallow_prefix_is_a_prefix_of_the_first_layer_alone(small_vit):
    images, prefix = torch.randn(2, 3, 16, 16), torch.randn(3, 2, 2, 6, 8)
    expected = blocks_one_by_one(small_vit, images, prefix[0], None, None)[:, 0]
    torch.testing.assert_close(small_vit(images, prefix[:1]), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(small_vit(images, prefix), expected, atol=1e-3)


def test_simple_share_treats_its_vectors_as_the_layer_treats_tokens(small_vit):
    prefix = Prefix(3, 2, 16, 4, "simple").eval()
    keys, values = prefix(small_vit)[1]  # of the second layer
    block = small_vit.blocks[1]
    tokens = block.norm1(prefix.p[1:2])  # (1, L, D): as if p were tokens
    _, k, v = block.attn.heads(block.attn.qkv(tokens))
    torch.testing.assert_close(keys, k[0])
    torch.testing.assert_close(values, v[0])


def test_a_saved_vit_loads_as_it_was_and_a_damaged_file_is_refused(small_vit, tmp_path):
    path, images = tmp_path / "backbone.safetensors", torch.randn(2, 3, 16, 16)
    save_file(small_vit.state_dict(), path, {"vit": json.dumps(small_vit.sizes)})
    torch.testing.assert_close(ViT.load(str(path))(images), small_vit(images), atol=0, rtol=0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        ViT.load(str(path))
    save_file(small_vit.state_dict(), path, {"vit": json.dumps(small_vit.sizes | {"dim": 32})})
    with pytest.raises(ValueError, match="size mismatch"):
        ViT.load(str(path))
    save_file(small_vit.state_dict(), path)
    with pytest.raises(ValueError, match="does not tell its sizes"):
        ViT.load(str(path))


def test_attention_keeps_q_k_v_and_output_for_backward_and_not_the_product_they_come_from():
    B, N, L, D, H = 2, 5, 3, 64, 2
    attention = Attention(D, H).requires_grad_(False)
    x, prefix = (
        torch.randn(B, N, D, requires_grad=True),
        torch.randn(2, H, L, D // H, requires_grad=True),
    )
    kept = kept_for_backward(lambda: attention(x, prefix), attention.parameters())
    log_sums = B * H * N
    assert kept == 4 * (B * N * D + 2 * B * (L + N) * D + B * N * D + log_sums)


def test_normalise_is_to_tensor_and_normalize_with_constants_that_are_no_weights():
    vit, pixels = ViT.load("scratch"), torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(vit.normalise(pixels), expected, atol=0, rtol=0)
    assert vit.normalisation == "ImageNet mean and std"
    assert not {"mean", "std"} & vit.state_dict().keys()
    half = ViT(**vit.sizes | {"mean": (0.5,) * 3, "std": (0.5,) * 3})
    torch.testing.assert_close(half.normalise(pixels), (pixels / 127.5 - 1).permute(0, 3, 1, 2))
    assert half.normalisation == f"mean {(0.5,) * 3} and std {(0.5,) * 3} (the backbone's)"


class Moves(TorchDispatchMode):
    """Notes the operations whose inputs and outputs lie on different devices."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.found.append(str(func))
        return out


@contextmanager
def fake_cuda():
    """Tensors without memory, which may say that they are on a GPU where there is none."""
    with FakeTensorMode():
        yield torch.device("cuda")


def test_a_forward_pass_on_cuda_moves_nothing_between_devices(monkeypatch):
    """A tensor that is made on the CPU and copied makes every step wait for the GPU."""
    with fake_cuda() as cuda:
        with cuda:
            vit = ViT(image=16, patch=8, dim=16, n_layer=3, n_head=2)
            prefixes = [Prefix(3, 2, 16, 5, share) for share in SHARE]
            pixels = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
        for name, buffer in vit.named_buffers():
            setattr(vit, name, buffer.to(cuda))  # as vit.to("cuda") does
        for prefix in prefixes:
            with Moves() as moves:
                assert vit(vit.normalise(pixels), prefix(vit, batch=2)).is_cuda
            assert moves.found == []

        def normalise(self, pixels):
            mean, std = (
                torch.tensor(self.sizes[name]).to(pixels.device) for name in ("mean", "std")
            )
            return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)

        monkeypatch.setattr(ViT, "normalise", normalise)  # constants made on the CPU
        with Moves() as moves:
            vit(vit.normalise(pixels), prefixes[0](vit, batch=2))
        assert moves.found == ["aten._to_copy.default"] * 2


def test_the_files_and_folders_that_timm_writes_are_read(tmp_path):
    source = random_timm("vit_tiny_patch16_224")
    source.reset_classifier(10)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    images = torch.randn(1, 3, 224, 224)
    expected = source.forward_features(images)[:, 0]  # (B, D)
    file = ViT.load(str(tmp_path / "model.safetensors"))
    torch.testing.assert_close(file(images), expected, atol=1e-5, rtol=1e-5)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 10}
    pixels = {"mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2]}
    config["pretrained_cfg"] = pixels | {"classifier": "head", "num_classes": 10}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in (tmp_path, tmp_path / "model.safetensors"):
        vit = ViT.load(str(name))
        torch.testing.assert_close(vit(images), expected, atol=1e-5, rtol=1e-5)
        assert vit.mean.flatten().tolist() == pytest.approx([0.4] * 3)
    assert file.sizes["mean"] == file.sizes["std"] == (0.5,) * 3
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="describes no ViT"):
        ViT.load(str(tmp_path))


@pytest.mark.parametrize("kind", [ViTModel, ViTForImageClassification])
def test_a_vit_of_transformers_is_read_from_its_folder(kind, tmp_path):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 40, "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-3}
    torch.manual_seed(0)
    source = kind(ViTConfig(**sizes)).eval()
    for parameter in source.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    source.save_pretrained(tmp_path)
    vit, images = ViT.load(str(tmp_path)), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs = getattr(source, "vit", source)(images).last_hidden_state[:, 0]
        torch.testing.assert_close(vit(images), theirs, atol=1e-5, rtol=1e-5)
        assert theirs.std() > 0.1
    assert vit.sizes["mean"] == vit.sizes["std"] == (0.5,) * 3
    pixels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    vit = ViT.load(str(tmp_path))
    assert vit.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert "(0.1, 0.2, 0.3) and std (0.4, 0.5, 0.6)" in vit.normalisation
    save_file(vit.state_dict(), tmp_path / "tuned.safetensors", {"vit": json.dumps(vit.sizes)})
    assert torch.equal(ViT.load(str(tmp_path / "tuned.safetensors")).mean, vit.mean)


def test_names_of_timm_and_of_the_hub_and_what_is_close_to_them(monkeypatch):
    for name in ("vit_base_patch16_225", "vit_base_patch16_224.orig_in21", "tine"):
        with pytest.raises(ValueError, match=f"no ViT '{name}' .*did you mean '") as error:
            ViT.load(name)
        assert "\n" not in str(error.value)
    asked, make = [], timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, **_: asked.append(name) or make("vit_tiny_patch16_224", num_classes=0),
    )
    for name in ("timm/vit_tiny_patch16_224.augreg_in21k", "hf-hub:timm/vit_x", "vit_x"):
        ViT.load(name)
    assert asked == ["hf-hub:timm/vit_tiny_patch16_224.augreg_in21k", "hf-hub:timm/vit_x", "vit_x"]


def test_the_paper_s_backbone_has_imagenet_s_normalisation_and_others_their_own(monkeypatch):
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=1))  # faster
    paper = ViT.load("vit_base_patch16_224.orig_in21k", pretrained=False)
    assert paper.normalisation == "ImageNet mean and std"
    other = ViT.load("vit_tiny_patch16_224.augreg_in21k", pretrained=False)
    assert "0.5, 0.5" in other.normalisation
    assert ViT.load("deit_tiny_patch16_224", pretrained=False).normalisation == paper.normalisation
