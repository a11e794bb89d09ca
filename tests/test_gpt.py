"""gpt.py: equal to transformers and peft on the same weights; what is fast equals what is plain."""

import copy
import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import save_file
from test_vit import Moves, fake_cuda
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.bias import causal_lower_right
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

import gpt as module
from gpt import GPT, causal_attention, converted, flash_causal
from prefix import SHARE, Prefix
from vit import Attention

V, D, H, LAYERS, L = 97, 32, 4, 3, 5
EOS = 0


def random_gpt2(noise=0.2, seed=0, **options):
    """A GPT-2 of transformers all of whose parameters, biases and norms too, are random."""
    sizes = {"vocab_size": V, "n_positions": 64, "n_embd": D, "n_layer": LAYERS, "n_head": H}
    torch.manual_seed(seed)
    source = GPT2LMHeadModel(
        GPT2Config(**sizes | {"bos_token_id": EOS, "eos_token_id": EOS} | options)
    ).eval()
    for parameter in source.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return source.requires_grad_(False)


def same(source):
    """Our GPT with the weights of transformers' model."""
    c = source.config
    model = GPT(c.vocab_size, c.n_positions, c.n_embd, c.n_layer, c.n_head, c.layer_norm_epsilon)
    model.load_state_dict(converted(source.state_dict()))
    return model.requires_grad_(False).to(source.dtype)


@pytest.fixture(scope="module")
def pair():
    source = random_gpt2()
    return source, same(source)


