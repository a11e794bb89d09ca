"""Language tasks: where their pairs of source and text come from, and the paper's settings.

E2E: attributes of a restaurant -> a sentence or two. WebNLG: facts of DBpedia -> a text that says
them. XSUM: a news article -> its first sentence. A folder below --data-dir may hold them in one of
the layouts of LAYOUTS; else they are downloaded. `restaurants` and `guidebook` are made in
language.py, and a .jsonl file may hold your own pairs.

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from support import language
from support.benchmarks import SPLITS, UNPACKED
from support.files import UsageError, fetch, obtain, verify
from support.language import Pair, Template, Text, encoding, is_jsonl, one_line, read, read_sources

__all__ = ["TEXT_TASKS", "Text", "encoding", "is_jsonl", "load_jsonl", "read", "read_sources"]

WHOLE = language.WHOLE
Row = tuple[str, str, list[str], str]  # its place in a file, source, targets, group
LAYOUTS = {
    "e2e": "trainset.csv, devset.csv and testset_w_refs.csv; Prefix-tuning's src1_train.txt, "
    "src1_valid.txt and src1_test.txt; or a folder e2e_nlg with the Hub's .parquet or .json",
    "webnlg": "webnlg_challenge_2017/ with train/, dev/ and test/, or with Prefix-tuning's "
    "train.json, dev.json and test.json; or a folder web_nlg with the Hub's .parquet or .json",
    "xsum": "a folder xsum with the Hub's .parquet or .json",
}


# Reading and finding files


def pairs(path: Path, rows: Iterable[Row]) -> list[Pair]:
    """One Pair per distinct source. UsageError if there are no rows, or for an empty target."""
    found: dict[str, Pair] = {}
    for place, source, targets, group in rows:
        if not targets or not all(target.strip() for target in targets):
            raise UsageError(
                f"{place}: a target is empty, which would teach to say nothing; write or delete it"
            )
        found.setdefault(source, Pair(source, [], group)).references.extend(targets)
    if not found:
        raise UsageError(f"{path} holds no pairs of source and target; {WHOLE}")
    return list(found.values())


SPLIT_WORDS = {"train": "train", "val": "val|valid|validation|dev", "test": "test"}


def find(root: Path, task: str, name: str) -> list[Path]:
    """The file `name` in root, one folder below it, or anywhere in root/task: one or none."""
    for place in (name, f"*/{name}", f"{task}/**/{name}"):
        if found := [path for path in sorted(root.glob(place)) if "/." not in path.as_posix()]:
            return found[:1]
    return []


def tables(root: Path, names: Iterable[str], split: str) -> list[Path]:
    """The .parquet or .json files of a split in a folder of one of these names.

    The split is a word of the path: dev.json, data/train-00000-of-00001.parquet,
    en/validation/0000.parquet. GEM's Russian texts and challenge sets are left out.
    """
    split_word = re.compile(rf"(^|[^a-z])({SPLIT_WORDS[split]})([^a-z].*)?[.](parquet|jsonl?)$")
    for name in names:
        for folder in (root / name, *sorted(root.glob(f"*/{name}"))):
            inner = {p: p.relative_to(folder).as_posix().lower() for p in sorted(folder.rglob("*"))}
            found = [p for p, name in inner.items() if split_word.search(name)]
            found = [p for p in found if not re.search(r"^\.|/\.|\bru\b|challenge_[tv]", inner[p])]
            if found:
                return [path for path in found if path.suffix == found[0].suffix]
    return []


def parquet_rows(path: Path) -> Iterator[dict]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"{path} needs pyarrow; install it: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(1024)
            count = -(-file.metadata.num_rows // 1024)
            for batch in tqdm(batches, f"reading {path.name}", count, unit="k", delay=2):
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); {WHOLE}") from error


def json_rows(path: Path) -> list[dict]:
    """A list, an object with one inside, or an object per line."""
    try:
        rows = json.loads(read(path))
    except ValueError:
        return [language.parsed(place, line) for place, line in language.lines(path)]
    return rows if isinstance(rows, list) else next(iter(rows.values()))


def from_table(path: Path, read_row: Callable[[dict, str], tuple]) -> Iterator[Row]:
    """read_row(row, place) -> source, targets, group. UsageError for a row with other columns."""
    rows = parquet_rows(path) if path.suffix == ".parquet" else json_rows(path)
    for number, row in enumerate(rows, 1):
        place = f"{path} row {number}"
        try:
            source, targets, group = read_row(row, place)
            if targets:
                yield place, source, [one_line(text) for text in targets], group
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{place} has other columns than are known ({error!r})") from error


def targets_of(row: dict, *names: str) -> list[str]:
    """The first of these columns that holds something: a text, or a list of them."""
    found = next((row[name] for name in names if row.get(name)), "")
    return [found] if isinstance(found, str) else list(found)


# E2E

E2E_COMMIT = "ab0d967dd5729ce455ef14ba9ffafc456a335264"
E2E_URL = f"https://raw.githubusercontent.com/tuetschek/e2e-dataset/{E2E_COMMIT}"
E2E_VAL = "sha256:fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9"
E2E_TEST = "sha256:edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd"
E2E_FILES = {
    "train": ("trainset.csv", "git:fa3a5e1124d2aa0d768881e38f8ee73e63d5880d"),
    "val": ("devset.csv", E2E_VAL),
    "test": ("testset_w_refs.csv", E2E_TEST),
}
E2E_TEXTS = {"train": "src1_train.txt", "val": "src1_valid.txt", "test": "src1_test.txt"}
E2E_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


def load_e2e(root: Path) -> dict:
    """E2E: attributes of a restaurant, and what several people wrote from them."""
    files = e2e_files(root)
    for split, (name, checksum) in E2E_FILES.items():
        if not files[split] or files[split][0].name == name:
            path = files[split][0] if files[split] else root / "e2e" / name
            files[split] = [download("e2e", fetch, [f"{E2E_URL}/{name}"], path, checksum)]
    return {"template": Template(), "splits": splits_of("e2e", files, e2e_rows)}


def e2e_files(root: Path) -> dict[str, list[Path]]:
    """The files of every split: the challenge's, or else Prefix-tuning's or the Hub's."""
    official = {split: find(root, "e2e", name) for split, (name, _) in E2E_FILES.items()}
    texts = {split: find(root, "e2e", name) for split, name in E2E_TEXTS.items()}
    hub = {split: tables(root, ("e2e", "e2e_nlg"), split) for split in SPLITS}
    return next((files for files in (official, texts, hub) if all(files.values())), official)


