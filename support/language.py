"""Text as tokens: a batch is a few examples of like length, and where in them the model has something to learn.

A GPT continues text. Here it reads a source, then bos, and writes the target up to eos; one token, <|endoftext|>, is
both. It reads all of them, but learns the target and the eos alone, so a batch says where those are:

    tokens    name  :  Alimentum  <bos>  There  is  a  place      (B, T)  padded on the right, where causal attention
    at                            3      4      5   6  7          (B, Q)  from `at` never looks
    labels                        There  is     a   place <eos>   (B, Q)  the token after column `at`; -100 is padding

The official loss is the *sum* over a sequence's labels, averaged over the batch:
    cross_entropy(model(tokens, prefix, at).flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100) / B

Shapes: B sequences, T tokens, Q labels of the sequence that has most.
Source: Li & Liang, ACL 2021 (Prefix-tuning), whose templates, label masks and length limits these are.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product, takewhile
from typing import ClassVar, Literal

import numpy as np
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

from support.files import UsageError
from support.images import Batched

EOT = "<|endoftext|>"
VOCABULARY = (
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"  # whence tiktoken has GPT-2's
)
STRETCH = 100  # batches whose examples are sorted by length among themselves


def encoding(name: str) -> tiktoken.Encoding:
    """ "gpt2", or "bytes": a token for every byte, and <|endoftext|>. UsageError if GPT-2's cannot be fetched."""
    if name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        return tiktoken.Encoding(
            name, pat_str="(?s).+", mergeable_ranks=ranks, special_tokens={EOT: 256}
        )
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        urls = [f"{VOCABULARY}/{file}" for file in ("vocab.bpe", "encoder.json")]
        files = " and ".join(f"{url} as {hashlib.sha1(url.encode()).hexdigest()}" for url in urls)
        raise UsageError(
            f"GPT-2's vocabulary cannot be fetched ({error}); save {files} in a folder, and name that folder in the "
            "environment variable TIKTOKEN_CACHE_DIR"
        ) from error


@dataclass
class Pair:
    """A source and all its references. group: "seen" or "unseen" in WebNLG's test set, where each is scored apart."""

    source: str
    references: list[str]
    group: str = ""


@dataclass(frozen=True)
class Template:
    """A pair becomes the tokens of source, bos, target, eos, with `space` before and after either text.

    With GPT-2's vocabulary the spaces before bos and eos are tokens of their own (220), as in the official code.
    cut: the most tokens of a source, of a target to train on, and of any other target; None keeps them all.
    longest: the most tokens that are written.
    """

    space: str = " "
    cut: tuple[int | None, int | None, int | None] = (None, None, None)
    longest: int = 100


