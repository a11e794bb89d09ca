"""metrics.py: what the official programs print, with any number of references and with groups.

SAMPLE: an output, then its references. All but the last two blocks come from the development set of
the E2E NLG challenge (CC BY-SA 4.0), with mistakes made on purpose. E2E and COCO are what
e2e-metrics printed for it (measure_scores.py -p). WEBNLG is what
multi-bleu.perl, METEOR 1.5 and tercom 7.25 printed for it, prepared by the challenge's rules.
"""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import sacrebleu

from extras.score import main
from support.metrics import RULES, score

# ruff: noqa: RUF001 - the dash is one that the WebNLG rules must turn into ASCII
SAMPLE = """
Aromi has an average customer rating in Riverside that provides food.
Aromi has an average customer rating in Riverside that provides Chinese food.

Aromi is a coffee shop Chinese providing food is It located in the riverside. Its rating is
The highly rated and kid friendly Aromi coffee shop serves Chinese food in the riverside area.

An English coffee shop Clowns has a 5 of of out 5 is in the city centre near Clare Hall.
Clowns is an English coffee shop near Clare Hall in the city centre with a rating of 5 out of 5.
An English coffee shop Clowns has a rating of 5 out of 5 is in the city centre near Clare Hall.

There is a place in the centre, Alimentum, that is not family-friendly.
There is a place in the city centre, Alimentum, that is not family-friendly.
In the city centre there is a venue name Alimentum, this is not a family-friendly venue.
Alimentum is not a family-friendly place, located in city centre.
Alimentum is not a family-friendly arena and is located in the city centre.

Bibimbap House in city centre near Café Sicilia.
By the riverside and near Café Sicilia is Bibimbap House.
Bibimbap House is near Café Sicilia. It is located on the riverside.
By the riverside, close to Café Sicilia, a Bibimbap House can be found.
Bibimbap House can be found in the riverside area near Café Sicilia.

Cocum a coffee shop that inexpensive is not and family friendly.
Cocum is a coffee shop that is inexpensive and not family friendly.
Cocum is a coffee shop that is not family friendly and serves British food.
The coffee shop Cocum does not allow children but is cheap.
Cocum is a coffee shop that is in the low price range and is rated one star.

House Midsummer is located near The Bakers and boasts a out of customer 5 rating.
Midsummer House has a customer rating of 5 out of 5 and is near The Bakers.
Midsummer House is a 5 out of 5 rated place near The Bakers.
Midsummer House has a customer rating of 5 out of 5 and is located near The Bakers.
Midsummer House has a 5 out of 5 customer rating and is located near The Bakers

The Eagle is Brazil in city centre. It has a low customer rating.
Near Café Brazil in the city centre is a low rated family-friendly restaurant called The Eagle.
The Eagle is a low rated family-friendly restaurant near Café Brazil in the city centre.

The Mill is a high coffee shop that sells in Chinese food riverside near The Sorrento.
The Mill is a high end coffee shop that sells Chinese food in riverside near The Sorrento.

The Punter is a children-friendly restaurant in riverside with a low customer rating.
The Punter its a great place on riverside , has an average rating but not good for family
The Punter is in riverside, rated average but not family-friendly.
The Punter its on the area of riverside with a average rating is not recommended for family
The Punter, in riverside, is rated average but not a good choice for family.

The Wrestlers has a of customer 5 out 5. of However, we are not family-friendly.
With a customer rating of 5 out of 5, The Wrestlers is not family-friendly.
The Wrestlers has a customer rating of 5 out of 5. However, we are not family-friendly.
The Wrestlers has received a 5 out of 5 customer rating it is not family-friendly.
The Wrestlers is not family-friendly and has received 5 out of 5 for customer rating.

Riverside area, near Raja Indian Cuisine, high customer rating named Travellers Rest Beefeater.
Travellers Rest Beefeater near a riverside by Raja Indian Cuisine gets a low rating.
Travellers Rest Beefeater located near Raja Indian Cuisine offers low-rated food in riverside.

Café İzmir–Nord serves 1½ litres of çay at 5.50.
Café İzmir-Nord sells 1½ litres of çay for 5.50.
At İzmir–Nord's café, 1½ litres of çay cost 5.50.

It's cheap.
The Punter is cheap, isn't it?
"""
E2E = {"BLEU": 45.44, "NIST": 6.0719}
COCO = {"METEOR": 39.15, "ROUGE-L": 64.53, "CIDEr": 3.3597}
WEBNLG = {
    "BLEU": 45.99, "METEOR": 39.52, "TER": 37.97,
    "BLEU seen": 35.14, "METEOR seen": 31.53, "TER seen": 53.70,
    "BLEU unseen": 53.82, "METEOR unseen": 46.54, "TER unseen": 23.63,
}  # fmt: skip

