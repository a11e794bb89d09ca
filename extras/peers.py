"""What bench.py compares with: the same work, done as existing repositories and libraries do it, written plainly.

Images: timm's ViT with the prefix concatenated inside its attention, softmax written out, a Python loop over the
layers' maps, the whole last block, fp32 (VPT and the paper's code are built so), and torchvision's pipeline, which
decodes every image in every epoch. Text: transformers and peft, if they are installed.
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

from data import UsageError, normalise
from gpt import GPT, converted
from support.images import IMAGENET_MEAN, IMAGENET_STD
from train import TunedModel, image_loss
from vit import ViT


class Peer(nn.Module):
    """Deep-share on ViT-B/16 as existing repositories do it (timm, explicit attention, a loop over layers, fp32)."""

    def __init__(self, length: int, classes: int):
        super().__init__()
        self.vit = timm.create_model("vit_base_patch16_224", num_classes=0).requires_grad_(False)
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
        q, k, v = (
            attn.qkv(x).reshape(B, N, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        )  # 3 x (B, H, N, Dh)
        k, v = (
            torch.cat([prefix_k, k], dim=2),
            torch.cat([prefix_v, v], dim=2),
        )  # 2 x (B, H, L + N, Dh)
        weights = ((q * attn.scale) @ k.transpose(-2, -1)).softmax(-1)  # (B, H, N, L + N)
        return attn.proj((weights @ v).transpose(1, 2).reshape(B, N, D))

    def forward(self, pixels: Tensor) -> Tensor:
        vit, B = self.vit, len(pixels)
        x = vit.patch_embed(normalise(pixels))  # (B, N - 1, D)
        x = torch.cat([vit.cls_token.expand(B, -1, -1), x], dim=1) + vit.pos_embed  # (B, N, D)
        for block, p, made in zip(vit.blocks, self.p, self.map, strict=True):
            parts = [
                F.dropout(t.expand(B, -1, -1), 0.1, self.training) for t in made(p).chunk(2, dim=-1)
            ]
            prefix = [
                t.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2) for t in parts
            ]  # 2 x (B, H, L, Dh)
            x = x + self.attention(block.attn, block.norm1(x), *prefix)
            x = x + block.mlp(block.norm2(x))
        return self.head(vit.norm(x)[:, 0])

    @torch.no_grad()
    def give_weights(self, model: TunedModel, vit: ViT) -> None:
        """Our model with the same weights as this one."""
        vit.load_state_dict(self.vit.state_dict())
        model.head.load_state_dict(self.head.state_dict())
        model.prefix.p.copy_(torch.stack(list(self.p)))  # (G, L, D)
        for i in (0, 2):
            model.prefix.map[i].weight.copy_(
                torch.stack([made[i].weight.T for made in self.map])
            )  # (G, in, out)
            model.prefix.map[i].bias.copy_(torch.stack([made[i].bias[None] for made in self.map]))

    def check_equal(self, model: TunedModel, vit: ViT, pixels: Tensor, labels: Tensor) -> None:
        """Ours computes the same loss and gradients, or there is nothing to compare. AssertionError if not."""
        theirs = F.cross_entropy(self.eval()(pixels), labels)
        loss, _ = image_loss(model.eval(), vit, False, pixels, labels)
        theirs.backward()
        loss.backward()
        torch.testing.assert_close(loss, theirs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            model.prefix.p.grad, torch.stack([p.grad for p in self.p]), atol=1e-5, rtol=1e-3
        )
        torch.testing.assert_close(
            model.head.weight.grad, self.head.weight.grad, atol=1e-4, rtol=1e-3
        )
        for module in (self, model):
            module.zero_grad()


def step(model: nn.Module, pixels: Tensor, labels: Tensor) -> Callable[[], None]:
    """A training step of a classifier that normalises its images itself, or of one of timm's."""
    optimizer = torch.optim.SGD(
        [p for p in model.train().parameters() if p.requires_grad], lr=1e-6, momentum=0.9
    )
    inputs = pixels if isinstance(model, Peer) else normalise(pixels)

    def run() -> None:
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def photographs(folder: Path, count: int) -> float:
    """JPEGs of 500 x 375 with detail at all scales, as photographs have it, in ten classes; their mean size, kB."""
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
    """FGVC's training images, decoded, resized and cut again in every epoch, in the process that trains."""
    steps = [transforms.Resize(256), transforms.RandomCrop(224), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return DataLoader(
        ImageFolder(folder, transforms.Compose(steps)), batch, shuffle=True, drop_last=True
    )


def gpt2(length: int) -> tuple[nn.Module, nn.Module, GPT]:
    """(transformers' GPT-2 of 124M random parameters, peft's prefix-tuning of it, our GPT with the same weights)."""
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
