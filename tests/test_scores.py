"""scores.py: equal to values computed by hand, with any number of references; what is missing is named."""

import sys
from types import SimpleNamespace

import nltk
import pytest
import sacrebleu

from support.corpora import Pair
from support.scores import score

PAIRS = [
    Pair(
        "a",
        [
            "The cat sat on the mat.",
            "A cat was sitting on the mat.",
            "On the mat sat a cat, of course.",
        ],
        "seen",
    ),
    Pair("b", ["Dogs bark loudly at night, always."], "unseen"),
    Pair("c", ["Café Rouge is cheap, isn't it?", "It is cheap: Café Rouge."], "seen"),
]
OUTPUTS = ["The cat sat on a mat.", "Dogs bark at night.", "Café Rouge is cheap."]


@pytest.fixture(autouse=True)
def wordnet(monkeypatch):
    """A WordNet of one entry, for its data cannot come from PyPI: cat and puss mean the same."""
    lemmas = [SimpleNamespace(name=lambda: "cat"), SimpleNamespace(name=lambda: "puss")]
    synsets = {"cat": [SimpleNamespace(lemmas=lambda: lemmas)]}
    stub = SimpleNamespace(ensure_loaded=lambda: None, synsets=lambda word: synsets.get(word, []))
    monkeypatch.setattr(nltk.corpus, "wordnet", stub)
    return stub


def only(output: str, *references: str) -> dict[str, float]:
    return score([output], [Pair("", list(references))])[0]


def test_bleu_is_100_for_a_reference_and_the_geometric_mean_of_precisions_times_brevity_otherwise():
    assert only("a b c d e", "x", "a b c d e")["BLEU"] == pytest.approx(100)
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples: the product is 1/5
    assert only("a b c d x", "a b c d e")["BLEU"] == pytest.approx(100 * 0.2**0.25)


def test_ter_counts_edits_to_the_nearest_reference_per_average_reference_length():
    assert only("a b c d", "a b c e")["TER"] == pytest.approx(100 / 4)
    assert only("a b c d", "a b c e", "v w x y z v w x y z v w")["TER"] == pytest.approx(100 / 8)
    assert only("c d a b", "a b c d")["TER"] == pytest.approx(100 / 4)  # one move of a phrase


def test_nist_weighs_a_word_by_how_rare_the_references_make_it():
    # of four reference words a is every second (1 bit), b every fourth (2 bits); b follows every second a (1 bit)
    assert only("a b", "a b", "a c")["NIST"] == pytest.approx((1 + 2) / 2 + 1)
    assert only("a c", "a b", "a b")["NIST"] == pytest.approx(1 / 2)


def test_meteor_is_a_weighted_mean_of_precision_and_recall_less_a_penalty_for_pieces():
    # all of 3 words and 3 of 4: F = 0.75 / (0.9 + 0.1 * 0.75); one piece of three words: penalty 0.5 / 27
    expected = 100 * 0.75 / 0.975 * (1 - 0.5 / 27)
    assert only("the cat sat", "no match", "the cat sat down")["METEOR"] == pytest.approx(expected)
    assert only("the cat sat", "the puss sat")["METEOR"] == pytest.approx(
        100 * (1 - 0.5 / 27)
    )  # a synonym
    assert only("the dog sat", "the puss sat")["METEOR"] < 70


def test_rouge_takes_the_best_reference_for_every_kind():
    scores = only("the cat sat", "no", "the cat ran off")
    assert scores["ROUGE-1"] == pytest.approx(100 * 2 * 2 / (3 + 4))
    assert scores["ROUGE-2"] == pytest.approx(100 * 2 * 1 / (2 + 3))
    assert scores["ROUGE-L"] == pytest.approx(100 * 2 * 2 / (3 + 4))
    assert only("ran cat the", "the cat ran")["ROUGE-L"] == pytest.approx(100 / 3)  # another order


def test_cider_is_ten_for_the_only_reference_and_the_mean_over_several():
    pairs = [Pair("1", ["a b c d"]), Pair("2", ["e f g h"])]
    assert score(["a b c d", "e f g h"], pairs)[0]["CIDEr"] == pytest.approx(10)
    pairs[0].references.append("i j k l")
    assert score(["a b c d", "e f g h"], pairs)[0]["CIDEr"] == pytest.approx((5 + 10) / 2)