def e2e_rows(path: Path, split: str) -> Iterator[Row]:
    if path.suffix == ".csv":
        yield from csv_rows(path)
    elif path.suffix == ".txt":
        for place, line in language.lines(path):
            source, bar, target = line.partition("||")
            if not bar:
                raise UsageError(f"{place}: not `source||target`, but {line[:40]}; {WHOLE}")
            yield place, source, [target], ""
    else:
        yield from from_table(path, e2e_row)


def e2e_row(row: dict, place: str) -> tuple[str, list[str], str]:
    targets = targets_of(row, "human_reference", "references", "target")
    return e2e_source(row["meaning_representation"], place), targets, ""


def csv_rows(path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(read(path), newline=""), strict=True)
    try:
        for row in reader:
            place = f"{path} line {reader.line_num}"
            if len(row) != 2:
                raise UsageError(f"{place}: {len(row)} columns where mr,ref are meant; {WHOLE}")
            if row != ["mr", "ref"]:
                yield place, e2e_source(row[0], place), [one_line(row[1])], ""
    except csv.Error as error:
        raise UsageError(f"{path} line {reader.line_num}: {error}; {WHOLE}") from error


def e2e_source(meaning: str, place: str) -> str:
    """`name[Aromi], priceRange[£20-25]` -> `name : Aromi | price : £ 20 - 25`, the official way."""
    attributes = re.findall(r"([^][,]+)\[([^][]*)\](?:, |$)", meaning)
    if not attributes or ", ".join(f"{name}[{value}]" for name, value in attributes) != meaning:
        raise UsageError(f"{place}: '{meaning}' is no list such as name[A], area[west]; mend it")
    parts = []
    for name, value in attributes:
        words = " ".join(re.findall(r"\w+|[^\w\s]", value))
        parts.append(f"{E2E_NAMES.get(name, name)} : {words}")
    return " | ".join(parts)


# WebNLG

WEBNLG_COMMIT = "1c777e22cc3f3f8c50ecd791c72756a53663cea8"
WEBNLG_URL = f"https://github.com/fuzihaofzh/webnlg-dataset/archive/{WEBNLG_COMMIT}.tar.gz"
WEBNLG_TEST = "sha256:43287905cbfe47697232d569ea6ff072d598282da2ea022bc435ca26b943cd93"


