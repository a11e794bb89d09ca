"""What the benchmark compares with: the same work as existing repositories and libraries do it.

Images: timm's ViT with the prefix concatenated inside its attention. As VPT and the paper's code
are built: softmax written out, fp32. As one writes it today: fused attention, bf16, compiled.
VPT-deep with its prompts as tokens. torchvision's pipeline, which decodes every image in every
epoch. Texts: transformers and peft, if they are installed.

A ViT of these is called as ours is, with a prefix that our `Prefix` has made: making it takes a
thousandth of a step.

Shapes: B images or texts, N tokens, D width, H heads, Dh = D / H, L prefix length, Q targets.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from gpt import SIZES
from support.files import UsageError
from vit import IMAGENET_MEAN, IMAGENET_STD, ViT


class Peer(VisionTransformer):
    """timm's ViT with a prefix as existing repositories have it: softmax written out."""

    fused = False
    prefix_init_scale = 0.05
    normalise, cast_frozen_weights = ViT.normalise, ViT.cast_frozen_weights

    def __init__(self, **sizes: int):
        super().__init__(num_classes=0, **sizes)
        self.n_layer, self.n_head = len(self.blocks), self.blocks[0].attn.num_heads
        self.dim = self.embed_dim
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, prefix_kv: Tensor) -> Tensor:
        """images (B, 3, size, size), prefix_kv (depth, 2, [B,] H, L, Dh) -> (B, D)."""
        x = self._pos_embed(self.patch_embed(images))  # (B, N, D)
        for block, layer_kv in zip(self.blocks, prefix_kv, strict=True):
            x = self.layer(block, x, layer_kv)
        return self.norm(x)[:, 0]

    def layer(self, block: nn.Module, x: Tensor, prefix_kv: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        # Queries, keys and values of the tokens, the prefix before them.
        heads = (len(x), -1, 3, self.n_head, self.dim // self.n_head)
        q, k, v = block.attn.qkv(block.norm1(x)).view(heads).permute(2, 0, 3, 1, 4)
        prefix_k, prefix_v = (t.expand(len(x), -1, -1, -1) for t in prefix_kv.to(k.dtype))
        k = torch.cat([prefix_k, k], dim=2)  # (B, H, L + N, Dh)
        v = torch.cat([prefix_v, v], dim=2)  # (B, H, L + N, Dh)

        # Attention and MLP.
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, Dh)
        else:
            weights = (q * block.attn.scale @ k.mT).softmax(-1)  # (B, H, N, L + N)
            out = weights @ v  # (B, H, N, Dh)
        x = x + block.attn.proj(out.transpose(1, 2).flatten(2))  # (B, N, D)
        return x + block.mlp(block.norm2(x))  # (B, N, D)


class ModernPeer(Peer):
    """The same as one writes it today."""

    fused = True


class PromptTokens(Peer):
    """VPT-deep as VPT computes it: L prompt tokens beside the patches, replaced in every layer."""

    def __init__(self, **sizes: int):
        super().__init__(**sizes)
        for block in self.blocks:
            block.keys_values = nn.Identity()  # Simple-share hands its vectors over as they are

    def layer(self, block: nn.Module, x: Tensor, prompts: Tensor) -> Tensor:
        """x (B, N, D) or (B, N + L, D), prompts ([B,] L, D) -> (B, N + L, D)"""
        tokens = x[:, : self.pos_embed.shape[1]]  # (B, N, D): without the last layer's prompts
        prompts = prompts.to(x.dtype).expand(len(x), -1, -1)  # (B, L, D)
        return block(torch.cat([tokens, prompts], dim=1))  # (B, N + L, D)


def transformers_gpt2(sizes: dict) -> nn.Module:
    """transformers' GPT-2, frozen; its parameters are random. sizes: as GPT has them."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UsageError(
            "row gpt compares with transformers and peft: pip install transformers peft"
        ) from None
    config = GPT2Config(**{SIZES[name]: value for name, value in sizes.items()})
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def peft_gpt2(length: int, sizes: dict) -> nn.Module:
    """peft's prefix-tuning of it, with the map of Li & Liang."""
    gpt = transformers_gpt2(sizes)
    from peft import PrefixTuningConfig, get_peft_model

    warnings.simplefilter("ignore", FutureWarning)  # between the two of them
    options = {"num_virtual_tokens": length, "prefix_projection": True, "encoder_hidden_size": 512}
    tuned = get_peft_model(gpt, PrefixTuningConfig("CAUSAL_LM", **options))
    tuned.head = None  # make_optimizer asks for it
    return tuned


def peft_loss(
    tuned: nn.Module, _: None, bf16: bool, tokens: Tensor, positions: Tensor, labels: Tensor
) -> tuple[Tensor, int]:
    """As train.text_loss; the Q targets end the texts."""
    Q = labels.shape[1]
    every = torch.cat([torch.full_like(tokens[:, Q:], -100), labels], dim=1)  # (B, T)
    return Q * tuned.eval()(input_ids=tokens, labels=every).loss, labels.numel()


def photographs(folder: Path, count: int) -> None:
    """JPEGs of 500 x 375 in ten classes, with detail at all scales, of about 40 kB."""
    rng = np.random.default_rng(0)
    for i in range(count):
        picture = np.zeros((375, 500, 3))
        for cells in (4, 12, 36, 108, 324):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            picture += np.asarray(noise.resize((500, 375), Image.Resampling.BICUBIC)) / cells**0.5
        path = folder / f"class{i % 10}" / f"{i:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((picture / picture.max() * 255).astype(np.uint8)).save(path, quality=90)


def decoding_loader(folder: Path, batch: int) -> DataLoader:
    """FGVC's training images, decoded, resized and cut again in every epoch."""
    steps = [transforms.Resize(256), transforms.RandomCrop(224), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    data = ImageFolder(folder, transforms.Compose(steps))
    return DataLoader(data, batch, shuffle=True, drop_last=True)