java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java: default-jre-headless")


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")


def pair(*references: str, group: str = "") -> SimpleNamespace:
    return SimpleNamespace(references=list(references), group=group)


BLOCKS = [block.split("\n") for block in SAMPLE.strip().split("\n\n")]
OUTPUTS = [block[0] for block in BLOCKS]
PAIRS = [pair(*b[1:], group=("unseen", "seen")[i % 2]) for i, b in enumerate(BLOCKS)]


def only(output: str, *references: str, rules: str = "plain") -> dict[str, float]:
    return score([output], [pair(*references)], rules)[0]


@pytest.mark.slow  # METEOR reads its tables at every start
@java
def test_e2e_is_scored_as_e2e_metrics_scores_it():
    scores, missing = score(OUTPUTS, [pair(*p.references) for p in PAIRS], "e2e")
    assert missing == []
    assert scores == pytest.approx(E2E | COCO, abs=0.006)  # it prints four digits of a fraction
    assert score(OUTPUTS, PAIRS)[0]["rougeL"] != pytest.approx(COCO["ROUGE-L"], abs=0.5)


@pytest.mark.long  # METEOR reads its tables at every start
@java
def test_webnlg_is_scored_as_the_challenge_scores_it_in_all_and_in_every_group():
    scores, missing = score(OUTPUTS, PAIRS, "webnlg")
    assert missing == []
    assert scores == pytest.approx(WEBNLG, abs=0.006)  # they print two digits
    assert scores["BLEU"] != pytest.approx(E2E["BLEU"], abs=0.1)


def multi_bleu(outputs: list[str], references: list[list[str]]) -> float:
    """multi-bleu.perl in plain loops, on texts whose words have a space between them."""
    matched, made, written, wanted = [0] * 4, [0] * 4, 0, 0
    for output, own in zip(outputs, references, strict=True):
        words = output.split()
        lengths = [len(reference.split()) for reference in own]
        written += len(words)
        wanted += min(lengths, key=lambda length: (abs(length - len(words)), length))
        for n in range(1, 5):
            runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
            made[n - 1] += len(runs)
            for run in set(runs):
                most = 0
                for reference in own:
                    r = reference.split()
                    most = max(most, sum(tuple(r[i : i + n]) == run for i in range(len(r))))
                matched[n - 1] += min(runs.count(run), most)
    precision = math.prod(m / n for m, n in zip(matched, made, strict=True)) ** 0.25
    return 100 * precision * math.exp(min(0, 1 - wanted / written))


def test_an_absent_reference_is_an_empty_line_for_webnlgs_bleu_and_only_three_count(no_java):
    outputs = ["the cat sat on a mat .", "it is cheap", "yes it is the cat on the mat"]
    references = [
        [
            "the cat sat on the mat .",
            "a cat was there , on the mat of a house .",
            "x y",
            outputs[0],
        ],
        ["it is cheap , and it is good"],  # written: 3 words, 4 from 7; the empty line is nearer
        ["it is the cat on the big mat", "yes the cat"],
    ]
    scores, _ = score(outputs, [pair(*own) for own in references], "webnlg")
    three = [[*own[:3], "", ""][:3] for own in references]
    assert scores["BLEU"] == pytest.approx(multi_bleu(outputs, three))
    assert scores["BLEU"] != pytest.approx(multi_bleu(outputs, [own[:3] for own in references]))


def test_webnlgs_texts_lose_capitals_and_accents_and_signs_stand_alone(no_java):
    scores = only("Café-Bar ÉTÉ, (İzmir)", "cafe - bar ete , ( izmir )", rules="webnlg")
    assert scores["BLEU"] == pytest.approx(100)
    assert scores["TER"] == 0
    # an output is made ASCII before it is split, a reference afterwards: "1 1 / 2 x", "1 1/2 x"
    assert only("1½ x", "1½ x", rules="webnlg")["TER"] == pytest.approx(100 * 3 / 3)