def load_webnlg(root: Path) -> dict:
    """WebNLG 2017: up to seven facts, and texts that say them; half of test is of unseen kinds.

    Texts to train and validate on are those judged "good"; at test every text is a reference.
    """
    files = webnlg_files(root)
    if not any(files.values()):
        archive = root / "webnlg" / "webnlg-dataset.tar.gz"
        download("webnlg", obtain, root / "webnlg" / UNPACKED, archive, [WEBNLG_URL], None)
        files = webnlg_files(root)
        for test in files["test"]:
            verify(test, WEBNLG_TEST, record=test)
    splits = splits_of("webnlg", files, webnlg_rows)
    # Scores are reported apart for the categories that train has and those that it has not.
    known = {pair.group for pair in splits["train"]}
    for split, pairs in splits.items():
        for pair in pairs:
            seen = "seen" if pair.group in known else "unseen"
            pair.group = seen if split == "test" else ""
    return {"template": Template(lead=" "), "splits": splits}


def webnlg_files(root: Path) -> dict[str, list[Path]]:
    """The files of every split: the challenge's XML, or else Prefix-tuning's or the Hub's."""
    for folder in ("", "webnlg_challenge_2017/"):
        if test := find(root, "webnlg", f"{folder}test/testdata_with_lex.xml"):
            top = test[0].parent.parent
            train, val = (sorted(top.glob(f"{name}/*/*.xml")) for name in ("train", "dev"))
            return {"train": train, "val": val, "test": test}
    names = ("webnlg", "web_nlg", "webnlg_challenge_2017")
    return {split: tables(root, names, split) for split in SPLITS}


def webnlg_rows(path: Path, split: str) -> Iterator[Row]:
    """The group of a row is its category."""
    if path.suffix != ".xml":
        yield from from_table(path, lambda row, place: webnlg_row(row, split == "test"))
        return
    text = read(path)
    try:
        entries = ET.fromstring(text).iter("entry")
    except ET.ParseError as error:
        raise UsageError(f"{path} line {error.position[0]}: {error}; {WHOLE}") from error
    for entry, start in zip(entries, re.finditer(r"<entry\b", text), strict=False):
        place = f"{path} line {text.count(chr(10), 0, start.start()) + 1}"
        triples = entry.iterfind("modifiedtripleset/mtriple")
        facts = [(triple.text or "").strip().split(" | ") for triple in triples]
        if not facts or any(len(fact) != 3 for fact in facts):
            raise UsageError(
                f"{place}: no mtriple, or one not `subject | property | object`; {WHOLE}"
            )
        good = [t for t in entry.iterfind("lex") if split == "test" or t.get("comment") == "good"]
        if good:
            texts = [(t.text or "").strip() for t in good]
            yield place, webnlg_source(facts), texts, entry.get("category", "")


def webnlg_row(row: dict, test: bool) -> tuple[str, list[str], str]:
    """A row of Prefix-tuning's files, {"1": {...}}, or of GEM's on the Hub."""
    row = next(iter(row.values())) if len(row) == 1 else row
    if "modifiedtripleset" in row:
        triples = row["modifiedtripleset"]
        facts = [[triple[key] for key in ("subject", "property", "object")] for triple in triples]
        texts = [t["lex"] for t in row["lexicalisations"] if test or t["comment"] == "good"]
    else:
        facts = [fact.split(" | ") for fact in row["input"]]
        texts = targets_of(row, "references", "target")
    return webnlg_source(facts), texts, row["category"]


def webnlg_source(facts: list[list[str]]) -> str:
    """`| subject : property : object` of every fact; the template puts one more space before it."""
    return " ".join(f"| {' : '.join(fact)}" for fact in facts)


# XSUM

XSUM_URL = "https://huggingface.co/datasets/EdinburghNLP/xsum/resolve"
XSUM_TEST = "sha256:224e9dbc6fed987759c1954603b43cb280b8d475d78893779130aa707d967ed7"
XSUM_FILES = {
    "train": (f"{XSUM_URL}/refs%2Fconvert%2Fparquet/default/train/0000.parquet", None),
    "val": (f"{XSUM_URL}/refs%2Fconvert%2Fparquet/default/validation/0000.parquet", None),
    "test": (f"{XSUM_URL}/main/data/test-00000-of-00001.parquet", XSUM_TEST),
}


def load_xsum(root: Path) -> dict:
    """XSUM: a BBC article, and the sentence that introduces it. Both are cut to fit in GPT-2."""
    files = xsum_files(root)
    for split, (url, checksum) in XSUM_FILES.items():
        path = root / "xsum" / f"{split}.parquet"
        files[split] = files[split] or [download("xsum", fetch, [url], path, checksum)]
    splits = splits_of("xsum", files, lambda path, split: from_table(path, xsum_row))
    return {"template": Template(space="", cut=(512, 60, 100)), "splits": splits}


def xsum_files(root: Path) -> dict[str, list[Path]]:
    return {split: tables(root, ("xsum",), split) for split in SPLITS}


