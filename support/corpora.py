"""Language tasks: where their pairs of source and text come from, how they are written, and the paper's settings.

E2E: attributes of a restaurant -> a sentence or two. WebNLG: facts of DBpedia -> a text that says them. XSUM: a news
article -> its first sentence. They come over the network, unless the folder given with --data-dir holds them in one of
their usual layouts. `restaurants` and `guidebook` are made here (restaurants.py); a .jsonl file may hold your own.
How pairs become batches: tokens.py.

Sources: Novikova et al., SIGDIAL 2017 (E2E); Gardent et al., INLG 2017 (WebNLG); Narayan et al., EMNLP 2018 (XSUM);
Li & Liang, ACL 2021 (how a source is written, lengths); Le et al., ICLR 2025, arXiv 2410.02200 (settings).
"""

import csv
import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import tiktoken

from support import language
from support.benchmarks import SPLITS, UNPACKED, places
from support.files import UsageError, fetch, obtain, verify
from support.language import Pair, Template, Text, encoding

__all__ = ["TEXT_TASKS", "Pair", "Template", "Text", "TextTask", "encoding", "load_jsonl"]

Row = tuple[str, str, list[str], str]  # its place in a file, source, targets, group


def pairs(path: Path, rows: Iterable[Row]) -> list[Pair]:
    """The rows of `path` as one Pair per distinct source. UsageError if there are none, or for an empty target."""
    found: dict[str, Pair] = {}
    for place, source, targets, group in rows:
        if not targets or not all(targets):
            raise UsageError(
                f"{place}: a target is empty, which would teach to say nothing; write or delete it"
            )
        found.setdefault(source, Pair(source, [], group)).references.extend(targets)
    if not found:
        raise UsageError(
            f"{path} holds no pairs of source and target; put a whole copy in its place"
        )
    return list(found.values())


def one_line(text: str) -> str:
    """Any white space as one space: the decoder never writes a new line, so none is taught."""
    return " ".join(text.split())


def read(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path} line {line}: not UTF-8; save the file in this encoding"
        ) from error


E2E_URL = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/ab0d967dd5729ce455ef14ba9ffafc456a335264"
E2E_FILES = {
    "train": ("trainset.csv", "git:fa3a5e1124d2aa0d768881e38f8ee73e63d5880d"),
    "val": (
        "devset.csv",
        "sha256:fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9",
    ),
    "test": (
        "testset_w_refs.csv",
        "sha256:edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd",
    ),
}
E2E_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


def e2e_file(file: str, root: Path) -> Path | None:
    folders = places(root, ("e2e", "e2e-dataset", "e2e-dataset-1.0.0"))
    return next((folder / file for folder in folders if (folder / file).exists()), None)


def load_e2e(root: Path, encoding: tiktoken.Encoding) -> dict:
    """E2E: attributes of a restaurant, and what several people wrote from them."""
    splits = {}
    for split, (file, checksum) in E2E_FILES.items():
        path = fetch([f"{E2E_URL}/{file}"], e2e_file(file, root) or root / "e2e" / file, checksum)
        splits[split] = pairs(path, e2e_rows(path))
    return {"encoding": encoding, "template": Template(), "splits": splits}


def e2e_rows(path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(read(path), newline=""), strict=True)
    try:
        for row in reader:
            place = f"{path} line {reader.line_num}"
            if len(row) != 2:
                raise UsageError(
                    f"{place}: {len(row)} columns where mr,ref are meant; put a whole copy in its place"
                )
            if row != ["mr", "ref"]:
                yield place, e2e_source(row[0], place), [one_line(row[1])], ""
    except csv.Error as error:
        raise UsageError(
            f"{path} line {reader.line_num}: {error}; put a whole copy in its place"
        ) from error


def e2e_source(meaning: str, place: str) -> str:
    """`name[Aromi], priceRange[£20-25]` -> `name : Aromi | price : £ 20 - 25`, as Prefix-tuning's own files have it."""
    attributes = re.findall(r"([^][,]+)\[([^][]*)\](?:, |$)", meaning)
    if not attributes or ", ".join(f"{name}[{value}]" for name, value in attributes) != meaning:
        raise UsageError(
            f"{place}: '{meaning}' is no list such as name[Aromi], area[riverside]; mend it"
        )
    words = [
        (E2E_NAMES.get(name, name), re.findall(r"\w+|[^\w\s]", value)) for name, value in attributes
    ]
    return " | ".join(f"{name} : {' '.join(value)}" for name, value in words)


