"""Language tasks: where their pairs of source and target come from, and the paper's settings.

E2E: attributes of a restaurant -> a sentence or two. WebNLG: facts of DBpedia -> a text that says
them. XSUM: a news article -> its first sentence. `restaurants` and `guidebook` are made in
language.py. A .jsonl file holds your own pairs.

E2E, WebNLG and XSUM are read from --data-dir as the official releases, Prefix-tuning or the Hub
have them; else they are downloaded. Every file is read as records (a dict each); a record becomes a
Row, and rows with the same source become one Pair with several references.

Targets are the natural text of the official releases. Prefix-tuning's own E2E files hold the same
texts with spaces around punctuation ("city centre , Alimentum"), and its runs train on those; they
are read as they stand if you have them (src1_train.txt).

Sources: Novikova et al., SIGDIAL 2017 (E2E); Gardent et al., INLG 2017 (WebNLG); Narayan et al.,
EMNLP 2018 (XSUM); Li & Liang, ACL 2021 (how a source is written, lengths); Le et al., ICLR 2025,
arXiv 2410.02200 (settings).
"""

import csv
import io
import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support import language
from support.benchmarks import SPLITS, UNPACKED
from support.files import UsageError, fetch, obtain, verify
from support.images import visible
from support.language import WHOLE, Pair, Template, one_line, read

Row = tuple[str, list[str], str]  # source, targets, group


def words(text: str) -> list[list[str]]:
    """The words of every line."""
    return [line.split() for line in text.strip().split("\n")]


# Texts per split, what they are trained with, and a learning rate per method of train.py. XSUM's
# rates are the paper's for BART-large; it has no GPT-2 there.
HEAD, *SETTINGS = words("""
task         train   val    test   backbone     batch  epochs  length  learning rates
e2e          42061   4672   4693   gpt2-medium  10     5       5       none=1e-2 deep=1e-4
webnlg       18025   2258   4928   gpt2-medium  5      5       5       none=5e-2 deep=1e-4
xsum         204045  11332  11334  gpt2-medium  16     30      200     none=5e-4 deep=5e-5
restaurants  2400    90     270    tiny_gpt     10     10      5       none=0.3 deep=2e-3
guidebook    40000   300    300    tiny_gpt     24     1       5       full=2e-3
""")


@dataclass(frozen=True)
class TextTask:
    """A line of SETTINGS. sizes: texts per split. lr: per method of train.py."""

    sizes: dict[str, int]
    backbone: str
    batch: int
    epochs: int
    length: int
    lr: dict[str, float]


def text_task(row: list[str]) -> TextTask:
    train, val, test, backbone, batch, epochs, length, *rates = row
    sizes = {"train": int(train), "val": int(val), "test": int(test)}
    lr = {method: float(rate) for method, rate in (rate.split("=") for rate in rates)}
    return TextTask(sizes, backbone, int(batch), int(epochs), int(length), lr)


TEXT_TASKS = {name: text_task(row) for name, *row in SETTINGS}

# Finding files

# Folders that hold a task, in --data-dir or in a folder of it.
FOLDERS = language.table("""
e2e: e2e, e2e_nlg
webnlg: webnlg, web_nlg, webnlg_challenge_2017
xsum: xsum
""")
# The files of train, val and test. Those of E2E and WebNLG may also lie in --data-dir itself, or in
# any folder of it. The Hub's must be in one of FOLDERS, or anywhere below it.
LAYOUTS = words("""
e2e     trainset.csv     devset.csv      testset_w_refs.csv
e2e     src1_train.txt   src1_valid.txt  src1_test.txt
webnlg  train/*/*.xml    dev/*/*.xml     test/testdata_with_lex.xml
hub     train*.parquet   val*.parquet    test*.parquet
hub     train/*.parquet  val*/*.parquet  test/*.parquet
hub     train*.json*     val*.json*      test*.json*
hub     train*.json*     dev*.json*      test*.json*
""")


