"""Two small language tasks that the repository makes itself: what a tiny GPT knows, and what a prefix teaches it.

`guidebook` is what the GPT is trained on: hotels, museums, films, ... in three notations and five styles. Its names are
strung together from syllables, so the only way to write one is to copy it from the source. `restaurants` keeps the
copying and has everything else of its own: a notation, attributes, values and sentences. Every source has three
references, and what val and test ask for are *combinations* of food, price and area that train never shows.

Both are drawn from random.Random(0), so every machine has the same.
"""

import random
from itertools import product

from tokens import Pair

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
NUMBERS = ("two", "three", "four", "five", "six", "seven", "nine", "ten")
QUARTERS = ("old town", "harbour", "north", "valley", "west end", "market", "hills")
NOTATIONS = (("{}={}", ";"), ("{} {}", ", "), ("{}({})", ""))  # of an attribute, and what joins them
KINDS = {  # kind -> attribute -> what a sentence says of it, and its values; a name if there are none
    "hotel": {"rooms": ("has {} rooms", NUMBERS), "owner": ("belongs to {}", ()), "part": ("lies in the {}", QUARTERS)},
    "museum": {
        "shows": ("shows {}", ("old coins", "toys", "maps", "clocks", "glass")),
        "founder": ("was founded by {}", ()),
    },
    "film": {"by": ("was made by {}", ()), "theme": ("is about {}", ("love", "war", "a thief", "the sea", "horses"))},
    "school": {"subject": ("teaches {}", ("music", "German", "chess", "law", "Greek")), "near": ("is near {}", ())},
    "shop": {
        "goods": ("sells {}", ("cheap shoes", "bread", "fish", "tea", "books")),
        "part": ("is in the {}", QUARTERS),
    },
}
STYLES = (
    "{name} is a {kind}. It {}. It {}.",
    "The {kind} {name} {} and {}.",
    "Do you know {name}? This {kind} {} and {}.",
    "{name}: a {kind} that {} and {}.",
    "There is a {kind} called {name}. It {} and {}.",
)
FOODS = ("Italian", "Indian", "Thai", "French", "Chinese", "Spanish", "Mexican", "Turkish")
PRICES = ("cheap", "good", "costly")
AREAS = ("city centre", "riverside", "suburbs", "south", "park")
SAYINGS = (
    "{name} serves {price} {food} food in the {area}{near}.",
    "In the {area}{near}, {name} offers {food} dishes that are {price}.",
    "If you like {price} {food} food, visit {name} in the {area}{near}.",
)


def name(rng: random.Random) -> str:
    return "".join(rng.sample(SYLLABLES, 2)).capitalize()


def guide(rng: random.Random) -> Pair:
    kind, (written, joint) = rng.choice(list(KINDS)), rng.choice(NOTATIONS)
    chosen = {a: (says, rng.choice(values) if values else name(rng)) for a, (says, values) in KINDS[kind].items()}
    chosen = dict(rng.sample(list(chosen.items()), 2))
    attributes = {"name": name(rng), "kind": kind} | {a: value for a, (_, value) in chosen.items()}
    source = joint.join(written.format(*attribute) for attribute in rng.sample(list(attributes.items()), 4))
    said = [says.format(value) for says, value in chosen.values()]
    return Pair(source, [rng.choice(STYLES).format(*said, **attributes)])


def guidebook() -> dict[str, list[Pair]]:
    rng = random.Random(0)
    return {
        split: [guide(rng) for _ in range(size)] for split, size in (("train", 20_000), ("val", 300), ("test", 300))
    }


def restaurant(rng: random.Random, food: str, price: str, area: str) -> Pair:
    near = name(rng) if rng.random() < 0.5 else ""
    attributes = {"name": name(rng), "food": food, "price": price, "area": area} | ({"near": near} if near else {})
    source = " | ".join(f"{attribute} : {value}" for attribute, value in attributes.items())
    return Pair(source, [saying.format(**attributes | {"near": near and f" near {near}"}) for saying in SAYINGS])


def restaurants() -> dict[str, list[Pair]]:
    """80 combinations to train on, 10 times each; 10 for val and 30 for test, thrice each."""
    rng = random.Random(0)
    meanings = rng.sample(list(product(FOODS, PRICES, AREAS)), 120)
    parts = {"train": meanings[:80] * 10, "val": meanings[80:90] * 3, "test": meanings[90:] * 3}
    return {split: [restaurant(rng, *meaning) for meaning in part] for split, part in parts.items()}
