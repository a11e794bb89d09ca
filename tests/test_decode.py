"""gpt.py writes the texts of transformers' `generate`; its cache computes a plain forward pass."""

import random

import pytest
import torch
from test_gpt import EOS, LAYERS, L, V, past, random_gpt2, same, some_prefix

from gpt import GPT, Cache


@pytest.fixture(scope="module")
def pair():
    source = random_gpt2()
    return source, same(source)


def until_eos(text):
    return text[: text.index(EOS)] if EOS in text else text


def transformers_texts(
    source, prompts, prefix=None, one_by_one=False, banned=(), beams=1, max_new=16, **options
):
    """What transformers' generate writes: prompts padded at the left, or one by one."""
    if one_by_one:
        return [
            transformers_texts(source, [p], prefix, False, banned, beams, max_new, **options)[0]
            for p in prompts
        ]
    longest = max(map(len, prompts))
    tokens = torch.tensor([[EOS] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    if prefix is not None:
        mask = torch.cat(
            [torch.ones(len(prompts), prefix.shape[-2], dtype=torch.long), mask], dim=1
        )
        options["cache"] = past(prefix, len(prompts) * beams)
    if banned:
        options["bad_words_ids"] = [[token] for token in banned]
    options |= {
        "num_beams": beams,
        "max_new_tokens": max_new,
        "do_sample": False,
        "pad_token_id": EOS,
    }
    texts = source.generate(tokens, attention_mask=mask, **options)
    return [until_eos(text) for text in texts[:, longest:].tolist()]


@pytest.fixture(scope="module")
def double_pair():
    """In fp64 no order of sums decides a near tie: texts must be equal. eos is a likely token."""
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
    {"beams": 2},
]


@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_texts_equal_those_of_transformers_batched_and_one_by_one(
    settings, with_prefix, double_pair, prompts
):
    source, model = double_pair
    torch.manual_seed(1)
    prefix = some_prefix(torch.float64)[:2] if with_prefix else None
    theirs = transformers_texts(source, prompts, prefix, **settings)
    ours = model.generate(prompts, prefix, max_new=16, eos=EOS, **settings)
    assert ours == theirs
    assert {type(token) for text in ours for token in text} == {int}
    assert [
        model.generate([p], prefix, max_new=16, eos=EOS, **settings)[0] for p in prompts[:20]
    ] == theirs[:20]
    some = transformers_texts(source, prompts[:5], prefix, one_by_one=True, **settings)
    assert some == theirs[:5]
    assert len({len(text) for text in theirs}) > 2  # some end early
    assert not {5, 7, 11} & {token for text in ours for token in text} or "banned" not in settings


def test_beams_matter(double_pair, prompts):
    _, model = double_pair
    one, two, five = (model.generate(prompts, beams=n, max_new=16, eos=EOS) for n in (1, 2, 5))
    assert one != two != five != one


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
            cache.keep(rows)
            texts = [texts[row] for row in rows]
    assert texts[0][0] != texts[0][1] != texts[0][2]
    assert not torch.allclose(logits[0, 0], logits[0, 1], atol=1e-2)


def test_finished_prompts_leave_the_batch(double_pair, prompts, monkeypatch):
    _, model = double_pair
    sizes = []
    step = Cache.step
    monkeypatch.setattr(
        Cache,
        "step",
        lambda self, parent, token: sizes.append(len(token)) or step(self, parent, token),
    )
    texts = model.generate(prompts, max_new=16, eos=EOS)
    assert sizes == [sum(len(text) > n for text in texts) for n in range(len(sizes))]
    assert sizes[0] > sizes[-1] > 0


def test_texts_that_do_not_fit_the_context_are_refused(pair):
    _, model = pair
    assert model(torch.randint(V, (1, 64 - L)), some_prefix()).shape == (1, 64 - L, V)
    with pytest.raises(ValueError, match="5 prefix vectors and 60 tokens exceed the context of 64"):
        model(torch.randint(V, (1, 60)), some_prefix())
    assert (
        len(model.generate([[1] * 40], some_prefix(), max_new=20, eos=-1)[0]) == 20
    )  # the last one is not read
    with pytest.raises(ValueError, match="need 65 positions of 64"):
        model.generate([[1] * 41], some_prefix(), max_new=20)
    with pytest.raises(ValueError, match="empty"):
        model.generate([[1], []], max_new=20)


@pytest.mark.parametrize("beams", [1, 4])
def test_a_gpt_held_in_bf16_writes_texts_that_fp32_finds_likely(beams, pair, prompts):
    source, model = pair
    torch.manual_seed(0)
    held, prefix = same(source), some_prefix()
    held.cast_frozen_weights()

    def log_p(texts):
        """The mean over all texts of what `model` gives them."""
        rows = [
            model(torch.tensor([p + t]), prefix)[0, len(p) - 1 : -1]
            .log_softmax(-1)[range(len(t)), t]
            .sum()
            .item()
            for p, t in zip(prompts, texts, strict=True)
        ]
        return sum(rows) / len(rows)

    exact, rough = (m.generate(prompts, prefix, beams, max_new=8, eos=-1) for m in (model, held))
    assert log_p(rough) == pytest.approx(log_p(exact), abs=0.2)
    assert log_p(exact[1:] + exact[:1]) < log_p(exact) - 3  # each other's texts


def test_rows_beyond_the_encoding_s_tokens_are_never_scored_and_never_written():
    """A [PAD] that was added, or a table padded to a round number (nanoGPT's 50304)."""
    sizes = {"context": 20, "dim": 16, "n_layer": 1, "n_head": 2}
    padded = GPT(50_304, **sizes).requires_grad_(False)
    plain = GPT(50_257, **sizes).requires_grad_(False)
    state = padded.state_dict()
    plain.load_state_dict(state | {"wte.weight": state["wte.weight"][:50_257]})
    padded.norm.bias.data += 1
    plain.norm.bias.data += 1
    padded.wte.weight.data[50_257:] = 5  # the likeliest of all
    tokens, prompts = torch.randint(50_257, (2, 7)), [[1, 2, 3], [4]]
    assert padded.vocab == 50_257
    torch.testing.assert_close(padded(tokens), plain(tokens), atol=0, rtol=0)
    for beams in (1, 3):
        made = padded.generate(prompts, beams=beams, max_new=5)
        assert made == plain.generate(prompts, beams=beams, max_new=5)
        assert max(token for text in made for token in text) < 50_257
    assert GPT.load("tiny_gpt").vocab == 257
