"""gpt.py and decode.py: equal to transformers and peft on the same weights; what is fast is equal to what is plain."""

import copy
import json
import math
import random

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import save_file
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

import gpt as module
from decode import Cache
from gpt import GPT, CausalAttention, converted
from prefix import SHARE, Prefix

V, D, H, LAYERS, L = 97, 32, 4, 3, 5
EOS = 0


def random_gpt2(noise=0.2, seed=0, **options):
    """A GPT-2 of transformers all of whose parameters, biases and norms too, are random."""
    sizes = {"vocab_size": V, "n_positions": 64, "n_embd": D, "n_layer": LAYERS, "n_head": H}
    torch.manual_seed(seed)
    source = GPT2LMHeadModel(GPT2Config(**sizes | {"bos_token_id": EOS, "eos_token_id": EOS} | options)).eval()
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
    attention, x, prefix = (
        CausalAttention(D, H).requires_grad_(False),
        torch.randn(2, 6, D),
        torch.randn(2, H, L, D // H),
    )
    mask = torch.arange(L + 6) <= torch.arange(6)[:, None] + L
    out = attention(x, prefix, mask)
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).split(D, dim=-1)  # 3 x (B, T, D)
    expected = torch.zeros(2, 6, D)
    for b in range(2):
        for h in range(H):
            head = slice(h * D // H, (h + 1) * D // H)
            for t in range(6):
                keys, values = [*prefix[0, h], *k[b, : t + 1, head]], [*prefix[1, h], *v[b, : t + 1, head]]
                scores = [math.exp(q[b, t, head] @ key / math.sqrt(D // H)) for key in keys]
                for score, value in zip(scores, values, strict=True):
                    expected[b, t, head] += score / sum(scores) * value
    expected = expected @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)  # fp32, another order of sums
    assert not torch.allclose(attention(x, prefix, mask | True), expected, atol=1e-3)  # sees what comes after


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
        assert not torch.allclose(other(tokens), theirs, atol=1e-2)  # a forgotten transpose shows, and any weight


def test_a_prefix_equals_the_same_past_key_values_in_transformers(pair):
    source, model = pair
    tokens, prefix = torch.randint(V, (4, 20)), some_prefix()
    theirs = source(tokens, cache=past(prefix, 4)).logits
    torch.testing.assert_close(model(tokens, prefix), theirs, atol=1e-4, rtol=0)
    assert not torch.allclose(model(tokens, prefix.flip(1)), theirs, atol=1e-2)  # keys and values swapped
    assert not torch.allclose(model(tokens), theirs, atol=1e-2)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # asked for by peft
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # given by peft
@pytest.mark.parametrize("projection", [True, False])
def test_outputs_equal_peft_s_with_the_same_prefix(projection):
    source = random_gpt2()
    model, tokens = same(source), torch.randint(V, (3, 12))
    options = {"num_virtual_tokens": L, "prefix_projection": projection, "encoder_hidden_size": 16}
    theirs = get_peft_model(source, PrefixTuningConfig(task_type="CAUSAL_LM", **options)).eval()
    encoder = theirs.prompt_encoder["default"]
    prefix = Prefix(LAYERS, H, D, L, "deep" if projection else "none", hidden=16, per_layer=False, dropout=0.0)
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
    hooks = [
        part.register_forward_hook(lambda _, x, y: shapes.append(y.shape)) for part in (b.mlp for b in model.blocks)
    ]
    hooks.append(model.blocks[-1].attn.proj.register_forward_hook(lambda _, x, y: shapes.append(y.shape)))
    model(torch.randint(V, (4, 20)), at=torch.randint(20, (4, 7)))
    assert shapes == [(4, 20, D), (4, 20, D), (4, 7, D), (4, 7, D)]
    for hook in hooks:
        hook.remove()


def test_padding_on_the_right_changes_nothing(pair):
    _, model = pair
    prefix, tokens = some_prefix(), torch.randint(V, (2, 20))
    padded = torch.cat([tokens[:, :13], torch.randint(V, (2, 7))], dim=1)
    torch.testing.assert_close(model(padded, prefix)[:, :13], model(tokens, prefix)[:, :13], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(tokens[:, :13], prefix), model(tokens, prefix)[:, :13], atol=1e-4, rtol=1e-5)
    assert not torch.allclose(model(padded, prefix)[:, 13:], model(tokens, prefix)[:, 13:], atol=1e-2)


def test_a_shallow_prefix_is_seen_in_the_first_layer_alone(pair):
    _, model = pair
    tokens, prefix = torch.randint(V, (2, 10)), some_prefix()
    triangle = torch.ones(10, 10, dtype=torch.bool).tril()
    x = model.wte(tokens) + model.wpe[L : L + 10]
    x = model.blocks[0](x, prefix[0], torch.cat([torch.ones(10, L, dtype=torch.bool), triangle], dim=1))
    x = model.blocks[2](model.blocks[1](x, None, triangle), None, triangle)
    torch.testing.assert_close(model(tokens, prefix[:1]), model.norm(x) @ model.wte.weight.T, atol=1e-4, rtol=0)
    assert not torch.allclose(model(tokens, prefix), model(tokens, prefix[:1]), atol=1e-2)


def test_a_prefix_per_text_equals_each_text_alone_with_its_prefix(pair):
    _, model = pair
    tokens, prefix = torch.randint(V, (3, 10)), torch.stack([some_prefix() for _ in range(3)], dim=2)
    alone = torch.cat([model(tokens[b : b + 1], prefix[:, :, b]) for b in range(3)])
    torch.testing.assert_close(model(tokens, prefix), alone, atol=1e-4, rtol=0)
    assert not torch.allclose(model(tokens, prefix[:, :, 0]), alone, atol=1e-2)


def test_every_share_makes_a_prefix_for_gpt_and_simple_share_treats_it_as_tokens(pair):
    _, model = pair
    for share in SHARE:
        prefix = Prefix(LAYERS, H, D, L, share, hidden=16, per_layer=False, init_scale=model.prompt_scale).eval()
        assert prefix(model).shape == (LAYERS, 2, H, L, D // H)
        if share == "simple":
            block = model.blocks[1]
            _, k, v = block.attn.heads(block.norm1(prefix.p), slice(0, 3))  # as if p were tokens
            torch.testing.assert_close(prefix(model)[1], torch.stack([k[0], v[0]]))


def test_gates_are_shown_when_asked_for_sum_to_one_and_change_nothing(pair):
    _, model = pair
    tokens, prefix, gates = torch.randint(V, (4, 20)), some_prefix(), []
    at = torch.randint(20, (4, 7))
    torch.testing.assert_close(model(tokens, prefix, at, gates), model(tokens, prefix, at), atol=1e-4, rtol=0)
    assert [gate.shape for gate in gates] == [(4, H, 20, L + 20)] * 2 + [(4, H, 7, L + 20)]
    for gate in gates:
        torch.testing.assert_close(gate.sum(-1), torch.ones(gate.shape[:-1]))
    later = torch.arange(20) > torch.arange(20)[:, None]
    assert gates[0][..., L:][..., later].max() == 0  # nobody sees what comes after
    assert gates[0][..., :L].min() > 0  # everybody sees the prefix
    assert gates[0][..., L:][..., ~later].min() > 0


def until_eos(text):
    return text[: text.index(EOS)] if EOS in text else text


def transformers_texts(source, prompts, prefix=None, one_by_one=False, banned=(), beams=1, max_new=16, **options):
    """What transformers' generate writes: prompts of one batch padded at the left, or one by one."""
    if one_by_one:
        return [transformers_texts(source, [p], prefix, False, banned, beams, max_new, **options)[0] for p in prompts]
    longest = max(map(len, prompts))
    tokens = torch.tensor([[EOS] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    if prefix is not None:
        mask = torch.cat([torch.ones(len(prompts), prefix.shape[-2], dtype=torch.long), mask], dim=1)
        options["cache"] = past(prefix, len(prompts) * beams)
    if banned:
        options["bad_words_ids"] = [[token] for token in banned]
    options |= {"num_beams": beams, "max_new_tokens": max_new, "do_sample": False, "pad_token_id": EOS}
    texts = source.generate(tokens, attention_mask=mask, **options)
    return [until_eos(text) for text in texts[:, longest:].tolist()]


@pytest.fixture(scope="module")
def double_pair():
    """In fp64 no near tie is decided by the order of sums, so texts must be equal; eos is likelier than most tokens."""
    source = random_gpt2(noise=0.45, seed=2, n_layer=2)
    source.transformer.wte.weight.data[EOS] *= 3
    source.double()
    return source, same(source)


@pytest.fixture(scope="module")
def prompts():
    draw = random.Random(0)
    return [[draw.randrange(1, V) for _ in range(draw.randrange(1, 15))] for _ in range(50)]


SETTINGS = [
    {"beams": 1},
    {"beams": 1, "banned": (5, 7, 11)},
    {"beams": 5},
    {"beams": 5, "banned": (5, 7, 11)},
    {"beams": 5, "length_penalty": 0.6},
    {"beams": 5, "length_penalty": 2.0, "banned": (5, 7, 11)},
    {"beams": 2, "length_penalty": 0.0},
    {"beams": 3, "length_penalty": -1.0},
]


@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_texts_equal_those_of_transformers_batched_and_one_by_one(settings, with_prefix, double_pair, prompts):
    source, model = double_pair
    torch.manual_seed(1)
    prefix = some_prefix(torch.float64)[:2] if with_prefix else None
    theirs = transformers_texts(source, prompts, prefix, **settings)
    ours = model.generate(prompts, prefix, max_new=16, eos=EOS, **settings)
    assert ours == theirs
    assert {type(token) for text in ours for token in text} == {int}
    assert [model.generate([p], prefix, max_new=16, eos=EOS, **settings)[0] for p in prompts[:20]] == theirs[:20]
    some = transformers_texts(source, prompts[:5], prefix, one_by_one=True, **settings)
    assert some == theirs[:5]
    assert len({len(text) for text in theirs}) > 2  # some end early
    assert not {5, 7, 11} & {token for text in ours for token in text} or "banned" not in settings


def test_beams_and_length_penalties_matter(double_pair, prompts):
    _, model = double_pair
    texts = [
        model.generate(prompts, beams=beams, max_new=16, length_penalty=penalty, eos=EOS)
        for beams, penalty in ((1, 1.0), (5, 1.0), (5, 0.6), (5, 2.0))
    ]
    assert all(a != b for i, a in enumerate(texts) for b in texts[:i])
    assert sum(map(len, texts[2])) < sum(map(len, texts[1])) < sum(map(len, texts[3]))


@pytest.mark.parametrize("depth", [0, 1, LAYERS])
def test_the_cached_decoder_equals_the_uncached_forward_at_every_step(depth, pair):
    _, model = pair
    torch.manual_seed(0)
    prefix = some_prefix()[:depth] if depth else None
    texts = [[[3, 1, 4]], [[1, 5]], [[9, 2, 6, 5]], [[3]]]  # every prompt's beams, one at first
    cache, width = Cache(model, [beams[0] for beams in texts], prefix, room=18), 3
    for step in range(6):
        if step:
            parent = torch.randint(len(texts[0]), (len(texts), width))
            token = torch.randint(V, (len(texts), width))
            texts = [
                [beams[i] + [t] for i, t in zip(*pair, strict=True)]
                for beams, *pair in zip(texts, parent.tolist(), token.tolist(), strict=True)
            ]
            logits = cache.step(parent, token)
        else:
            logits = cache.logits
        for row, beams in enumerate(texts):
            for w, text in enumerate(beams):
                expected = model(torch.tensor([text]), prefix)[0, -1]
                torch.testing.assert_close(logits[row, w], expected, atol=1e-4, rtol=0)
        if step in (2, 4):  # prompts leave the batch
            rows = [0, 3] if step == 2 else [1]
            order = cache.keep(rows)
            assert sorted(order) == rows
            texts = [texts[row] for row in order]
    assert texts[0][0] != texts[0][1] != texts[0][2]
    assert not torch.allclose(logits[0, 0], logits[0, 1], atol=1e-2)


def test_finished_prompts_leave_the_batch(double_pair, prompts, monkeypatch):
    _, model = double_pair
    sizes = []
    step = Cache.step
    monkeypatch.setattr(
        Cache, "step", lambda self, parent, token: sizes.append(len(token)) or step(self, parent, token)
    )
    texts = model.generate(prompts, max_new=16, eos=EOS)
    assert sizes == [sum(len(text) > n for text in texts) for n in range(len(sizes))]
    assert sizes[0] > sizes[-1] > 0


def test_texts_that_do_not_fit_the_context_are_refused(pair):
    _, model = pair
    assert model(torch.randint(V, (1, 64 - L)), some_prefix()).shape == (1, 64 - L, V)
    with pytest.raises(ValueError, match="5 prefix vectors and 60 tokens exceed the context of 64"):
        model(torch.randint(V, (1, 60)), some_prefix())
    assert len(model.generate([[1] * 40], some_prefix(), max_new=20, eos=-1)[0]) == 20  # the last one is not read
    with pytest.raises(ValueError, match="need 65 positions of 64"):
        model.generate([[1] * 41], some_prefix(), max_new=20)
    with pytest.raises(ValueError, match="empty"):
        model.generate([[1], []], max_new=20)


def test_bf16_is_close_even_where_all_logits_are_far_from_zero():
    model, tokens, prefix = same(random_gpt2()), torch.randint(V, (4, 20)), some_prefix()
    model.wte.weight += 4 * torch.randn(D)  # in all logits of a token, as in the real GPT-2
    exact = model(tokens, prefix)
    assert exact.mean(-1).abs().max() > 50
    plain = copy.deepcopy(model)
    plain.wte.to(torch.bfloat16)
    model.hold_in_bf16()
    assert {p.dtype for p in model.blocks.parameters()} == {torch.bfloat16, torch.float32}
    assert (model.wte.weight.dtype, model.wpe.dtype, model.norm.weight.dtype) == (torch.bfloat16, *[torch.float32] * 2)
    with torch.autocast("cpu", torch.bfloat16):
        errors = [m(tokens, prefix).float().log_softmax(-1) - exact.log_softmax(-1) for m in (model, plain)]
    assert errors[0].std() < 0.01
    assert errors[1].std() > 0.1  # if wte is only cast


@pytest.mark.parametrize("beams", [1, 4])
def test_a_gpt_held_in_bf16_writes_texts_that_fp32_finds_likely(beams, pair, prompts):
    source, model = pair
    torch.manual_seed(0)
    held, prefix = same(source), some_prefix()
    held.hold_in_bf16()

    def log_p(texts):
        """The mean over all texts of what `model` gives them."""
        rows = [
            model(torch.tensor([p + t]), prefix)[0, len(p) - 1 : -1].log_softmax(-1)[range(len(t)), t].sum().item()
            for p, t in zip(prompts, texts, strict=True)
        ]
        return sum(rows) / len(rows)

    exact, rough = (m.generate(prompts, prefix, beams, max_new=8, eos=-1) for m in (model, held))
    assert log_p(rough) == pytest.approx(log_p(exact), abs=0.2)
    assert log_p(exact[1:] + exact[:1]) < log_p(exact) - 3  # each other's texts


def test_torch_compile_finds_no_graph_break():
    model = same(random_gpt2(n_layer=2))
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for batch, count in ((2, 20), (3, 17)):
        tokens, at, prefix = torch.randint(V, (batch, count)), torch.randint(count, (batch, 5)), some_prefix()[:2]
        torch.testing.assert_close(compiled(tokens, prefix, at), model(tokens, prefix, at))


def test_random_weights_are_drawn_as_gpt2_s():
    torch.manual_seed(0)
    model = GPT(vocab=1000, context=500, dim=128, n_layer=8, n_head=4)
    expected = {"wte.weight": 0.02, "wpe": 0.02, "qkv.weight": 0.02, "fc1.weight": 0.02}
    expected |= {"proj.weight": 0.02 / 4, "fc2.weight": 0.02 / 4, "bias": 0.0}
    for name, parameter in model.named_parameters():
        std = next((std for end, std in expected.items() if name.endswith(end)), None)
        assert parameter.std().item() == pytest.approx(std or 0.0, rel=0.03), name  # norms: all ones
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(**module.HUB["gpt2"]).parameters()) == 124_439_808


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_saved_gpt2_loads_under_either_style_of_names(prefix, pair, tmp_path, monkeypatch):
    source, _ = pair
    source.save_pretrained(tmp_path)
    state = {prefix + name: value.contiguous() for name, value in source.transformer.state_dict().items()}
    for i in range(LAYERS):  # as in the hub's files
        state[f"{prefix}h.{i}.attn.bias"] = torch.ones(64, 64).tril()[None, None]
        state[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state | {"lm_head.weight": torch.zeros(V, D)}, tmp_path / "model.safetensors")
    tokens = torch.randint(V, (2, 9))
    model = GPT.load(str(tmp_path))
    torch.testing.assert_close(model(tokens), source(tokens).logits, atol=1e-4, rtol=0)
    asked = []
    monkeypatch.setattr(module, "HUB", {"gpt2": {"vocab": V, "context": 64, "dim": D, "n_layer": LAYERS, "n_head": H}})
    monkeypatch.setattr(module, "hf_hub_download", lambda *a: asked.append(a) or str(tmp_path / "model.safetensors"))
    torch.testing.assert_close(GPT.load("gpt2")(tokens), model(tokens), atol=0, rtol=0)
    assert asked == [("openai-community/gpt2", "model.safetensors")]
    assert not torch.allclose(GPT.load("gpt2", pretrained=False)(tokens), model(tokens), atol=1e-2)
    assert len(asked) == 1


def test_a_saved_gpt_loads_as_it_was_and_names_without_weights_are_known(pair, tmp_path):
    _, model = pair
    path, tokens = tmp_path / "gpt.safetensors", torch.randint(V, (2, 9))
    save_file(model.state_dict(), path, {"gpt": json.dumps(model.sizes)})
    loaded = GPT.load(str(path))
    assert loaded.sizes == model.sizes
    torch.testing.assert_close(loaded(tokens), model(tokens), atol=0, rtol=0)
    assert GPT.load("scratch_gpt").reads == "bytes"
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
    refused(saved(state, sizes | {"dim": 64}), "wte.weight has another shape|has another shape")
    refused(saved(state, sizes | {"n_layer": 4}), "blocks.3.attn.proj.bias is missing")
    refused(saved(state | {"head": torch.ones(1)}, sizes), "head is unknown")
    refused("gpt-3", "no GPT 'gpt-3'; possible are gpt2, ")
    monkeypatch.setattr(module, "TINY_GPT_WEIGHTS", tmp_path / "tiny_gpt.safetensors")
    refused("tiny_gpt", "tiny_gpt.safetensors", FileNotFoundError)
    source.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    GPT.load(str(tmp_path))  # this one is not refused
    for name, value in (
        ("activation_function", "relu"),
        ("n_inner", 3 * D),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        refused(tmp_path, f"says {name} {value}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused(tmp_path, "describes no GPT-2")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "damaged")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "config.json", FileNotFoundError)
