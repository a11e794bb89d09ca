"""What the prefix does, as pictures: where it makes the model look, and how alike its experts are.

One softmax gates L prefix experts and N tokens, so what a query gathers divides into two shares that sum to 1:
    share of the prefix = sum_l g_l,  share of the tokens = sum_j g_j,  g = softmax of [q . p_k[l], q . k_j] / sqrt(Dh)
The weights come from the model's own attention (`attn_weights`, a list that it fills), not from a copy of it.

Shapes: B images or texts, N tokens, H heads, L prefix length, depth = layers with a prefix.
Sources: Le et al., ICLR 2025; Abnar & Zuidema, ACL 2020 (rollout); Roy & Vetterli, EUSIPCO 2007 (effective rank).
"""

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from data import normalise
from gpt import GPT
from vit import ViT


@torch.inference_mode()
def gates_of(backbone: ViT | GPT, inputs: Tensor, prefix_kv: Tensor | None) -> list[Tensor]:
    """The attention weights (B, H, Nq, L + N) of every layer, for normalised images or for tokens."""
    attn_weights: list[Tensor] = []
    backbone(inputs, prefix_kv, attn_weights=attn_weights)
    return [gate.float() for gate in attn_weights]


def prefix_share(attn_weights: list[Tensor], tokens: int) -> Tensor:
    """How much every query takes from the prefix, per layer and head: attn_weights (B, H, Nq, L + N) -> (layers, B, H, 1)."""
    return torch.stack([gate[:, :, -1:, :-tokens].sum(-1) for gate in attn_weights])


def last_layer(attn_weights: list[Tensor], tokens: int) -> Tensor:
    """Where CLS looks among the tokens in the last layer, mean over heads: (B, N), sums to 1."""
    looks = attn_weights[-1][:, :, 0, -tokens:].mean(1)  # (B, N)
    return looks / looks.sum(-1, keepdim=True)


def rollout(attn_weights: list[Tensor], tokens: int) -> Tensor:
    """How much of each token has reached CLS, if half of a token stays and half moves by attention: (B, N)."""
    eye = torch.eye(tokens, device=attn_weights[0].device)
    flow = eye
    for gate in attn_weights:
        looks = gate[..., -tokens:].mean(
            1
        )  # (B, N, N), the last layer (B, 1, N): without the prefix's columns
        looks = looks / looks.sum(-1, keepdim=True)
        flow = (looks + eye[: looks.shape[1]]) / 2 @ flow  # (B, N, N)
    return flow[:, 0]


def image_picture(vit: ViT, pixels: Tensor, prefix_kv: Tensor, title: str) -> Figure:
    """One image (1, size, size, 3): CLS's attention to it without the prefix, with it, the difference; and the gate."""
    tokens, side = vit.pos_embed.shape[1], round((vit.pos_embed.shape[1] - 1) ** 0.5)
    both = [gates_of(vit, normalise(pixels), prefix) for prefix in (None, prefix_kv)]
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    figure.suptitle(title, parse_math=False)  # the user's file name, in which a $ is a $
    (first, *above), (second, *below) = figure.subplots(2, 4)
    first.imshow(pixels[0].numpy(force=True))
    first.set_title("the image, as the model sees it")
    for cells, look, name in ((above, last_layer, "last layer"), (below, rollout, "rollout")):
        without, with_prefix = (
            look(attn_weights, tokens)[0, 1:].view(side, side) for attn_weights in both
        )  # CLS itself is left out
        change = with_prefix - without
        most, far = max(without.max(), with_prefix.max()), change.abs().max()
        heat_map(figure, cells[0], without, (0, most), "viridis", f"{name}, without prefix")
        heat_map(figure, cells[1], with_prefix, (0, most), "viridis", f"{name}, with prefix")
        heat_map(figure, cells[2], change, (-far, far), "RdBu_r", f"{name}, difference")
    for cell in (first, *above, *below):
        cell.axis("off")
    share = prefix_share(both[1], tokens)[:, 0, :, 0]  # (layers, H)
    gate_map(figure, second, share, "head", "share of CLS's attention\nthat goes to the prefix")
    second.set_xticks(range(share.shape[1]), range(1, share.shape[1] + 1))
    return figure


