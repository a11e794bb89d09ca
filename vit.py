"""A Vision Transformer written out by hand, and the two lines where a prefix enters it.

An image becomes N - 1 patches, each a vector of width D, plus one class token (CLS). In a block
the tokens look at each other (attention), then each is transformed alone (MLP). The answer is read
from CLS after the last layer norm.

Prefix-tuning changes one thing, in `Attention.forward`: a layer gets L more keys and values,
    k = cat([prefix_k, k]),  v = cat([prefix_v, v])
and queries still come from the tokens alone. The prefix is an argument, never an attribute: the
backbone knows nothing of tuning, and any number of prefixes can use one backbone.

Shapes: B images, N tokens (CLS first), Nq queries, D width, H heads, Dh = D / H, L prefix length.
Modules are named as in timm. Sources: Dosovitskiy et al., ICLR 2021 (arXiv 2010.11929); Le et al.,
ICLR 2025 (arXiv 2410.02200), eq. 1 for the prefix.
"""

import difflib
import json
import textwrap
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

IN21K = "vit_base_patch16_224.orig_in21k"  # the backbone of VPT and of the paper, in timm's words
TINY: dict = {"image": 32, "patch": 8, "dim": 32, "n_layer": 8, "n_head": 4}
TINY_WEIGHTS = Path(__file__).parent / "assets" / "tiny_vit.safetensors"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, attn_weights: list | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v: q (B, H, Nq, Dh), k and v (B, H, L + N, Dh) -> (B, H, Nq, Dh).

    mask: (Nq, L + N), or with B and 1 before that; True where a query may choose an expert.
    attn_weights: a list that receives the softmax (B, H, Nq, L + N), for those who want to see it.
    """
    # The fused kernel (flash attention on CUDA) stores no scores. On a CPU it is slow in bf16.
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

    def keys_values(self, x: Tensor) -> Tensor:
        """W_k x + b_k and W_v x + b_v: x (B, N, D) -> (2, B, H, N, Dh)."""
        dim = x.shape[-1]
        return self.heads(F.linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:]))

    def forward(
        self,
        x: Tensor,
        prefix_kv: Tensor | None = None,
        attention_fn: Callable = attention,
        asking: Tensor | None = None,
    ) -> Tensor:
        """x (B, N, D), prefix_kv (2, H, L, Dh) or (2, B, H, L, Dh) -> (B, Nq, D).

        asking: the tokens (B, Nq, D) that get an answer; None: all of x. Keys and values always
            come from all of x.
        """
        # Queries, keys and values of the tokens.
        if asking is None:
            q, k, v = self.heads(self.qkv(x))  # 3 x (B, H, N, Dh)
        else:
            dim = x.shape[-1]
            q = F.linear(asking, self.qkv.weight[:dim], self.qkv.bias[:dim])  # (B, Nq, D)
            (q,) = self.heads(q)  # (B, H, Nq, Dh)
            k, v = self.keys_values(x)  # 2 x (B, H, N, Dh)

        # The prefix: L more keys and values, which come first.
        if prefix_kv is not None:
            prefix_k, prefix_v = prefix_kv.to(k.dtype)  # 2 x ([B,] H, L, Dh)
            k = torch.cat([prefix_k.expand(len(x), -1, -1, -1), k], dim=2)  # (B, H, L + N, Dh)
            v = torch.cat([prefix_v.expand(len(x), -1, -1, -1), v], dim=2)  # (B, H, L + N, Dh)

        # Every head mixes its experts; W_o brings the heads together.
        out = attention_fn(q, k, v)  # (B, H, Nq, Dh)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, Nq, D)


class Block(nn.Module):
    """One layer: attention, then an MLP. gelu: "none" is the exact one, "tanh" GPT-2's."""

    def __init__(self, dim: int, n_head: int, hidden: int, eps: float, gelu: str = "none"):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, n_head)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        mlp = {"fc1": nn.Linear(dim, hidden), "act": nn.GELU(gelu), "fc2": nn.Linear(hidden, dim)}
        self.mlp = nn.Sequential(OrderedDict(mlp))

    def forward(
        self,
        x: Tensor,
        prefix_kv: Tensor | None = None,
        attention_fn: Callable = attention,
        choose: Callable | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D); (B, Nq, D) if `choose` picks the tokens that ask and go on."""
        # All tokens have keys and values, but perhaps not all ask.
        y = self.norm1(x)  # (B, N, D)
        asking = None
        if choose is not None:
            asking, x = choose(y), choose(x)  # 2 x (B, Nq, D)

        # The residual stream: attention adds to it, then the MLP.
        x = x + self.attn(y, prefix_kv, attention_fn, asking)  # (B, N or Nq, D)
        return x + self.mlp(self.norm2(x))  # (B, N or Nq, D)

    def keys_values(self, x: Tensor) -> Tensor:
        """What this layer makes of any vectors (B, L, D), for Simple-share: (2, B, H, L, Dh)."""
        return self.attn.keys_values(self.norm1(x))


def by_layer(prefix_kv: Tensor | None, n_layer: int) -> list[Tensor | None]:
    """The prefix (2, [B,] H, L, Dh) of every layer; None for the layers beyond its depth."""
    layers = [] if prefix_kv is None else list(prefix_kv.unbind())
    return layers + [None] * (n_layer - len(layers))


class ViT(nn.Module):
    """A plain ViT: square images in patches, a CLS token, learned positions, norms before layers.

    image, patch: their sides, in pixels. hidden: width of the MLPs (None: 4 D).
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

        # What others ask about this model.
        hidden = hidden or 4 * dim
        self.sizes: dict = {"image": image, "patch": patch, "dim": dim, "n_layer": n_layer}
        self.sizes |= {"n_head": n_head, "hidden": hidden, "eps": eps}
        self.sizes |= {"mean": tuple(mean), "std": tuple(std)}
        self.image_size, self.dim, self.n_layer, self.n_head = image, dim, n_layer, n_head
        self.inputs = {"image_size": image}  # what `data.load` has to make for this model
        self.prefix_init_scale = (6 / (3 * patch**2 + dim)) ** 0.5  # as for a patch embedding

        # Constants on the model's device, in no file and no fingerprint.
        for name in ("mean", "std"):
            constant = torch.tensor(self.sizes[name], device="cpu").view(3, 1, 1)
            self.register_buffer(name, constant, persistent=False)

        # What is learned: the tokens' embedding and places, the layers, the last norm.
        embed = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)  # a linear map of every patch
        self.patch_embed = nn.Sequential(OrderedDict({"proj": embed}))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, n_head, hidden, eps) for _ in range(n_layer))
        self.norm = nn.LayerNorm(dim, eps=eps)

    @property
    def normalisation(self) -> str:
        """The mean and the standard deviation of `normalise`, in words."""
        mean, std = self.sizes["mean"], self.sizes["std"]
        if (mean, std) == (IMAGENET_MEAN, IMAGENET_STD):
            return "ImageNet mean and std"
        return f"mean {mean} and std {std} (the backbone's)"

    def normalise(self, pixels: Tensor) -> Tensor:
        """pixels (B, size, size, 3) uint8 -> images (B, 3, size, size) float32, normalised."""
        images = pixels.permute(0, 3, 1, 2).float().div_(255)  # (B, 3, size, size)
        return images.sub_(self.mean).div_(self.std)  # in place: half the time on a CPU

    def forward(
        self, images: Tensor, prefix_kv: Tensor | None = None, attn_weights: list | None = None
    ) -> Tensor:
        """images (B, 3, size, size) -> (B, D): CLS after the final norm.

        prefix_kv: from `Prefix`, (depth, 2, H, L, Dh), or (depth, 2, B, H, L, Dh) if every example
            has its own. Layers beyond depth have none.
        attn_weights: a list that receives every layer's (B, H, N, L + N), at last (B, H, 1, L + N).
        """
        # Patches become tokens. CLS comes first, and every token learns its place.
        x = self.patch_embed(images).flatten(2).mT  # (B, N - 1, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, N, D)
        x = x + self.pos_embed  # (B, N, D)

        # All layers but the last: every token asks.
        *early, last = self.blocks
        layers = by_layer(prefix_kv, self.n_layer)  # n_layer x (2, [B,] H, L, Dh), or None
        attention_fn = partial(attention, attn_weights=attn_weights)
        for block, layer_kv in zip(early, layers, strict=False):
            x = block(x, layer_kv, attention_fn)  # (B, N, D)

        # Nobody reads what the other tokens would gather in the last one: CLS asks alone there.
        x = last(x, layers[-1], attention_fn, lambda tokens: tokens[:, :1])  # (B, 1, D)
        return self.norm(x)[:, 0]

    def cast_frozen_weights(self) -> None:
        """Cast the matrices of a frozen ViT to bf16 once, not in every step. Norms stay fp32."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(torch.bfloat16)

    @classmethod
    def load(cls, name: str, pretrained: bool = True) -> "ViT":
        """tiny: the shipped weights. scratch: the same shape, random. Or a name of timm's, a hub id
        (timm/...), a folder that timm or transformers saved, a .safetensors file or a .npz file.

        pretrained: False gives a timm name random weights and needs no download.
        Raises ValueError, in one sentence, for a file or a model that is not a plain ViT.
        """
        if name == "scratch":
            return cls(**TINY)
        path = TINY_WEIGHTS if name == "tiny" else Path(name)
        if path.suffix == ".safetensors":
            return from_file(path)
        if path.suffix == ".npz":
            return from_timm(read_npz(path), name)
        if path.is_dir():
            return from_folder(path)
        return from_timm(create(name, pretrained), name)


# The rest of this file reads other people's weights. What they do not tell:
HALF = (0.5,) * 3  # the mean and the std that timm and transformers assume
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # of ViT-Ti, S, B, L, H by their width
ONLY_PLAIN = f"vit.py holds plain ViTs only, such as '{IN21K}'"
# Parameters that a plain ViT does not have, and what they mean.
NOT_PLAIN = """
dist_token                   has a distillation token
reg_token                    has register tokens
norm_pre.weight              has a norm before the blocks
blocks.0.ls1.gamma           has layer scale
blocks.0.attn.q_norm.weight  has norms of queries and keys
attn_pool.latent             has a pooling head
fc_norm.weight               reads the mean of its tokens, not CLS
"""
# What transformers calls the parts of timm's ViT, in the order of replacement.
TRANSFORMERS = """
embeddings.patch_embeddings.projection  patch_embed.proj
embeddings.cls_token                    cls_token
embeddings.position_embeddings          pos_embed
encoder.layer.                          blocks.
attention.attention.                    attn.
attention.output.dense                  attn.proj
intermediate.dense                      mlp.fc1
output.dense                            mlp.fc2
layernorm_before                        norm1
layernorm_after                         norm2
layernorm.                              norm.
"""


def from_file(path: Path) -> ViT:
    """A ViT that `train.py --tune full` saved, its sizes in the metadata, or a file of timm's."""
    state, metadata = read_weights(path)
    if "vit" in metadata:
        return build(ViT, json.loads(metadata["vit"]), state, path)
    if path.with_name("config.json").exists():
        return from_folder(path.parent)
    return from_state(state, path, mean=HALF, std=HALF)


