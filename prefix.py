"""A prefix is L extra experts that every query of an attention layer may choose.

Attention is a mixture of experts. A query q scores N tokens x_j and mixes what they say:
    out(q) = sum_j g_j W_v x_j,    g = softmax_j(q . W_k x_j / sqrt(Dh))
Token j is an expert: its key W_k x_j decides *when* it is heard (the gate), its value W_v x_j
*what* it says. Prefix-tuning adds L experts that depend on no token. One softmax gates all L + N:
    out(q) = sum_l g_l p_v[l] + sum_j g_j W_v x_j
    g = softmax over [q . p_k[l], q . W_k x_j] / sqrt(Dh)
So p_k[l] is the parameter of expert l's gate, and p_v[l] is the expert itself. The backbone stays
frozen.

`share` decides two things: whether gate and expert grow from one vector p[l] or from two, and
through which map (the "reparameterisation"). The paper compares the four cells marked *:
    map                      one vector p[l]         two vectors, the same map
    identity (k, v) = p      identity                none             * No-share
    the frozen layer         simple  * Simple-share  simple-separate
    linear                   linear  *               linear-separate
    MLP                      deep    * Deep-share    deep-separate
The frozen layer makes p_k[l] = W_k LN(p[l]) + b_k and p_v[l] = W_v LN(p[l]) + b_v, as it does for a
token. Linear is [p_k[l], p_v[l]] = tanh(A p[l] + a), and the MLP is A2 tanh(A1 p[l] + a1) + a2; A,
a, A1, a1, A2, a2 are trained. Of two vectors the first makes the key and the second the value.

Simple-share is VPT-deep (Jia et al., ECCV 2022), exactly. VPT-deep puts p[1] .. p[L] as tokens into
every layer and throws their outputs away before the next one, so nothing reads more of them than
this layer's keys and values. What a prompt token costs beyond these (its query, its row of
attention, its projection and its MLP) is wasted:
    VPT-deep       [CLS p[1] .. p[L] patches] -> layer -> [CLS  thrown away  patches]
    Simple-share   [CLS patches] -> layer, with k, v of LN(p[1]) .. LN(p[L]) -> [CLS patches]

The theorems: if gate and expert share p[l], the error of the estimated experts falls about like
n^-1/2 in the number n of samples. With free keys and values it can fall more slowly than any power
of n, because out(q) is linear in p_v: two experts with one key can move their values apart without
any change in the output. If key and value are one vector, the gates move too. The rate is proved
for maps that are fixed; Deep-share's map is trained. The separate cells tell what the sharing
does from what the map does: on the digits it is the map that helps (docs/results.md).

Shapes: L prefix length, D width, H heads, Dh = D / H, depth = number of layers with a prefix.
Source: Le et al., "Revisiting Prefix-tuning", ICLR 2025, arXiv 2410.02200.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The paper's four, then those that tell sharing from its map.
SHARE: tuple[str, ...] = ("none", "simple", "linear", "deep")
SHARE += ("identity", "simple-separate", "linear-separate", "deep-separate")


class GroupedLinear(nn.Module):
    """G linear layers side by side: (G, L, fan_in) -> (G, L, fan_out), initialised as nn.Linear."""

    def __init__(self, groups: int, fan_in: int, fan_out: int):
        super().__init__()

        # nn.Linear draws weights and biases from the same interval.
        bound = fan_in**-0.5
        self.weight = nn.Parameter(torch.empty(groups, fan_in, fan_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(groups, 1, fan_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias  # (G, L, fan_out)


class Prefix(nn.Module):
    """Makes the keys and values of L prefix experts for every layer, or for the first one only.

    n_layer, n_head, dim: of the backbone.
    length: L.
    share: one of SHARE.
    hidden: width of Deep-share's MLP.
    shallow: put the prefix in the first layer only.
    per_layer: every layer has its own p and its own map (images); otherwise one p and one map make
        the keys and values of all layers (texts, as Li & Liang have it).
    init_scale: v in p ~ uniform(-v, v); a backbone knows its own, `prefix_init_scale`.
    dropout: its rate, while training; a shallow prefix has none.
    Raises ValueError if a size is not positive or `share` is unknown.
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
        dropout: float = 0.1,
    ):
        super().__init__()

        # Sizes and maps that cannot be.
        if share not in SHARE:
            raise ValueError(f"share is '{share}'; it must be one of {', '.join(SHARE)}")
        if min(n_layer, n_head, dim, length, hidden) < 1 or dim % n_head:
            raise ValueError(f"sizes must be positive and dim {dim} a multiple of n_head {n_head}")

        # A shallow prefix has no dropout, as in the paper.
        self.share, self.n_head, self.dim = share, n_head, dim
        kind, _, self.separate = share.partition("-")
        self.depth = 1 if shallow else n_layer
        self.dropout = 0.0 if shallow else dropout

        # G groups: one per layer, or a single one that makes the keys and values of all layers.
        groups = self.depth if per_layer else 1
        out = 2 * dim * self.depth // groups  # a key and a value for every layer of the group

        # The vectors p. Without a map, keys and values themselves are trained.
        widths = {"none": out, "identity": out // 2}
        width = widths.get(share, 2 * dim if self.separate else dim)
        p = torch.empty(groups, length, width).uniform_(-init_scale, init_scale)
        self.p = nn.Parameter(p)  # (G, L, D), (G, L, 2 * D) for two vectors; No-share (G, L, out)

        # The map from p to keys and values. Simple-share uses the backbone's own layers instead.
        if kind == "linear":
            self.map = nn.Sequential(GroupedLinear(groups, dim, out), nn.Tanh())
        elif kind == "deep":
            first, second = GroupedLinear(groups, dim, hidden), GroupedLinear(groups, hidden, out)
            self.map = nn.Sequential(first, nn.Tanh(), second)
        else:
            self.map = nn.Identity()

    def forward(self, backbone: nn.Module, batch: int | None = None) -> Tensor:
        """The prefix of every layer: (depth, 2, H, L, Dh), [:, 0] keys and [:, 1] values.

        backbone: only Simple-share reads it; its keys and values come from the frozen layers.
        batch: B. While training with dropout, every sample gets its own: (depth, 2, B, H, L, Dh).
        """
        # Outside of training, and without a batch, nothing is dropped.
        rate = self.dropout if self.training and batch else 0.0

        # Simple-share's map is a part of the backbone.
        if self.share.startswith("simple"):
            return self.project(backbone, batch, rate)

        # Map p to keys and values, then cut these into layers and heads.
        kv = self.both(self.expand, 3, self.p)  # (G, L, layers of a group, 2, H, Dh)
        kv = kv.permute(0, 2, 3, 4, 1, 5).flatten(0, 1)  # (depth, 2, H, L, Dh)

        # Dropout draws one mask per sample, for keys and values apart.
        if rate:
            kv = kv.unsqueeze(2).expand(-1, -1, batch, -1, -1, -1)  # (depth, 2, B, H, L, Dh)
            kv = F.dropout(kv, rate)
        return kv

    def expand(self, p: Tensor) -> Tensor:
        """The map: p (G, L, D) -> keys and values (G, L, layers of a group, 2, H, Dh)."""
        # The numbers of all layers of a group lie side by side.
        kv = self.map(p)  # (G, L, layers * 2 * D); identity: (G, L, layers * D)
        head_dim = self.dim // self.n_head  # Dh

        # In "identity" key and value are the same numbers, elsewhere the one follows the other.
        if self.share == "identity":
            return kv.unflatten(-1, (-1, 1, self.n_head, head_dim)).expand(-1, -1, -1, 2, -1, -1)
        return kv.unflatten(-1, (-1, 2, self.n_head, head_dim))

    def both(self, make: Callable[[Tensor], Tensor], kind: int, p: Tensor) -> Tensor:
        """make(p), whose dimension `kind` tells keys from values.

        Of two vectors in p, the first makes the keys and the second the values.
        """
        if not self.separate:
            return make(p)

        # Each vector makes both, and only one of the two is taken.
        first, second = p.chunk(2, dim=-1)
        return torch.stack([make(first).select(kind, 0), make(second).select(kind, 1)], dim=kind)

    def project(self, backbone: nn.Module, batch: int | None, rate: float) -> Tensor:
        """Simple-share: p[l] passes through the frozen layer's LN, W_k and W_v, as a token does."""
        # Dropout draws one mask per sample on p itself: key and value lose the same coordinates.
        p = self.p.unsqueeze(1)  # (G, 1, L, D)
        if rate:
            p = F.dropout(p.expand(-1, batch, -1, -1), rate)  # (G, B, L, D)
        p = p.expand(self.depth, -1, -1, -1)  # (depth, 1 or B, L, D)

        # Every layer makes its keys and values, (2, 1 or B, H, L, Dh).
        layers = backbone.blocks[: self.depth]
        kv = torch.stack([self.both(layer.keys_values, 0, p[i]) for i, layer in enumerate(layers)])
        return kv if rate else kv.squeeze(2)  # (depth, 2, H, L, Dh), or (depth, 2, B, H, L, Dh)
