"""A Vision Transformer written out by hand, and the two lines where a prefix enters it.

An image becomes N - 1 patches, each a vector of width D, plus one class token (CLS). In a block
the tokens look at each other (attention), then each is transformed alone (MLP). The answer is read
from CLS after the last layer norm.

Prefix-tuning changes one thing, in `Attention.forward`: a layer gets L more keys and values,
    k = cat([prefix_k, k]),  v = cat([prefix_v, v])
and queries still come from the tokens alone. The prefix is an argument, never an attribute: the
backbone knows nothing of tuning, and any number of prefixes can use one backbone.

Shapes: B images, N tokens (CLS first), Nq queries, D width, H heads, Dh = D / H, L prefix length.
Modules are named as in timm, so timm's weights load as they are. Sources: Dosovitskiy et al., ICLR
2021 (arXiv 2010.11929); Le et al., ICLR 2025 (arXiv 2410.02200), eq. 1 for the prefix.
"""

import json
import textwrap
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

IN21K = "vit_base_patch16_224.orig_in21k"  # the backbone of VPT and of the paper, in timm's words
TINY = {"image": 32, "patch": 8, "dim": 32, "n_layer": 8, "n_head": 4}
TINY_WEIGHTS = Path(__file__).parent / "assets" / "tiny_vit.safetensors"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Model = TypeVar("Model", bound=nn.Module)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    attn_weights: list | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v: q (B, H, Nq, Dh), k and v (B, H, L + N, Dh) -> (B, H, Nq, Dh).

    mask: (Nq, L + N), or with B and 1 before that; True where a query may choose an expert.
    attn_weights: a list that receives the softmax (B, H, Nq, L + N), for those who want to see it.
    """
    # The fused kernel (flash attention on CUDA) never stores the scores. In bf16 on a CPU it is
    # the slower of the two.
    if attn_weights is None and (q.is_cuda or q.dtype != torch.bfloat16):
        q = q.contiguous()  # copy q: a view would keep the whole qkv tensor alive until backward
        return F.scaled_dot_product_attention(q, k, v, mask)  # (B, H, Nq, Dh)

    # The same, written out.
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, Nq, L + N)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    gate = scores.softmax(-1)  # (B, H, Nq, L + N): sums to 1 over the experts
    if attn_weights is not None:
        attn_weights.append(gate)
    return gate @ v  # (B, H, Nq, Dh): the gate mixes the experts


class Attention(nn.Module):
    """Multi-head attention. W_q, W_k and W_v are stacked in `qkv`, as in timm."""

    def __init__(self, dim: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, y: Tensor) -> Tensor:
        """Cut queries, keys or values into heads: (B, N, parts * D) -> (parts, B, H, N, Dh)."""
        head_dim = self.proj.in_features // self.n_head  # Dh
        return y.unflatten(-1, (-1, self.n_head, head_dim)).permute(2, 0, 3, 1, 4)

    def queries(self, x: Tensor) -> Tensor:
        """W_q x + b_q alone: x (B, Nq, D) -> (B, H, Nq, Dh)."""
        dim = x.shape[-1]
        return self.heads(F.linear(x, self.qkv.weight[:dim], self.qkv.bias[:dim]))[0]

    def keys_values(self, x: Tensor) -> Tensor:
        """W_k x + b_k and W_v x + b_v: x (B, N, D) -> (2, B, H, N, Dh)."""
        dim = x.shape[-1]
        return self.heads(F.linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:]))

    def forward(
        self,
        x: Tensor,
        prefix_kv: Tensor | None = None,
        asking: Tensor | None = None,
        mask: Tensor | None = None,
        attn_weights: list | None = None,
        kv: list | None = None,
    ) -> Tensor:
        """x (B, N, D), prefix_kv (2, H, L, Dh) or (2, B, H, L, Dh) -> (B, Nq, D).

        asking: the tokens (B, Nq, D) that get an answer; None: all of x. Keys and values always
            come from all of x.
        kv: a list that receives the keys and values (2, B, H, L + N, Dh), the prefix's included.
        """
        # Queries, keys and values of the tokens.
        if asking is None:
            q, k, v = self.heads(self.qkv(x))  # 3 x (B, H, N, Dh)
        else:
            q = self.queries(asking)  # (B, H, Nq, Dh)
            k, v = self.keys_values(x)  # 2 x (B, H, N, Dh)

        # The prefix: L more keys and values, which come first.
        if prefix_kv is not None:
            prefix_k, prefix_v = prefix_kv.to(k.dtype)  # 2 x ([B,] H, L, Dh)
            k = torch.cat([prefix_k.expand(len(x), -1, -1, -1), k], dim=2)  # (B, H, L + N, Dh)
            v = torch.cat([prefix_v.expand(len(x), -1, -1, -1), v], dim=2)  # (B, H, L + N, Dh)
        if kv is not None:
            kv.append(torch.stack([k, v]))

        out = attention(q, k, v, mask, attn_weights)  # (B, H, Nq, Dh)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, Nq, D)


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
        prefix_kv: Tensor | None = None,
        cls_only: bool = False,
        attn_weights: list | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D), or (B, 1, D) with cls_only: CLS asks and goes on alone."""
        y = self.norm1(x)  # (B, N, D)
        asking = y[:, :1] if cls_only else None
        x = x[:, :1] if cls_only else x
        x = x + self.attn(y, prefix_kv, asking, attn_weights=attn_weights)  # (B, N or 1, D)
        return x + self.mlp(self.norm2(x))  # (B, N or 1, D)

    def keys_values(self, x: Tensor) -> Tensor:
        """What this layer makes of any vectors (B, L, D), for Simple-share: (2, B, H, L, Dh)."""
        return self.attn.keys_values(self.norm1(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).mT  # (B, N - 1, D)


class ViT(nn.Module):
    """A plain ViT: square images in patches, a CLS token, learned positions, norms before layers.

    image, patch: side of an image and of a patch, in pixels. hidden: width of the MLPs (None: 4 D).
    eps: of the layer norms. mean, std: of the pixels that the weights were trained on, per colour.
    """

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
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ):
        super().__init__()
        hidden = hidden or 4 * dim
        self.sizes = {
            **{"image": image, "patch": patch, "dim": dim, "n_layer": n_layer, "n_head": n_head},
            **{"hidden": hidden, "eps": eps, "mean": mean, "std": std},
        }
        self.image_size, self.dim, self.n_layer, self.n_head = image, dim, n_layer, n_head
        self.inputs = {"image_size": image}  # what `data.load` has to make for this model
        self.prefix_init_scale = (6 / (3 * patch**2 + dim)) ** 0.5  # as for a patch embedding

        # Constants on the model's device, in no file and no fingerprint.
        for name, values in (("mean", mean), ("std", std)):
            constant = torch.tensor(values, device="cpu").view(3, 1, 1)
            self.register_buffer(name, constant, persistent=False)

        self.patch_embed = PatchEmbed(patch, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, n_head, hidden, eps) for _ in range(n_layer))
        self.norm = nn.LayerNorm(dim, eps=eps)

    @property
    def normalisation(self) -> str:
        """The mean and the standard deviation of `normalise`, in words."""
        mean, std = self.sizes["mean"], self.sizes["std"]
        if (*mean, *std) == (*IMAGENET_MEAN, *IMAGENET_STD):
            return "ImageNet mean and std"
        if len({*mean, *std}) == 1:
            return f"mean and std {mean[0]:g} (timm's)"
        return f"mean {', '.join(f'{m:g}' for m in mean)}, std {', '.join(f'{s:g}' for s in std)}"

    def normalise(self, pixels: Tensor) -> Tensor:
        """pixels (B, size, size, 3) uint8 -> images (B, 3, size, size) float32, as the ViT wants.

        VPT and the paper use ImageNet's mean and std for their backbone; so do the files of this
        repository. Other weights of timm bring their own.
        """
        images = pixels.permute(0, 3, 1, 2).float().div_(255)  # (B, 3, size, size)
        return images.sub_(self.mean).div_(self.std)  # in place: half the time on a CPU

    def forward(
        self,
        images: Tensor,
        prefix_kv: Tensor | None = None,
        attn_weights: list | None = None,
    ) -> Tensor:
        """images (B, 3, size, size) -> (B, D): CLS after the final norm.

        prefix_kv: from `Prefix`, (depth, 2, H, L, Dh), or (depth, 2, B, H, L, Dh) if every example
            has its own. Layers beyond depth have none.
        attn_weights: a list that receives every layer's attention weights, (B, H, N, L + N), from
            the last layer (B, H, 1, L + N).
        """
        # Patches become tokens. CLS comes first, and every token learns its place.
        x = self.patch_embed(images)  # (B, N - 1, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, N, D)
        x = x + self.pos_embed  # (B, N, D)

        # Nobody reads what the other tokens gather in the last block: CLS asks alone there.
        layers = () if prefix_kv is None else prefix_kv.unbind()  # depth x (2, [B,] H, L, Dh)
        for i, block in enumerate(self.blocks):
            layer_kv = layers[i] if i < len(layers) else None
            x = block(x, layer_kv, i == self.n_layer - 1, attn_weights)  # (B, N, D), then (B, 1, D)
        return self.norm(x)[:, 0]

    def cast_frozen_weights(self) -> None:
        """Cast the matrices of a frozen ViT to bf16 once, not in every step. Norms stay fp32."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(torch.bfloat16)

    @classmethod
    def load(cls, name: str, pretrained: bool = True) -> "ViT":
        """tiny: the shipped weights. scratch: the same shape, random. Otherwise a .npz file of the
        original ViT, a .safetensors file that `train.py --tune full` saved, or a name of timm's.

        pretrained: False gives a timm name random weights and needs no download.
        Raises ValueError, in one sentence, for a file or a model that is not a plain ViT.
        """
        if name == "scratch":
            return cls(**TINY)
        if name == "tiny" or name.endswith(".safetensors"):
            return cls.from_file(TINY_WEIGHTS if name == "tiny" else name)
        if name.endswith(".npz"):
            return cls.from_timm(read_npz(name), name)
        return cls.from_timm(timm.create_model(name, pretrained=pretrained, num_classes=0), name)

    @classmethod
    def from_file(cls, path: str | Path) -> "ViT":
        """A ViT that `train.py --tune full` saved, its sizes in the metadata."""
        state, metadata = read_weights(path)
        if "vit" not in metadata:
            raise ValueError(f"{path} holds no ViT of this repository (its metadata name no sizes)")
        return build(cls, json.loads(metadata["vit"]), state, path)

    @classmethod
    def from_timm(cls, source: nn.Module, name: str) -> "ViT":
        """The weights of a plain timm ViT, with the same outputs."""
        # What a plain ViT has not, in words.
        state = source.state_dict()
        reasons = [reason for part, reason in NOT_PLAIN.items() if part in state]
        if not isinstance(source, timm.models.VisionTransformer):
            reasons = [f"is a {type(source).__name__}"]
        elif not {"cls_token", "pos_embed"} <= state.keys():
            reasons.append("has no class token, or no learned positions")
        elif getattr(source.blocks[0].mlp.act, "approximate", "") != "none":
            reasons.append("does not use exact GELU")
        if reasons:
            raise ValueError(f"'{name}' {reasons[0]}; vit.py holds plain ViTs only, as '{IN21K}'")

        # The same sizes, the same weights.
        block, patches = source.blocks[0], source.patch_embed
        sizes = {"image": patches.img_size[0], "patch": patches.patch_size[0]}
        sizes |= {"dim": source.embed_dim, "n_layer": len(source.blocks)}
        sizes |= {"n_head": block.attn.num_heads, "hidden": block.mlp.fc1.out_features}
        vit = build(cls, sizes | {"eps": block.norm1.eps}, state, name)

        # Weights do not tell every difference (another GELU, another epsilon); outputs do.
        probe = torch.linspace(-1, 1, 3 * vit.image_size**2).view(1, 3, vit.image_size, -1)
        with torch.no_grad():
            error = (vit(probe) - source.eval()(probe)).abs().max().item()
        if error > 1e-3:
            raise ValueError(f"'{name}' is no plain ViT (its outputs differ by {error:.1g})")
        return vit


NOT_PLAIN = {  # parameters that a plain ViT does not have, and what they mean
    "dist_token": "has a distillation token",
    "reg_token": "has register tokens",
    "norm_pre.weight": "has a norm before the blocks",
    "blocks.0.ls1.gamma": "has layer scale",
    "blocks.0.attn.q_norm.weight": "has norms of queries and keys",
    "attn_pool.latent": "has a pooling head",
    "fc_norm.weight": "reads the mean of its tokens, not CLS",
}


def read_npz(path: str | Path) -> nn.Module:
    """The original Google checkpoint, such as ViT-B_16.npz, as timm reads it."""
    with np.load(path, allow_pickle=False) as flax:
        block = "Transformer/encoderblock_0"
        patch, _, _, dim = flax["embedding/kernel"].shape  # (patch, patch, 3, D)
        count = flax["Transformer/posembed_input/pos_embedding"].shape[1]  # N
        heads = flax[f"{block}/MultiHeadDotProductAttention_1/query/kernel"].shape[1]  # (D, H, Dh)
        hidden = flax[f"{block}/MlpBlock_3/Dense_0/kernel"].shape[1]  # (D, hidden)
        depth = len({name.split("/")[1] for name in flax.files if "encoderblock_" in name})
    sizes = {"embed_dim": dim, "depth": depth, "num_heads": heads, "mlp_ratio": hidden / dim}
    image = patch * round((count - 1) ** 0.5)
    source = timm.models.VisionTransformer(image, patch, num_classes=0, **sizes)
    source.load_pretrained(str(path))
    return source


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a .safetensors file. Raises ValueError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def build(
    kind: type[Model], sizes: dict[str, Any], state: dict[str, Tensor], source: str | Path
) -> Model:
    """A model of these sizes with these weights, in fp32. Raises ValueError if they do not fit."""
    other = f"{source} holds another model than a {kind.__name__} of the sizes {sizes}"
    if sizes.get("n_layer", 0) > len(state):  # a damaged file may claim 10^9 layers
        raise ValueError(f"{other} (it has {len(state)} tensors)")

    # Tensors on the meta device take no memory, and nothing is drawn that is overwritten at once.
    with torch.device("meta"):
        model = kind(**sizes)
    copies = {name: value.to(torch.float32, copy=True) for name, value in state.items()}
    try:
        model.load_state_dict(copies, assign=True)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error).split("\n")[1], 120)
        raise ValueError(f"{other} ({reason})") from error
    return model.eval()
