"""Prompts for distillation: lists, files, data sets, generators, and mixtures of them."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from configparser import ConfigParser
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Protocol, runtime_checkable

from tqdm.auto import tqdm

from ..errors import DistillError, HubAccessError
from ..hub import hub_errors

_MAX_TRIES = 1000  # of a generator for one prompt
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and lone surrogates, which UTF-8 can't hold


@runtime_checkable
class PromptSource(Protocol):
    """Prompts of a run, finite or endless."""

    def prompt(self, index: int, seed: int | str = 0) -> str:
        """Return the prompt of draw `index`, from 0, in the order of `seed`.

        It depends on nothing else: a run that is resumed, or on more processes, sees the same.
        """

    def all(self) -> list[str]:
        """Return each distinct prompt of a finite source; DistillError for an endless one."""

    def without(self, share: float) -> PromptSource:
        """Return the source without the prompts whose `hash_position` is below `share`."""

    def facts(self) -> dict[str, Any]:
        """Return a description for the metadata of a run, in the types of JSON."""

    def fingerprint(self) -> str:
        """Return a SHA-256 of the prompts and of what orders them: not of seed or file names."""
        return _sha256(self.facts())


Prompts = PromptSource | Iterable[str] | str | os.PathLike[str] | Mapping[str, Any]


class PromptList(PromptSource):
    """A list of prompts, each drawn once per epoch, every epoch in an order of its own.

    White space around prompts is stripped; blank and repeated ones are dropped. Errors call the
    list `name`.
    """

    def __init__(self, prompts: Iterable[str], name: str = "list") -> None:
        if isinstance(prompts, Set) or hasattr(prompts, "columns"):  # without order; of columns
            wanted = "a list: of a table, list(table['caption']); of a set, sorted(prompts)"
            raise DistillError(f"Got a {type(prompts).__name__}; expected {wanted}.")
        numbered = enumerate(tqdm(prompts, f"Reading {name}", delay=2), 1)
        texts = (_text(prompt, f"{name}, prompt {number}") for number, prompt in numbered)
        self._prompts = [text for text in dict.fromkeys(texts) if text]
        if not self._prompts:
            raise DistillError(f"{name} holds no prompts; expected at least one.")
        self._order = lru_cache(1)(partial(_shuffled, self._prompts))

    def prompt(self, index: int, seed: int | str = 0) -> str:
        # The first draw of an epoch takes 0.5 seconds per million prompts.
        epoch, place = divmod(index, len(self._prompts))
        return self._order(f"{seed}/{epoch}")[place]

    def all(self) -> list[str]:
        return list(self._prompts)

    def without(self, share: float) -> PromptList:
        rest = [prompt for prompt in self._prompts if hash_position(prompt) >= share]
        return PromptList(rest, f"list without a share of {share}")

    def facts(self) -> dict[str, Any]:
        return {"kind": "list", "prompts": len(self._prompts), "sha256": _sha256(self._prompts)}


@dataclass(eq=False)
class GeneratedPrompts(PromptSource):
    """Prompts generated from templates, endless or a number of them.

    Attributes:
        criterion: "compositional" (attributes of objects, relations, counts) or "text_rendering"
            (somebody with a sign), after two criteria of arXiv 2503.19897; or a function of a
            `random.Random` alone that returns a prompt.
        count: Number of prompts, a few of which may be equal. None: endless.
        held_out: Share of all conceivable prompts, by `hash_position`, that is never generated.

    Raises:
        DistillError: An unknown criterion, or a count below 1.
    """

    criterion: str | Callable[[Random], str]
    count: int | None = None
    held_out: float = 0.0

    def __post_init__(self) -> None:
        make = _CRITERIA.get(self.criterion) if isinstance(self.criterion, str) else self.criterion
        if not callable(make) or (self.count is not None and self.count < 1):
            raise DistillError(f"{self}: expected one of {[*_CRITERIA]} or a function; count >= 1.")
        self._make, self._name = make, getattr(make, "__name__", type(make).__name__)
        self._order = lru_cache(1)(partial(_shuffled, range(self.count or 0)))

    def prompt(self, index: int, seed: int | str = 0) -> str:
        if self.count is not None:
            epoch, place = divmod(index, self.count)
            index, seed = self._order(f"{seed}/{epoch}")[place], 0
        rng = Random(f"{seed}/{index}")
        for _ in range(_MAX_TRIES):
            prompt = _text(self._make(rng), f"{self._name}, prompt {index}")
            if prompt and hash_position(prompt) >= self.held_out:
                return prompt
        raise DistillError(f"{self}: {_MAX_TRIES} successive prompts are blank or held out.")

    def all(self) -> list[str]:
        if self.count is None:
            raise DistillError(f"{self} has no end; expected a `count` of prompts to generate.")
        return list(dict.fromkeys(map(self.prompt, range(self.count))))

    def without(self, share: float) -> GeneratedPrompts:
        return replace(self, held_out=max(share, self.held_out))

    def facts(self) -> dict[str, Any]:
        facts = {"criterion": self._name, "count": self.count, "held_out_share": self.held_out}
        digest = _sha256([self.prompt(i) for i in range(4096)])
        return {"kind": "generated", **facts, "sha256": digest}


class PromptMixture(PromptSource):
    """Prompts of several sources, each drawn from with a probability of its own.

    Args:
        parts: Pairs of prompts, as `prompt_source` takes them, and their weight. Only the ratio of
            the weights counts.

    Raises:
        DistillError: A weight that is not above 0.
    """

    def __init__(self, parts: Iterable[tuple[Prompts, float]]) -> None:
        pairs = list(parts)
        self._parts = [prompt_source(part) for part, _ in pairs]
        self._weights = [weight for _, weight in pairs]
        if not pairs or not all(0 < weight < float("inf") for weight in self._weights):
            raise DistillError(f"Got weights {self._weights}; expected one or more, all above 0.")

    def prompt(self, index: int, seed: int | str = 0) -> str:
        (part,) = Random(f"{seed}/{index}").choices(range(len(self._parts)), self._weights)
        # By the draw's own index, a part that is a list still repeats no prompt within an epoch. A
        # seed for each part, so that its choices don't go in step with this one.
        return self._parts[part].prompt(index, f"{seed}/{part}")

    def all(self) -> list[str]:
        return list(dict.fromkeys(prompt for part in self._parts for prompt in part.all()))

    def without(self, share: float) -> PromptMixture:
        rests = [part.without(share) for part in self._parts]
        return PromptMixture(zip(rests, self._weights, strict=True))

    def facts(self) -> dict[str, Any]:
        pairs = zip(self._weights, self._parts, strict=True)
        parts = [{"weight": weight, "prompts": part.facts()} for weight, part in pairs]
        return {"kind": "mixture", "parts": parts}


def prompt_source(prompts: Prompts) -> PromptSource:
    """Make a source of prompts in any form: a source, a list, a file, or a mapping as in YAML.

        {file: captions.parquet, column: caption}
        {dataset: somebody/captions, column: caption, limit: 100000}
        {generator: compositional, count: 1000}
        {mixture: [{weight: 2, prompts: ...}, {weight: 1, prompts: ...}]}

    See docs/prompts.md. A data set is streamed into memory, its first million prompts by default
    (0.1 to 0.3 GB). Raises a DistillError, or a HubAccessError for a data set out of reach.
    """
    if isinstance(prompts, PromptSource):
        return prompts
    if isinstance(prompts, (str, os.PathLike)):
        return _read_file(prompts)
    if not isinstance(prompts, Mapping):
        return PromptList(prompts)
    options = dict(prompts)
    try:
        if "file" in prompts:
            return _read_file(options.pop("file"), **options)
        if "dataset" in prompts:
            name, limit = options.pop("dataset"), options.pop("limit", 1_000_000)
            return PromptList(islice(_rows(name, name, **options), limit), name)
        if "generator" in prompts:
            return GeneratedPrompts(options.pop("generator"), **options)
        pairs = [(part["prompts"], part["weight"]) for part in options.pop("mixture")]
        return PromptMixture(pairs, **options)
    except (KeyError, TypeError) as error:  # of keys, or values of another type
        raise DistillError(
            f"{prompts}: {error!r}; expected {{file, column}}, {{dataset, column, config, split, "
            "revision, limit}, {generator, count}, or {mixture: [{weight, prompts}, ...]}."
        ) from error


def load_prompts(prompts: Prompts) -> list[str]:
    """Return each distinct prompt of a finite source."""
    return prompt_source(prompts).all()


def split_held_out(
    prompts: Prompts, share: float = 0.01, count: int = 64
) -> tuple[PromptSource, list[str]]:
    """Split prompts into those to train on, and some to evaluate on that are never among them.

    A prompt's hash alone decides on its side: the same on every machine, in every file and mixture,
    whatever stands before it.

    Args:
        prompts: See `prompt_source`.
        share: Share of all prompts to hold out, above 0 and below 1.
        count: Held-out prompts to return at most; an evaluation samples a trajectory for each.

    Returns:
        The source without its held-out prompts, and up to `count` of these.

    Raises:
        DistillError: Nothing is held out, or everything; or see `prompt_source`.
    """
    if not 0 < share < 1 or count < 1:
        raise DistillError(f"Got share={share}, count={count}; expected 0 < share < 1 <= count.")
    source = prompt_source(prompts)
    if isinstance(source, PromptList):  # sorted: the first don't depend on the order of a file
        found = iter(sorted(source.all(), key=hash_position))
    else:
        draws = range(int((_MAX_TRIES + 20 * count) / share))  # 1 / share are enough for one
        found = (source.prompt(draw, "held out") for draw in draws)
    held_out: dict[str, None] = {}  # an ordered set
    while len(held_out) < count and (prompt := next(found, "")):
        if hash_position(prompt) < share:
            held_out[prompt] = None
    if not held_out:
        raise DistillError(f"share={share} holds out none of the prompts; expected a larger one.")
    return source.without(share), list(held_out)


def hash_position(prompt: str) -> float:
    """Return the position of a prompt's SHA-256 among all, in [0, 1), by its first six bytes."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "big") / 2**48


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _shuffled(items: Iterable[Any], seed: str) -> list[Any]:
    order = list(items)
    Random(seed).shuffle(order)
    return order


