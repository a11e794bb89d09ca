"""language.py: encodings, the batches of tokens and labels that a model learns, two made tasks."""

import hashlib
import json
from dataclasses import asdict
from itertools import chain

import numpy as np
import pytest
import requests
import tiktoken
import torch
import torch.nn.functional as F

from data import load
from support import language
from support.corpora import TEXT_TASKS
from support.files import UsageError
from support.language import EOT, Pair, Template, Text, encoding

BYTES = encoding("bytes")


def make(n: int = 83) -> Text:
    """n sources of very different lengths with one or two references, each of its own."""
    rng = np.random.default_rng(0)
    pairs = [
        Pair(f"s{i}" * rng.integers(1, 9), [f"t{i}" * rng.integers(1, 9), f"u{i}"][: 1 + i % 2])
        for i in range(n)
    ]
    return Text("made", "bytes", Template(), {"train": pairs, "val": pairs[:9], "test": pairs[:9]})


def test_bytes_need_no_vocabulary_and_no_text_can_forge_the_end():
    for content in ("plain", "naïve £ 東京 \n\t🙂", EOT, ""):
        tokens = BYTES.encode_ordinary(content)
        assert tokens == list(content.encode())
        assert BYTES.decode(tokens) == content
    assert (BYTES.n_vocab, BYTES.eot_token) == (257, 256)


def test_a_vocabulary_that_cannot_be_fetched_is_a_sentence_with_what_to_save_where(
    tmp_path, monkeypatch
):
    def offline(url):
        raise requests.exceptions.ConnectionError(f"no way to {url}")

    monkeypatch.setattr(requests, "get", offline)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(
        UsageError, match=r"cannot be fetched \(no way to .*TIKTOKEN_CACHE_DIR"
    ) as error:
        encoding("gpt2")
    assert "/vocab.bpe as 6d1cbeee0f20b3d9449abfede4726ed8212e3aee" in str(error.value)
    assert "/encoder.json as 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6" in str(error.value)


def test_every_label_is_the_token_after_its_column_and_a_row_s_labels_are_its_target():
    data = make()
    left = sorted((tuple(source), tuple(target)) for source, target in data.examples("train"))
    for tokens, at, labels in data.batches("train", 8, seed=1):
        assert (tokens.dtype, at.dtype, labels.dtype, at.shape) == (
            *3 * [torch.int64],
            labels.shape,
        )
        for row, columns, target in zip(tokens, at, labels, strict=True):
            columns, target = columns[target != -100], target[target != -100]
            bos = int(columns[0])
            assert columns.tolist() == list(range(bos, bos + len(target)))
            assert torch.equal(row[columns[1:]], target[:-1])
            assert row[bos] == target[-1] == BYTES.eot_token
            left.remove((tuple(row[: bos + 1].tolist()), tuple(target.tolist())))
    assert not left


def loss(tokens, at, labels):
    """The official loss under a model whose columns see themselves and the columns before them."""
    torch.manual_seed(0)
    embedding = torch.randn(257, 16)
    seen = embedding[tokens].cumsum(1)  # (B, T, 16)
    logits = seen.gather(1, at[..., None].expand(-1, -1, 16)) @ embedding.T
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100
    ) / len(tokens)


def test_the_loss_is_the_sum_over_each_sequence_alone_whatever_its_padding_holds():
    data = make()
    tokens, at, labels = next(data.batches("train", 16, seed=0))
    expected = loss(tokens, at, labels)
    alone = [
        loss(row[: n + 1][None], c[None], y[None])
        for row, n, c, y in zip(tokens, at.amax(1), at, labels, strict=True)
    ]
    torch.testing.assert_close(torch.stack(alone).mean(), expected)
    padding = torch.arange(tokens.shape[1]) > at.amax(1, keepdim=True)
    assert padding.any()
    torch.testing.assert_close(
        loss(tokens.masked_fill(padding, 7), at, labels), expected, rtol=0, atol=0
    )
    assert not torch.isclose(
        loss(tokens.masked_fill(~padding, 7), at, labels), expected
    )  # what is read does count


def test_changing_a_source_changes_no_label():
    data, other = make(), make()
    for pair in other.splits["train"]:
        pair.source = pair.source.upper()
    for (tokens, at, labels), (others, others_at, others_labels) in zip(
        data.batches("train", 8, seed=3), other.batches("train", 8, seed=3), strict=True
    ):
        assert torch.equal(labels, others_labels)
        assert torch.equal(at, others_at)
        assert not torch.equal(tokens, others)


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_an_epoch_holds_every_example_once_and_depends_on_seed_and_epoch_alone(seed):
    def epoch(**order):
        return [
            [tuple(y[y >= 0].tolist()) for y in labels]
            for _, _, labels in data.batches("train", 8, **order)
        ]

    data = make()
    expected = sorted(tuple(target) for _, target in data.examples("train"))
    first = epoch(seed=seed, epoch=0)
    assert sorted(chain.from_iterable(first)) == expected
    assert sorted(map(len, first)) == [
        4,
        *15 * [8],
    ]  # 83 sources, 41 of them with a second reference
    assert first == epoch(seed=seed, epoch=0)
    assert first != epoch(seed=seed, epoch=1)
    assert first != epoch(seed=seed + 1, epoch=0)