def xsum_row(row: dict, place: str) -> tuple[str, list[str], str]:
    return one_line(row["document"] or ""), targets_of(row, "summary", "target"), ""


# All tasks


def download(task: str, get: Callable[..., Path], *arguments: Any) -> Path:
    """get(*arguments). A UsageError also says in which other layouts the task is read."""
    try:
        return get(*arguments)
    except UsageError as error:
        raise UsageError(f"{error}. In --data-dir this is read, too: {LAYOUTS[task]}") from error


def splits_of(task: str, files: dict[str, list[Path]], rows: Callable) -> dict[str, list[Pair]]:
    """rows(path, split) of all files as pairs. Says so if they are not as many as in the paper."""
    splits = {}
    for split, paths in files.items():
        if not paths:
            raise UsageError(f"no files of {task} for {split}; this is read: {LAYOUTS[task]}")
        found = chain.from_iterable(rows(path, split) for path in paths)
        splits[split] = pairs(paths[0], found)
    sizes = {split: sum(len(p.references) for p in made) for split, made in splits.items()}
    if sizes != (paper := TEXT_TASKS[task].sizes):
        said = f"{task} has {sizes} texts here, {paper} in the paper: scores cannot be compared"
        print(said, file=sys.stderr)
    return splits


def load_jsonl(path: Path, root: Path) -> dict:
    """Your own pairs, a {"source": ..., "target": ...} per line, split 80 / 10 / 10 by source.

    The split is always the same. A target is a string, or a list of them. The template is E2E's.
    """
    found = pairs(path, jsonl_rows(path))
    if len(found) < 10:
        raise UsageError(
            f"{path} has {len(found)} distinct sources; "
            "a split into 80 / 10 / 10 % needs at least 10"
        )
    order = np.random.default_rng(0).permutation(len(found))
    parts = np.split(order, (round(0.8 * len(found)), round(0.9 * len(found))))
    both = zip(SPLITS, parts, strict=True)
    splits = {split: [found[i] for i in sorted(part)] for split, part in both}
    return {"template": Template(), "splits": splits}


def jsonl_rows(path: Path) -> Iterator[Row]:
    for place, line in language.lines(path):
        source, row = language.source_of(place, line)
        targets = row.get("target")
        targets = [targets] if isinstance(targets, str) else targets
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise UsageError(f'{place}: "target" is no text and no list of texts; mend it')
        yield place, source, [one_line(target) for target in targets], ""


def load_made(make: Callable[[], dict[str, list[Pair]]], root: Path) -> dict:
    return {"template": Template(longest=130), "splits": make()}


@dataclass(frozen=True)
class TextTask:
    """A task. load: root -> template and splits. files: root -> the files of each split here.

    sizes: texts per split. lr: per method of train.py.
    """

    load: Callable[[Path], dict]
    files: Callable[[Path], dict] = lambda root: {}
    sizes: dict[str, int] = field(default_factory=dict)
    backbone: str = "gpt2-medium"
    batch: int = 10
    epochs: int = 5
    length: int = 5
    lr: dict[str, float] = field(default_factory=dict)

    def here(self, root: Path) -> bool:
        """Whether nothing has to be downloaded."""
        return all(self.files(root).values())


TEXT_TASKS = {
    "e2e": TextTask(
        load_e2e,
        e2e_files,
        sizes={"train": 42_061, "val": 4_672, "test": 4_693},
        lr={"none": 1e-2, "deep": 1e-4},
    ),
    "webnlg": TextTask(
        load_webnlg,
        webnlg_files,
        sizes={"train": 18_025, "val": 2_258, "test": 4_928},
        batch=5,
        lr={"none": 5e-2, "deep": 1e-4},
    ),
    "xsum": TextTask(
        load_xsum,
        xsum_files,
        sizes={"train": 204_045, "val": 11_332, "test": 11_334},
        batch=16,
        epochs=30,
        length=200,
        lr={"none": 5e-4, "deep": 5e-5},  # the paper's for BART-large; it has no GPT-2 there
    ),
    "restaurants": TextTask(
        partial(load_made, language.restaurants),
        sizes={"train": 2_400, "val": 90, "test": 270},
        backbone="tiny_gpt",
        epochs=10,
        lr={"none": 0.3, "deep": 2e-3},
    ),
    "guidebook": TextTask(
        partial(load_made, language.guidebook),
        sizes={"train": 40_000, "val": 300, "test": 300},
        backbone="tiny_gpt",
        batch=24,
        epochs=1,
        lr={"full": 2e-3},
    ),
}
