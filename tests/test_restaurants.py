"""restaurants.py: a task with combinations that were never shown, and a guidebook that has its words but not it."""

from itertools import chain

import pytest

from data import load
from support import language
from support.corpora import TEXT_TASKS, Pair, Text, encoding

BYTES = encoding("bytes")


def meaning(pair: Pair) -> tuple[str, ...]:
    attributes = dict(attribute.split(" : ") for attribute in pair.source.split(" | "))
    return attributes["food"], attributes["price"], attributes["area"]


def test_restaurants_ask_for_combinations_that_were_never_shown_of_values_that_were():
    splits = language.restaurants()
    shown = {meaning(pair) for pair in splits["train"]}
    for split in ("val", "test"):
        asked = {meaning(pair) for pair in splits[split]}
        assert not asked & shown
        assert set(chain(*asked)) <= set(chain(*shown))
    assert not {meaning(pair) for pair in splits["val"]} & {
        meaning(pair) for pair in splits["test"]
    }
    assert {split: len(pairs) for split, pairs in splits.items()} == {
        "train": 800,
        "val": 30,
        "test": 90,
    }


def test_a_restaurant_is_said_in_three_ways_each_with_all_its_values():
    for pair in chain(*language.restaurants().values()):
        values = [attribute.split(" : ")[1] for attribute in pair.source.split(" | ")]
        assert len(set(pair.references)) == 3
        assert all(value in reference for value in values for reference in pair.references)


def test_the_guidebook_has_all_words_of_the_restaurants_but_no_restaurant_and_no_price_of_food():
    told = list(chain(*language.guidebook().values()))
    asked = list(chain(*language.restaurants().values()))

    def words(pairs):
        return {
            word.strip(".,?:")
            for pair in pairs
            for text_ in pair.references
            for word in text_.split()
        }

    names = {pair.source.split(" | ")[0].split(" : ")[1] for pair in told + asked}
    assert words(asked) - words(told) - names == {"restaurant"}
    assert len({pair.source for pair in told}) == len(told)
    assert not [pair for pair in told if " food : " in pair.source and " price : " in pair.source]
    assert [pair for pair in told if " food : " in pair.source and " area : " in pair.source]


@pytest.mark.parametrize("task", ["restaurants", "guidebook"])
def test_the_repository_s_own_tasks_are_short_and_the_same_every_time(task, tmp_path):
    first, again = (Text(task, **TEXT_TASKS[task].load(tmp_path, BYTES)) for _ in range(2))
    assert first.splits == again.splits
    assert {split: first.count(split) for split in first.splits} == TEXT_TASKS[task].sizes
    assert max(len(source) + len(target) for source, target in first.examples("train")) <= 200


def test_a_text_task_is_loaded_in_its_own_encoding_if_none_is_named(tmp_path):
    assert load("restaurants", tmp_path).encoding.name == BYTES.name
    assert load("restaurants", tmp_path, "bytes").splits == load("restaurants", tmp_path).splits