@dataclass
class Text(Batched):
    """One language task, the counterpart of pixels.Dataset. `final` is the split the protocol's last runs train on."""

    task: str
    encoding: tiktoken.Encoding
    template: Template
    splits: dict[str, list[Pair]] = field(repr=False)  # train, val, test
    final: str = "train"
    classes: Sequence[str] = ()
    listing: None = None
    text: ClassVar[Literal[True]] = True
    unit: ClassVar = "texts"
    made: dict = field(
        default_factory=dict, init=False, repr=False
    )  # split -> its tokens, once asked for

    def tokens(self, split: str) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        """Per source of a split: the tokens up to bos, from which generation starts, and those of every target."""
        if split not in self.made:
            pairs, (source, train, other) = self.splits[split], self.template.cut
            references = [reference for pair in pairs for reference in pair.references]
            sources = self.encode([pair.source for pair in pairs], source)
            targets = iter(self.encode(references, train if split == "train" else other))
            self.made[split] = [
                (s, [next(targets) for _ in p.references])
                for s, p in zip(sources, pairs, strict=True)
            ]
        return self.made[split]

    def encode(self, texts: list[str], cut: int | None) -> list[np.ndarray]:
        space, encode, end = (
            self.template.space,
            self.encoding.encode_ordinary,
            [self.encoding.eot_token],
        )
        bar = tqdm(texts, f"tokens of {self.task}", unit="text", leave=False, delay=2)
        return [np.array(encode(f"{space}{text}{space}")[:cut] + end, np.int32) for text in bar]

    def examples(self, split: str, fraction: float = 1.0) -> list[tuple[np.ndarray, np.ndarray]]:
        """A split's (source, target) as tokens, one per reference. A smaller fraction is part of a larger one."""
        examples = [
            (source, target) for source, targets in self.tokens(split) for target in targets
        ]
        if fraction == 1:
            return examples
        order = np.random.default_rng(0).permutation(len(examples))
        return [examples[i] for i in order[: max(1, round(fraction * len(examples)))]]

    def order(self, examples: list, batch: int, rng: np.random.Generator | None) -> list[list]:
        """Batches of like length, shuffled if there is an rng, else in order of length. One of them may be smaller."""
        lengths = np.array([len(source) + len(target) for source, target in examples])
        return [[examples[i] for i in rows] for rows in ordered(lengths, batch, rng)]

    def gather(self, examples: list, rng: np.random.Generator | None) -> tuple[Tensor, ...]:
        """Tokens (B, T), at (B, Q) and labels (B, Q), all int64."""
        return gather(examples)

    def must_fit(self, room: int, splits: Iterable[str]) -> None:
        """UsageError if an example, or a prompt with all that may be written after it, has more than `room` tokens."""
        for split in splits:
            for (source, targets), pair in zip(self.tokens(split), self.splits[split], strict=True):
                longest = len(source) + max(self.template.longest, *map(len, targets)) - 1
                if longest > room:
                    raise UsageError(
                        f"a text of {self.task} needs {longest} of {room} positions; shorten '{pair.source[:40]}...' "
                        "or, with a smaller --length, the prefix"
                    )

    @property
    def metadata(self) -> dict:
        """What a trained model must know of its data to be used without them."""
        return {"classes": [], "template": asdict(self.template)}

    @property
    def decoding(self) -> dict:
        """How texts are written: up to eos or so many tokens, and in one line."""
        ends = [self.encoding.encode_ordinary(end) for end in ("\n", "\n\n")]
        banned = tuple(end[0] for end in ends if len(end) == 1)
        return {"max_new": self.template.longest, "eos": self.encoding.eot_token, "banned": banned}

    def prompts(self, split: str) -> list[tuple[list[int], Pair]]:
        """Per source, however many its references: the tokens up to bos, and the pair."""
        return [
            (s.tolist(), pair)
            for (s, _), pair in zip(self.tokens(split), self.splits[split], strict=True)
        ]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text up to the first eos, stripped; bytes that are not UTF-8 become U+FFFD."""
        end = self.encoding.eot_token
        return self.encoding.decode(list(takewhile(lambda token: token != end, tokens))).strip()


def ordered(lengths: np.ndarray, batch: int, rng: np.random.Generator | None) -> list[np.ndarray]:
    """The numbers of all examples as batches of like length: by length, or by length only inside random stretches."""
    n = len(lengths)
    if rng is None:
        return np.split(np.argsort(lengths, kind="stable"), range(batch, n, batch))
    shuffled = rng.permutation(n)
    order = shuffled[np.lexsort((lengths[shuffled], np.arange(n) // (STRETCH * batch)))]
    batches = np.split(order, range(batch, n, batch))
    return [batches[i] for i in rng.permutation(len(batches))]


def gather(examples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor, Tensor]:
    """One batch: tokens (B, T), at (B, Q) and labels (B, Q). The last eos is a label only, since nothing follows it."""
    B, Q = len(examples), max(len(target) for _, target in examples)
    T = max(len(source) + len(target) for source, target in examples) - 1
    tokens, at, labels = (
        np.zeros((B, T), np.int64),
        np.zeros((B, Q), np.int64),
        np.full((B, Q), -100),
    )
    for row, (source, target) in enumerate(examples):
        s, t = len(source), len(target)
        tokens[row, :s], tokens[row, s : s + t - 1] = source, target[:-1]
        at[row] = (
            s - 1 + np.minimum(np.arange(Q), t - 1)
        )  # column s - 1 is bos; padding repeats the last
        labels[row, :t] = target
    return torch.from_numpy(tokens), torch.from_numpy(at), torch.from_numpy(labels)


SYLLABLES = (
    "ba",
    "cor",
    "del",
    "fen",
    "gal",
    "jin",
    "kar",
    "lo",
    "mir",
    "nos",
    "pel",
    "qua",
    "ri",
    "sol",
    "tam",
    "wes",
)
VALUES = {  # of an attribute; owner and near are names
    "food": ("Italian", "Indian", "Thai", "French", "Chinese", "Spanish", "Mexican", "Turkish"),
    "price": ("cheap", "fair", "costly"),
    "area": ("city centre", "riverside", "suburbs", "south", "harbour"),
    "rooms": ("two", "three", "four", "five", "six", "seven", "nine", "ten"),
    "goods": ("shoes", "bread", "fish", "tea", "books", "old coins", "glass", "maps"),
    "subject": ("music", "German", "chess", "law", "Greek", "dance"),
}
WORDINGS = {
    "food": ("serves {} food", "offers {} dishes"),
    "price": ("has {} prices", "is {}"),
    "area": ("lies in the {}", "can be found in the {}"),
    "near": ("is near {}", "stands next to {}"),
    "rooms": ("has {} rooms", "gives you {} rooms"),
    "goods": ("sells {}", "is full of {}"),
    "subject": ("teaches {}", "is good for {}"),
    "owner": ("belongs to {}", "is owned by {}"),
}
KINDS = {
    "hotel": ("price", "area", "near", "rooms"),
    "museum": ("goods", "area", "near", "owner"),
    "shop": ("goods", "price", "near", "owner"),
    "school": ("subject", "area", "rooms", "price"),
    "club": ("food", "near", "owner", "rooms"),
    "market": ("food", "goods", "area", "near"),
    "ship": ("food", "rooms", "owner", "goods"),
}
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
    return "".join(rng.sample(SYLLABLES, 2)).capitalize()


def source(attributes: dict[str, str]) -> str:
    return " | ".join(f"{attribute} : {value}" for attribute, value in attributes.items())


def distinct(make: Callable[[], Pair], n: int) -> list[Pair]:
    found: dict[str, Pair] = {}
    while len(found) < n:
        pair = make()
        found[pair.source] = pair
    return list(found.values())


def guide(rng: random.Random) -> Pair:
    kind, own = rng.choice(list(KINDS)), name(rng)
    chosen = {
        a: rng.choice(VALUES.get(a) or [name(rng)])
        for a in rng.sample(KINDS[kind], rng.choice((2, 3)))
    }
    style, joint = rng.choice(STYLES)
    said = [
        rng.choice(WORDINGS[a]).format(value)
        for a, value in rng.sample(list(chosen.items()), len(chosen))
    ]
    return Pair(source({kind: own} | chosen), [style.format(joint.join(said), name=own, kind=kind)])


def guidebook() -> dict[str, list[Pair]]:
    pairs = distinct(partial(guide, random.Random(0)), 40_600)
    return {"train": pairs[:40_000], "val": pairs[40_000:40_300], "test": pairs[40_300:]}


def restaurant(rng: random.Random, meaning: tuple[str, str, str]) -> Pair:
    attributes = {"restaurant": name(rng)} | dict(
        zip(("food", "price", "area"), meaning, strict=True)
    )
    attributes |= {"near": name(rng)} if rng.random() < 0.5 else {}
    beside = f" near {attributes['near']}" if "near" in attributes else ""
    return Pair(
        source(attributes), [saying.format(**attributes, beside=beside) for saying in SAYINGS]
    )


def restaurants() -> dict[str, list[Pair]]:
    """Of 120 combinations 80 are for train, 10 times each, 10 for val and 30 for test, 3 times each."""
    rng, splits = random.Random(0), {}
    meanings = rng.sample(list(product(VALUES["food"], VALUES["price"], VALUES["area"])), 120)
    for split, own, times in (
        ("train", meanings[:80], 10),
        ("val", meanings[80:90], 3),
        ("test", meanings[90:], 3),
    ):
        splits[split] = [pair for m in own for pair in distinct(partial(restaurant, rng, m), times)]
    return splits