def past(prefix, batch):
    """A prefix (depth, 2, H, L, Dh) as transformers takes it."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefix):
        cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), layer)
    return cache


def some_prefix(dtype=torch.float32):
    return torch.randn(LAYERS, 2, H, L, D // H, dtype=dtype)


def test_a_token_mixes_the_prefix_and_the_tokens_up_to_itself():
    attention = Attention(D, H).requires_grad_(False)
    x, prefix = torch.randn(2, 6, D), torch.randn(2, H, L, D // H)
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    out = attention(x, prefix, partial(causal_attention, seen=seen))
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).split(D, dim=-1)  # 3 x (B, T, D)
    expected = torch.zeros(2, 6, D)
    for b in range(2):
        for h in range(H):
            head = slice(h * D // H, (h + 1) * D // H)
            for t in range(6):
                keys, values = (
                    [*prefix[0, h], *k[b, : t + 1, head]],
                    [*prefix[1, h], *v[b, : t + 1, head]],
                )
                scores = [math.exp(q[b, t, head] @ key / math.sqrt(D // H)) for key in keys]
                for score, value in zip(scores, values, strict=True):
                    expected[b, t, head] += score / sum(scores) * value
    expected = expected @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)  # fp32, another order of sums
    assert not torch.allclose(attention(x, prefix), expected, atol=1e-3)  # sees what comes after


def test_logits_equal_transformers_on_the_same_weights(pair):
    source, model = pair
    tokens = torch.randint(V, (4, 20))
    theirs = source(tokens).logits
    torch.testing.assert_close(model(tokens), theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 1
    for part in ("attn.proj", "mlp.fc2", "norm1"):
        other = same(source)
        weight = other.blocks[1].get_submodule(part).weight
        weight.data = weight.data.mT.contiguous() if part == "attn.proj" else weight.data * 1.1
        # A forgotten transpose shows, and any weight.
        assert not torch.allclose(other(tokens), theirs, atol=1e-2)


def test_a_prefix_equals_the_same_past_key_values_in_transformers(pair):
    source, model = pair
    tokens, prefix = torch.randint(V, (4, 20)), some_prefix()
    theirs = source(tokens, cache=past(prefix, 4)).logits
    torch.testing.assert_close(model(tokens, prefix), theirs, atol=1e-4, rtol=0)
    swapped = model(tokens, prefix.flip(1))  # keys and values
    assert not torch.allclose(swapped, theirs, atol=1e-2)
    assert not torch.allclose(model(tokens), theirs, atol=1e-2)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # both of peft
@pytest.mark.parametrize("projection", [True, False])
def test_outputs_equal_peft_s_with_the_same_prefix(projection):
    source = random_gpt2()
    model, tokens = same(source), torch.randint(V, (3, 12))
    options = {"num_virtual_tokens": L, "prefix_projection": projection, "encoder_hidden_size": 16}
    theirs = get_peft_model(source, PrefixTuningConfig(task_type="CAUSAL_LM", **options)).eval()
    encoder = theirs.prompt_encoder["default"]
    prefix = Prefix(
        LAYERS, H, D, L, "deep" if projection else "none", hidden=16, per_layer=False, dropout=0.0
    )
    prefix.p.data[0] = encoder.embedding.weight
    if projection:
        for ours, linear in zip(prefix.map[::2], encoder.transform[::2], strict=True):
            ours.weight.data[0], ours.bias.data[0] = linear.weight.T, linear.bias
    expected = theirs(input_ids=tokens).logits
    torch.testing.assert_close(model(tokens, prefix(model)), expected, atol=1e-4, rtol=0)
    assert not torch.allclose(model(tokens), expected, atol=1e-2)


@pytest.mark.parametrize("with_prefix", [True, False])
def test_logits_at_columns_are_those_of_all_columns_with_the_same_gradients(with_prefix, pair):
    _, model = pair
    tokens, at = torch.randint(V, (4, 20)), torch.randint(20, (4, 7))
    prefix = some_prefix().requires_grad_() if with_prefix else None
    rows, full = model(tokens, prefix, at), model(tokens, prefix)
    chosen = full[torch.arange(4)[:, None], at]
    torch.testing.assert_close(rows, chosen, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(rows, full[torch.arange(4)[:, None], at - 1], atol=1e-2)
    if with_prefix:
        (ours,), (whole,) = (torch.autograd.grad(y.square().sum(), prefix) for y in (rows, chosen))
        torch.testing.assert_close(ours, whole, atol=1e-3, rtol=1e-4)  # sums of about 100
        assert ours.abs().min() > 0


def test_the_last_block_computes_the_asked_columns_alone(pair):
    _, model = pair
    shapes = []
    parts = [*(block.mlp for block in model.blocks), model.blocks[-1].attn.proj]
    hooks = [p.register_forward_hook(lambda _, x, y: shapes.append(y.shape)) for p in parts]
    model(torch.randint(V, (4, 20)), target_positions=torch.randint(20, (4, 7)))
    assert shapes == [(4, 20, D), (4, 20, D), (4, 7, D), (4, 7, D)]
    for hook in hooks:
        hook.remove()


def test_padding_on_the_right_changes_nothing(pair):
    _, model = pair
    prefix, tokens = some_prefix(), torch.randint(V, (2, 20))
    padded = torch.cat([tokens[:, :13], torch.randint(V, (2, 7))], dim=1)
    whole, other = model(tokens, prefix), model(padded, prefix)  # 2 x (B, T, V)
    torch.testing.assert_close(other[:, :13], whole[:, :13], atol=1e-5, rtol=1e-5)
    cut = model(tokens[:, :13], prefix)
    torch.testing.assert_close(cut, whole[:, :13], atol=1e-4, rtol=1e-5)
    assert not torch.allclose(other[:, 13:], whole[:, 13:], atol=1e-2)


def test_a_shallow_prefix_is_seen_in_the_first_layer_alone(pair):
    _, model = pair
    tokens, prefix = torch.randint(V, (2, 10)), some_prefix()
    triangle = partial(causal_attention, seen=torch.ones(10, 10, dtype=torch.bool).tril())
    x = model.wte(tokens) + model.wpe[L : L + 10]
    x = model.blocks[0](x, prefix[0], triangle)
    x = model.blocks[2](model.blocks[1](x, None, triangle), None, triangle)
    shallow, expected = model(tokens, prefix[:1]), model.norm(x) @ model.wte.weight.T
    torch.testing.assert_close(shallow, expected, atol=1e-4, rtol=0)
    assert not torch.allclose(model(tokens, prefix), shallow, atol=1e-2)


def test_a_prefix_per_text_equals_each_text_alone_with_its_prefix(pair):
    _, model = pair
    tokens = torch.randint(V, (3, 10))
    prefix = torch.stack([some_prefix() for _ in range(3)], dim=2)
    alone = torch.cat([model(tokens[b : b + 1], prefix[:, :, b]) for b in range(3)])
    torch.testing.assert_close(model(tokens, prefix), alone, atol=1e-4, rtol=0)
    assert not torch.allclose(model(tokens, prefix[:, :, 0]), alone, atol=1e-2)


def test_every_share_makes_a_prefix_for_gpt_and_simple_share_treats_it_as_tokens(pair):
    _, model = pair
    for share in SHARE:
        prefix = Prefix(
            LAYERS, H, D, L, share, hidden=16, per_layer=False, init_scale=model.prefix_init_scale
        ).eval()
        assert prefix(model).shape == (LAYERS, 2, H, L, D // H)
        if share == "simple":
            block = model.blocks[1]
            tokens = block.norm1(prefix.p)  # (1, L, D): as if p were tokens
            _, k, v = block.attn.heads(block.attn.qkv(tokens))
            torch.testing.assert_close(prefix(model)[1], torch.stack([k[0], v[0]]))


def test_gates_are_shown_when_asked_for_sum_to_one_and_change_nothing(pair):
    _, model = pair
    tokens, prefix, attn_weights = torch.randint(V, (4, 20)), some_prefix(), []
    at = torch.randint(20, (4, 7))
    shown = model(tokens, prefix, at, attn_weights)
    torch.testing.assert_close(shown, model(tokens, prefix, at), atol=1e-4, rtol=0)
    assert [gate.shape for gate in attn_weights] == [(4, H, 20, L + 20)] * 2 + [(4, H, 7, L + 20)]
    for gate in attn_weights:
        torch.testing.assert_close(gate.sum(-1), torch.ones(gate.shape[:-1]))
    later = torch.arange(20) > torch.arange(20)[:, None]
    assert attn_weights[0][..., L:][..., later].max() == 0  # nobody sees what comes after
    assert attn_weights[0][..., :L].min() > 0  # everybody sees the prefix
    assert attn_weights[0][..., L:][..., ~later].min() > 0


def test_bf16_is_close_even_where_all_logits_are_far_from_zero():
    model, tokens, prefix = same(random_gpt2()), torch.randint(V, (4, 20)), some_prefix()
    model.wte.weight += 4 * torch.randn(D)  # in all logits of a token, as in the real GPT-2
    exact = model(tokens, prefix)
    assert exact.mean(-1).abs().max() > 50
    plain = copy.deepcopy(model)
    plain.wte.to(torch.bfloat16)
    model.cast_frozen_weights()
    assert {p.dtype for p in model.blocks.parameters()} == {torch.bfloat16, torch.float32}
    assert (model.wte.weight.dtype, model.wpe.dtype, model.norm.weight.dtype) == (
        torch.bfloat16,
        *[torch.float32] * 2,
    )
    with torch.autocast("cpu", torch.bfloat16):
        errors = [
            m(tokens, prefix).float().log_softmax(-1) - exact.log_softmax(-1)
            for m in (model, plain)
        ]
    assert errors[0].std() < 0.01
    assert errors[1].std() > 0.1  # if wte is only cast


@pytest.mark.parametrize("length", [0, L])
def test_causal_attention_is_a_boolean_mask_and_flash_computes_the_same(length):
    q, (k, v) = torch.randn(3, H, 20, 8), torch.randn(2, 3, H, length + 20, 8)
    inputs = [x.requires_grad_() for x in (q, k.clone(), v.clone())]
    columns = torch.arange(length + 20)
    mask = columns <= columns[length:, None]  # (T, L + T)
    seen = mask[:, length:]  # of the tokens alone
    forms = {
        "mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask),
        "ours": partial(causal_attention, seen=seen),
        "torch's": lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, causal_lower_right(20, length + 20)
        ),
        "flash": flash_causal,
        "later": partial(causal_attention, seen=seen | True),
    }
    results = {}
    for name, form in forms.items():
        out = form(*inputs)
        results[name] = [out, *torch.autograd.grad(out.square().sum(), inputs)]
    torch.testing.assert_close(results["ours"], results["mask"], atol=0, rtol=0)
    torch.testing.assert_close(results["torch's"], results["mask"], atol=0, rtol=0)
    torch.testing.assert_close(results["flash"], results["mask"], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(results["later"][0], results["mask"][0], atol=1e-3)


def test_on_cuda_all_layers_but_the_last_can_take_flash_attention(monkeypatch):
    asked, kernel = [], F.scaled_dot_product_attention

    def spy(q, k, v, mask=None, is_causal=False):
        asked.append((q.shape[2], k.shape[2], mask is not None, is_causal))
        return kernel(q, k, v, mask, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with fake_cuda() as cuda:
        with cuda:
            model = GPT(V, 64, D, LAYERS, H)
            prefix = Prefix(LAYERS, H, D, L, per_layer=False)
            tokens, at = torch.zeros(4, 20, dtype=torch.long), torch.zeros(4, 7, dtype=torch.long)
        with Moves() as moves:
            assert model(tokens, prefix(model), at).is_cuda
            assert model(tokens, prefix(model)[:1]).is_cuda
    assert moves.found == []
    flash, last = (L + 20, L + 20, False, True), (7, L + 20, True, False)
    plain = (20, 20, False, True)
    assert asked == [flash, flash, last, flash, plain, plain]


@pytest.mark.slow
def test_torch_compile_makes_one_graph_of_all_lengths():
    model = same(random_gpt2(n_layer=2))
    graphs, flash = (CompileCounterWithBackend(name) for name in ("eager", "aot_eager"))
    compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=True)
    attention = torch.compile(flash_causal, fullgraph=True, backend=flash, dynamic=True)
    for batch, count in ((6, 20), (7, 17)):  # no size equal to another
        tokens, at = torch.randint(V, (batch, count)), torch.randint(count, (batch, 9))
        prefix = some_prefix()[:2]
        torch.testing.assert_close(compiled(tokens, prefix, at), model(tokens, prefix, at))
        q, k = torch.randn(batch, H, count, 8), torch.randn(batch, H, L + count, 8)
        torch.testing.assert_close(attention(q, k, k), flash_causal(q, k, k))
    assert graphs.frame_count == flash.frame_count == 1


def test_random_weights_are_drawn_as_gpt2_s():
    torch.manual_seed(0)
    model = GPT(vocab=1000, context=500, dim=128, n_layer=8, n_head=4)
    expected = {"wte.weight": 0.02, "wpe": 0.02, "qkv.weight": 0.02, "fc1.weight": 0.02}
    expected |= {"proj.weight": 0.02 / 4, "fc2.weight": 0.02 / 4, "bias": 0.0}
    for name, parameter in model.named_parameters():
        std = next((std for end, std in expected.items() if name.endswith(end)), None)
        assert parameter.std().item() == pytest.approx(std or 0.0, rel=0.03), (
            name
        )  # norms: all ones
    with torch.device("meta"):
        gpt2 = GPT(**module.HUB["openai-community/gpt2"])
    assert sum(p.numel() for p in gpt2.parameters()) == 124_439_808


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_saved_gpt2_loads_under_either_style_of_names(prefix, pair, tmp_path, monkeypatch):
    source, _ = pair
    source.save_pretrained(tmp_path)
    state = {
        prefix + name: value.contiguous() for name, value in source.transformer.state_dict().items()
    }
    for i in range(LAYERS):  # as in the hub's files
        state[f"{prefix}h.{i}.attn.bias"] = torch.ones(64, 64).tril()[None, None]
        state[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    head = {"lm_head.weight": source.transformer.wte.weight.clone()}
    save_file(state | head, tmp_path / "model.safetensors")
    tokens = torch.randint(V, (2, 9))
    model = GPT.load(str(tmp_path))
    torch.testing.assert_close(model(tokens), source(tokens).logits, atol=1e-4, rtol=0)
    asked = []
    monkeypatch.setattr(module, "HUB", {"openai-community/gpt2": model.sizes})
    file = str(tmp_path / "model.safetensors")
    monkeypatch.setattr(module, "hf_hub_download", lambda *a: asked.append(a) or file)
    torch.testing.assert_close(GPT.load("gpt2")(tokens), model(tokens), atol=0, rtol=0)
    assert asked == [("openai-community/gpt2", "model.safetensors")]
    GPT.load("openai-community/gpt2")
    assert asked.pop() == asked[0]
    with pytest.raises(ValueError, match="its lm_head differs from wte"):
        converted(state | {"lm_head.weight": torch.zeros(V, D)})
    assert not torch.allclose(GPT.load("gpt2", pretrained=False)(tokens), model(tokens), atol=1e-2)
    assert len(asked) == 1


def test_a_saved_gpt_loads_as_it_was_and_names_without_weights_are_known(pair, tmp_path):
    _, model = pair
    path, tokens = tmp_path / "gpt.safetensors", torch.randint(V, (2, 9))
    save_file(model.state_dict(), path, {"gpt": json.dumps(model.sizes)})
    loaded = GPT.load(str(path))
    assert loaded.sizes == model.sizes
    torch.testing.assert_close(loaded(tokens), model(tokens), atol=0, rtol=0)
    assert GPT.load("scratch_gpt").encoding == "bytes"
    assert GPT.load("scratch_gpt").sizes.items() >= module.TINY_GPT.items()
    loaded(tokens).sum().backward()  # and can be trained on


def test_what_is_no_gpt2_is_refused_in_one_sentence(pair, tmp_path, monkeypatch):
    source, model = pair

    def refused(name, match, kind=ValueError):
        with pytest.raises(kind, match=match) as error:
            GPT.load(str(name))
        assert "\n" not in str(error.value)

    def saved(state, sizes=None, cut=0):
        path = tmp_path / "gpt.safetensors"
        save_file(state, path, None if sizes is None else {"gpt": json.dumps(sizes)})
        path.write_bytes(path.read_bytes()[: -cut or None])
        return path

    state, sizes = model.state_dict(), model.sizes
    refused(saved(state, sizes, cut=100), "damaged")
    refused(saved(state), "no GPT of this repository")
    refused(saved(state, sizes | {"dim": 64}), "size mismatch")
    refused(saved(state, sizes | {"n_layer": 4}), "Missing key.*blocks.3")
    refused(saved(state | {"head": torch.ones(1)}, sizes), "Unexpected key.*head")
    refused("gpt-3", "no GPT 'gpt-3'; possible are tiny_gpt, ")
    monkeypatch.setattr(module, "TINY_GPT_WEIGHTS", tmp_path / "tiny_gpt.safetensors")
    refused("tiny_gpt", "tiny_gpt.safetensors", FileNotFoundError)
    source.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    GPT.load(str(tmp_path))  # this one is not refused
    for name, value in (
        ("activation_function", "relu"),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        refused(tmp_path, f"says {name} {value}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused(tmp_path, "says model_type bert")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "config.json", FileNotFoundError)


def test_a_gpt2_in_shards_is_read_and_other_files_are_refused(pair, tmp_path):
    source, model = pair
    tokens = torch.randint(V, (2, 9))
    source.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    torch.testing.assert_close(GPT.load(str(tmp_path / "shards"))(tokens), model(tokens))
    source.save_pretrained(tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(source.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no model\.safetensors.*save_pretrained"):
        GPT.load(str(tmp_path / "bin"))
    next(iter(sorted((tmp_path / "shards").glob("*.safetensors")))).unlink()
    with pytest.raises(ValueError, match="Missing key"):
        GPT.load(str(tmp_path / "shards"))


def test_a_config_that_leans_on_transformers_defaults_means_gpt2_s_sizes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 3}))
    with torch.device("meta"):
        model = GPT(**module.read_config(tmp_path / "config.json"))
    theirs = GPT2Config(n_layer=3)
    assert (model.sizes["vocab"], model.context, model.dim, model.n_layer, model.n_head) == (
        *(theirs.vocab_size, theirs.n_positions, theirs.n_embd, theirs.n_layer, theirs.n_head),
    )
    assert model.sizes["eps"] == theirs.layer_norm_epsilon


def test_names_of_the_hub_have_their_owners_or_not(monkeypatch):
    asked = []

    def download(repository, name):
        asked.append(repository)
        raise FileNotFoundError

    monkeypatch.setattr(module, "hf_hub_download", download)
    for name in ("distilgpt2", "distilbert/distilgpt2", "openai-community/gpt2-medium"):
        with pytest.raises(FileNotFoundError):
            GPT.load(name)
    assert asked == ["distilbert/distilgpt2"] * 2 + ["openai-community/gpt2-medium"]
    assert GPT.load("distilgpt2", pretrained=False).n_layer == 6
