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

import difflib
import json
import textwrap
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

IN21K = "vit_base_patch16_224.orig_in21k"  # the backbone of VPT and of the paper, in timm's words
TINY: dict = {"image": 32, "patch": 8, "dim": 32, "n_layer": 8, "n_head": 4}
TINY_WEIGHTS = Path(__file__).parent / "assets" / "tiny_vit.safetensors"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Model = TypeVar("Model", bound=nn.Module)


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
        hidden = hidden or 4 * dim
        self.sizes: dict = {
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
        mean, std = ([round(x, 4) for x in self.sizes[name]] for name in ("mean", "std"))
        if mean == list(IMAGENET_MEAN) and std == list(IMAGENET_STD):
            return "ImageNet mean and std"
        both = f"and std {mean[0]}" if len({*mean, *std}) == 1 else f"{mean} and std {std}"
        return f"mean {both} (the backbone's)"

    def normalise(self, pixels: Tensor) -> Tensor:
        """pixels (B, size, size, 3) uint8 -> images (B, 3, size, size) float32, as the ViT wants.

        VPT and the paper use ImageNet's mean and std for their backbone; so do the files of this
        repository. Other weights of timm bring their own.
        """
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
        """tiny: the shipped weights. scratch: the same shape, random. Or a name of timm's, a hub id
        (timm/...), a folder that timm or transformers saved, a .safetensors file or a .npz file.

        pretrained: False gives a timm name random weights and needs no download.
        Raises ValueError, in one sentence, for a file or a model that is not a plain ViT.
        """
        if name == "scratch":
            return cls(**TINY)
        if name == "tiny":
            return cls.from_file(TINY_WEIGHTS)
        if name.endswith(".safetensors"):
            return cls.from_file(name)
        if name.endswith(".npz"):
            return cls.from_timm(read_npz(name), name)
        if Path(name).is_dir():
            return cls.from_folder(Path(name))
        return cls.from_timm(create(name, pretrained), name)

    @classmethod
    def from_file(cls, path: str | Path) -> "ViT":
        """A ViT that `train.py --tune full` saved, its sizes in the metadata, or a timm file."""
        state, metadata = read_weights(path)
        if "vit" in metadata:
            return build(cls, json.loads(metadata["vit"]), state, path)
        if Path(path).with_name("config.json").exists():
            return cls.from_folder(Path(path).parent)

        # timm's files do not tell the number of heads. The usual sizes are known by their width.
        width = state["cls_token"].shape[-1] if "cls_token" in state else None
        if width not in HEADS:
            raise ValueError(f"{path} does not tell its sizes; put timm's config.json beside it")
        return cls.from_state(state, path, n_head=HEADS[width], mean=HALF, std=HALF)

    @classmethod
    def from_folder(cls, folder: Path) -> "ViT":
        """A folder with a config.json: of timm's, or of a ViT that transformers saved."""
        config = json.loads((folder / "config.json").read_text())
        if "architecture" in config:
            return cls.from_timm(create(f"local-dir:{folder}", pretrained=True), str(folder))
        if config.get("model_type") != "vit" or config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"{folder / 'config.json'} describes no ViT of timm or transformers")
        reader = folder / "preprocessor_config.json"
        pixels = json.loads(reader.read_text()) if reader.exists() else {}
        heads, eps = config.get("num_attention_heads", 12), config.get("layer_norm_eps", 1e-12)
        sizes = {"n_head": heads, "eps": eps}
        sizes |= {name: pixels.get(f"image_{name}", HALF) for name in ("mean", "std")}
        return cls.from_state(from_transformers(read_folder(folder)), folder, **sizes)

    @classmethod
    def from_timm(cls, source: nn.Module, name: str) -> "ViT":
        """The weights of a plain timm ViT, with the same outputs."""
        if not isinstance(source, timm.models.VisionTransformer):
            raise ValueError(f"'{name}' is a {type(source).__name__}; {ONLY_PLAIN}")
        block = source.blocks[0]
        sizes = {"n_head": block.attn.num_heads, "eps": block.norm1.eps}

        # VPT and the paper normalise with ImageNet's mean and std; other weights have their own.
        pixels = getattr(source, "pretrained_cfg", None)
        if pixels and f"{pixels.get('architecture')}.{pixels.get('tag')}" != IN21K:
            sizes |= {"mean": pixels["mean"], "std": pixels["std"]}
        vit = cls.from_state(source.state_dict(), name, **sizes)

        # Weights do not tell every difference, such as another GELU; outputs do.
        size, draw = vit.image_size, torch.Generator().manual_seed(0)
        probe = torch.randn(1, 3, size, size, generator=draw)
        with torch.no_grad():
            error = (vit(probe) - source.eval()(probe)).abs().max().item()
        if error > 1e-3:
            raise ValueError(f"'{name}' has other outputs (by {error:.1g}); {ONLY_PLAIN}")
        return vit

    @classmethod
    def from_state(cls, state: dict[str, Tensor], name: str | Path, **sizes: Any) -> "ViT":
        """A ViT with weights under timm's names. Its other sizes are those of the weights."""
        for part, reason in NOT_PLAIN.items():
            if part in state:
                raise ValueError(f"'{name}' {reason}; {ONLY_PLAIN}")
        if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys():
            raise ValueError(f"'{name}' has no class token or no positions; {ONLY_PLAIN}")
        dim, _, _, patch = state["patch_embed.proj.weight"].shape  # (D, 3, patch, patch)
        image = patch * round((state["pos_embed"].shape[1] - 1) ** 0.5)  # from (1, N, D)
        depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        sizes |= {"image": image, "patch": patch, "dim": dim, "n_layer": depth}
        sizes["hidden"] = len(state["blocks.0.mlp.fc1.bias"])
        body = {key: value for key, value in state.items() if not key.startswith("head.")}
        return build(cls, sizes, body, name)


