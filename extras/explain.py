"""What the prefix does, as pictures: where it makes the model look, and how alike its experts are.

One softmax weighs L prefix experts and N tokens. A query's attention has two shares of sum 1:
    prefix: sum_l g_l,  tokens: sum_j g_j,  g = softmax of [q . p_k[l], q . k_j] / sqrt(Dh)
The weights come from the model's own attention (`attn_weights`, a list that it fills).

Shapes: B images or texts, N tokens, H heads, L prefix length, depth = layers with a prefix.
Sources: Le et al., ICLR 2025; Abnar & Zuidema, ACL 2020 (rollout); Roy & Vetterli, EUSIPCO 2007
(effective rank).
"""

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from gpt import GPT
from vit import ViT

PER_ROW = 40  # tokens in a row of the text picture


@torch.inference_mode()
def attention_of(backbone: ViT | GPT, inputs: Tensor, prefix_kv: Tensor | None) -> list[Tensor]:
    """The attention weights (B, H, Nq, L + N) of every layer, for images or for tokens."""
    attn_weights: list[Tensor] = []
    backbone(inputs, prefix_kv, attn_weights=attn_weights)
    return [weights.float().cpu() for weights in attn_weights]


def prefix_share(attn_weights: list[Tensor], tokens: int) -> Tensor:
    """What CLS, the first query, takes from the prefix: (B, H, Nq, L + N) -> (layers, B, H)."""
    return torch.stack([weights[:, :, 0, :-tokens].sum(-1) for weights in attn_weights])


def last_layer(attn_weights: list[Tensor], tokens: int) -> Tensor:
    """Where CLS looks among the tokens in the last layer, mean over heads: (B, N), sums to 1."""
    looks = attn_weights[-1][:, :, 0, -tokens:].mean(1)  # (B, N)
    return looks / looks.sum(-1, keepdim=True)


def rollout(attn_weights: list[Tensor], tokens: int) -> Tensor:
    """How much of each token has reached CLS if half stays and half moves by attention: (B, N)."""
    flow = eye = torch.eye(tokens)
    for weights in attn_weights:
        looks = weights[..., -tokens:].mean(1)  # (B, N, N) without the prefix; last layer (B, 1, N)
        looks = looks / looks.sum(-1, keepdim=True)
        flow = (looks + eye[: looks.shape[1]]) / 2 @ flow  # (B, N, N)
    return flow[:, 0]


def heat_map(
    axes: Axes,
    values: Tensor,
    title: str,
    ends: tuple | None = None,
    colours: str = "viridis",
    group: int = 1,
) -> None:
    """Draw values (rows, columns) and their colour bar, which spans the values or `ends`.

    Groups of rows and of columns, as the experts of a layer, are counted from 1.
    """
    rows, columns = (size / group for size in values.shape)
    shown = axes.imshow(values.numpy(force=True), colours, clim=ends, interpolation="nearest")
    shown.set_extent((0.5, columns + 0.5, rows + 0.5, 0.5))
    axes.set_aspect("equal" if rows == columns else "auto")
    axes.figure.colorbar(shown, ax=axes)
    axes.set_title(title, fontsize=10)


def image_picture(vit: ViT, pixels: Tensor, prefix_kv: Tensor, title: str) -> Figure:
    """CLS's attention to an image (1, size, size, 3) without and with the prefix; its share."""
    tokens = vit.pos_embed.shape[1]
    side = round((tokens - 1) ** 0.5)
    both = [attention_of(vit, vit.normalise(pixels), prefix) for prefix in (None, prefix_kv)]
    figure = Figure(figsize=(11.5, 5.2), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)  # a $ in a file name is no formula
    (image, *above), (share, *below) = figure.subplots(2, 4)

    # On the left: the image, and below it the prefix's share in every layer and head.
    image.imshow(pixels[0].numpy(force=True))
    image.set_title("what the model sees", fontsize=10)
    percent = 100 * prefix_share(both[1], tokens)[:, 0]  # (layers, H)
    heat_map(share, percent, "CLS's attention\nto the prefix, %")
    share.set(xlabel="head", ylabel="layer")

    # On the right, a row per way of looking. CLS itself is left out; a pair has one scale.
    for cells, look, name in ((above, last_layer, "last layer"), (below, rollout, "rollout")):
        maps = torch.stack([100 * look(w, tokens)[0, 1:].view(side, side) for w in both])
        change = maps[1] - maps[0]  # (side, side)
        ends, far = (maps.min(), maps.max()), change.abs().max()
        heat_map(cells[0], maps[0], f"{name},\nwithout prefix, %", ends)
        heat_map(cells[1], maps[1], f"{name},\nwith prefix, %", ends)
        heat_map(cells[2], change, f"{name}, difference,\n% points", (-far, far), "RdBu_r")
    for cell in (image, *above, *below):
        cell.axis("off")
    return figure