WEBNLG_COMMIT = "1c777e22cc3f3f8c50ecd791c72756a53663cea8"
WEBNLG_URL = f"https://github.com/fuzihaofzh/webnlg-dataset/archive/{WEBNLG_COMMIT}.tar.gz"
WEBNLG_TEST = "sha256:43287905cbfe47697232d569ea6ff072d598282da2ea022bc435ca26b943cd93"
WEBNLG_TEXTS = {"train": 18_025, "val": 2_258, "test": 4_928}  # that are used
WEBNLG_SEEN = (
    *(
        "Airport",
        "Astronaut",
        "Building",
        "City",
        "ComicsCharacter",
        "Food",
        "Monument",
        "SportsTeam",
        "University",
    ),
    "WrittenWork",
)


def webnlg_folder(root: Path) -> Path | None:
    names = (
        "webnlg",
        UNPACKED,
        "webnlg-dataset",
        f"webnlg-dataset-{WEBNLG_COMMIT}",
        "webnlg_challenge_2017",
    )
    return next(
        (
            folder
            for folder in places(root, names)
            if (folder / "test/testdata_with_lex.xml").exists()
        ),
        None,
    )


def load_webnlg(root: Path, encoding: tiktoken.Encoding) -> dict:
    """WebNLG 2017: up to seven facts, and texts that say them. Nearly half of the test's are of kinds that train lacks.

    Texts to train and validate on are those judged "good"; at test every text is a reference.
    """
    unpacked = root / "webnlg" / UNPACKED
    if webnlg_folder(root) is None:
        obtain(unpacked, root / "webnlg" / "webnlg-dataset.tar.gz", [WEBNLG_URL], None)
    folder = webnlg_folder(root)
    if folder is None:
        raise UsageError(f"{unpacked} does not hold WebNLG 2017; delete it to have it fetched anew")
    test = folder / "test" / "testdata_with_lex.xml"
    verify(test, WEBNLG_TEST, record=test)
    files = {
        "train": sorted(folder.glob("train/*/*.xml")),
        "val": sorted(folder.glob("dev/*/*.xml")),
        "test": [test],
    }
    splits = {}
    for split, texts in WEBNLG_TEXTS.items():
        splits[split] = pairs(
            folder, chain.from_iterable(webnlg_rows(file, split == "test") for file in files[split])
        )
        if (found := sum(len(pair.references) for pair in splits[split])) != texts:
            raise UsageError(
                f"{folder} has {found} texts for {split}, not {texts}; put a whole copy in its place"
            )
    return {"encoding": encoding, "template": Template(), "splits": splits}


def webnlg_rows(path: Path, test: bool) -> Iterator[Row]:
    """The source is ` | subject : property : object` of every fact, the leading separator and its space included."""
    text = read(path)
    try:
        entries = ET.fromstring(text).iter("entry")
    except ET.ParseError as error:
        raise UsageError(
            f"{path} line {error.position[0]}: {error}; put a whole copy in its place"
        ) from error
    for entry, start in zip(entries, re.finditer(r"<entry\b", text), strict=False):
        place = f"{path} line {text.count(chr(10), 0, start.start()) + 1}"
        facts = [
            (fact.text or "").strip().split(" | ")
            for fact in entry.iterfind("modifiedtripleset/mtriple")
        ]
        if not facts or any(len(fact) != 3 for fact in facts):
            raise UsageError(
                f"{place}: no mtriple, or one not `subject | property | object`; put a whole copy there"
            )
        source = "".join(f" | {' : '.join(fact)}" for fact in facts)
        texts = [
            (t.text or "").strip()
            for t in entry.iterfind("lex")
            if test or t.get("comment") == "good"
        ]
        if texts:
            yield (
                place,
                source,
                texts,
                ("seen" if entry.get("category") in WEBNLG_SEEN else "unseen") if test else "",
            )


XSUM_URL = "https://huggingface.co/datasets/EdinburghNLP/xsum/resolve"
XSUM_FILES = {
    "train": (f"{XSUM_URL}/refs%2Fconvert%2Fparquet/default/train/0000.parquet", None),
    "validation": (f"{XSUM_URL}/refs%2Fconvert%2Fparquet/default/validation/0000.parquet", None),
    "test": (
        f"{XSUM_URL}/main/data/test-00000-of-00001.parquet",
        "sha256:224e9dbc6fed987759c1954603b43cb280b8d475d78893779130aa707d967ed7",
    ),
}


def xsum_file(name: str, root: Path) -> Path | None:
    return next(
        (
            file
            for f in places(root / "xsum", ("data",))
            for file in sorted(f.glob(f"{name}*.parquet"))
        ),
        None,
    )


