"""A Vision Transformer written out by hand, and the one line where a prefix enters it.

An image becomes N - 1 patches, each a vector of width D, plus one class token (CLS). A block lets the tokens look at
each other (attention), then transforms each alone (MLP). The answer is read from CLS after the last layer norm.

Prefix-tuning changes one thing, in `Attention.forward`: every layer gets L more keys and values than it has tokens,
    k = cat([prefix_k, k]),  v = cat([prefix_v, v])
and queries come from the tokens alone. The prefix is an argument, never an attribute: the backbone knows nothing of
tuning, and any number of prefixes can use one backbone.

Shapes: B images, N tokens (CLS first), D width, H heads, Dh = D / H, L prefix length.
Module names are timm's, so timm's weights load as they are. Sources: Dosovitskiy et al., ICLR 2021 (arXiv 2010.11929);
Le et al., ICLR 2025 (arXiv 2410.02200), eq. 1 for the prefix.
"""

import json
from itertools import zip_longest
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.files import fill, read_weights

IN21K = (
    "vit_base_patch16_224.orig_in21k"  # the checkpoint of VPT and of the paper, as timm names it
)
TINY = {"image": 32, "patch": 8, "dim": 32, "n_layer": 8, "n_head": 4}
TINY_WEIGHTS = (
    Path(__file__).parent / "assets" / "tiny_vit.safetensors"
)  # comes with the repository


def written_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, attn_weights: list | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v, written out: q (B, H, Nq, Dh), k and v (B, H, L + N, Dh) -> (B, H, Nq, Dh).

    mask (Nq, L + N), or with B and 1 before that: True where a query may choose an expert.
    attn_weights: a list that is given the softmax (B, H, Nq, L + N), for those who want to see it.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, Nq, L + N)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    gate = scores.softmax(-1)  # (B, H, Nq, L + N): sums to 1 over the experts
    if attn_weights is not None:
        attn_weights.append(gate)
    return gate @ v  # (B, H, Nq, Dh): the gate mixes the experts


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same numbers from PyTorch's fused kernel (flash attention on CUDA), which never stores the scores."""
    q = (
        q.contiguous()
    )  # a copy, lest backward keep the whole product (q, k and v of all tokens) that q is a view of
    return F.scaled_dot_product_attention(q, k, v, mask)  # (B, H, Nq, Dh)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, attn_weights: list | None = None
) -> Tensor:
    """Whichever of the two is faster here; the one that is written out if its attn_weights are wanted."""
    if attn_weights is None and (q.is_cuda or q.dtype != torch.bfloat16):
        return fused_attention(q, k, v, mask)
    return written_attention(q, k, v, mask, attn_weights)