def test_sources_may_have_any_number_of_references():
    scores, missing = score(OUTPUTS, PAIRS)
    assert missing == []
    filled = [
        [*pair.references, *[pair.references[-1]] * 2][:3] for pair in PAIRS
    ]  # saying it twice changes nothing
    streams = [list(stream) for stream in zip(*filled, strict=True)]
    assert scores["BLEU"] == pytest.approx(sacrebleu.corpus_bleu(OUTPUTS, streams).score)
    first = [pair.references[0] for pair in PAIRS]
    assert scores["BLEU"] > sacrebleu.corpus_bleu(OUTPUTS, [first]).score + 1
    ter = sacrebleu.metrics.TER()
    parts = [
        ter.sentence_score(output, pair.references)
        for output, pair in zip(OUTPUTS, PAIRS, strict=True)
    ]
    expected = 100 * sum(part.num_edits for part in parts) / sum(part.ref_length for part in parts)
    assert scores["TER"] == pytest.approx(expected)


def test_every_group_is_scored_as_if_it_were_alone():
    scores, _ = score(OUTPUTS, PAIRS)
    seen, _ = score([OUTPUTS[0], OUTPUTS[2]], [PAIRS[0], PAIRS[2]])
    unseen, _ = score(OUTPUTS[1:2], PAIRS[1:2])
    names = ("BLEU", "TER", "NIST", "METEOR", "ROUGE-1", "ROUGE-2", "ROUGE-L", "CIDEr")
    assert set(scores) == {f"{name}{group}" for name in names for group in ("", " seen", " unseen")}
    assert [scores[f"{name} seen"] for name in names] == [seen[name] for name in names]
    assert [scores[f"{name} unseen"] for name in names] == [unseen[name] for name in names]
    assert scores["BLEU seen"] != scores["BLEU unseen"]


def test_outputs_may_be_empty():
    scores, missing = score(["", "", ""], PAIRS)
    assert missing == []
    assert {value for name, value in scores.items() if not name.startswith("TER")} == {0}
    assert scores["TER unseen"] == 100
    mixed, _ = score(["", *OUTPUTS[1:]], PAIRS)
    assert 0 < mixed["BLEU"] < score(OUTPUTS, PAIRS)[0]["BLEU"]


@pytest.mark.parametrize(
    ("module", "names", "mend"),
    [
        ("sacrebleu.metrics", ["BLEU", "TER"], "pip install sacrebleu"),
        ("nltk.translate.nist_score", ["NIST"], "pip install nltk"),
        ("nltk.translate.meteor_score", ["METEOR"], "python -m nltk.downloader wordnet"),
        ("rouge_score.rouge_scorer", ["ROUGE-1", "ROUGE-2", "ROUGE-L"], "pip install rouge-score"),
        ("pycocoevalcap.cider.cider", ["CIDEr"], "pip install pycocoevalcap"),
    ],
)
def test_a_missing_library_costs_its_scores_alone_and_is_named(module, names, mend, monkeypatch):
    whole, _ = score(OUTPUTS, PAIRS)
    monkeypatch.setitem(sys.modules, module, None)
    scores, missing = score(OUTPUTS, PAIRS)
    assert scores == {name: value for name, value in whole.items() if name.split()[0] not in names}
    assert len(missing) == 1
    assert mend in missing[0]
    assert all(name.split("-")[0] in missing[0] for name in names)


@pytest.mark.parametrize(
    "error", [LookupError("Resource wordnet not found"), OSError("no index.sense")]
)
def test_missing_wordnet_data_is_named_with_how_to_get_it(error, wordnet):
    def ensure_loaded():
        raise error

    wordnet.ensure_loaded = ensure_loaded
    scores, missing = score(OUTPUTS, PAIRS)
    assert missing == [
        "METEOR left out (WordNet is missing or not whole): pip install nltk && python -m nltk.downloader wordnet"
    ]
    assert "METEOR" not in scores
    assert "NIST" in scores
