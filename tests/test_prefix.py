"""prefix.py: every cell of its table of maps equals its formula, written out as plain loops."""

import pytest
import torch
import torch.nn.functional as F

from prefix import SHARE, Prefix
from vit import ViT, attention

H, D, L = 2, 16, 5


def heads(vectors):
    """(L, D) -> (H, L, Dh): head h reads its own stretch of D / H numbers."""
    return torch.stack([vectors[:, h * D // H : (h + 1) * D // H] for h in range(H)])


def mapped(kind, vector, prefix, vit, layer):
    """(key, value), each (D,), that the map `kind` of a layer makes of one vector."""
    if kind == "identity":
        return vector, vector
    if kind == "simple":
        block = vit.blocks[layer]
        normed = F.layer_norm(vector, (D,), block.norm1.weight, block.norm1.bias, 1e-6)
        _, key, value = (block.attn.qkv.weight @ normed + block.attn.qkv.bias).split(D)
        return key, value
    linear = prefix.map[0]
    hidden = torch.tanh(vector @ linear.weight[layer] + linear.bias[layer, 0])
    if kind == "linear":
        return hidden[:D], hidden[D:]
    last = prefix.map[2]
    both = hidden @ last.weight[layer] + last.bias[layer, 0]
    return both[:D], both[D:]


def reference(prefix, vit, layer):
    """Keys and values of one layer by the table in prefix.py, one prefix vector at a time."""
    keys, values = [], []
    for p in prefix.p[layer]:
        kind, _, separate = prefix.share.partition("-")
        if kind == "none":
            kind, separate = "identity", True
        first, second = (p[:D], p[D:]) if separate else (p, p)
        keys.append(mapped(kind, first, prefix, vit, layer)[0])
        values.append(mapped(kind, second, prefix, vit, layer)[1])
    return heads(torch.stack(keys)), heads(torch.stack(values))


@pytest.mark.parametrize("share", SHARE)
@pytest.mark.parametrize("shallow", [False, True])
def test_keys_and_values_equal_the_formula_of_their_share(share, shallow, small_vit):
    prefix = Prefix(3, H, D, L, share, hidden=7, shallow=shallow, init_scale=1.0)
    made = prefix(small_vit)
    assert made.shape == (1 if shallow else 3, 2, H, L, D // H)
    for layer, (keys, values) in enumerate(made):
        expected_keys, expected_values = reference(prefix, small_vit, layer)
        torch.testing.assert_close(keys, expected_keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(values, expected_values, atol=1e-5, rtol=0)
        same = torch.allclose(keys, expected_values, atol=1e-3)
        assert same == (share == "identity")  # elsewhere keys and values are not the same thing


@pytest.mark.parametrize("kind", ["simple", "linear", "deep"])
@pytest.mark.parametrize("per_layer", [True, False])
def test_a_separate_prefix_whose_two_vectors_are_equal_is_the_shared_one(
    kind, per_layer, small_vit
):
    shared, separate = (
        Prefix(3, H, D, L, share, per_layer=per_layer) for share in (kind, f"{kind}-separate")
    )
    separate.load_state_dict(shared.state_dict() | {"p": torch.cat([shared.p, shared.p], dim=-1)})
    torch.testing.assert_close(separate(small_vit), shared(small_vit), atol=0, rtol=0)
    separate.p.data[..., D:] += torch.randn(L, D)
    changed, before = separate(small_vit), shared(small_vit)  # (3, 2, H, L, Dh)
    torch.testing.assert_close(changed[:, 0], before[:, 0], atol=0, rtol=0)
    assert not torch.allclose(changed[:, 1], before[:, 1], atol=1e-3)


def test_identity_is_no_share_with_one_vector_for_key_and_value(small_vit):
    for per_layer in (True, False):
        one, two = (
            Prefix(3, H, D, L, share, per_layer=per_layer) for share in ("identity", "none")
        )
        both = one.p.unflatten(-1, (-1, 1, D)).expand(-1, -1, -1, 2, -1)  # (G, L, layers, 2, D)
        two.load_state_dict({"p": both.flatten(2)})
        torch.testing.assert_close(one(small_vit), two(small_vit), atol=0, rtol=0)


def test_random_numbers_are_drawn_in_one_order_and_dropout_falls_on_one_layout(small_vit):
    """A change of either would move every published number: seed, p, map, then a mask per step."""
    torch.manual_seed(5)
    prefix = Prefix(3, H, D, L, "deep", hidden=7, init_scale=0.3)
    torch.manual_seed(5)
    p = torch.empty(3, L, D).uniform_(-0.3, 0.3)
    A1, a1 = (torch.empty(3, n, 7).uniform_(-(D**-0.5), D**-0.5) for n in (D, 1))
    A2, a2 = (torch.empty(3, n, 2 * D).uniform_(-(7**-0.5), 7**-0.5) for n in (7, 1))
    kv = torch.tanh(p @ A1 + a1) @ A2 + a2  # (3, L, 2 * D)
    kv = kv.view(3, L, 1, 2, H, D // H).permute(0, 2, 3, 4, 1, 5).flatten(0, 1)
    assert torch.equal(prefix.eval()(small_vit), kv)
    torch.manual_seed(6)
    dropped = prefix.train()(small_vit, batch=4)
    torch.manual_seed(6)
    assert torch.equal(
        dropped, F.dropout(kv.unsqueeze(2).expand(-1, -1, 4, -1, -1, -1), prefix.dropout)
    )
    assert not torch.equal(dropped, prefix(small_vit, batch=4))


def test_a_prefix_keeps_the_ratios_among_tokens_and_adds_one_vector(small_vit):
    """Petrov et al. (arXiv 2310.19698): all that a prefix can do in the first layer."""
    x, attn = torch.randn(2, 5, D), small_vit.blocks[0].attn
    prefix = Prefix(3, H, D, L, init_scale=1.0)(small_vit)[0]  # (2, H, L, Dh)
    q, k, v = attn.heads(attn.qkv(x))  # 3 x (B, H, N, Dh)
    plain, tuned = [], []
    before = attention(q, k, v, attn_weights=plain)  # (B, H, N, Dh)
    prefix_k, prefix_v = prefix.unsqueeze(1).expand(-1, 2, -1, -1, -1)  # 2 x (B, H, L, Dh)
    both_k, both_v = torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2)
    after = attention(q, both_k, both_v, attn_weights=tuned)
    to_prefix, to_tokens = tuned[0].split([L, 5], dim=-1)  # (B, H, N, L), (B, H, N, N)
    left = 1 - to_prefix.sum(-1, keepdim=True)  # (B, H, N, 1)
    torch.testing.assert_close(to_tokens, left * plain[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(after, left * before + to_prefix @ prefix_v, atol=1e-5, rtol=0)
    assert left.mean() < 0.9  # the prefix is not idle


def test_the_language_form_makes_all_layers_from_one_table_and_one_mlp(small_vit):
    prefix = Prefix(3, H, D, L, "deep", hidden=7, per_layer=False)
    first, _, second = prefix.map
    assert prefix.p.shape == (1, L, D)
    hidden = torch.tanh(prefix.p[0] @ first.weight[0] + first.bias[0, 0])  # (L, 7)
    flat = hidden @ second.weight[0] + second.bias[0, 0]  # (L, 3 * 2 * D)
    made = prefix(small_vit)
    for layer in range(3):
        for kind in range(2):
            start = (2 * layer + kind) * D
            torch.testing.assert_close(
                made[layer, kind], heads(flat[:, start : start + D]), atol=1e-6, rtol=0
            )


@pytest.mark.parametrize(
    ("share", "total"),
    [
        ("none", 338_120),
        ("simple", 245_960),
        ("linear", 14_420_168),
        ("deep", 1_592_072),
        ("identity", 245_960),
        ("simple-separate", 338_120),
        ("linear-separate", 14_512_328),
        ("deep-separate", 1_684_232),
    ],
)
def test_parameter_counts_are_the_paper_s(share, total):
    prefix, head = Prefix(12, 12, 768, 10, share), torch.nn.Linear(768, 200)
    assert sum(p.numel() for p in [*prefix.parameters(), *head.parameters()]) == total


def count(prefix):
    return sum(p.numel() for p in prefix.parameters())


def test_parameter_counts_follow_their_formulas_in_every_placement():
    n, d, length, m = 4, 24, 7, 5
    for depth, shallow in ((n, False), (1, True)):
        expected = {
            "none": depth * length * 2 * d,
            "simple": depth * length * d,
            "linear": depth * (length * d + d * 2 * d + 2 * d),
            "deep": depth * (length * d + d * m + m + m * 2 * d + 2 * d),
            "identity": depth * length * d,
        }
        for kind in ("simple", "linear", "deep"):  # one vector more for every l and layer
            expected[f"{kind}-separate"] = expected[kind] + depth * length * d
        for share in SHARE:
            assert (
                count(Prefix(n, 2, d, length, share, hidden=m, shallow=shallow)) == expected[share]
            )
    one_for_all = length * d + d * m + m + m * n * 2 * d + n * 2 * d
    assert count(Prefix(n, 2, d, length, "deep", hidden=m, per_layer=False)) == one_for_all


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    vit = ViT(n_layer=1)
    scale = (6 / (3 * 16**2 + 768)) ** 0.5
    assert vit.prefix_init_scale == scale
    for share in SHARE:
        p = Prefix(12, 12, 768, 10, share, init_scale=vit.prefix_init_scale).p
        assert p.abs().max() <= scale
        assert p.std().item() == pytest.approx(
            scale / 3**0.5, rel=0.01
        )  # of a uniform distribution
    made = Prefix(12, 12, 768, 10, "deep", init_scale=vit.prefix_init_scale)(
        vit
    )  # (12, 2, H, L, Dh)
    assert made.std(dim=3).mean().item() == pytest.approx(
        0.012, rel=0.1
    )  # the L vectors are nearly equal
    assert made.std().item() == pytest.approx(0.086, rel=0.1)


@pytest.mark.parametrize("share", [share for share in SHARE if not share.startswith("simple")])
def test_dropout_gives_every_sample_key_and_value_a_mask_of_its_own(share, small_vit):
    prefix = Prefix(3, H, D, 50, share, init_scale=1.0)
    clean, dropped = prefix(small_vit), prefix(small_vit, batch=8)
    assert dropped.shape == (3, 2, 8, H, 50, D // H)
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(0.9, abs=0.01)
    expected = clean.unsqueeze(2).expand_as(dropped) / 0.9
    torch.testing.assert_close(dropped[kept], expected[kept], atol=1e-6, rtol=1e-6)
    assert not torch.equal(kept[:, :, 0], kept[:, :, 1])  # samples differ
    assert not torch.equal(kept[:, 0], kept[:, 1])  # keys and values differ
    torch.testing.assert_close(prefix.eval()(small_vit, batch=8), clean)


def test_simple_share_drops_coordinates_of_p_before_the_frozen_layer(small_vit):
    prefix = Prefix(3, H, D, L, "simple", init_scale=1.0)
    torch.manual_seed(3)
    dropped = prefix(small_vit, batch=4)  # (3, 2, 4, H, L, Dh)
    torch.manual_seed(3)
    masked = F.dropout(prefix.p.unsqueeze(1).expand(-1, 4, -1, -1), 0.1)  # (3, 4, L, D)
    for layer, block in enumerate(small_vit.blocks):
        normed = F.layer_norm(
            masked[layer], (D,), block.norm1.weight, block.norm1.bias, 1e-6
        )  # (4, L, D)
        for kind in (0, 1):
            rows = slice((kind + 1) * D, (kind + 2) * D)
            flat = normed @ block.attn.qkv.weight[rows].T + block.attn.qkv.bias[rows]  # (4, L, D)
            expected = flat.view(4, L, H, D // H).transpose(1, 2)  # (4, H, L, Dh)
            torch.testing.assert_close(dropped[layer, kind], expected, atol=1e-5, rtol=0)
    assert not torch.allclose(dropped[:, :, 0], dropped[:, :, 1], atol=1e-3)  # one mask per sample


def test_a_shallow_prefix_has_no_dropout(small_vit):
    for share in SHARE:
        prefix = Prefix(3, H, D, L, share, shallow=True)
        torch.testing.assert_close(prefix(small_vit, batch=4), prefix(small_vit))


@pytest.mark.parametrize("wrong", [{"share": "all"}, {"length": 0}, {"dim": 15}, {"hidden": -1}])
def test_sizes_and_shares_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        Prefix(**{"n_layer": 3, "n_head": H, "dim": D, "length": L, **wrong})