def from_folder(folder: Path) -> ViT:
    """A folder with a config.json: of timm's, or of a ViT that transformers saved."""
    # timm reads its own folders.
    config = json.loads((folder / "config.json").read_text())
    if "architecture" in config:
        return from_timm(create(f"local-dir:{folder}"), str(folder))
    if config.get("model_type") != "vit" or config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{folder / 'config.json'} describes no ViT of timm or transformers")

    # transformers keeps the mean and the std in a file of its own.
    file = folder / "preprocessor_config.json"
    pixels = json.loads(file.read_text()) if file.exists() else {}
    sizes = {name: pixels.get(f"image_{name}", HALF) for name in ("mean", "std")}
    sizes["n_head"] = config.get("num_attention_heads", 12)
    sizes["eps"] = config.get("layer_norm_eps", 1e-12)
    return from_state(from_transformers(read_folder(folder)), folder, **sizes)


def from_timm(source: nn.Module, name: str) -> ViT:
    """The weights of a plain timm ViT, with the same outputs."""
    if not isinstance(source, timm.models.VisionTransformer):
        raise ValueError(f"'{name}' is a {type(source).__name__}; {ONLY_PLAIN}")
    sizes = {"n_head": source.blocks[0].attn.num_heads, "eps": source.blocks[0].norm1.eps}

    # VPT and the paper normalise with ImageNet's mean and std; other weights have their own.
    pixels = getattr(source, "pretrained_cfg", None)
    if pixels and f"{pixels.get('architecture')}.{pixels.get('tag')}" != IN21K:
        sizes |= {"mean": pixels["mean"], "std": pixels["std"]}
    vit = from_state(source.state_dict(), name, **sizes)

    # Weights do not tell every difference, such as another GELU; outputs do.
    size, draw = vit.image_size, torch.Generator().manual_seed(0)
    probe = torch.randn(1, 3, size, size, generator=draw)
    with torch.no_grad():
        error = (vit(probe) - source.eval()(probe)).abs().max().item()
    if error > 1e-3:
        raise ValueError(f"'{name}' has other outputs (by {error:.1g}); {ONLY_PLAIN}")
    return vit