def load_xsum(root: Path, encoding: tiktoken.Encoding) -> dict:
    """XSUM: a BBC article, and the sentence that introduces it. Both are cut to fit GPT-2's 1,024 positions."""
    splits = {}
    for split, (name, (url, checksum)) in zip(SPLITS, XSUM_FILES.items(), strict=True):
        path = xsum_file(name, root) or fetch([url], root / "xsum" / f"{name}.parquet", checksum)
        splits[split] = pairs(path, xsum_rows(path))
    return {
        "encoding": encoding,
        "template": Template(space="", cut=(512, 60, 100)),
        "splits": splits,
    }


def xsum_rows(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(
            "XSUM comes as parquet files; to read them: pip install pyarrow"
        ) from error
    try:
        rows = parquet.read_table(path, columns=["document", "summary"]).to_pylist()
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} is no XSUM ({error}); put a whole copy in its place") from error
    for i, row in enumerate(rows, 1):
        yield (
            f"{path} row {i}",
            one_line(row["document"] or ""),
            [one_line(row["summary"] or "")],
            "",
        )


def load_jsonl(path: Path, root: Path, encoding: tiktoken.Encoding) -> dict:
    """Your own pairs, a {"source": ..., "target": ...} per line, split 80 / 10 / 10 by source, always in the same way.

    A target is a string, or a list of them: several ways to say it. The template is E2E's.
    """
    found = pairs(path, jsonl_rows(path))
    if len(found) < 10:
        raise UsageError(
            f"{path} has {len(found)} distinct sources; a split into 80 / 10 / 10 % needs at least 10"
        )
    order = np.random.default_rng(0).permutation(len(found))
    parts = np.split(order, (round(0.8 * len(found)), round(0.9 * len(found))))
    splits = {
        split: [found[i] for i in sorted(part)] for split, part in zip(SPLITS, parts, strict=True)
    }
    return {"encoding": encoding, "template": Template(), "splits": splits}


def jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            row = {}
        source, targets = row.get("source"), row.get("target")
        targets = [targets] if isinstance(targets, str) else targets
        if not (
            isinstance(source, str)
            and isinstance(targets, list)
            and all(isinstance(t, str) for t in targets)
        ):
            raise UsageError(
                f'{path} line {number}: not {{"source": "...", "target": "..."}}, but {line[:40]}; mend it'
            )
        yield (
            f"{path} line {number}",
            one_line(source),
            [one_line(target) for target in targets],
            "",
        )


def load_restaurants(root: Path, encoding: tiktoken.Encoding) -> dict:
    return {
        "encoding": encoding,
        "template": Template(longest=130),
        "splits": language.restaurants(),
    }


def load_guidebook(root: Path, encoding: tiktoken.Encoding) -> dict:
    return {"encoding": encoding, "template": Template(longest=130), "splits": language.guidebook()}


@dataclass(frozen=True)
class TextTask:
    """One name that --task takes. load: (root, encoding) -> the fields of Text but its name. here: root -> whether the
    files are on this machine. sizes: texts per split. lr: per method of train.py.
    """

    load: Callable[[Path, tiktoken.Encoding], dict]
    here: Callable[[Path], bool] = lambda root: True
    sizes: dict[str, int] = field(default_factory=dict)
    backbone: str = "gpt2-medium"
    batch: int = 10
    epochs: int = 5
    length: int = 5
    lr: dict[str, float] = field(default_factory=dict)


TEXT_TASKS = {
    "e2e": TextTask(
        load_e2e,
        lambda root: all(e2e_file(file, root) for file, _ in E2E_FILES.values()),
        sizes={"train": 42_061, "val": 4_672, "test": 4_693},
        lr={"none": 1e-2, "deep": 1e-4},
    ),
    "webnlg": TextTask(
        load_webnlg,
        lambda root: webnlg_folder(root) is not None,
        sizes=WEBNLG_TEXTS,
        batch=5,
        lr={"none": 5e-2, "deep": 1e-4},
    ),
    "xsum": TextTask(
        load_xsum,
        lambda root: all(xsum_file(name, root) for name in XSUM_FILES),
        sizes={"train": 204_045, "val": 11_332, "test": 11_334},
        batch=16,
        epochs=30,
        length=200,
        lr={"none": 5e-4, "deep": 5e-5},  # the paper's for BART-large; it has no GPT-2 there
    ),
    "restaurants": TextTask(
        load_restaurants,
        sizes={"train": 2_400, "val": 90, "test": 270},
        backbone="tiny_gpt",
        epochs=10,
        lr={"none": 0.3, "deep": 2e-3},
    ),
    "guidebook": TextTask(
        load_guidebook,
        sizes={"train": 40_000, "val": 300, "test": 300},
        backbone="tiny_gpt",
        batch=24,
        epochs=1,
        lr={"full": 2e-3},
    ),
}
