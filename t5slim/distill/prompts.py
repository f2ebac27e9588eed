"""Prompts for distillation: lists, files, data sets, generated ones, and mixtures of them."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Set, Sized
from configparser import ConfigParser
from functools import lru_cache, partial
from itertools import accumulate, islice, repeat
from pathlib import Path
from random import Random
from typing import Any

from tqdm.auto import tqdm

from ..errors import DistillError, T5SlimError
from ..hub import hub_errors

_LIMIT = 1_000_000  # of data sets, and of what may have no end; these take 0.1 to 0.3 GB
_LONGEST = 100_000  # characters of a prompt; a file without an end of line is none
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and lone surrogates, which UTF-8 can't hold


class PromptSource:
    """Prompts of a run, one list or a mixture of several.

    White space around prompts is stripped; blank and repeated ones are dropped. All are in memory:
    of a data set, the first million are streamed, or `limit`; an iterable without a length, which
    may have no end, is read up to a million, too.

    Args:
        prompts: A source, a list, a file, or a mapping as in YAML, whose forms docs/prompts.md has:
            a file and its column, a data set, a generator, or a mixture of these.

    Attributes:
        parts: Weight and distinct prompts of each list; only the ratio of the weights counts.

    Raises:
        DistillError: Another form, a file that doesn't exist or can't be read, something that isn't
            text in UTF-8, no prompts at all, or a weight that isn't above 0; the message names the
            file and the prompt.
        HubAccessError: A data set is out of reach.
    """

    def __init__(self, prompts: "Prompts") -> None:
        self.parts = _parts(prompts)
        self._weights = [weight for weight, _ in self.parts]
        if not self.parts or not all(0 < weight < float("inf") for weight in self._weights):
            raise DistillError(f"Got weights {self._weights}; expected one or more, all above 0.")
        self._order = lru_cache(len(self.parts))(self._shuffled)

    def prompt(self, index: int, seed: int | str = 0) -> str:
        """Return the prompt of draw `index`, from 0, in the order of `seed`.

        It depends on nothing else: a run that is resumed, or on more processes, sees the same. A
        list has each prompt once per epoch, every epoch in an order of its own; in a mixture, no
        part repeats one within as many draws of the mixture as it has prompts.
        """
        part = 0
        if len(self.parts) > 1:
            (part,) = Random(f"{seed}/{index}").choices(range(len(self.parts)), self._weights)
            # A seed for each part, so that its order doesn't go in step with the choice of parts.
            seed = f"{seed}/{part}"
        epoch, place = divmod(index, len(self.parts[part][1]))
        return self._order(part, f"{seed}/{epoch}")[place]

    def _shuffled(self, part: int, seed: str) -> list[str]:
        """The prompts of a part in the order of an epoch: 0.5 seconds per million prompts."""
        order = list(self.parts[part][1])
        Random(seed).shuffle(order)
        return order

    def all(self) -> list[str]:
        """Return each distinct prompt, in the order of the parts."""
        return list(dict.fromkeys(prompt for _, prompts in self.parts for prompt in prompts))

    def facts(self) -> dict[str, Any]:
        """Return what identifies the source, in the types of JSON.

        Returns:
            The number of prompts, the weights of the parts, and the SHA-256 of weights and prompts.
            It depends on their order, and not on seeds and file names.
        """
        digest = hashlib.sha256(json.dumps(self.parts).encode()).hexdigest()
        return {"prompts": len(self.all()), "weights": self._weights, "sha256": digest}


Prompts = PromptSource | Iterable[str] | str | os.PathLike[str] | Mapping[str, Any]


def split_held_out(
    prompts: Prompts, share: float = 0.01, count: int = 64
) -> tuple[PromptSource, list[str]]:
    """Split prompts into those to train on, and some to evaluate on that are never among them.

    A prompt's hash alone decides on its side: the same on every machine, in every file and mixture,
    whatever stands before it.

    Args:
        prompts: See `PromptSource`.
        share: Share of all prompts to hold out, above 0 and below 1.
        count: Held-out prompts to return at most; an evaluation samples a trajectory for each.

    Returns:
        The source without its held-out prompts, and the `count` lowest of these by `hash_position`:
        they don't depend on the order of a file.

    Raises:
        DistillError: Nothing is held out, or all of a part; or see `PromptSource`.
    """
    if type(share) not in (int, float) or type(count) is not int or count < 1:
        raise DistillError(f"Got share={share!r} and count={count!r}; expected positive numbers.")
    source = PromptSource(prompts)
    held_out = {prompt for prompt in source.all() if hash_position(prompt) < share}
    rest = [(weight, [p for p in part if p not in held_out]) for weight, part in source.parts]
    if not held_out or not all(part for _, part in rest):
        raise DistillError(f"share={share} holds out none of the prompts, or all of a list.")
    mixture = [{"weight": weight, "prompts": part} for weight, part in rest]
    return PromptSource({"mixture": mixture}), sorted(held_out, key=hash_position)[:count]


def hash_position(prompt: str) -> float:
    """Return the position of a prompt's SHA-256 among all, in [0, 1), by its first six bytes."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "big") / 2**48


