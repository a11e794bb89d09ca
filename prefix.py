"""A prefix is L extra experts that every query of an attention layer may choose.

Attention is a mixture of experts. A query q scores N tokens x_j and mixes what they say:
    out(q) = sum_j g_j W_v x_j,    g = softmax_j(q . W_k x_j / sqrt(Dh))
Token j is an expert: its key W_k x_j decides *when* it is heard (the gate), its value W_v x_j *what* it says.
Prefix-tuning adds L experts that depend on no token, and one softmax gates all L + N:
    out(q) = sum_l g_l p_v[l] + sum_j g_j W_v x_j,    g = softmax over [q . p_k[l], q . W_k x_j] / sqrt(Dh)
So p_k[l] is the parameter of expert l's gate, and p_v[l] is the expert itself. The backbone stays frozen.

`share` decides whether the gate and the expert grow from one vector p[l] (the "reparameterisation"):
    none    No-share      p_k[l], p_v[l] are two free vectors
    simple  Simple-share  p_k[l] = W_k LN(p[l]) + b_k,  p_v[l] = W_v LN(p[l]) + b_v   (through the frozen layer itself)
    linear                [p_k[l], p_v[l]] = tanh(A p[l] + a)                         (A, a learned)
    deep    Deep-share    [p_k[l], p_v[l]] = A2 tanh(A1 p[l] + a1) + a2               (A1, a1, A2, a2 learned)
The theorems: with a shared p[l], the distance between true and estimated experts (theory.py: the Voronoi loss) falls
about like n^-1/2 in the number n of samples; with free keys and values it can fall slower than any power of n. out(q)
is linear in p_v: two experts with one key can move their values apart without any change that data could show. If key
and value are one vector, the gates move too (theory.py draws it).

Shapes: L prefix length, D width, H heads, Dh = D / H, depth = number of layers that carry a prefix.
Source: Le et al., "Revisiting Prefix-tuning", ICLR 2025, arXiv 2410.02200.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHARE = ("none", "simple", "linear", "deep")


class GroupedLinear(nn.Module):
    """G linear layers side by side: (G, L, fan_in) -> (G, L, fan_out), initialised as PyTorch's nn.Linear."""

    def __init__(self, groups: int, fan_in: int, fan_out: int):
        super().__init__()
        bound = fan_in**-0.5
        self.weight = nn.Parameter(torch.empty(groups, fan_in, fan_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(groups, 1, fan_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias  # (G, L, fan_out)


class Prefix(nn.Module):
    """Makes the keys and values of L prefix experts for every layer, or for the first one only (`shallow`).

    n_layer, n_head, dim: of the backbone. length: L. share: one of SHARE. hidden: width of Deep-share's MLP.
    per_layer: every layer has its own p and its own map (vision form); else one p and one map make all layers' keys and
    values (the language form of Li & Liang). init_scale: v in p ~ uniform(-v, v); ViTs use `ViT.prompt_scale`.
    dropout: None is the paper's 0.1, and 0 for a shallow prefix. ValueError for a size or a `share` that cannot be.
    """

    def __init__(
        self,
        n_layer: int,
        n_head: int,
        dim: int,
        length: int,
        share: str = "deep",
        hidden: int = 48,
        shallow: bool = False,
        per_layer: bool = True,
        init_scale: float = 0.02,
        dropout: float | None = None,
    ):
        super().__init__()
        if share not in SHARE:
            raise ValueError(f"share is '{share}'; it must be one of {', '.join(SHARE)}")
        if min(n_layer, n_head, dim, length, hidden) < 1 or dim % n_head:
            raise ValueError(f"sizes must be positive and dim {dim} a multiple of n_head {n_head}")
        self.share, self.length, self.n_head, self.dim = share, length, n_head, dim
        self.depth = 1 if shallow else n_layer
        self.dropout = dropout if dropout is not None else (0.0 if shallow else 0.1)

        groups = self.depth if per_layer else 1  # G: how many tables of vectors, and how many maps
        out = 2 * dim * self.depth // groups  # one key and one value for every layer of the group
        width = out if share == "none" else dim
        self.p = nn.Parameter(
            torch.empty(groups, length, width).uniform_(-init_scale, init_scale)
        )  # (G, L, D or out)
        if share == "linear":
            self.map = nn.Sequential(GroupedLinear(groups, dim, out), nn.Tanh())
        elif share == "deep":
            self.map = nn.Sequential(
                GroupedLinear(groups, dim, hidden), nn.Tanh(), GroupedLinear(groups, hidden, out)
            )
        else:
            self.map = nn.Identity()

    def forward(self, backbone: nn.Module, batch: int | None = None) -> Tensor:
        """The prefix of every layer: (depth, 2, H, L, Dh), [:, 0] keys and [:, 1] values, to be given to the backbone.

        While training with dropout, `batch` = B makes one prefix per sample: (depth, 2, B, H, L, Dh).
        backbone: read by Simple-share alone, whose keys and values are the frozen layers' own projections.
        """
        rate = self.dropout if self.training and batch else 0.0
        if self.share == "simple":
            return self.project(backbone, batch, rate)
        kv = self.map(self.p)  # (G, L, layers of a group * 2 * D)
        kv = kv.unflatten(
            -1, (-1, 2, self.n_head, self.dim // self.n_head)
        )  # (G, L, layers, 2, H, Dh)
        kv = kv.permute(0, 2, 3, 4, 1, 5).flatten(0, 1)  # (depth, 2, H, L, Dh)
        if rate:  # a mask of its own for every sample, key and value
            kv = F.dropout(
                kv.unsqueeze(2).expand(-1, -1, batch, -1, -1, -1), rate
            )  # (depth, 2, B, H, L, Dh)
        return kv

    def project(self, backbone: nn.Module, batch: int | None, rate: float) -> Tensor:
        """Simple-share: p[l] goes through layer norm, W_k and W_v of the frozen layer, just as a token does."""
        p = self.p.unsqueeze(1)  # (G, 1, L, D)
        if rate:  # one mask per sample on p itself, so key and value lose the same coordinates
            p = F.dropout(p.expand(-1, batch, -1, -1), rate)  # (G, B, L, D)
        p = p.expand(self.depth, -1, -1, -1)  # (depth, 1 or B, L, D)
        kv = torch.stack(
            [block.keys_values(p[i]) for i, block in enumerate(backbone.blocks[: self.depth])]
        )
        return kv if rate else kv.squeeze(2)  # (depth, 2, H, L, Dh), or (depth, 2, B, H, L, Dh)
