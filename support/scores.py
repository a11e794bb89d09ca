"""How good written texts are: each is compared with all references of its source, however many there are.

BLEU, NIST   runs of up to four (five) words that a reference has too; for NIST a rare run counts more
METEOR       words that a reference has too, or their stems or synonyms, less a penalty for scattered ones
ROUGE        F-measure of words, of pairs, and of the longest common subsequence, with the best reference
CIDEr        likeness to the references in runs of words, each weighed by how few sources have it
TER          edits (words, and moves of phrases) to the nearest reference per reference word: less is better

NIST and CIDEr are no percentages. Papers have their figures from other scripts, which split words in other ways.
"""

import re
from collections.abc import Callable, Sequence
from itertools import zip_longest
from statistics import fmean

from support.language import Pair

References = list[list[str]]  # of every output


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def bleu_ter(outputs: list[str], references: References) -> dict[str, float]:
    from sacrebleu.metrics import BLEU, TER

    streams = list(
        zip_longest(*references)
    )  # None where a source has no more references, as sacrebleu has it
    return {
        "BLEU": BLEU().corpus_score(outputs, streams).score,
        "TER": TER().corpus_score(outputs, streams).score,
    }


def nist(outputs: list[str], references: References) -> dict[str, float]:
    from nltk.translate.nist_score import corpus_nist

    written = [words(output) for output in outputs]
    longest = min(
        5, max(map(len, written))
    )  # nltk divides by the number of runs, which must not be 0
    known = [[words(reference) for reference in own] for own in references]
    return {"NIST": corpus_nist(known, written, n=longest) if longest else 0.0}


def meteor(outputs: list[str], references: References) -> dict[str, float]:
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import meteor_score

    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError) as error:
        raise ImportError("WordNet is missing or not whole") from error
    every = [
        meteor_score([words(reference) for reference in own], words(output), wordnet=wordnet)
        for output, own in zip(outputs, references, strict=True)
    ]
    return {"METEOR": 100 * fmean(every)}


def rouge(outputs: list[str], references: References) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    kinds = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    scorer = RougeScorer(list(kinds), use_stemmer=True)
    every = [
        scorer.score_multi(own, output) for output, own in zip(outputs, references, strict=True)
    ]  # best reference
    return {
        name: 100 * fmean(scores[kind].fmeasure for scores in every) for kind, name in kinds.items()
    }


def cider(outputs: list[str], references: References) -> dict[str, float]:
    from pycocoevalcap.cider.cider import Cider

    written = {i: [" ".join(words(output))] for i, output in enumerate(outputs)}
    known = {
        i: [" ".join(words(reference)) for reference in own] for i, own in enumerate(references)
    }
    return {"CIDEr": float(Cider().compute_score(known, written)[0])}


METRICS: dict[str, tuple[Callable[[list[str], References], dict[str, float]], str]] = {
    "BLEU and TER": (bleu_ter, "pip install sacrebleu"),
    "NIST": (nist, "pip install nltk"),
    "METEOR": (meteor, "pip install nltk && python -m nltk.downloader wordnet"),
    "ROUGE": (rouge, "pip install rouge-score"),
    "CIDEr": (cider, "pip install pycocoevalcap"),
}


def score(outputs: list[str], pairs: Sequence[Pair]) -> tuple[dict[str, float], list[str]]:
    """The scores of one output per pair: over all pairs ("BLEU"), and over those of each group ("BLEU seen").

    Also a sentence for every score that is left out because its library is missing, with how to get it.
    """
    groups = {"": list(zip(outputs, pairs, strict=True))}
    for name in sorted({pair.group for pair in pairs} - {""}):
        groups[f" {name}"] = [row for row in groups[""] if row[1].group == name]
    scores: dict[str, float] = {}
    missing: list[str] = []
    for names, (metric, mend) in METRICS.items():
        try:
            for group, own in groups.items():
                made = metric([output for output, _ in own], [pair.references for _, pair in own])
                scores |= {f"{name}{group}": value for name, value in made.items()}
        except ImportError as error:
            missing.append(f"{names} left out ({error}): {mend}")
    return scores, missing
