"""prefix.py: the four ways to make keys and values equal their formulas, written out here with plain loops."""

import pytest
import torch
import torch.nn.functional as F

from prefix import SHARE, Prefix
from vit import ViT

H, D, L = 2, 16, 5


def heads(vectors):
    """(L, D) -> (H, L, Dh): head h reads its own stretch of D / H numbers."""
    return torch.stack([vectors[:, h * D // H : (h + 1) * D // H] for h in range(H)])


def reference(prefix, vit, layer):
    """Keys and values of one layer by the table of formulas in the paper, one prefix vector at a time."""
    block, p = vit.blocks[layer], prefix.p[layer]
    keys, values = [], []
    for vector in p:
        if prefix.share == "none":
            key, value = vector[:D], vector[D:]
        elif prefix.share == "simple":
            normed = F.layer_norm(vector, (D,), block.norm1.weight, block.norm1.bias, 1e-6)
            key = block.attn.qkv.weight[D : 2 * D] @ normed + block.attn.qkv.bias[D : 2 * D]
            value = block.attn.qkv.weight[2 * D :] @ normed + block.attn.qkv.bias[2 * D :]
        elif prefix.share == "linear":
            linear = prefix.map[0]
            both = torch.tanh(vector @ linear.weight[layer] + linear.bias[layer, 0])
            key, value = both[:D], both[D:]
        else:
            first, _, second = prefix.map
            hidden = torch.tanh(vector @ first.weight[layer] + first.bias[layer, 0])
            both = hidden @ second.weight[layer] + second.bias[layer, 0]
            key, value = both[:D], both[D:]
        keys.append(key)
        values.append(value)
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
        assert not torch.allclose(
            keys, expected_values, atol=1e-3
        )  # keys and values must not be the same thing


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
    [("none", 338_120), ("simple", 245_960), ("linear", 14_420_168), ("deep", 1_592_072)],
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
        }
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


@pytest.mark.parametrize("share", ["none", "linear", "deep"])
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