def test_ter_is_sacrebleus_on_the_prepared_texts_and_every_sentence_is_counted_once(
    no_java, monkeypatch
):
    outputs = ["a b c , d", "c d a b", "a"]
    pairs = [
        pair("a b c d", "a b , d", group="x"),
        pair("a b c d", group="y"),
        pair("b", group="x"),
    ]
    streams = [["a b c d", "a b c d", "b"], ["a b , d", None, None]]
    expected = sacrebleu.metrics.TER().corpus_score(outputs, streams).score
    calls, sentence = [], sacrebleu.metrics.TER.sentence_score
    counting = lambda self, *own: calls.append(own[0]) or sentence(self, *own)  # noqa: E731
    monkeypatch.setattr(sacrebleu.metrics.TER, "sentence_score", counting)
    scores, _ = score(outputs, pairs, "webnlg")
    assert calls == outputs
    assert scores["TER"] == pytest.approx(expected)
    assert scores["TER y"] == pytest.approx(100 / 4)  # one move of a phrase
    assert scores["TER x"] != scores["TER"]


def test_nist_weighs_a_word_by_how_rare_the_references_make_it(no_java):
    # a is every second of 4 reference words (1 bit), b every fourth (2), b after a every second (1)
    assert only("a b", "a b", "a c", rules="e2e")["NIST"] == pytest.approx((1 + 2) / 2 + 1)
    assert only("a c", "a b", "a b", rules="e2e")["NIST"] == pytest.approx(1 / 2)
    # two thirds of the references' length: half of (1.58 + 1.58) / 2 + 0
    assert only("a b", "a b c", rules="e2e")["NIST"] == pytest.approx(math.log2(3) / 2)


def test_nist_expects_the_mean_length_of_each_source_s_references(no_java):
    pairs = [pair("a b c d e f"), pair("a b", "a b", "a b")]  # 6 and 2 words; Perl expects 12 / 2
    scores, _ = score(["a b c d", "a b"], pairs, "e2e")
    penalty = math.exp(math.log(0.5) * (math.log(6 / 8) / math.log(1.5)) ** 2)
    # of 12 words, a and b are 4 each, c is 1; c comes once after b, and once after a b
    words, twos, threes = (4 * math.log2(3) + 2 * math.log2(12)) / 6, 2 / 4, 2 / 2
    assert scores["NIST"] == pytest.approx(penalty * (words + twos + threes))


def test_rouge_takes_the_best_reference_and_stems_and_xsum_names_it_as_its_papers_do():
    scores = only("the cats sat", "no", "the cat ran off", rules="xsum")
    assert scores["ROUGE-1"] == pytest.approx(100 * 2 * 2 / (3 + 4))
    assert scores["ROUGE-2"] == pytest.approx(100 * 2 * 1 / (2 + 3))
    assert scores["ROUGE-L"] == pytest.approx(100 * 2 * 2 / (3 + 4))
    assert only("ran cat the", "the cat ran", rules="xsum")["ROUGE-L"] == pytest.approx(100 / 3)


def test_plain_texts_have_sacrebleus_bleu_and_rouge_under_names_that_say_so():
    scores, missing = score(OUTPUTS, PAIRS)
    assert missing == []
    streams = [[(p.references + [None] * 4)[k] for p in PAIRS] for k in range(4)]
    assert scores["sacreBLEU"] == pytest.approx(sacrebleu.corpus_bleu(OUTPUTS, streams).score)
    assert {name.split()[0] for name in scores} == {"sacreBLEU", "rouge1", "rouge2", "rougeL"}
    seen = [i for i, p in enumerate(PAIRS) if p.group == "seen"]
    alone, _ = score([OUTPUTS[i] for i in seen], [PAIRS[i] for i in seen])
    assert {name: scores[f"{name} seen"] for name in ("sacreBLEU", "rougeL")} == {
        name: alone[name] for name in ("sacreBLEU", "rougeL")
    }


