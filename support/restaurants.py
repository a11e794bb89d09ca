"""Two small language tasks that the repository makes itself: what a tiny GPT knows, and what a prefix then teaches it.

`guidebook`, to train the GPT on: hotels, museums, clubs, ... with two or three attributes each, said in a random style,
order and choice of words. Names are two syllables, so the way to write one is to copy it from the source.
`restaurants`, to prefix-tune it: a kind of place that is not in the guidebook, with attributes that never come together
there, in sentences of its own. It says everything in three ways, the references. What val and test ask for are
*combinations* of food, price and area that train never shows.

Both come from random.Random(0), so they are the same on every machine.
"""

import random
from collections.abc import Callable
from functools import partial
from itertools import product

from support.tokens import Pair

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
    chosen = {a: rng.choice(VALUES.get(a) or [name(rng)]) for a in rng.sample(KINDS[kind], rng.choice((2, 3)))}
    style, joint = rng.choice(STYLES)
    said = [rng.choice(WORDINGS[a]).format(value) for a, value in rng.sample(list(chosen.items()), len(chosen))]
    return Pair(source({kind: own} | chosen), [style.format(joint.join(said), name=own, kind=kind)])


def guidebook() -> dict[str, list[Pair]]:
    pairs = distinct(partial(guide, random.Random(0)), 40_600)
    return {"train": pairs[:40_000], "val": pairs[40_000:40_300], "test": pairs[40_300:]}


def restaurant(rng: random.Random, meaning: tuple[str, str, str]) -> Pair:
    attributes = {"restaurant": name(rng)} | dict(zip(("food", "price", "area"), meaning, strict=True))
    attributes |= {"near": name(rng)} if rng.random() < 0.5 else {}
    beside = f" near {attributes['near']}" if "near" in attributes else ""
    return Pair(source(attributes), [saying.format(**attributes, beside=beside) for saying in SAYINGS])


def restaurants() -> dict[str, list[Pair]]:
    """Of 120 combinations 80 are for train, 10 times each, 10 for val and 30 for test, 3 times each."""
    rng, splits = random.Random(0), {}
    meanings = rng.sample(list(product(VALUES["food"], VALUES["price"], VALUES["area"])), 120)
    for split, own, times in (("train", meanings[:80], 10), ("val", meanings[80:90], 3), ("test", meanings[90:], 3)):
        splits[split] = [pair for m in own for pair in distinct(partial(restaurant, rng, m), times)]
    return splits
