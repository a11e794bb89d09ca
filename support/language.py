"""Text as tokens, in batches that say where a model has something to learn; and two made tasks.

A GPT continues text. Here it reads a source, then bos, and writes the target up to eos; one token,
<|endoftext|>, is both. It learns the target and the eos alone, so a batch says where those are:

    tokens            name  :  Alimentum  <bos>  There  is  a  place     (B, T) padded on the right
    target_positions                      3      4      5   6  7         (B, Q) columns of `tokens`
    labels                                There  is     a   place <eos>  (B, Q) the token after each

Padding has the label -100. The official loss is the *sum* over a text's labels, its mean over B:
    logits = model(tokens, prefix_kv, target_positions)  # (B, Q, V)
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100) / B

Shapes: B texts, T tokens, Q labels of the text that has most, V vocabulary.
Source: Li & Liang, ACL 2021 (Prefix-tuning), whose templates, label masks and limits these are.
"""

import gzip
import hashlib
import json
import random
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import chain, product
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import tiktoken
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from support.files import UsageError
from support.images import Batched

EOT = "<|endoftext|>"
VOCABULARY = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"  # tiktoken's source


def encoding(name: str) -> tiktoken.Encoding:
    """ "gpt2", or "bytes": a token for every byte, and <|endoftext|>.

    UsageError if GPT-2's vocabulary cannot be downloaded.
    """
    if name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        return tiktoken.Encoding(
            name, pat_str="(?s).+", mergeable_ranks=ranks, special_tokens={EOT: 256}
        )
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"GPT-2's vocabulary cannot be fetched ({error}); "
            f"save {VOCABULARY}/vocab.bpe as 6d1cbeee0f20b3d9449abfede4726ed8212e3aee "
            f"and {VOCABULARY}/encoder.json as 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6 in a "
            "folder, and name that folder in the environment variable TIKTOKEN_CACHE_DIR; "
            "--backbone tiny_gpt needs no vocabulary"
        ) from error


@dataclass
class Pair:
    """A source and all its references. group: "seen" or "unseen" in WebNLG's test set."""

    source: str
    references: list[str]
    group: str = ""


@dataclass(frozen=True)
class Template:
    """How a pair becomes tokens: lead, source, bos, target, eos, with `space` around either text.

    With GPT-2's vocabulary the spaces before bos and eos are tokens of their own (220), as in the
    official code. cut: the most tokens of a source, of a target of train and val, and of one of
    test; None keeps them all. longest: the most tokens that are written.
    """

    space: str = " "
    cut: tuple[int | None, int | None, int | None] = (None, None, None)
    longest: int = 100
    lead: str = ""