def _text(prompt: Any, place: str) -> str:
    if isinstance(prompt, str) and not _NOT_TEXT.search(prompt):
        return prompt.strip()
    raise DistillError(f"{place}: {prompt!r:.80}; expected text, in UTF-8 and without NUL.")


def _read_file(path: str | os.PathLike[str], column: str | None = None) -> PromptList:
    path = Path(path)
    if not os.path.isfile(path):
        raise DistillError(f"{str(path)!r} is no such file; expected a list of prompts, or a file.")
    if path.suffix.lower() in ("", ".txt") and column is None:
        # Bytes that are not UTF-8 become lone surrogates, which are refused with their line. Unlike
        # str.splitlines, this ends no line at form feeds or U+2028, which captions do hold.
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            return PromptList(lines, path.name)
    rows = _rows(path.name, str(path.parent), column, data_files=glob.escape(path.name))
    return PromptList(rows, path.name)


def _rows(name: str, path: str, column: str | None = None, **options: Any) -> Iterator[str]:
    """Stream the column of prompts out of a data set, which errors call `name`."""
    options = {"name": options.pop("config", None), "split": "train", **options}
    try:
        import datasets  # type: ignore[import-untyped]

        with hub_errors(name):
            # Streamed: nothing is copied to the cache. No code of a data set's own is run.
            table = datasets.load_dataset(path, streaming=True, **options)
            names = table.column_names or list(next(iter(table), {}))
            usual = [name for name in names if name.lower() in ("prompt", "caption", "text")]
            if column is None and len(usual) == 1:
                column = usual[0]
            # Where lines have more fields than the header, pandas makes an index of the first ones.
            if column not in names or "__index_level_0__" in names:
                wanted = column or "one called prompt, caption or text, or its name as `column`"
                raise ValueError(f"the columns are {names}; expected {wanted}, commas in quotes.")
            for row in table.select_columns([column]):
                yield row[column] or ""
    except ModuleNotFoundError as error:
        raise DistillError('`datasets` is missing: pip install "t5slim[prompts]"') from error
    except HubAccessError:
        raise
    except Exception as error:  # `datasets` and the readers behind it have no common base
        raise DistillError(f"{name}: {error}") from error