@pytest.mark.long  # METEOR reads its tables at every start
@java
def test_outputs_may_be_empty_or_have_line_breaks_for_the_java_programs():
    odd = ["", "a|||b\nc\u2028d e f", ""]
    pairs = [pair("a b c"), pair("a b\nc d e f"), pair("b")]
    scores, missing = score(odd, pairs, "e2e")
    assert missing == []
    assert all(value > 0 and math.isfinite(value) for value in scores.values())
    assert scores["ROUGE-L"] > 25  # of 33: each output has met its own references


@pytest.mark.parametrize("rules", RULES)
def test_all_outputs_may_be_empty(rules, no_java):
    scores, _ = score(["", ""], [pair("a b c"), pair("d e")], rules)
    assert {value for name, value in scores.items() if name != "TER"} == {0}


@pytest.mark.parametrize(
    ("rules", "names", "stay"),
    [
        ("e2e", "METEOR, ROUGE-L and CIDEr", {"BLEU", "NIST"}),
        ("webnlg", "METEOR", {"BLEU", "TER"}),
    ],
)
def test_without_java_its_scores_are_left_out_with_one_sentence_and_plain_ones_stand_in(
    rules, names, stay, no_java
):
    scores, missing = score(OUTPUTS[:3], [pair(*p.references) for p in PAIRS[:3]], rules)
    assert set(scores) == stay | {"sacreBLEU", "rouge1", "rouge2", "rougeL"}
    assert len(missing) == 1
    assert missing[0].startswith(f"{names} left out")
    assert missing[0].endswith("Java (Debian: apt-get install default-jre-headless)")
    assert score(OUTPUTS[:3], PAIRS[:3], "plain")[1] == []  # needs none


def test_a_java_that_fails_costs_its_scores_alone(monkeypatch, tmp_path):
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    scores, missing = score(OUTPUTS[:3], PAIRS[:3], "e2e")
    assert {"BLEU", "NIST"} <= set(scores)
    assert "METEOR" not in scores
    assert "exit status 1" in missing[0]


@pytest.mark.parametrize(
    ("module", "rules", "names"),
    [
        ("sacrebleu.metrics", "plain", ["sacreBLEU"]),
        ("rouge_score.rouge_scorer", "xsum", ["ROUGE"]),
        ("pycocoevalcap.cider.cider", "e2e", ["METEOR, ROUGE-L and CIDEr"]),
        ("unidecode", "webnlg", ["BLEU", "METEOR", "TER"]),
    ],
)
def test_a_missing_library_costs_its_scores_alone_and_is_named(module, rules, names, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)  # no plain scores as stand-ins
    monkeypatch.setitem(sys.modules, module, None)
    scores, missing = score(OUTPUTS[:2], [pair("a"), pair("b")], rules)
    assert [sentence.split(" left out")[0] for sentence in missing] == names
    assert all(module in s and s.endswith("requirements-text.txt") for s in missing)
    assert not any(name.split(",")[0] in scores for name in names)


def test_the_command_scores_a_file(tmp_path, monkeypatch, capsys):
    rows = [
        {"source": "s", "references": p.references, "output": output, "group": p.group}
        for output, p in zip(OUTPUTS, PAIRS, strict=True)
    ]
    path = tmp_path / "generated.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["score", str(path), "--rules", "xsum", "--json"])
    assert main() == 0
    expected = score(OUTPUTS, PAIRS, "xsum")[0]
    assert json.loads(capsys.readouterr().out) == expected
    monkeypatch.setattr(sys, "argv", ["score", str(path), "--rules", "xsum"])
    assert main() == 0
    assert f"{'ROUGE-L seen':20} {expected['ROUGE-L seen']:8.2f}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", ["nothing", "[1]", '{"output": "a"}', '{"output": "a", "references": []}',
             '{"output": "a", "references": "a"}', '{"output": 1, "references": ["a"]}', ""]
)  # fmt: skip
def test_the_command_says_which_line_is_wrong(line, tmp_path, monkeypatch, capsys):
    path = tmp_path / "file.jsonl"
    path.write_text(line)
    monkeypatch.setattr(sys, "argv", ["score", str(path)])
    assert main() == 2
    said = capsys.readouterr().err
    assert ("line 1" if line else "no line to score") in said
    assert said.count("\n") == 1
