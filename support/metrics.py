"""How good written texts are, counted as the papers of each task count it.

e2e     e2e-metrics: BLEU and NIST of mteval-v13a; METEOR, ROUGE-L and CIDEr of the COCO captions
webnlg  the WebNLG challenge: BLEU as multi-bleu.perl counts it, METEOR, TER; three references
xsum    ROUGE-1, ROUGE-2 and ROUGE-L with a stemmer
plain   any other text: sacrebleu's BLEU and rouge_score's ROUGE, named as those libraries name them

BLEU, NIST   runs of up to four (five) words that a reference has too; in NIST rare runs count more
METEOR       words that a reference has too, or their stems, synonyms or paraphrases
ROUGE        F-measure of words, of pairs, and of the longest common subsequence
CIDEr        likeness to the references in runs of words, each weighed by how few sources have it
TER          edits (words, and moves of phrases) to the nearest reference, per reference word

A metric reads all texts once, and returns functions that give a score over any rows of them.
All are percentages, but NIST and CIDEr; less is better in TER alone. docs/differences.md has our
figures beside those of the official programs.
"""

import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial, reduce
from itertools import zip_longest
from operator import or_
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from support.files import write
from support.runs import BAR, WRITE, final_prefix, lines, use_bf16

Rows = list[tuple[str, list[str]]]  # written texts, each with its references
Over = Callable[[list[int]], float]  # a score over some rows
Metric = Callable[[Rows], dict[str, Over]]

KINDS = ("rouge1", "rouge2", "rougeL")  # rouge_score's names
progress = partial(tqdm, unit="text", delay=2, mininterval=1, leave=None)


def mean(values: list[float]) -> Over:
    return lambda at: 100 * fmean(values[i] for i in at)


def bleu(rows: Rows, name: str = "BLEU", absent: Any = None, **options: Any) -> dict[str, Over]:
    """absent: what a source with fewer references has in place of the others; None is nothing."""
    from sacrebleu.metrics import BLEU

    def over(at: list[int]) -> float:
        streams = list(zip_longest(*(rows[i][1] for i in at), fillvalue=absent))
        return BLEU(force=True, **options).corpus_score([rows[i][0] for i in at], streams).score

    return {name: over}


def nist(rows: Rows) -> dict[str, Over]:
    """Sum over n: the information of the n-grams that a reference has too, per n-gram written.

    An n-gram's information is log2(count of its first n - 1 words / its count) over all references.
    Short texts are penalised, by 1/2 at 2/3 of the expected length. NIST expects, for each source,
    the mean length of its references (e2e-metrics -p); NIST (Perl) expects all references' words
    divided by the mean number of references (e2e-metrics without -p).
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    split = Tokenizer13a()

    def ngrams(text: str) -> Counter[tuple[str, ...]]:
        """n = 0 counts the words."""
        words = split(text).lower().split()
        starts = [(n, i) for n in range(6) for i in range(len(words) - max(n, 1) + 1)]
        return Counter(tuple(words[i : i + n]) for n, i in starts)

    written = [ngrams(text) for text, _ in rows]
    known = [[ngrams(text) for text in references] for _, references in rows]

    def over(at: list[int], perl: bool = False) -> float:
        total = Counter(run for i in at for own in known[i] for run in own.elements())
        made = Counter(len(run) for i in at for run in written[i].elements())

        # an n-gram matches as often as the reference that has it most often
        value = 0.0
        for i in at:
            for run in (written[i] & reduce(or_, known[i])).elements():
                value += math.log2(total[run[:-1]] / total[run]) / made[len(run)]

        if perl:
            length = total[()] / fmean(len(known[i]) for i in at)
        else:
            length = sum(fmean(own[()] for own in known[i]) for i in at)
        short = math.log(min(1, max(1, made[0]) / max(1, length)), 1.5)
        return value * 0.5 ** (short**2)

    return {"NIST": over, "NIST (Perl)": partial(over, perl=True)}


def java(module: Any, jar: str, arguments: str, texts: list[str]) -> list[str]:
    """What a jar beside a module answers, a line for each text.

    Java 17 and older would read texts as the locale says, hence UTF-8.
    """
    path = str(Path(module.__file__).with_name(jar))
    command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-cp", path, *arguments.split()]
    lines = "".join(text + "\n" for text in texts)
    done = subprocess.run(command, input=lines, capture_output=True, encoding="utf-8", check=True)
    return done.stdout.split("\n")


def meteor(rows: Rows) -> dict[str, Over]:
    """METEOR 1.5: SCORE gives the counts of a text, EVAL the score of each of them, then of all."""
    from pycocoevalcap.meteor import meteor as coco

    ask = partial(java, coco, coco.METEOR_JAR, "Meteor - - -stdio -l en -norm")
    counts = ask([" ||| ".join(["SCORE", *own, output]) for output, own in rows])

    def over(at: list[int]) -> float:
        return 100 * float(ask([" ||| ".join(["EVAL", *(counts[i] for i in at)])])[len(at)])

    return {"METEOR": over}


def coco(rows: Rows) -> dict[str, Over]:
    """On the Penn Treebank's words, in lower case and without punctuation."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer import ptbtokenizer as penn

    # one call of the tokeniser for all texts; METEOR separates texts by |||
    tokenizer = "edu.stanford.nlp.process.PTBTokenizer -preserveLines -lowerCase"
    texts = [" ".join(text.split()) for output, own in rows for text in (output, *own)]
    lines = java(penn, penn.STANFORD_CORENLP_3_4_1_JAR, tokenizer, texts)
    dropped = {*penn.PUNCTUATIONS, "|||"}
    split = (" ".join(word for word in line.split(" ") if word not in dropped) for line in lines)
    rows = [(next(split), [next(split) for _ in own]) for _, own in rows]

    def cider(at: list[int]) -> float:
        written = {i: [rows[i][0]] for i in at}
        return Cider().compute_score({i: rows[i][1] for i in at}, written)[0]

    rouge_l = mean([Rouge().calc_score([output], own) for output, own in rows])
    return meteor(rows) | {"ROUGE-L": rouge_l, "CIDEr": cider}