# --- generators ---

_parser = ConfigParser(interpolation=None)
_parser.read(Path(__file__).with_name("words.txt"), "utf-8")
_TABLES = {s: {k: re.split(r",\s+", v) for k, v in _parser.items(s)} for s in _parser.sections()}
_WORDS = _TABLES["lists"]
_TABLES["colours"] = dict.fromkeys(_WORDS["colours"], _WORDS["things"])
_NOUNS = _WORDS["things"] + _WORDS["animals"]


def compositional(rng: Random) -> str:
    """A red bench and a blue kettle; a girl riding a donkey; three owls: a third each."""
    prompt = rng.choice((_binding, _relation, _counting))(rng)
    return _framed(rng, prompt, "places", 0.25)


def text_rendering(rng: Random) -> str:
    """Somebody with a sign: 'an old sailor holding a sign that says "harvest"'."""
    person, sign = _person(rng), _a(rng.choice(_WORDS["signs"]))
    case = rng.choice((str.lower, str.lower, str.capitalize, str.upper))
    word, quote = case(rng.choice(_WORDS["common_words"])), rng.choice('""\'')
    holding, written = rng.choice(_WORDS["holding"]), rng.choice(_WORDS["written"])
    prompt = f"{person} {holding} {sign} {written} {quote}{word}{quote}"
    return _framed(rng, prompt, "sign_places", 0.4)