HALF = (0.5,) * 3  # the mean and the std that timm and transformers assume
ONLY_PLAIN = f"vit.py holds plain ViTs only, such as '{IN21K}'"
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # of ViT-Ti, S, B, L, H by their width
NOT_PLAIN = {  # parameters that a plain ViT does not have, and what they mean
    "dist_token": "has a distillation token",
    "reg_token": "has register tokens",
    "norm_pre.weight": "has a norm before the blocks",
    "blocks.0.ls1.gamma": "has layer scale",
    "blocks.0.attn.q_norm.weight": "has norms of queries and keys",
    "attn_pool.latent": "has a pooling head",
    "fc_norm.weight": "reads the mean of its tokens, not CLS",
}
TRANSFORMERS = {  # what transformers calls the parts of timm's ViT, in the order of replacement
    **{"embeddings.patch_embeddings.projection": "patch_embed.proj", "encoder.layer.": "blocks."},
    **{"embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed"},
    **{"attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1"},
    **{"output.dense": "mlp.fc2", "layernorm_before": "norm1", "layernorm_after": "norm2"},
    **{"layernorm.": "norm."},
}


def create(name: str, pretrained: bool) -> nn.Module:
    """A model of timm's by its name, by its id on the hub, or from a folder (local-dir:...)."""
    source = f"hf-hub:{name}" if "/" in name and ":" not in name else name
    try:
        return timm.create_model(source, pretrained=pretrained, num_classes=0)
    except (RuntimeError, ValueError) as error:
        known = ["tiny", "scratch", *timm.list_models(), *timm.list_pretrained()]
        close = " or ".join(f"'{near}'" for near in difflib.get_close_matches(name, known, 2))
        hint = f"did you mean {close}?" if close else "give a name of timm's, a folder or a file"
        raise ValueError(
            f"no ViT '{name}' ({textwrap.shorten(str(error), 120)}); {hint}"
        ) from error


def from_transformers(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of transformers' ViT under timm's names."""
    state = {}
    for key, value in theirs.items():
        name = key.removeprefix("vit.")
        for old, new in TRANSFORMERS.items():
            name = name.replace(old, new)
        if not name.startswith(("classifier.", "pooler.")):
            state[name] = value

    # W_q, W_k and W_v are three matrices there.
    for name in [name for name in state if ".query." in name]:
        qkv = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(qkv)
    return state


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
    sizes |= {"img_size": patch * round((count - 1) ** 0.5), "patch_size": patch}
    source = timm.models.VisionTransformer(num_classes=0, **sizes)
    source.load_pretrained(str(path))
    return source


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a .safetensors or .bin file. ValueError if it is damaged."""
    try:
        if str(path).endswith(".bin"):
            return torch.load(path, map_location="cpu", weights_only=True), {}
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may lead to anything
        raise ValueError(f"{path} is damaged ({textwrap.shorten(str(error), 120)})") from error


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder of transformers: one file or several shards."""
    whole, shards = ("model.safetensors", "pytorch_model.bin"), ("model-*.safetensors", "*-*.bin")
    for pattern in (whole[0], shards[0], whole[1], shards[1]):
        if paths := sorted(folder.glob(pattern)):
            parts = [read_weights(path)[0] for path in paths]
            return {name: value for part in parts for name, value in part.items()}
    raise ValueError(f"{folder} holds no {' or '.join(whole)}")


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