def find(task: str, root: Path) -> dict[str, list[Path]]:
    """The files of each split in the first layout that has all three; {} if there is none."""
    # Where to look.
    named = [folder for name in FOLDERS[task] for folder in (root / name, *root.glob(f"*/{name}"))]
    below = sorted(chain.from_iterable(folder.glob("**/") for folder in named))
    places = {task: [root, *sorted(root.glob("*/")), *below], "hub": below}

    # Hidden files, such as those of an archive that a Mac made, are no data.
    for kind, *patterns in LAYOUTS:
        for place in places.get(kind, []):
            found = {}
            for split, pattern in zip(SPLITS, patterns, strict=True):
                files = sorted(place.glob(pattern))
                found[split] = [p for p in files if all(map(visible, p.relative_to(root).parts))]
            if all(found.values()):
                return found
    return {}


# What is downloaded: a file below --data-dir, and its address.
E2E = "https://raw.githubusercontent.com/tuetschek/e2e-dataset"
WEBNLG = "https://github.com/fuzihaofzh/webnlg-dataset/archive"
XSUM = "https://huggingface.co/datasets/EdinburghNLP/xsum/resolve"
URLS = words(f"""
e2e/trainset.csv              {E2E}/ab0d967dd5729ce455ef14ba9ffafc456a335264/trainset.csv
e2e/devset.csv                {E2E}/ab0d967dd5729ce455ef14ba9ffafc456a335264/devset.csv
e2e/testset_w_refs.csv        {E2E}/ab0d967dd5729ce455ef14ba9ffafc456a335264/testset_w_refs.csv
webnlg/webnlg-dataset.tar.gz  {WEBNLG}/1c777e22cc3f3f8c50ecd791c72756a53663cea8.tar.gz
xsum/train.parquet            {XSUM}/refs%2Fconvert%2Fparquet/default/train/0000.parquet
xsum/val.parquet              {XSUM}/refs%2Fconvert%2Fparquet/default/validation/0000.parquet
xsum/test.parquet             {XSUM}/main/data/test-00000-of-00001.parquet
""")
CHECKSUMS = dict(
    words("""
trainset.csv           git:fa3a5e1124d2aa0d768881e38f8ee73e63d5880d
devset.csv             sha256:fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9
testset_w_refs.csv     sha256:edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd
testdata_with_lex.xml  sha256:43287905cbfe47697232d569ea6ff072d598282da2ea022bc435ca26b943cd93
test.parquet           sha256:224e9dbc6fed987759c1954603b43cb280b8d475d78893779130aa707d967ed7
""")
)


def download(task: str, root: Path) -> dict[str, list[Path]]:
    """The files of each split. UsageError also says in which other layouts they are read."""
    try:
        for name, url in URLS:
            path = root / name
            if path.parent.name != task:
                continue
            if path.suffix == ".gz":
                obtain(path.parent / UNPACKED, path, [url], None)
            else:
                fetch([url], path, CHECKSUMS.get(path.name))

        # WebNLG's test file was in an archive, which has no checksum
        files = find(task, root)
        if not files:
            raise UsageError(f"{root / task} is not whole; delete it")
        for path in files["test"]:
            verify(path, CHECKSUMS[path.name], record=path)
        return files
    except UsageError as error:
        others = [", ".join(files) for kind, *files in LAYOUTS if kind in (task, "hub")]
        raise UsageError(
            f"{error}. In a folder {task} of --data-dir this is read, too: {'; '.join(others)}"
        ) from error


# Reading files: the place of every record and its columns


def csv_records(path: Path) -> Iterator[tuple[str, dict]]:
    reader = csv.DictReader(io.StringIO(read(path), newline=""), strict=True)
    for record in reader:
        yield f"{path} line {reader.line_num}", record


def text_records(path: Path) -> Iterator[tuple[str, dict]]:
    """Lines of `source||target`."""
    for place, line in language.lines(path):
        source, _, target = line.partition("||")
        yield place, {"source": source, "target": target}


