"""What the prefix does, as pictures: where it makes the model look, and how alike its experts are.

One softmax weighs L prefix experts and N tokens. A query's attention has two shares of sum 1:
    prefix: sum_l g_l,  tokens: sum_j g_j,  g = softmax of [q . p_k[l], q . k_j] / sqrt(Dh)
The weights come from the model's own attention (`attn_weights`, a list that it fills).

Shapes: B images or texts, N tokens, H heads, L prefix length, depth = layers with a prefix.
Sources: Le et al., ICLR 2025; Abnar & Zuidema, ACL 2020 (rollout); Roy & Vetterli, EUSIPCO 2007
(effective rank).
"""

import textwrap

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from gpt import GPT
from vit import ViT

PER_ROW = 40  # tokens in a row of the text picture


@torch.inference_mode()
def attention_of(backbone: ViT | GPT, inputs: Tensor, prefix_kv: Tensor | None) -> list[Tensor]:
    """The attention weights (B, H, Nq, L + N) of every layer, for images or for tokens."""
    attn_weights: list[Tensor] = []
    backbone(inputs, prefix_kv, attn_weights=attn_weights)
    return [weights.float() for weights in attn_weights]


def prefix_share(attn_weights: list[Tensor], tokens: int) -> Tensor:
    """What CLS, the first query, takes from the prefix: (B, H, Nq, L + N) -> (layers, B, H)."""
    return torch.stack([weights[:, :, 0, :-tokens].sum(-1) for weights in attn_weights])


def last_layer(attn_weights: list[Tensor], tokens: int) -> Tensor:
    """Where CLS looks among the tokens in the last layer, mean over heads: (B, N), sums to 1."""
    looks = attn_weights[-1][:, :, 0, -tokens:].mean(1)  # (B, N)
    return looks / looks.sum(-1, keepdim=True)


def rollout(attn_weights: list[Tensor], tokens: int) -> Tensor:
    """How much of each token has reached CLS if half stays and half moves by attention: (B, N)."""
    eye = torch.eye(tokens, device=attn_weights[0].device)
    flow = eye
    for weights in attn_weights:
        looks = weights[..., -tokens:].mean(1)  # (B, N, N) without the prefix; last layer (B, 1, N)
        looks = looks / looks.sum(-1, keepdim=True)
        flow = (looks + eye[: looks.shape[1]]) / 2 @ flow  # (B, N, N)
    return flow[:, 0]


def image_picture(vit: ViT, pixels: Tensor, prefix_kv: Tensor, title: str) -> Figure:
    """CLS's attention to an image (1, size, size, 3) without and with the prefix; its share."""
    tokens = vit.pos_embed.shape[1]
    side = round((tokens - 1) ** 0.5)
    both = [attention_of(vit, vit.normalise(pixels), prefix) for prefix in (None, prefix_kv)]
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)  # a $ in a file name is no formula
    (image, *above), (share, *below) = figure.subplots(2, 4)

    # On the left: the image, and below it the prefix's share in every layer and head.
    image.imshow(pixels[0].numpy(force=True))
    image.set_title("what the model sees", fontsize=10)
    percent = 100 * prefix_share(both[1], tokens)[:, 0]  # (layers, H)
    figure.colorbar(layers_map(share, percent), ax=share, label="%")
    share.set_title("CLS's attention\nto the prefix", fontsize=10)
    share.set_xlabel("head")
    share.set_xticks(range(vit.n_head), range(1, vit.n_head + 1))

    # On the right, a row per way of looking. CLS itself is left out; a pair has one scale.
    for cells, look, name in ((above, last_layer, "last layer"), (below, rollout, "rollout")):
        maps = torch.stack([100 * look(w, tokens)[0, 1:].view(side, side) for w in both])
        change = maps[1] - maps[0]  # (side, side), in percentage points
        low, high, far = maps.min().item(), maps.max().item(), change.abs().max().item()
        heat_map(cells[0], maps[0], low, high, "viridis", f"{name},\nwithout prefix")
        pair = heat_map(cells[1], maps[1], low, high, "viridis", f"{name},\nwith prefix")
        shift = heat_map(cells[2], change, -far, far, "RdBu_r", f"{name},\ndifference")
        figure.colorbar(pair, ax=cells[:2], label="% of attention")
        figure.colorbar(shift, ax=cells[2], label="percentage points")
    for cell in (image, *above, *below):
        cell.axis("off")
    return figure