class Attention(nn.Module):
    def __init__(self, dim: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(dim, 3 * dim)  # W_q, W_k, W_v stacked
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor, parts: slice) -> Tensor:
        """Project x (B, N, D) by some of W_q, W_k, W_v and cut it into heads: (parts, B, H, N, Dh)."""
        weight = self.qkv.weight.unflatten(0, (3, -1))[parts].flatten(0, 1)  # (parts * D, D)
        bias = self.qkv.bias.unflatten(0, (3, -1))[parts].flatten()  # (parts * D,)
        y = F.linear(x, weight, bias).unflatten(-1, (-1, self.n_head, x.shape[-1] // self.n_head))
        return y.permute(2, 0, 3, 1, 4)  # (parts, B, H, N, Dh)

    def forward(
        self,
        x: Tensor,
        prefix: Tensor | None,
        n_query: int | None = None,
        attn_weights: list | None = None,
    ) -> Tensor:
        """x (B, N, D), prefix (2, H, L, Dh) or (2, B, H, L, Dh) -> (B, n_query, D): what the first tokens gather.

        n_query: None is N, all of them.
        """
        if n_query is None:
            q, k, v = self.heads(x, slice(0, 3))  # 3 x (B, H, N, Dh)
        else:
            (q,) = self.heads(x[:, :n_query], slice(0, 1))  # (B, H, n_query, Dh)
            k, v = self.heads(x, slice(1, 3))  # 2 x (B, H, N, Dh)
        if prefix is not None:
            prefix_k, prefix_v = (
                p.expand(len(x), -1, -1, -1) for p in prefix.to(k.dtype)
            )  # 2 x (B, H, L, Dh)
            k = torch.cat([prefix_k, k], dim=2)  # (B, H, L + N, Dh)
            v = torch.cat([prefix_v, v], dim=2)  # (B, H, L + N, Dh)
        out = attention(q, k, v, attn_weights=attn_weights)  # (B, H, n_query, Dh)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, n_query, D)


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # (B, N, D)


class Block(nn.Module):
    def __init__(self, dim: int, n_head: int, hidden: int, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, n_head)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, hidden)

    def forward(
        self,
        x: Tensor,
        prefix: Tensor | None = None,
        n_query: int | None = None,
        attn_weights: list | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, n_query, D). Only the first n_query tokens go on; the others are still keys and values."""
        gathered = self.attn(self.norm1(x), prefix, n_query, attn_weights)  # (B, n_query, D)
        x = (x if n_query is None else x[:, :n_query]) + gathered  # (B, n_query, D)
        return x + self.mlp(self.norm2(x))  # (B, n_query, D)

    def keys_values(self, x: Tensor) -> Tensor:
        """The keys and values this layer makes of any vectors (B, L, D): (2, B, H, L, Dh). Simple-share lives on it."""
        return self.attn.heads(self.norm1(x), slice(1, 3))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).mT  # (B, N - 1, D)


class ViT(nn.Module):
    """A plain ViT: images of `image` x `image` pixels in patches of `patch`; CLS token, learned positions, pre-norm."""

    fingerprint = ""  # of the weights; set when they are loaded

    def __init__(
        self,
        image: int = 224,
        patch: int = 16,
        dim: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        hidden: int | None = None,
        eps: float = 1e-6,
    ):
        super().__init__()
        hidden = hidden or 4 * dim
        self.sizes: dict = {
            "image": image,
            "patch": patch,
            "dim": dim,
            "n_layer": n_layer,
            "n_head": n_head,
        }
        self.sizes |= {"hidden": hidden, "eps": eps}
        self.image_size, self.dim, self.n_layer, self.n_head = image, dim, n_layer, n_head
        self.inputs = {"image_size": image}  # what `data.load` must make for it
        self.prefix_init_scale = (
            6 / (3 * patch**2 + dim)
        ) ** 0.5  # v of the paper: a prefix starts like a patch embedding
        self.patch_embed = PatchEmbed(patch, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, n_head, hidden, eps) for _ in range(n_layer))
        self.norm = nn.LayerNorm(dim, eps=eps)

    def tokens(
        self,
        images: Tensor,
        prefix: Tensor | None = None,
        n_query: int | None = None,
        attn_weights: list | None = None,
    ) -> Tensor:
        """(B, 3, image, image) -> (B, n_query or N, D): the tokens after the final norm, CLS first."""
        x = self.patch_embed(images)  # (B, N - 1, D)
        x = (
            torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        )  # (B, N, D)
        prefixes = () if prefix is None else prefix.unbind()  # depth x (2, [B,] H, L, Dh)
        for i, (block, p) in enumerate(zip_longest(self.blocks, prefixes)):
            last = i == self.n_layer - 1
            x = block(
                x, p, n_query if last else None, attn_weights
            )  # (B, N, D); the last block: (B, n_query, D)
        return self.norm(x)

    def forward(
        self, images: Tensor, prefix: Tensor | None = None, attn_weights: list | None = None
    ) -> Tensor:
        """(B, 3, image, image) -> (B, D): CLS after the final norm. The last block computes CLS alone.

        prefix: (depth, 2, H, L, Dh) or (depth, 2, B, H, L, Dh) from `Prefix`; layers beyond depth have none.
        attn_weights: a list that is given every layer's attention weights (B, H, N, L + N), the last layer's (B, H, 1, L + N).
        """
        return self.tokens(images, prefix, n_query=1, attn_weights=attn_weights)[:, 0]

    def cast_frozen_weights(self) -> None:
        """Cast the matrices for good, for a frozen ViT: no fp32 copy is cast in every step. Norms stay fp32."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(torch.bfloat16)

    @classmethod
    def load(cls, name: str, pretrained: bool = True) -> "ViT":
        """tiny: the shipped weights; scratch: that shape, random; a .npz or .safetensors file; or a name of timm's."""
        if name == "scratch":
            return cls(**TINY)
        if name.endswith(".npz"):
            return cls.from_npz(name)
        if name == "tiny" or name.endswith(".safetensors"):
            return cls.from_file(TINY_WEIGHTS if name == "tiny" else name)
        return cls.from_timm(name, pretrained)

    @classmethod
    def from_timm(cls, name: str = IN21K, pretrained: bool = True) -> "ViT":
        """The weights of any plain timm ViT, with the same outputs. ValueError if this class cannot represent it."""
        source = timm.create_model(name, pretrained=pretrained, num_classes=0).eval()
        if reason := unlike_a_plain_vit(source):
            raise ValueError(
                f"timm's '{name}' {reason}; vit.py holds plain ViTs only, such as '{IN21K}'"
            )
        block, conv = source.blocks[0], source.patch_embed.proj
        vit = cls(
            source.patch_embed.img_size[0],
            conv.kernel_size[0],
            source.embed_dim,
            len(source.blocks),
            block.attn.num_heads,
            block.mlp.fc1.out_features,
            block.norm1.eps,
        )
        vit.load_state_dict(source.state_dict())
        probe = torch.randn(
            1, 3, vit.image_size, vit.image_size, generator=torch.Generator().manual_seed(0)
        )
        with torch.no_grad():
            error = (vit.eval()(probe) - source(probe)).abs().max().item()
        if error > 1e-3:
            raise ValueError(
                f"timm's '{name}' computes something else than a plain ViT (outputs differ by {error:.1g})"
            )
        return vit

    @classmethod
    def from_npz(cls, path: str | Path) -> "ViT":
        """The original Google checkpoint, such as ViT-B_16.npz: Flax names, kernels as (in, out), heads cut apart."""
        with np.load(path, allow_pickle=False) as file:
            flax = {name: torch.from_numpy(file[name].astype(np.float32)) for name in file.files}
        patch, _, _, dim = flax["embedding/kernel"].shape  # (patch, patch, 3, D)
        positions = flax["Transformer/posembed_input/pos_embedding"].shape[1]  # N
        n_layer = len({name.split("/")[1] for name in flax if "encoderblock" in name})
        attention = "MultiHeadDotProductAttention_1"
        _, n_head, _ = flax[
            f"Transformer/encoderblock_0/{attention}/query/kernel"
        ].shape  # (D, H, Dh)
        hidden = flax["Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"].shape[1]
        vit = cls(round((positions - 1) ** 0.5) * patch, patch, dim, n_layer, n_head, hidden)

        def linear(
            name: str, n_in: int
        ) -> dict[str, Tensor]:  # Flax keeps (in, out), in or out cut into heads
            return {
                "weight": flax[f"{name}/kernel"].reshape(n_in, -1).mT,
                "bias": flax[f"{name}/bias"].flatten(),
            }

        def norm(name: str) -> dict[str, Tensor]:
            return {"weight": flax[f"{name}/scale"], "bias": flax[f"{name}/bias"]}

        conv = {
            "weight": flax["embedding/kernel"].permute(3, 2, 0, 1),
            "bias": flax["embedding/bias"],
        }
        parts = {"patch_embed.proj": conv, "norm": norm("Transformer/encoder_norm")}
        for i in range(n_layer):
            theirs, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
            qkv = [
                linear(f"{theirs}/{attention}/{part}", dim) for part in ("query", "key", "value")
            ]
            parts[f"{ours}.norm1"] = norm(f"{theirs}/LayerNorm_0")
            parts[f"{ours}.attn.qkv"] = {
                kind: torch.cat([part[kind] for part in qkv]) for kind in ("weight", "bias")
            }
            parts[f"{ours}.attn.proj"] = linear(f"{theirs}/{attention}/out", dim)
            parts[f"{ours}.norm2"] = norm(f"{theirs}/LayerNorm_2")
            parts[f"{ours}.mlp.fc1"] = linear(f"{theirs}/MlpBlock_3/Dense_0", dim)
            parts[f"{ours}.mlp.fc2"] = linear(f"{theirs}/MlpBlock_3/Dense_1", hidden)
        state = {
            f"{name}.{kind}": value for name, part in parts.items() for kind, value in part.items()
        }
        state |= {
            "cls_token": flax["cls"],
            "pos_embed": flax["Transformer/posembed_input/pos_embedding"],
        }
        vit.load_state_dict(state)
        return vit.eval()

    @classmethod
    def from_file(cls, path: str | Path) -> "ViT":
        """A ViT saved by `train.py --tune full`: safetensors with sizes in its metadata. ValueError if it is not."""
        state, strings = read_weights(path)
        if "vit" not in strings:
            raise ValueError(f"{path} holds no ViT of this repository (its metadata name no sizes)")
        return fill(cls, json.loads(strings["vit"]), state, path)


def unlike_a_plain_vit(source: nn.Module) -> str | None:
    """What a timm model has, or lacks, that `ViT` cannot represent; None if it is a plain ViT."""
    if not isinstance(source, timm.models.VisionTransformer):
        return f"is a {type(source).__name__}"
    block, names = source.blocks[0], set(source.state_dict())
    plain = set(ViT(16, 16, 64, len(source.blocks), 1).state_dict())
    checks = {
        "has a distillation token": "dist_token" in names,
        "has no class token": "cls_token" not in names,
        "has register tokens": "reg_token" in names,
        "has layer scale": "blocks.0.ls1.gamma" in names,
        "has a pooling head": any(n.startswith("attn_pool") for n in names)
        or source.global_pool != "token",
        "has no learned position per token": "pos_embed" not in names or source.no_embed_class,
        "does not use exact GELU": not isinstance(block.mlp.act, nn.GELU)
        or block.mlp.act.approximate != "none",
        "takes images that are not square": len(set(source.patch_embed.img_size)) != 1,
    }
    for reason, holds in checks.items():
        if holds:
            return reason
    odd = sorted(names ^ plain)
    return f"has other parts than a plain ViT ({', '.join(odd[:3])})" if odd else None
