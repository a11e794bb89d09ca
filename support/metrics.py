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
from functools import cache, partial, reduce
from itertools import zip_longest
from operator import or_
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from support.files import write
from support.runs import BAR, WRITE, final_prefix, lines, use_bf16

Rows = list[tuple[str, list[str]]]  # written texts, each with its references
Metric = Callable[[Rows], dict[str, float]]

progress = partial(tqdm, unit="text", delay=2, mininterval=1, leave=None)


def bleu(
    rows: Rows, name: str = "BLEU", absent: str | None = None, **options: Any
) -> dict[str, float]:
    """absent: what a source with fewer references has in place of the others; None is nothing."""
    from sacrebleu.metrics import BLEU

    outputs, references = zip(*rows, strict=True)
    streams = list(zip_longest(*references, fillvalue=absent))
    return {name: BLEU(force=True, **options).corpus_score(outputs, streams).score}


def nist(rows: Rows) -> dict[str, float]:
    """Sum over n: the information of the n-grams that a reference has too, per n-gram written.

    An n-gram's information is log2(count of its first n - 1 words / its count) over all references.
    Short texts are penalised, by 1/2 at 2/3 of the expected length, which is the mean length of a
    source's references. Perl's mteval-v13a expects another length where sources have different
    numbers of references; e2e-metrics runs it unless it is called with -p.
    """
    from sacrebleu.metrics.helpers import extract_all_word_ngrams
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    split = Tokenizer13a()

    def ngrams(text: str) -> Any:
        """Runs of up to five words with their counts, and the number of words."""
        return extract_all_word_ngrams(split(text).lower(), 1, 5)

    written = [ngrams(output) for output, _ in rows]
    known = [[ngrams(text) for text in own] for _, own in rows]

    # How often the references have an n-gram, and how many n-grams of each length were written.
    total = Counter(run for own in known for runs, _ in own for run in runs.elements())
    total[()] = sum(words for own in known for _, words in own)
    made = Counter(len(run) for runs, _ in written for run in runs.elements())

    # An n-gram matches as often as the reference that has it most often.
    value = 0.0
    for (runs, _), own in zip(written, known, strict=True):
        for run in (runs & reduce(or_, (other for other, _ in own))).elements():
            value += math.log2(total[run[:-1]] / total[run]) / made[len(run)]

    # The penalty of length.
    expected = sum(fmean(words for _, words in own) for own in known)
    short = math.log(min(1, max(1, made[1]) / max(1, expected)), 1.5)
    return {"NIST": value * 0.5 ** (short**2)}


def java(jar: str, arguments: str, **files: list[str]) -> str:
    """What a jar of pycocoevalcap prints. Its arguments name the files, which have a text a line.

    Java 17 and older would read them as the locale says, hence UTF-8.
    """
    import pycocoevalcap

    path = Path(pycocoevalcap.__path__[0], jar).absolute()
    command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-cp", str(path), *arguments.split()]
    with TemporaryDirectory() as folder:
        for name, texts in files.items():
            Path(folder, name).write_text("".join(text + "\n" for text in texts), "utf-8")
        done = subprocess.run(
            command, cwd=folder, capture_output=True, encoding="utf-8", check=True
        )
    return done.stdout


def meteor(rows: Rows) -> dict[str, float]:
    """METEOR 1.5. It wants equally many references for all, so empty ones fill up."""
    most = max(len(own) for _, own in rows)
    references = [text for _, own in rows for text in own + [""] * (most - len(own))]
    outputs = [output for output, _ in rows]
    arguments = f"Meteor outputs references -l en -norm -r {most}"
    said = java("meteor/meteor-1.5.jar", arguments, outputs=outputs, references=references)
    return {"METEOR": 100 * float(said.split()[-1])}


def coco(rows: Rows) -> dict[str, float]:
    """On the Penn Treebank's words, in lower case and without punctuation."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    # One call of the tokeniser for all texts.
    texts = [" ".join(text.split()) for output, own in rows for text in (output, *own)]
    tokenizer = "edu.stanford.nlp.process.PTBTokenizer -preserveLines -lowerCase texts"
    lines = java("tokenizer/stanford-corenlp-3.4.1.jar", tokenizer, texts=texts).split("\n")
    words = ([word for word in line.split(" ") if word not in PUNCTUATIONS] for line in lines)
    split = map(" ".join, words)
    rows = [(next(split), [next(split) for _ in own]) for _, own in rows]

    rouge_l = [Rouge().calc_score([output], own) for output, own in rows]
    written = {i: [output] for i, (output, _) in enumerate(rows)}
    cider, _ = Cider().compute_score({i: own for i, (_, own) in enumerate(rows)}, written)
    return meteor(rows) | {"ROUGE-L": 100 * fmean(rouge_l), "CIDEr": cider}


@cache  # TER takes the longest, and a text is also in a group
def edits(output: str, *references: str) -> Any:
    from sacrebleu.metrics import TER

    return TER().sentence_score(output, references)


def ter(rows: Rows) -> dict[str, float]:
    parts = [edits(output, *own) for output, own in progress(rows, "TER")]
    words = sum(part.ref_length for part in parts)
    return {"TER": 100 * sum(part.num_edits for part in parts) / max(1, words)}


def rouge(rows: Rows, name: str = "rouge") -> dict[str, float]:
    """The best reference counts."""
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    parts = [scorer.score_multi(own, output) for output, own in progress(rows, "ROUGE")]
    return {name + kind[-1]: 100 * fmean(part[kind].fmeasure for part in parts) for kind in kinds}


def as_webnlg(metric: Metric, rows: Rows) -> dict[str, float]:
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
    "xsum": {"ROUGE": partial(rouge, name="ROUGE-")},
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
    groups: dict[str, Rows] = {}
    for output, pair in zip(outputs, pairs, strict=True):
        for group in {"", pair.group and f" {pair.group}"}:
            groups.setdefault(group, []).append((output, pair.references))

    # Without Java the plain scores stand in for those that need it.
    metrics = RULES[rules]
    if rules in ("e2e", "webnlg") and not shutil.which("java"):
        metrics = metrics | RULES["plain"]
    scores: dict[str, float] = {}
    missing = []
    for names, metric in metrics.items():
        try:
            for group, rows in sorted(groups.items()):
                scores |= {name + group: value for name, value in metric(rows).items()}
        except ImportError as error:
            missing.append(f"{names} left out ({error}): pip install -r requirements-text.txt")
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            missing.append(f"{names} left out ({error}): {JAVA}")
    return scores, missing


@torch.inference_mode()
def write_texts(config: Any, model: Any, backbone: Any, data: Any) -> dict[str, float]:
    """Write a text for every source of the test split, keep them in its order, score them."""
    # Prompts of like length are written together; each text then goes back to its place.
    prompts, pairs = data.prompts("test"), data.splits["test"]
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