@dataclass
class Text(Batched):
    """One language task, the counterpart of images.Dataset.

    vocabulary: the name of an encoding, which is loaded when the first token is asked for.
    """

    task: str
    vocabulary: str
    template: Template
    splits: dict[str, list[Pair]] = field(repr=False)  # train, val, test
    made: dict = field(default_factory=dict, init=False, repr=False)  # tokens of splits

    # What images.Dataset has, too.
    text: ClassVar[Literal[True]] = True
    unit: ClassVar = "texts"
    final: ClassVar = "train"  # the split that the protocol's last runs train on
    classes: ClassVar[list[str]] = []
    listing: ClassVar = None

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        return encoding(self.vocabulary)

    @cached_property
    def identity(self) -> dict[str, str]:
        """A short digest of the classes (there are none) and of each split's pairs."""
        digests = {}
        for name, pairs in {"classes": [], **self.splits}.items():
            made = hashlib.sha256()
            for pair in pairs:
                made.update(json.dumps([pair.source, pair.references, pair.group]).encode())
            digests[name] = made.hexdigest()[:16]
        return digests

    @property
    def metadata(self) -> dict:
        """What a trained model must know of its data to be used without them."""
        return {"classes": [], "template": asdict(self.template)}

    def tokens(self, split: str) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        """Per source of a split: its tokens up to bos, and those of every target."""
        if split not in self.made:
            most, train, test = self.template.cut
            pairs, made = self.splits[split], []
            for pair in tqdm(pairs, f"tokens of {self.task}", unit="text", leave=False, delay=2):
                source = self.encode(self.template.lead + pair.source, most)
                cut = test if split == "test" else train
                made.append((source, [self.encode(text, cut) for text in pair.references]))
            self.made[split] = made
        return self.made[split]

    def encode(self, text: str, most: int | None) -> np.ndarray:
        """A text with spaces around it as at most so many tokens, and the end."""
        space = self.template.space
        tokens = self.encoding.encode_ordinary(f"{space}{text}{space}")[:most]
        return np.array([*tokens, self.encoding.eot_token], np.int32)

    def count(self, split: str, fraction: float = 1.0) -> int:
        """How many examples there are. This needs no tokens."""
        total = sum(len(pair.references) for pair in self.splits[split])
        return max(1, round(fraction * total))

    def examples(self, split: str, fraction: float = 1.0) -> list[tuple[np.ndarray, np.ndarray]]:
        """(source, target) as tokens, one per reference. A smaller fraction is part of a larger."""
        pairs = [(source, target) for source, targets in self.tokens(split) for target in targets]
        if fraction == 1:
            return pairs
        order = np.random.default_rng(0).permutation(len(pairs))
        return [pairs[i] for i in order[: self.count(split, fraction)]]

    def order(self, examples: list, batch: int, rng: np.random.Generator | None) -> list[list]:
        """Batches of like length, shuffled if there is an rng, else in order of length."""
        lengths = np.array([len(source) + len(target) for source, target in examples])
        order = np.argsort(lengths, kind="stable")

        # While training: shuffle, sort by length inside stretches of 100 batches, and ...
        if rng is not None:
            shuffled = rng.permutation(len(examples))
            stretch = np.arange(len(examples)) // (100 * batch)
            order = shuffled[np.lexsort((lengths[shuffled], stretch))]
        starts = range(0, len(examples), batch)
        batches = [[examples[i] for i in order[start : start + batch]] for start in starts]

        # ... shuffle the batches.
        if rng is not None:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches

    def gather(self, examples: list, rng: np.random.Generator | None) -> tuple[Tensor, ...]:
        """One batch: tokens (B, T), target_positions (B, Q) and labels (B, Q), all int64."""
        # The last eos is a label only, since nothing follows it.
        texts = [torch.from_numpy(np.append(source, target[:-1])) for source, target in examples]
        targets = [torch.from_numpy(target) for _, target in examples]
        tokens = pad_sequence(texts, batch_first=True).long()  # (B, T)
        labels = pad_sequence(targets, batch_first=True, padding_value=-100).long()  # (B, Q)

        # A text's columns begin at bos, which ends its source; in padding the last one is repeated.
        bos = torch.tensor([len(source) - 1 for source, _ in examples])  # (B,)
        last = torch.tensor([len(target) - 1 for target in targets])  # (B,)
        columns = torch.arange(labels.shape[1])  # (Q,)
        positions = bos[:, None] + torch.minimum(columns, last[:, None])  # (B, Q)
        return tokens, positions, labels

    def must_fit(self, room: int, splits: Iterable[str], length: int = 0) -> None:
        """UsageError if an example, or a prompt and all that may be written, exceeds `room` tokens.

        room: the positions of a backbone that the `length` vectors of a prefix leave.
        """
        needs = []
        for split in splits:
            for (tokens, targets), pair in zip(self.tokens(split), self.splits[split], strict=True):
                written = max([self.template.longest, *map(len, targets)])
                needs.append((len(tokens) + written - 1, pair.source))
        longest, source = max(needs)
        if longest <= room:
            return
        over, most = sum(need > room for need, _ in needs), room + length - longest
        advice = "take a backbone with a longer context, or shorten these texts"
        if most > 0:
            advice = f"take --length {most} or less, or a backbone with a longer context"
        raise UsageError(
            f"{over:,} of {len(needs):,} texts of {self.task} do not fit: the longest needs "
            f"{longest} of {room} positions ('{source[:40]}...'); {advice}"
        )

    def prompts(self, split: str) -> list[list[int]]:
        """Per source, however many its references: the tokens up to bos."""
        return [tokens.tolist() for tokens, _ in self.tokens(split)]

    @property
    def decoding(self) -> dict:
        """How texts are written: up to eos or so many tokens, and in one line."""
        ends = [self.encoding.encode_ordinary(end) for end in ("\n", "\n\n")]
        banned = tuple(end[0] for end in ends if len(end) == 1)
        return {"max_new": self.template.longest, "eos": self.encoding.eot_token, "banned": banned}

    def decode(self, tokens: list[int]) -> str:
        """The text, stripped; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode(tokens).strip()


# Reading files of texts

WHOLE = "put a whole copy in its place"


def read(path: str | Path) -> str:
    """The text of a file, gzipped or not, or of standard input (-). UsageError if not UTF-8."""
    if str(path) == "-":
        return sys.stdin.read().removeprefix("\ufeff")
    try:
        raw = Path(path).read_bytes()
        raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path} line {line}: not UTF-8; save the file as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read ({error}); {WHOLE}") from error


def lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """(its place, line) for every line that is not blank."""
    for number, line in enumerate(read(path).split("\n"), 1):
        if line.strip():
            yield f"{path} line {number}", line.removesuffix("\r")


def one_line(text: str) -> str:
    """Any white space as one space: the decoder never writes a new line, so none is taught."""
    return " ".join(text.split())


def parsed(place: str, line: str) -> dict:
    """A line of a .jsonl file. UsageError, with json's own words, if it is no object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = str(error).replace(" line 1 ", " ")  # json calls every line the first
        raise UsageError(f"{place}: {reason}; mend it") from error
    if not isinstance(row, dict):
        raise UsageError(f"{place}: no object in braces, but {line[:40]}; mend it")
    return row


def is_jsonl(path: str | Path) -> bool:
    return str(path).lower().endswith((".jsonl", ".jsonl.gz"))