def xml_records(path: Path) -> Iterator[tuple[str, dict]]:
    """Entries of WebNLG, with the columns that GEM and Prefix-tuning have."""
    for number, entry in enumerate(ET.fromstring(read(path)).iter("entry"), 1):
        triples = entry.iterfind("modifiedtripleset/mtriple")
        texts = [{"lex": lex.text, **lex.attrib} for lex in entry.iterfind("lex")]
        facts = [(triple.text or "").strip() for triple in triples]
        record = {"input": facts, "lexicalisations": texts, **entry.attrib}
        yield f"{path} entry {number}", record


def parquet_records(path: Path) -> Iterator[tuple[str, dict]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        thousands = -(-file.metadata.num_rows // 1000)
        bar = tqdm(file.iter_batches(1000), f"reading {path.name}", thousands, unit="k", delay=2)
        rows = chain.from_iterable(batch.to_pylist() for batch in bar)
        for number, record in enumerate(rows, 1):
            yield f"{path} row {number}", record


def line_records(path: Path) -> Iterator[tuple[str, dict]]:
    for place, line in language.lines(path):
        yield place, language.parsed(place, line)


def json_records(path: Path) -> Iterator[tuple[str, dict]]:
    """A list, an object with one inside, or an object per line."""
    try:
        rows = json.loads(read(path))
    except ValueError:
        yield from line_records(path)
        return
    if isinstance(rows, dict):
        [rows] = rows.values()
    for number, record in enumerate(rows, 1):
        yield f"{path} row {number}", record


READERS = {
    ".csv": csv_records,
    ".txt": text_records,
    ".xml": xml_records,
    ".parquet": parquet_records,
    ".json": json_records,
}  # of .jsonl and .jsonl.gz: line_records


def records(path: Path) -> Iterator[tuple[str, dict]]:
    """The records of a file. UsageError if it is damaged."""
    place = str(path)
    try:
        for place, record in READERS.get(path.suffix, line_records)(path):
            yield place, record
    except ImportError as error:
        raise UsageError(f"{path} cannot be read ({error}); pip install pyarrow") from error
    except (csv.Error, ET.ParseError, OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} cannot be read after {place} ({error}); {WHOLE}") from error


# From records to pairs


def texts(record: dict, *names: str) -> list[str]:
    """Of the first of these columns that holds something: its text or texts, each in one line."""
    found = next((record[name] for name in names if record.get(name)), "")
    return [one_line(text) for text in (found if isinstance(found, list) else [found])]


def e2e_row(record: dict, split: str) -> Row:
    """A line of a .csv file or of src1_*.txt, or a row of the Hub's e2e_nlg."""
    if "source" in record:
        return record["source"], [record["target"]], ""
    if None in record:
        raise ValueError("more columns than the first line names: a comma outside quotes")
    source = e2e_source(record.get("mr") or record["meaning_representation"])
    return source, texts(record, "ref", "human_reference", "references", "target"), ""


def e2e_source(meaning: str) -> str:
    """`name[Aromi], priceRange[£20-25]` -> `name : Aromi | price : £ 20 - 25`, the official way."""
    attributes = re.findall(r"([^][,]+)\[([^][]*)\](?:, |$)", meaning)
    if not attributes or ", ".join(f"{name}[{value}]" for name, value in attributes) != meaning:
        raise ValueError("no list such as name[A], area[west]")
    names = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
    parts = []
    for name, value in attributes:
        words = " ".join(re.findall(r"\w+|[^\w\s]", value))
        parts.append(f"{names.get(name, name)} : {words}")
    return " | ".join(parts)


def webnlg_row(record: dict, split: str) -> Row:
    """An entry of the .xml files, of Prefix-tuning's {"1": {...}}, or a row of GEM's web_nlg.

    Texts to train and validate on are those judged "good"; at test every text is a reference.
    """
    record = next(iter(record.values())) if len(record) == 1 else record
    if "modifiedtripleset" in record:
        facts = [(t["subject"], t["property"], t["object"]) for t in record["modifiedtripleset"]]
    else:
        facts = [tuple(fact.split(" | ")) for fact in record["input"]]
    if not facts or any(len(fact) != 3 for fact in facts):
        raise ValueError("a fact that is not `subject | property | object`")
    source = " ".join(f"| {' : '.join(fact)}" for fact in facts)
    targets = texts(record, "references", "target")
    if "lexicalisations" in record:
        known = record["lexicalisations"]
        good = [text for text in known if split == "test" or text["comment"] == "good"]
        targets = [one_line(text["lex"]) for text in good]
    return source, targets, record["category"]


def xsum_row(record: dict, split: str) -> Row:
    return one_line(record["document"] or ""), texts(record, "summary", "target"), ""


def own_row(record: dict, split: str) -> Row:
    """A line of your own .jsonl file. A target is a string, or a list of them."""
    return one_line(record["source"]), texts(record, "target"), ""


def pairs(
    paths: list[Path], read_row: Callable[[dict, str], Row], split: str, wanted: str
) -> list[Pair]:
    """One Pair per distinct source. UsageError for a record that is not as `wanted`."""
    found: dict[str, Pair] = {}
    for place, record in chain.from_iterable(map(records, paths)):
        # What the record says.
        try:
            source, targets, group = read_row(record, split)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UsageError(f"{place}: not {wanted}, but {str(record)[:60]}; mend it") from error

        # An empty target is a mistake; none at all is a WebNLG entry without a good text.
        if not all(target.strip() for target in targets):
            raise UsageError(
                f"{place}: no target, or an empty one, which would teach to say nothing; "
                "write or delete it"
            )
        if targets:
            found.setdefault(source, Pair(source, [], group)).references.extend(targets)
    if not found:
        raise UsageError(f"{paths[0]} holds no pairs of source and target; {WHOLE}")
    return list(found.values())


# All tasks

MADE = {"restaurants": language.restaurants, "guidebook": language.guidebook}
ROWS = {"e2e": e2e_row, "webnlg": webnlg_row, "xsum": xsum_row}
TEMPLATES = {
    "e2e": Template(),
    "webnlg": Template(lead=" "),  # two blanks come before the first fact
    "xsum": Template(space="", cut=(512, 60, 100)),  # to fit in GPT-2
}


def here(task: str, root: Path) -> bool:
    """Whether nothing has to be downloaded."""
    return task in MADE or bool(find(task, root))


def load(task: str, root: Path) -> dict:
    """Template and splits of a task. Says so if its texts are not as many as in the paper."""
    if task in MADE:
        return {"template": Template(longest=130), "splits": MADE[task]()}

    # Read all splits.
    files = find(task, root) or download(task, root)
    splits = {
        split: pairs(paths, ROWS[task], split, f"as {task} has it")
        for split, paths in files.items()
    }

    # Scores on other texts than the paper's say nothing about the paper's.
    sizes = {split: sum(len(p.references) for p in made) for split, made in splits.items()}
    paper = TEXT_TASKS[task].sizes
    if sizes != paper:
        said = f"{task} has {sizes} texts here, {paper} in the paper: scores cannot be compared"
        print(said, file=sys.stderr)

    # WebNLG's scores are reported apart for the categories that train has and those that it lacks.
    known = {pair.group for pair in splits["train"]}
    for split, made in splits.items():
        for pair in made:
            if pair.group:
                seen = "seen" if pair.group in known else "unseen"
                pair.group = seen if split == "test" else ""
    return {"template": TEMPLATES[task], "splits": splits}


def load_jsonl(path: Path, root: Path) -> dict:
    """Your own pairs, a {"source": ..., "target": ...} per line, split 80 / 10 / 10 by source.

    The split is always the same. The template is E2E's.
    """
    # read
    found = pairs([path], own_row, "", '{"source": "...", "target": "..."}')
    if len(found) < 10:
        raise UsageError(
            f"{path} has {len(found)} distinct sources; "
            "a split into 80 / 10 / 10 % needs at least 10"
        )

    # split
    order = np.random.default_rng(0).permutation(len(found))
    parts = np.split(order, (round(0.8 * len(found)), round(0.9 * len(found))))
    splits = {
        split: [found[i] for i in sorted(part)] for split, part in zip(SPLITS, parts, strict=True)
    }
    return {"template": Template(), "splits": splits}