def text_picture(
    gpt: GPT, prompt: list[int], ids: list[int], words: list[str], prefix_kv: Tensor
) -> Figure:
    """The prefix's share of attention, mean of heads, per layer and written token (ids, words)."""
    read = torch.tensor([prompt + ids[:-1]], device=prefix_kv.device)  # (1, T)
    attn_weights = attention_of(gpt, read, prefix_kv)  # per layer (1, H, T, L + T)
    shares = [w[0, :, -len(ids) :, : -read.shape[1]].sum(-1).mean(0) for w in attn_weights]
    percent = 100 * torch.stack(shares)  # (layers, tokens written)
    words = [repr(word)[1:-1].replace(" ", "\u2423") for word in words]
    turn = 90 if max(map(len, words)) > 2 else 0  # words are written upwards, letters are not

    # Long texts go on in the next row, so that every token can be read. A row is a part of the map.
    width = min(len(words), PER_ROW)
    starts = range(0, len(words), width)
    figure = Figure(figsize=(11.5, len(starts) * (0.13 * gpt.n_layer + 1.5)), layout="constrained")
    for axes, start in zip(figure.subplots(len(starts), squeeze=False).flat, starts, strict=True):
        heat_map(axes, percent, "% of attention to the prefix")
        axes.set_xticks(
            range(1, len(words) + 1), words, rotation=turn, fontsize=9, parse_math=False
        )
        axes.set(ylabel="layer", xlim=(start + 0.5, start + width + 0.5))
    return figure


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of all pairs: (n, D), (m, D) -> (n, m)."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT


def effective_rank(vectors: Tensor) -> float:
    """exp(entropy of the singular values' shares): (L, D) -> L if orthogonal, 1 if all are one."""
    shares = torch.linalg.svdvals(vectors)
    return torch.special.entr(shares / shares.sum()).sum().exp().item()


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
    figure = Figure(figsize=(11.5, 2.7 * len(runs)), layout="constrained")
    grid = figure.subplots(len(runs), 4, squeeze=False)
    for (*cells, last), (name, *states) in zip(grid, runs, strict=True):
        # The heads side by side: 2 x (2, depth, L, D), keys and values.
        now, before = (kv.float().cpu().permute(1, 0, 3, 2, 4).flatten(3) for kv in states)
        _, depth, length, _ = now.shape
        keys, values = now.flatten(1, 2)  # 2 x (depth * L, D)

        # Cosines of every pair of experts, grouped by layer.
        for cell, what, a, b in (
            (cells[0], "keys and keys", keys, keys),
            (cells[1], "values and values", values, values),
            (cells[2], "keys and values", keys, values),
        ):
            alike = cosines(a, b)  # (depth * L, depth * L)
            heat_map(cell, alike, f"{name}:\ncosines, {what}", (-1, 1), "RdBu_r", length)
            cell.set(xlabel="layer", ylabel="layer")

        # The effective rank, with the untrained prefix in grey.
        layers = range(1, depth + 1)
        both = zip(("keys", "values"), ("o-", "s--"), before, now, strict=True)
        for what, mark, start, trained in both:
            ranks = [effective_rank(vectors) for vectors in start]
            last.plot(layers, ranks, mark[1:], color="grey", label=f"{what}, untrained")
            last.plot(layers, [effective_rank(vectors) for vectors in trained], mark, label=what)
        last.set_title(f"{name}:\neffective rank of {length} experts", fontsize=10)
        last.set(xlabel="layer", ylim=(0.8, length + 0.5))
        last.legend(fontsize=7)
    return figure