def read_sources(path: str | Path) -> list[str]:
    """The sources of a .jsonl file, or one per line of another text file or of standard input (-).

    They are read as training reads them: byte order marks and line ends do not count, and white
    space is one space.
    """
    if not is_jsonl(path):
        return [one_line(line) for _, line in lines(path)]
    sources = []
    for place, line in lines(path):
        source = parsed(place, line).get("source")
        if not isinstance(source, str):
            raise UsageError(f'{place}: no {{"source": "..."}}, but {line[:40]}; mend it')
        sources.append(one_line(source))
    return sources


# Two made tasks. `restaurants` asks for combinations of values that its train split never shows.
# `guidebook` is what the shipped tiny_gpt was trained on: the same words, but no restaurant.


def table(text: str) -> dict[str, list[str]]:
    """Lines of `name: value, value` as a dict."""
    rows = [line.split(": ") for line in text.strip().split("\n")]
    return {name: values.split(", ") for name, values in rows}


VALUES = table("""
syllable: ba, cor, del, fen, gal, jin, kar, lo, mir, nos, pel, qua, ri, sol, tam, wes
food: Italian, Indian, Thai, French, Chinese, Spanish, Mexican, Turkish
price: cheap, fair, costly
area: city centre, riverside, suburbs, south, harbour
rooms: two, three, four, five, six, seven, nine, ten
goods: shoes, bread, fish, tea, books, old coins, glass, maps
subject: music, German, chess, law, Greek, dance
""")  # of an attribute; owner and near are names
WORDINGS = table("""
food: serves {} food, offers {} dishes
price: has {} prices, is {}
area: lies in the {}, can be found in the {}
near: is near {}, stands next to {}
rooms: has {} rooms, gives you {} rooms
goods: sells {}, is full of {}
subject: teaches {}, is good for {}
owner: belongs to {}, is owned by {}
""")
KINDS = table("""
hotel: price, area, near, rooms
museum: goods, area, near, owner
shop: goods, price, near, owner
school: subject, area, rooms, price
club: food, near, owner, rooms
market: food, goods, area, near
ship: food, rooms, owner, goods
""")
STYLES = (  # a sentence, and what joins the attributes in it
    ("{name} is a {kind}. It {}.", ". It "),
    ("The {kind} {name} {}.", " and "),
    ("Do you know {name}? This {kind} {}.", ", "),
    ("{name}: a {kind} that {}.", " and "),
    ("If you like a {kind} that {}, visit {name}.", " and "),
)
SAYINGS = (
    "{restaurant} serves {food} food in the {area}{beside}. It has {price} prices.",
    "The {food} restaurant {restaurant} is {price}. It lies in the {area}{beside}.",
    "Do you like {food} dishes? {restaurant} in the {area}{beside} is {price}.",
)


def name(rng: random.Random) -> str:
    return "".join(rng.sample(VALUES["syllable"], 2)).capitalize()


def source(attributes: dict[str, str]) -> str:
    return " | ".join(f"{attribute} : {value}" for attribute, value in attributes.items())


def distinct(make: Callable[[], Pair], n: int) -> list[Pair]:
    """n pairs with n sources."""
    found: dict[str, Pair] = {}
    while len(found) < n:
        pair = make()
        found[pair.source] = pair
    return list(found.values())


def guide(rng: random.Random) -> Pair:
    """Two or three attributes of a place, told in a style and an order drawn at random."""
    kind, own = rng.choice(list(KINDS)), name(rng)
    attributes = rng.sample(KINDS[kind], rng.choice((2, 3)))
    chosen = {a: rng.choice(VALUES.get(a) or [name(rng)]) for a in attributes}
    style, joint = rng.choice(STYLES)
    told = rng.sample(list(chosen.items()), len(chosen))
    said = joint.join(rng.choice(WORDINGS[a]).format(value) for a, value in told)
    return Pair(source({kind: own} | chosen), [style.format(said, name=own, kind=kind)])


def guidebook() -> dict[str, list[Pair]]:
    pairs = distinct(partial(guide, random.Random(0)), 40_600)
    return {"train": pairs[:40_000], "val": pairs[40_000:40_300], "test": pairs[40_300:]}


def restaurant(rng: random.Random, food: str, price: str, area: str) -> Pair:
    attributes = {"restaurant": name(rng), "food": food, "price": price, "area": area}
    beside = ""
    if rng.random() < 0.5:
        attributes["near"] = name(rng)
        beside = f" near {attributes['near']}"
    texts = [saying.format(**attributes, beside=beside) for saying in SAYINGS]
    return Pair(source(attributes), texts)


def restaurants() -> dict[str, list[Pair]]:
    """Of 120 combinations train has 80, 10 times each, val 10 and test 30, 3 times each."""
    rng = random.Random(0)
    meanings = rng.sample(list(product(VALUES["food"], VALUES["price"], VALUES["area"])), 120)
    splits = {"train": (meanings[:80], 10), "val": (meanings[80:90], 3), "test": (meanings[90:], 3)}
    told: dict[str, list[Pair]] = {}
    for split, (chosen, times) in splits.items():
        each = [distinct(partial(restaurant, rng, *meaning), times) for meaning in chosen]
        told[split] = list(chain.from_iterable(each))
    return told
