"""What the benchmark compares with: the same work as existing repositories and libraries do it.

Images: timm's ViT with the prefix concatenated inside its attention. As VPT and the paper's code
are built: softmax written out, fp32. As a good engineer writes it today: fused attention, bf16
autocast, compiled. VPT-deep with its prompts as tokens. torchvision's pipeline, which decodes every
image in every epoch. Text: transformers and peft, if they are installed.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from data import normalise
from gpt import GPT, converted
from support.files import UsageError
from support.images import IMAGENET_MEAN, IMAGENET_STD
from train import TunedModel, image_loss
from vit import ViT


class Peer(nn.Module):
    """Deep-share on timm's ViT-B/16, as existing repositories do it: a loop over the layers' maps.

    modern: fused attention in place of the written-out one.
    """

    def __init__(self, length: int, classes: int, modern: bool = False):
        super().__init__()
        self.vit = timm.create_model("vit_base_patch16_224", num_classes=0).requires_grad_(False)
        self.modern = modern
        dim = self.vit.embed_dim
        self.p = nn.ParameterList(
            nn.Parameter(torch.empty(length, dim).uniform_(-0.05, 0.05)) for _ in self.vit.blocks
        )
        self.map = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 48), nn.Tanh(), nn.Linear(48, 2 * dim))
            for _ in self.vit.blocks
        )
        self.head = nn.Linear(dim, classes)

    def attention(self, attn: nn.Module, x: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        B, N, D = x.shape
        # 3 x (B, H, N, Dh)
        q, k, v = attn.qkv(x).reshape(B, N, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        k = torch.cat([prefix_k.to(k.dtype), k], dim=2)  # (B, H, L + N, Dh)
        v = torch.cat([prefix_v.to(v.dtype), v], dim=2)  # (B, H, L + N, Dh)
        if self.modern:
            out = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, Dh)
        else:
            weights = ((q * attn.scale) @ k.transpose(-2, -1)).softmax(-1)  # (B, H, N, L + N)
            out = weights @ v  # (B, H, N, Dh)
        return attn.proj(out.transpose(1, 2).reshape(B, N, D))

    def forward(self, pixels: Tensor) -> Tensor:
        vit, B = self.vit, len(pixels)
        x = embed(vit, normalise(pixels))  # (B, N, D)
        for block, p, made in zip(vit.blocks, self.p, self.map, strict=True):
            # The prefix of this layer, with a dropout mask per sample, cut into heads.
            k, v = (t.expand(B, -1, -1) for t in made(p).chunk(2, dim=-1))  # 2 x (B, L, D)
            k, v = F.dropout(k, 0.1, self.training), F.dropout(v, 0.1, self.training)
            heads = [t.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2) for t in (k, v)]
            x = x + self.attention(block.attn, block.norm1(x), *heads)
            x = x + block.mlp(block.norm2(x))
        return self.head(vit.norm(x)[:, 0].float())

    @torch.no_grad()
    def give_weights(self, model: TunedModel, vit: ViT) -> None:
        """Our model with the same weights as this one."""
        vit.load_state_dict(self.vit.state_dict())
        model.head.load_state_dict(self.head.state_dict())
        model.prefix.p.copy_(torch.stack(list(self.p)))  # (G, L, D)
        for i in (0, 2):  # the map's two linear layers: (G, in, out) and (G, 1, out)
            model.prefix.map[i].weight.copy_(torch.stack([m[i].weight.T for m in self.map]))
            model.prefix.map[i].bias.copy_(torch.stack([m[i].bias[None] for m in self.map]))


class PromptTokens(nn.Module):
    """VPT-deep as VPT computes it: L prompt tokens beside the patches, replaced in every layer."""

    def __init__(self, length: int, classes: int):
        super().__init__()
        self.vit = timm.create_model("vit_base_patch16_224", num_classes=0).requires_grad_(False)
        depth, dim = len(self.vit.blocks), self.vit.embed_dim
        self.p = nn.Parameter(torch.empty(depth, length, dim).uniform_(-0.05, 0.05))
        self.head = nn.Linear(dim, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        x = embed(self.vit, normalise(pixels))  # (B, N, D)
        for i, (block, p) in enumerate(zip(self.vit.blocks, self.p, strict=True)):
            prompts = F.dropout(p.expand(len(x), -1, -1), 0.1, self.training)  # (B, L, D)
            patches = x[:, 1:] if i == 0 else x[:, 1 + len(p) :]  # the last layer's prompts go
            x = block(torch.cat([x[:, :1], prompts.to(x.dtype), patches], dim=1))  # (B, L + N, D)
        return self.head(self.vit.norm(x)[:, 0].float())

    @torch.no_grad()
    def give_weights(self, model: TunedModel, vit: ViT) -> None:
        """Our Simple-share with the same weights as this one."""
        vit.load_state_dict(self.vit.state_dict())
        model.head.load_state_dict(self.head.state_dict())
        model.prefix.p.copy_(self.p)  # (G, L, D)


def embed(vit: nn.Module, images: Tensor) -> Tensor:
    """timm's own beginning: CLS and patches with their positions, (B, N, D)."""
    x = vit.patch_embed(images)  # (B, N - 1, D)
    return torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + vit.pos_embed