def ter(rows: Rows) -> dict[str, Over]:
    from sacrebleu.metrics import TER

    parts = [TER().sentence_score(*row) for row in progress(rows, desc="TER")]

    def over(at: list[int]) -> float:
        words = sum(parts[i].ref_length for i in at)
        return 100 * sum(parts[i].num_edits for i in at) / max(1, words)

    return {"TER": over}


def rouge(rows: Rows, names: Sequence[str] = KINDS) -> dict[str, Over]:
    """The best reference counts."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(KINDS, use_stemmer=True)
    parts = [scorer.score_multi(own, output) for output, own in progress(rows, desc="ROUGE")]
    scores = zip(names, KINDS, strict=True)
    return {name: mean([part[kind].fmeasure for part in parts]) for name, kind in scores}


def as_webnlg(metric: Metric, rows: Rows) -> dict[str, Over]:
    """Score texts as the challenge prepares them: lower case, ASCII, signs apart, 3 references."""
    from unidecode import unidecode

    def split(text: str) -> str:
        return " ".join(re.findall(r"\w+|[^\w\s]", text))

    # The challenge makes an output ASCII before it splits it, and a reference afterwards.
    prepared = []
    for output, own in rows:
        references = [unidecode(split(text).lower()) for text in own[:3]]
        prepared.append((split(unidecode(output).lower()), references))
    return metric(prepared)


# An absent reference is an empty line there, and its length of 0 may be the closest to an output's.
MULTI_BLEU = partial(bleu, absent="", tokenize="none", smooth_method="none")

RULES: dict[str, dict[str, Metric]] = {
    "e2e": {
        "BLEU": partial(bleu, lowercase=True),
        "NIST": nist,
        "METEOR, ROUGE-L and CIDEr": coco,
    },
    "webnlg": {
        "BLEU": partial(as_webnlg, MULTI_BLEU),
        "METEOR": partial(as_webnlg, meteor),
        "TER": partial(as_webnlg, ter),
    },
    "xsum": {"ROUGE": partial(rouge, names=("ROUGE-1", "ROUGE-2", "ROUGE-L"))},
    "plain": {"sacreBLEU": partial(bleu, name="sacreBLEU"), "ROUGE": rouge},
}
JAVA = "it takes Java (Debian: apt-get install default-jre-headless)"


def score(
    outputs: list[str], pairs: Sequence[Any], rules: str = "plain"
) -> tuple[dict[str, float], list[str]]:
    """The scores of one output per pair: over all ("BLEU"), and over each group ("BLEU seen").

    Also a sentence for every score that is left out because something is missing, and the cure.
    A pair has references and a group ("" is none).
    """
    rows = [(output, pair.references) for output, pair in zip(outputs, pairs, strict=True)]
    groups: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        for name in {"", pair.group and f" {pair.group}"}:
            groups.setdefault(name, []).append(i)

    # without Java the plain scores stand in for those that need it
    metrics = RULES[rules]
    if rules in ("e2e", "webnlg") and not shutil.which("java"):
        metrics = metrics | RULES["plain"]
    scores: dict[str, float] = {}
    missing = []
    for names, metric in metrics.items():
        try:
            for name, over in metric(rows).items():
                scores |= {name + group: over(groups[group]) for group in sorted(groups)}
        except ImportError as error:
            missing.append(f"{names} left out ({error}): pip install -r requirements-text.txt")
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            missing.append(f"{names} left out ({error}): {JAVA}")
    return scores, missing


@torch.inference_mode()
def write_texts(config: Any, model: Any, backbone: Any, data: Any) -> dict[str, float]:
    """Write a text for every source of the test split, keep them in its order, score them."""
    # Prompts of like length are written together; each text then goes back to its place.
    prompts, pairs = zip(*data.prompts("test"), strict=True)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    writer = model.backbone or backbone
    prefix_kv = final_prefix(config, model, backbone)  # (depth, 2, H, L, Dh)
    outputs = [""] * len(pairs)
    bar = tqdm(desc="test", total=len(pairs), unit="text", **BAR)
    with torch.autocast(config.device, torch.bfloat16, enabled=use_bf16(config, backbone)):
        for start in range(0, len(order), WRITE):
            some = order[start : start + WRITE]
            asked = [prompts[i] for i in some]
            made = writer.generate(asked, prefix_kv, config.beams, **data.decoding)
            for i, tokens in zip(some, made, strict=True):
                outputs[i] = data.decode(tokens)
            bar.update(len(made))
    bar.close()

    # Keep them, then score them.
    rows = [asdict(pair) | {"output": output} for pair, output in zip(pairs, outputs, strict=True)]
    write(Path(config.out) / "generated.jsonl", lines(rows))
    text = "".join(" ".join(output.split()) + "\n" for output in outputs)
    write(Path(config.out) / "generated.txt", text.encode())
    scores, missing = score(outputs, pairs, config.task if config.task in RULES else "plain")
    for sentence in missing:
        tqdm.write(sentence, file=sys.stderr)
    return scores