def text_picture(
    gpt: GPT, prompt: list[int], made: list[str], ids: list[int], prefix_kv: Tensor, title: str
) -> Figure:
    """The gate over the tokens that were written (as text, and as ids): the prefix's share per layer, mean of heads."""
    tokens = torch.tensor(
        [prompt + ids[:-1]], device=prefix_kv.device
    )  # (1, T): what was read to write the last one
    count = tokens.shape[1]
    share = [
        gate[0, :, -len(ids) :, :-count].sum(-1).mean(0)
        for gate in gates_of(gpt, tokens, prefix_kv)
    ]
    figure = Figure(figsize=(max(6, 0.22 * len(made)), 4), layout="constrained")
    figure.suptitle(title if len(title) < 90 else title[:87] + "...", fontsize=9, parse_math=False)
    axes = figure.subplots()
    gate_map(
        figure,
        axes,
        torch.stack(share),
        "token that was written",
        "share of attention that goes to the prefix",
    )
    axes.set_xticks(range(len(made)), made, rotation=90, fontsize=8, parse_math=False)
    return figure


def heat_map(
    figure: Figure, axes: Axes, values: Tensor, limits: tuple, colours: str, title: str
) -> None:
    low, high = (float(limit) for limit in limits)
    shown = axes.imshow(values.numpy(force=True), vmin=low, vmax=high, cmap=colours)
    axes.set_title(title)
    figure.colorbar(shown, ax=axes, shrink=0.8)


def gate_map(figure: Figure, axes: Axes, share: Tensor, across: str, title: str) -> None:
    """Shares from 0 to 1, a row per layer, the first layer on top."""
    heat_map(figure, axes, share, (0, 1), "magma", title)
    axes.set(ylabel="layer", xlabel=across, aspect="auto")
    axes.set_yticks(range(len(share)), [str(i + 1) for i in range(len(share))])


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of all pairs: (n, D), (m, D) -> (n, m)."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT


def effective_rank(vectors: Tensor) -> float:
    """exp(entropy of the singular values' shares) of L vectors (L, D): L if all point elsewhere, 1 if they are one."""
    shares = torch.linalg.svdvals(vectors)
    shares = shares / shares.sum()
    return torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum()).item()


def experts_picture(runs: list[tuple[str, Tensor]]) -> Figure:
    """A row per run (name, experts (depth, 2, H, L, Dh)): cosines of all keys and values, and each layer's rank."""
    figure = Figure(figsize=(15, 3.8 * len(runs)), layout="constrained")
    for (*cells, last), (name, prefix_kv) in zip(
        figure.subplots(len(runs), 4, squeeze=False), runs, strict=True
    ):
        keys, values = (
            prefix_kv.float().cpu().transpose(2, 3).flatten(3).unbind(1)
        )  # 2 x (depth, L, D)
        depth, length, _ = keys.shape
        layers, middles = range(1, depth + 1), [length * (i + 0.5) - 0.5 for i in range(depth)]
        pairs = {
            "keys, keys": (keys, keys),
            "values, values": (values, values),
            "keys, values": (keys, values),
        }
        for cell, (what, (a, b)) in zip(cells, pairs.items(), strict=True):
            alike = cosines(a.flatten(0, 1), b.flatten(0, 1))  # (depth * L, depth * L)
            heat_map(figure, cell, alike, (-1, 1), "RdBu_r", f"{name}: cosine of {what}")
            cell.set(xlabel="layer", ylabel="layer")
            cell.set_xticks(middles, layers)
            cell.set_yticks(middles, layers)
        for what, part in (("keys", keys), ("values", values)):
            last.plot(layers, [effective_rank(layer) for layer in part], marker="o", label=what)
        last.set(
            title=f"effective rank of {length} experts", xlabel="layer", ylim=(0.9, length + 0.5)
        )
        last.legend()
    return figure