def _parts(prompts: Prompts) -> list[tuple[float, list[str]]]:
    """The weights and distinct prompts of any form."""
    if isinstance(prompts, PromptSource):
        return prompts.parts
    forms: Any = {"file": _read_file, "dataset": _read_dataset, "generator": generate_prompts}
    try:
        if isinstance(prompts, (str, os.PathLike)):
            return [(1, _read_file(prompts))]
        if isinstance(prompts, Mapping):
            found = [read for form, read in forms.items() if form in prompts]
            return [(1, found[0](**prompts))] if found else _mix(**prompts)
        # Iterated, these give the names of their columns, or another order in each process.
        if isinstance(prompts, Set) or {"columns", "column_names"} & {*dir(prompts)}:
            raise TypeError(f"got a {type(prompts).__name__}")
        texts = getattr(prompts, "to_pylist", lambda: prompts)()  # of Arrow's arrays
        return [(1, _distinct(islice(texts, None if isinstance(texts, Sized) else _LIMIT), "list"))]
    except T5SlimError:
        raise
    except Exception as error:  # `datasets` and the readers behind it have no common base
        raise DistillError(
            f"{prompts!s:.200}: {error!r}; expected a list (of a table, table['caption']; of a "
            "set, sorted(prompts)), a file, {file, column}, {dataset, column, config, split, "
            "revision, limit}, {generator, count} or {mixture: [{weight, prompts}, ...]}."
        ) from error


def _mix(mixture: Iterable[Mapping[str, Any]]) -> list[tuple[float, list[str]]]:
    parts = []
    for part in mixture:
        inner = PromptSource(part["prompts"]).parts  # several, if it is a mixture, too
        unit = part["weight"] / sum(weight for weight, _ in inner)
        parts += [(unit * weight, prompts) for weight, prompts in inner]
    return parts


def _read_file(file: str | os.PathLike[str], column: str | None = None) -> list[str]:
    path = Path(file).expanduser()
    if not os.path.isfile(path):
        raise DistillError(f"{str(path)!r} is no such file; expected a list of prompts, or a file.")
    if path.suffix.lower() in ("", ".txt") and column is None:
        # Surrogates are refused below. Unlike splitlines, no line ends at form feeds or U+2028.
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as text:
            return _distinct(iter(partial(text.readline, _LONGEST + 1), ""), path.name)
    content = path.read_bytes() if path.suffix.lower() in (".json", ".jsonl") else b""
    for json_text in (content, *content.splitlines()):
        brackets = re.sub(rb'"(?:\\.|[^"\\])*"|[^][{}]', b"", json_text, flags=re.DOTALL)
        depth = max(accumulate(1 if b in b"[{" else -1 for b in brackets), default=0)
        if depth > 1000 or re.match(rb"[^\w\[{\"]*null", json_text):  # which would crash pyarrow
            raise DistillError(f"{path.name} is nested over 1,000 deep, or a line in it is null.")
    files = glob.escape(path.name)
    return _read_dataset(str(path.absolute().parent), column, limit=None, data_files=files)