def from_state(state: dict[str, Tensor], name: str | Path, **sizes: Any) -> ViT:
    """A ViT with weights under timm's names. What `sizes` does not say, the weights tell."""
    # What is not plain is refused by its parameters.
    for line in NOT_PLAIN.strip().splitlines():
        part, reason = line.split(maxsplit=1)
        if part in state:
            raise ValueError(f"'{name}' {reason}; {ONLY_PLAIN}")
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys():
        raise ValueError(f"'{name}' has no class token or no positions; {ONLY_PLAIN}")

    # A file of timm's does not tell the number of heads; most have the usual one of their width.
    dim, _, _, patch = state["patch_embed.proj.weight"].shape  # (D, 3, patch, patch)
    sizes.setdefault("n_head", HEADS.get(dim))
    if not sizes["n_head"]:
        raise ValueError(f"{name} does not tell its sizes; put timm's config.json beside it")

    # The other sizes are those of the weights. A head for classes is left out.
    sizes |= {"patch": patch, "dim": dim, "hidden": len(state["blocks.0.mlp.fc1.bias"])}
    sizes["image"] = patch * round((state["pos_embed"].shape[1] - 1) ** 0.5)  # from (1, N, D)
    sizes["n_layer"] = sum(key.endswith(".norm1.weight") for key in state)
    heads = ("head.", "classifier.", "pooler.")
    body = {key: value for key, value in state.items() if not key.startswith(heads)}
    return build(ViT, sizes, body, name)