def check_equal(
    peer: Peer | PromptTokens, model: TunedModel, vit: ViT, pixels: Tensor, labels: Tensor
) -> None:
    """AssertionError if ours does not compute the peer's loss and gradients."""
    theirs = F.cross_entropy(peer.eval()(pixels), labels)
    loss, _ = image_loss(model.eval(), vit, False, pixels, labels)
    theirs.backward()
    loss.backward()
    torch.testing.assert_close(loss, theirs, atol=1e-4, rtol=1e-4)
    single = isinstance(peer.p, Tensor)
    grad = peer.p.grad if single else torch.stack([p.grad for p in peer.p])
    torch.testing.assert_close(model.prefix.p.grad, grad, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(model.head.weight.grad, peer.head.weight.grad, atol=1e-4, rtol=1e-3)
    for module in (peer, model):
        module.zero_grad()


def hold_in_bf16(model: nn.Module) -> None:
    """Keep the frozen matrices in bf16, as ours are: autocast need not cast them."""
    for module in model.vit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(torch.bfloat16)


def step(model: nn.Module, pixels: Tensor, labels: Tensor, bf16: bool = False) -> Callable:
    """A training step of a classifier that normalises its images itself, or of timm's whole ViT."""
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-6, momentum=0.9)
    inputs = pixels if hasattr(model, "vit") else normalise(pixels)

    def run() -> None:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def photographs(folder: Path, count: int) -> float:
    """JPEGs of 500 x 375 in ten classes, with detail at all scales; their mean size in kB."""
    rng = np.random.default_rng(0)
    for i in range(count):
        picture = np.zeros((375, 500, 3))
        for cells in (4, 12, 36, 108, 324):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            picture += np.asarray(noise.resize((500, 375), Image.Resampling.BICUBIC)) / cells**0.5
        path = folder / f"class{i % 10}" / f"{i:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((picture / picture.max() * 255).astype(np.uint8)).save(path, quality=90)
    return sum(path.stat().st_size for path in folder.rglob("*.jpg")) / count / 1e3


def decoding_loader(folder: Path, batch: int) -> DataLoader:
    """FGVC's training images, decoded, resized and cut again in every epoch."""
    steps = [transforms.Resize(256), transforms.RandomCrop(224), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return DataLoader(
        ImageFolder(folder, transforms.Compose(steps)), batch, shuffle=True, drop_last=True
    )


def gpt2(length: int) -> tuple[nn.Module, nn.Module, GPT]:
    """(transformers' GPT-2 of 124M random parameters, peft's prefix-tuning of it, our GPT)."""
    try:
        from peft import PrefixTuningConfig, get_peft_model
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UsageError(
            "row gpt compares with transformers and peft: pip install transformers peft"
        ) from None
    warnings.simplefilter("ignore", FutureWarning)  # between the two of them
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config()).eval().requires_grad_(False)
    ours = GPT()
    ours.load_state_dict(converted(theirs.state_dict()))
    options = {"num_virtual_tokens": length, "prefix_projection": True, "encoder_hidden_size": 512}
    return (
        theirs,
        get_peft_model(theirs, PrefixTuningConfig("CAUSAL_LM", **options)).eval(),
        ours.requires_grad_(False),
    )


def peft_step(tuned: nn.Module, tokens: Tensor, source: int) -> Callable[[], None]:
    labels = tokens.clone()
    labels[:, :source] = -100

    def step() -> None:
        tuned(input_ids=tokens, labels=labels).loss.backward()
        tuned.zero_grad()

    return step