def text_picture(
    gpt: GPT, prompt: list[int], ids: list[int], words: list[str], prefix_kv: Tensor, title: str
) -> Figure:
    """The prefix's share of attention, mean of heads, per layer and written token (ids, words)."""
    read = torch.tensor([prompt + ids[:-1]], device=prefix_kv.device)  # (1, T)
    shares = [
        weights[0, :, -len(ids) :, : -read.shape[1]].sum(-1).mean(0)
        for weights in attention_of(gpt, read, prefix_kv)
    ]
    percent = 100 * torch.stack(shares)  # (layers, tokens written)
    words = [repr(word)[1:-1].replace(" ", "\u2423") for word in words]

    # Long texts go on in the next row, so that every token can be read.
    starts = range(0, len(ids), PER_ROW)
    upright = max(map(len, words)) <= 2  # letters; words are written upwards
    height = 0.5 + len(starts) * (0.13 * gpt.n_layer + (0.6 if upright else 1.1))
    figure = Figure(figsize=(11.5, height), layout="constrained")
    figure.suptitle(textwrap.shorten(title, 120), fontsize=10, parse_math=False)
    ends = percent.min().item(), percent.max().item()
    cells = figure.subplots(len(starts), squeeze=False)[:, 0]
    for cell, start in zip(cells, starts, strict=True):
        part = slice(start, start + PER_ROW)
        shown = layers_map(cell, percent[:, part], *ends)
        cell.set_xlim(-0.5, min(len(ids), PER_ROW) - 0.5)
        ticks = words[part]
        cell.set_xticks(
            range(len(ticks)), ticks, rotation=0 if upright else 90, fontsize=9, parse_math=False
        )
    figure.colorbar(shown, ax=list(cells), label="% of attention to the prefix")
    return figure


def heat_map(
    axes: Axes, values: Tensor, low: float, high: float, colours: str, title: str
) -> AxesImage:
    axes.set_title(title, fontsize=10)
    return axes.imshow(values.numpy(force=True), vmin=low, vmax=high, cmap=colours)


def layers_map(
    axes: Axes, percent: Tensor, low: float | None = None, high: float | None = None
) -> AxesImage:
    """A row per layer, the first on top. The colours span the values there are."""
    axes.set_ylabel("layer")
    axes.set_yticks(range(len(percent)), [str(i + 1) for i in range(len(percent))], fontsize=8)
    return axes.imshow(percent.numpy(force=True), vmin=low, vmax=high, cmap="magma", aspect="auto")


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of all pairs: (n, D), (m, D) -> (n, m)."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT


def effective_rank(vectors: Tensor) -> float:
    """exp(entropy of the singular values' shares): (L, D) -> L if orthogonal, 1 if all are one."""
    shares = torch.linalg.svdvals(vectors)
    shares = shares / shares.sum()
    return torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum()).item()


def altered(prefix_kv: Tensor) -> dict[str, Tensor]:
    """The prefix (depth, 2, H, L, Dh), and what would do as well if its L experts acted as one."""
    mean = prefix_kv.mean(-2, keepdim=True).expand_as(prefix_kv)
    keys, values = prefix_kv.unbind(1)  # 2 x (depth, H, L, Dh)
    return {
        "as trained": prefix_kv,
        "with each layer's experts replaced by their mean": mean,
        "with values rotated among keys": torch.stack([keys, values.roll(1, dims=-2)], dim=1),
        "with one expert left": prefix_kv[..., :1, :],
    }


def experts_picture(runs: list[tuple[str, Tensor, Tensor]]) -> Figure:
    """A row per run (name, prefix_kv, and prefix_kv before training; both (depth, 2, H, L, Dh)).

    Three cells show the cosines of all keys and values; the last one each layer's effective rank.
    """
    figure = Figure(figsize=(11, 2.9 * len(runs)), layout="constrained")
    grid = figure.subplots(len(runs), 4, squeeze=False)
    for (*cells, last), (name, *states) in zip(grid, runs, strict=True):
        now, before = (
            kv.float().cpu().permute(1, 0, 3, 2, 4).flatten(3) for kv in states
        )  # 2 x (2, depth, L, D): keys and values, the heads side by side
        _, depth, length, _ = now.shape
        layers = range(1, depth + 1)

        # Cosines of every pair of experts, grouped by layer.
        for cell, what, a, b in (
            (cells[0], "keys and keys", now[0], now[0]),
            (cells[1], "values and values", now[1], now[1]),
            (cells[2], "keys and values", now[0], now[1]),
        ):
            alike = cosines(a.flatten(0, 1), b.flatten(0, 1))  # (depth * L, depth * L)
            shown = heat_map(cell, alike, -1, 1, "RdBu_r", f"{name}:\ncosines, {what}")
            middles = [length * (i + 0.5) - 0.5 for i in range(depth)]
            cell.set_xticks(middles, layers, fontsize=8)
            cell.set_yticks(middles, layers, fontsize=8)
            cell.set_xlabel("layer")
        cells[0].set_ylabel("layer")
        figure.colorbar(shown, ax=cells, aspect=30)

        # The effective rank, with the untrained prefix in grey.
        for i, what, mark in ((0, "keys", "o-"), (1, "values", "s--")):
            rank = [effective_rank(layer) for layer in before[i]]
            last.plot(layers, rank, mark[1:], color="grey", label=f"{what}, untrained")
            rank = [effective_rank(layer) for layer in now[i]]
            last.plot(layers, rank, mark, label=what)
        last.set_title(f"{name}:\neffective rank of {length} experts", fontsize=10)
        last.set(xlabel="layer", ylim=(0.8, length + 0.5), xticks=layers)
        last.legend(fontsize=7)
    return figure