_CRITERIA = {make.__name__: make for make in (compositional, text_rendering)}


def _framed(rng: Random, prompt: str, places: str, share: float) -> str:
    """The prompt in one of the places, for a share of the prompts, and seldom in some style."""
    if rng.random() < share:
        prompt = f"{prompt} {rng.choice(_WORDS[places])}"
    return f"{rng.choice(_WORDS['styles'])} {prompt}" if rng.random() < 0.15 else prompt


def _binding(rng: Random) -> str:
    """Two or three objects, each with its own colour (or material, shape, pattern)."""
    table = _TABLES[rng.choice(("colours", "colours", "materials", "shapes", "patterns"))]
    bound: dict[str, str] = {}
    for attribute in rng.sample(list(table), rng.choice((2, 2, 2, 3))):
        bound[rng.choice([thing for thing in table[attribute] if thing not in bound])] = attribute
    if len(bound) == 2 and rng.random() < 0.2:
        return " and ".join(f"{_a(thing)} that is {bound[thing]}" for thing in bound)
    *first, last = [_a(f"{attribute} {thing}") for thing, attribute in bound.items()]
    return f"{', '.join(first)} and {last}"


def _relation(rng: Random) -> str:
    """Two things in space, somebody who does something, or two people."""
    kind = rng.random()
    if kind < 0.5:
        first, second = rng.sample(_NOUNS, 2)
        if rng.random() < 0.5:
            colours = rng.sample(_WORDS["colours"], 2)
            pairs = zip(colours, (first, second), strict=True)
            first, second = (f"{c} {n}" if n in _WORDS["things"] else n for c, n in pairs)
        return f"{_a(first)} {rng.choice(_WORDS['spatial'])} {_a(second)}"
    if kind < 0.8:
        action, objects = rng.choice(list(_TABLES["actions"].items()))
        return f"{_person(rng)} {action} {_a(rng.choice(objects))}"
    first, second = rng.sample(_WORDS["people"], 2)
    return f"{_a(first)} {rng.choice(_WORDS['meetings'])} {_a(second)}"


def _counting(rng: Random) -> str:
    """Two to ten of a kind, often with a second kind, sometimes coloured."""
    groups: list[str] = []
    for noun in rng.sample(_NOUNS, rng.choice((1, 2, 2))):
        number = rng.choice(["one", *_WORDS["numbers"]] if groups else _WORDS["numbers"])
        coloured = noun in _WORDS["things"] and rng.random() < 0.4
        colour = f" {rng.choice(_WORDS['colours'])}" if coloured else ""
        plural = _TABLES["plurals"].get(noun, [f"{noun}s"])[0]
        groups.append(f"{number}{colour} {noun if number == 'one' else plural}")
    return " and ".join(groups)


def _person(rng: Random) -> str:
    person = rng.choice(_WORDS["people"])
    return _a(f"{rng.choice(_WORDS['looks'])} {person}" if rng.random() < 0.5 else person)


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