def create(name: str, pretrained: bool = True) -> nn.Module:
    """A model of timm's by its name, by its id on the hub, or from a folder (local-dir:...)."""
    source = f"hf-hub:{name}" if "/" in name and ":" not in name else name
    try:
        return timm.create_model(source, pretrained=pretrained, num_classes=0)
    except (RuntimeError, ValueError) as error:
        known = ["tiny", "scratch", *timm.list_models(), *timm.list_pretrained()]
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean '{close[0]}'?" if close else "give a timm name, a folder or a file"
        reason = textwrap.shorten(str(error), 120)
        raise ValueError(f"no ViT '{name}' ({reason}); {hint}") from error


def renamed(name: str, table: str) -> str:
    """A tensor's name with every part that is on the left of the table replaced by the right."""
    for line in table.strip().splitlines():
        old, new = line.split()
        name = name.replace(old, new)
    return name


def from_transformers(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of transformers' ViT under timm's names."""
    state = {renamed(key.removeprefix("vit."), TRANSFORMERS): theirs[key] for key in theirs}

    # W_q, W_k and W_v are three matrices there.
    for name in [name for name in state if ".query." in name]:
        qkv = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace("query", "qkv")] = torch.cat(qkv)
    return state


def read_npz(path: Path) -> nn.Module:
    """The original Google checkpoint, such as ViT-B_16.npz, as timm reads it."""
    with np.load(path, allow_pickle=False) as flax:
        block = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1"
        patch, _, _, dim = flax["embedding/kernel"].shape  # (patch, patch, 3, D)
        _, count, _ = flax["Transformer/posembed_input/pos_embedding"].shape  # (1, N, D)
        _, heads, _ = flax[f"{block}/query/kernel"].shape  # (D, H, Dh)
        depth = len({name.split("/")[1] for name in flax.files if "encoderblock_" in name})

    # A timm model of these sizes, to read the file into.
    sizes = {"embed_dim": dim, "depth": depth, "num_heads": heads, "num_classes": 0}
    size = patch * round((count - 1) ** 0.5)
    source = timm.models.VisionTransformer(img_size=size, patch_size=patch, **sizes)
    source.load_pretrained(str(path))
    return source


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder of transformers: one file or several shards."""
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        state |= read_weights(path)[0]
    if not state:
        raise ValueError(f"{folder} holds no model.safetensors; transformers' save_pretrained does")
    return state


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a .safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def build(kind: Any, sizes: dict[str, Any], state: dict[str, Tensor], source: str | Path) -> Any:
    """A ViT or GPT of these sizes with these weights, in fp32. ValueError if they do not fit."""
    if sizes.get("n_layer", 0) > len(state):  # a damaged file may claim 10^9 layers
        raise ValueError(f"{source} has {len(state)} tensors, too few for the sizes {sizes}")

    # Tensors on the meta device take no memory, and nothing is drawn that is overwritten at once.
    with torch.device("meta"):
        model = kind(**sizes)
    copies = {name: value.to(torch.float32, copy=True) for name, value in state.items()}
    try:
        model.load_state_dict(copies, assign=True)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 160)
        raise ValueError(f"{source} does not have the sizes {sizes} ({reason})") from error
    return model.eval()
