"""Prompts for two of the three criteria of arXiv 2503.19897, made up from templates.

Each criterion is a function of a `random.Random` alone. The third, image quality, is a matter of
captions that people wrote: those come from a file or a data set.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from .words import (
    ACTIONS,
    ANIMALS,
    BINDINGS,
    COLOURS,
    COMMON_WORDS,
    HOLDING,
    IRREGULAR_PLURALS,
    LOOKS,
    MEETINGS,
    NUMBERS,
    PEOPLE,
    PLACES,
    SIGN_PLACES,
    SIGNS,
    SPATIAL,
    STYLES,
    THINGS,
    WRITTEN,
)


def compositional(rng: random.Random) -> str:
    """Attributes bound to objects, relations in space and between people, or counts; a third each.

    "a red bench and a blue kettle", "a girl riding a donkey", "three owls and two green chairs".
    """
    prompt = rng.choice((_binding, _relation, _counting))(rng)
    if rng.random() < 0.25:
        prompt = f"{prompt} {rng.choice(PLACES)}"
    if rng.random() < 0.15:
        prompt = f"{rng.choice(STYLES)} {prompt}"
    return prompt


def text_rendering(rng: random.Random) -> str:
    """Somebody with a sign that says a common word: 'an old sailor holding a sign that says
    "harvest"'.
    """
    person, sign = _person(rng), _a(rng.choice(SIGNS))
    word = rng.choice((str.lower, str.lower, str.capitalize, str.upper))(rng.choice(COMMON_WORDS))
    quote = rng.choice('""\'')
    prompt = f"{person} {rng.choice(HOLDING)} {sign} {rng.choice(WRITTEN)} {quote}{word}{quote}"
    if rng.random() < 0.4:
        prompt = f"{prompt} {rng.choice(SIGN_PLACES)}"
    if rng.random() < 0.15:
        prompt = f"{rng.choice(STYLES)} {prompt}"
    return prompt


CRITERIA: dict[str, Callable[[random.Random], str]] = {
    "compositional": compositional,
    "text_rendering": text_rendering,
}


def _binding(rng: random.Random) -> str:
    """Two or three objects, each with its own colour (or material, shape, pattern)."""
    table = rng.choice((BINDINGS[0], *BINDINGS))
    bound: dict[str, str] = {}
    for attribute in rng.sample(list(table), rng.choice((2, 2, 2, 3))):
        bound[rng.choice([thing for thing in table[attribute] if thing not in bound])] = attribute
    if len(bound) == 2 and rng.random() < 0.2:
        return " and ".join(f"{_a(thing)} that is {bound[thing]}" for thing in bound)
    return _listed([_a(f"{attribute} {thing}") for thing, attribute in bound.items()])


def _relation(rng: random.Random) -> str:
    """Two things in space, somebody who does something, or two people."""
    kind = rng.random()
    if kind < 0.5:
        first, second = rng.sample(THINGS + ANIMALS, 2)
        if rng.random() < 0.5:
            first, second = (
                f"{colour} {thing}" if thing in THINGS else thing
                for colour, thing in zip(rng.sample(COLOURS, 2), (first, second), strict=True)
            )
        return f"{_a(first)} {rng.choice(SPATIAL)} {_a(second)}"
    if kind < 0.8:
        action = rng.choice(list(ACTIONS))
        return f"{_person(rng)} {action} {_a(rng.choice(ACTIONS[action]))}"
    first, second = rng.sample(PEOPLE, 2)
    return f"{_a(first)} {rng.choice(MEETINGS)} {_a(second)}"


def _counting(rng: random.Random) -> str:
    """Two to ten of a kind, often with a second kind, sometimes coloured."""
    groups: list[str] = []
    for noun in rng.sample(THINGS + ANIMALS, rng.choice((1, 2, 2))):
        number = rng.choice(("one", *NUMBERS) if groups else NUMBERS)
        coloured = noun in THINGS and rng.random() < 0.4
        words = [number, *([rng.choice(COLOURS)] if coloured else [])]
        groups.append(" ".join([*words, noun if number == "one" else _plural(noun)]))
    return _listed(groups)


def _person(rng: random.Random) -> str:
    person = rng.choice(PEOPLE)
    return _a(f"{rng.choice(LOOKS)} {person}" if rng.random() < 0.5 else person)


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _listed(phrases: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def _plural(noun: str) -> str:
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"