def test_batches_are_of_like_length_and_shuffled_while_training():
    rng = np.random.default_rng(0)
    pairs = [Pair("s" * n, ["t" * n]) for n in rng.integers(5, 100, 2000)]
    data = Text("made", "bytes", Template(), {"train": pairs, "val": pairs, "test": pairs})
    filled = sum(2 * len(pair.source) + 5 for pair in pairs)

    def padding(batches):
        return 1 - filled / sum(tokens.numel() for tokens in batches)

    training, in_order = (
        [b[0] for b in data.batches("train", 10, **kind)] for kind in ({"seed": 0}, {})
    )
    assert padding(in_order) <= padding(training) < 0.03
    widths = [tokens.shape[1] for tokens in in_order]
    assert widths == sorted(widths)
    widths = [tokens.shape[1] for tokens in training]
    assert (
        np.corrcoef(widths[1:], widths[:-1])[0, 1] < 0.2
    )  # long and short batches follow each other at random
    apart = [
        torch.zeros(10, max(2 * len(pair.source) + 5 for pair in pairs[i : i + 10]))
        for i in range(0, 2000, 10)
    ]
    assert padding(apart) > 0.3  # in the order of the file


def test_a_smaller_fraction_is_part_of_a_larger_one_and_the_same_in_every_epoch():
    data = make()
    sizes = [data.count("train", fraction) for fraction in (0.001, 0.1, 0.5, 1)]
    assert sizes == [1, 12, 62, 124]

    def targets(fraction, epoch):
        labels = [y for *_, y in data.batches("train", 8, seed=1, epoch=epoch, fraction=fraction)]
        return {tuple(row[row >= 0].tolist()) for part in labels for row in part}

    assert targets(0.1, 0) == targets(0.1, 1)
    assert targets(0.1, 0) < targets(0.5, 3) < targets(1, 0)


def test_there_is_one_prompt_per_source_and_an_output_is_stripped():
    data = make()
    prompts = [BYTES.decode(tokens) for tokens in data.prompts("val")]
    assert prompts == [f" {pair.source} {EOT}" for pair in data.splits["val"]]
    for (_, targets), pair in zip(data.tokens("val"), data.splits["val"], strict=True):
        assert data.decode(targets[0].tolist()[:-1]) == pair.references[0]
    assert data.decode([32, 0xC3, 0xA9, 0xC3]) == "é\ufffd"  # the second letter is cut
    assert data.decode([]) == ""


# The made tasks


@pytest.fixture(scope="module")
def told() -> dict[str, dict[str, list[Pair]]]:
    return {"restaurants": language.restaurants(), "guidebook": language.guidebook()}


def meaning(pair: Pair) -> tuple[str, ...]:
    attributes = dict(attribute.split(" : ") for attribute in pair.source.split(" | "))
    return attributes["food"], attributes["price"], attributes["area"]


def test_restaurants_ask_for_combinations_that_were_never_shown_of_values_that_were(told):
    meanings = {split: {meaning(p) for p in made} for split, made in told["restaurants"].items()}
    for split in ("val", "test"):
        assert not meanings[split] & meanings["train"]
        assert set(chain(*meanings[split])) <= set(chain(*meanings["train"]))
    assert not meanings["val"] & meanings["test"]
    assert {split: len(made) for split, made in meanings.items()} == {
        "train": 80,
        "val": 10,
        "test": 30,
    }


def test_a_restaurant_is_said_in_three_ways_each_with_all_its_values(told):
    for pair in chain(*told["restaurants"].values()):
        values = [attribute.split(" : ")[1] for attribute in pair.source.split(" | ")]
        assert len(set(pair.references)) == 3
        assert all(value in reference for value in values for reference in pair.references)


def test_the_guidebook_has_all_words_of_the_restaurants_but_no_restaurant_and_no_price_of_food(
    told,
):
    known, asked = (list(chain(*told[task].values())) for task in ("guidebook", "restaurants"))

    def words(pairs):
        return {word.strip(".,?:") for p in pairs for text in p.references for word in text.split()}

    names = {pair.source.split(" | ")[0].split(" : ")[1] for pair in known + asked}
    assert words(asked) - words(known) - names == {"restaurant"}
    assert len({pair.source for pair in known}) == len(known)
    assert not [pair for pair in known if " food : " in pair.source and " price : " in pair.source]
    assert [pair for pair in known if " food : " in pair.source and " area : " in pair.source]


@pytest.mark.parametrize(
    ("task", "sha256"),
    [
        ("restaurants", "617786f2022df2155709bed70df8498a98447d4ecad783dcaa25a346ef878c2e"),
        ("guidebook", "b52450094352d7de8667fa4329a282f5f6b106c429770dec251910f7f20dc049"),
    ],
    ids=["restaurants", "guidebook"],
)
def test_the_made_tasks_are_the_same_on_every_machine_and_fit_the_tiny_gpt(task, sha256, told):
    rows = {split: [asdict(pair) for pair in made] for split, made in told[task].items()}
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == sha256
    sizes = {split: sum(len(p.references) for p in made) for split, made in told[task].items()}
    assert sizes == TEXT_TASKS[task].sizes
    data = Text(task, "bytes", Template(), told[task])
    data.must_fit(256, ["val", "test"])
    longest = max(told[task]["train"], key=lambda p: len(p.source + max(p.references, key=len)))
    assert len(longest.source) + max(map(len, longest.references)) <= 200


def test_a_text_task_is_loaded_in_its_own_encoding_if_none_is_named(tmp_path):
    data = load("restaurants", tmp_path)
    assert data.encoding.name == "bytes"
    assert load("restaurants", tmp_path, encoding="gpt2").vocabulary == "gpt2"
    assert data.splits == language.restaurants()