def _read_dataset(dataset: str, column: str | None = None, **options: Any) -> list[str]:
    """Stream the column of prompts out of a data set; errors call it `data_files`, if there."""
    try:
        import datasets  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise DistillError(f"{error}: pip install 't5slim[prompts]'") from error
    name = options.get("data_files", dataset)
    limit, config = options.pop("limit", _LIMIT), options.pop("config", None)
    with hub_errors(name):
        # Streamed: nothing is copied to the cache. No code of a data set's own is run.
        options = {"split": "train"} | options
        table = datasets.load_dataset(dataset, config, streaming=True, **options)
        names = table.column_names or list(next(iter(table), {}))
        usual = [name for name in names if name.lower() in ("prompt", "caption", "text")]
        if column is None and len(usual) == 1:
            column = usual[0]
        # Where lines have more fields than the header, pandas makes an index of the first ones.
        if column not in names or "__index_level_0__" in names:
            wanted = column or "one called prompt, caption or text, or its name as `column`"
            raise ValueError(f"the columns are {names}; expected {wanted}, commas in quotes.")
        rows = islice(table.select_columns([column]), limit)
        return _distinct((row[column] or "" for row in rows), name)


def _distinct(prompts: Iterable[str], name: str, count: int | None = None) -> list[str]:
    """Up to `count` texts, stripped, neither blank nor repeated; errors call them `name`."""
    found: dict[str, None] = {}  # an ordered set
    for number, prompt in enumerate(tqdm(prompts, f"Reading {name}", delay=2), 1):
        if not isinstance(prompt, str) or len(prompt) > _LONGEST or _NOT_TEXT.search(prompt):
            wanted = f"expected text, in UTF-8 and without NUL, up to {_LONGEST:,} characters"
            raise DistillError(f"{name}, prompt {number}: {prompt!r:.80}; {wanted}.")
        if text := prompt.strip():
            found[text] = None
        if len(found) == count:
            break
    if not found:
        raise DistillError(f"{name} holds no prompts; expected at least one.")
    return list(found)


_parser = ConfigParser(interpolation=None)
_parser.read(Path(__file__).with_name("words.txt"), "utf-8")
_GRAMMAR = {symbol: rules.strip().split("\n") for symbol, rules in _parser["rules"].items()}
_GRAMMAR |= {symbol: re.split(r",\s+", words) for symbol, words in _parser["words"].items()}


def generate_prompts(
    generator: str | Callable[[Random], str], count: int = 50_000, seed: int | str = 0
) -> list[str]:
    """Generate distinct prompts, by the grammar in words.txt or a function.

    Args:
        generator: "compositional" (attributes of objects, relations, counts) or "text_rendering"
            (somebody with a sign), after two criteria of arXiv 2503.19897; or a function of a
            `random.Random` alone that returns a prompt.
        count: Number of prompts. Fewer are returned if ten times as many draws hold no more.
        seed: Seed of the draws. The prompts of a lower count are the first of a higher one.

    Raises:
        DistillError: An unknown criterion, a `count` of 0 or above a million, or no text.
    """
    known = callable(generator) or generator in ("compositional", "text_rendering")
    if not (known and isinstance(count, int) and count <= _LIMIT):
        raise DistillError(
            f"Got generator={generator!r:.80} and count={count!r:.80}; expected a function, "
            f"compositional or text_rendering, and at most {_LIMIT:,} prompts."
        )
    make = generator if callable(generator) else partial(_expand, generator)
    return _distinct(map(make, repeat(Random(seed), 10 * count)), "generator", count)


def _expand(symbol: str, rng: Random, used: set[str] | None = None) -> str:
    """A text that `symbol` stands for, without the alternatives that the prompt has `used`."""
    used = set() if used is None else used
    text = rng.choice([text for text in _GRAMMAR[symbol.lower()] if text not in used])
    used.add(text)
    text = re.sub("{(.*?)}", lambda inner: _expand(inner[1], rng, used), text)
    text = re.sub(r"\ba(?= [aeiou])", "an", text)
    return text.upper() if symbol.isupper() else text.capitalize() if symbol.istitle() else text
