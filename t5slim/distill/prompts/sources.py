"""Where prompts come from: lists, files, data sets and generators.

A run asks a source for one prompt after the other, by number. What it gets depends on nothing but
the source, the number, the seed and, in a schedule, the update: so a run that was interrupted, or
that has more processes, sees the same prompts as one that was not.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import random
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...errors import DistillError
from .criteria import CRITERIA
from .files import Row, read_dataset, read_file

logger = logging.getLogger(__name__)

_FINGERPRINT_DRAWS = 4096  # a generator is known by what it says
_MAX_TRIES = 1000  # to get a prompt that is not held out, out of a generator


class PromptSource(ABC):
    """What a run draws its prompts from."""

    @abstractmethod
    def prompt(self, index: int, seed: int | str = 0, update: int = 0) -> str:
        """Prompt number `index` of a run.

        Args:
            index: counts the prompts that the run draws, from 0.
            seed: of the order.
            update: of the student, from 0, for which the prompt is drawn. Only a schedule looks.
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a reader of the run's metadata needs to know of its prompts, for JSON."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the prompts and of what decides on their order, but for the seed.

        The same on every machine, and for every file with the same prompts.
        """

    @abstractmethod
    def _held_out(self, share: float) -> Iterator[str]:
        """The prompts that `_without` leaves out."""

    @abstractmethod
    def _without(self, share: float) -> PromptSource:
        """The source without the prompts whose `hash_place` is below `share`."""


class PromptList(PromptSource):
    """A list of prompts, each drawn once in every epoch, and every epoch in an order of its own.

    White space around a prompt is removed, line ends among it; blank prompts and all but the first
    of equal ones are left out, and counted.

    Args:
        prompts: the prompts.

    Attributes:
        prompts: those that were kept, in the order in which they came.

    Raises:
        DistillError: something that is not text, or no prompt at all.
    """

    prompts: list[str]

    def __init__(self, prompts: Iterable[str]) -> None:
        if isinstance(prompts, (str, os.PathLike)):
            raise DistillError(
                f"{str(prompts)!r} is no list of prompts. For a file, see PromptList.from_file."
            )
        rows = ((f"item {number}", prompt) for number, prompt in enumerate(prompts))
        self._fill(rows, "a list", "list")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], column: str | None = None) -> PromptList:
        """The prompts in a file, which its suffix tells how to read. Text is UTF-8.

        `.txt` or no suffix: one prompt on each line. `.csv`, `.tsv`: with a header. `.json`: a list
        of strings or of objects. `.jsonl`, `.ndjson`: a string or an object on each line.
        `.parquet`: needs pyarrow (`pip install "t5slim[prompts]"`).

        Args:
            path: the file.
            column: which column, or field of the objects. By default the one that is called
                "prompt", "caption" or "text", in upper or lower case.

        Raises:
            DistillError: the file, or a line of it, is not as expected; the message names it.
        """
        path = Path(path)
        made = cls.__new__(cls)
        made._fill(read_file(path, column), f"the file {path}", path.name)
        return made

    @classmethod
    def from_dataset(
        cls,
        repo_id: str,
        column: str | None = None,
        *,
        config: str | None = None,
        split: str = "train",
        revision: str | None = None,
        limit: int = 1_000_000,
    ) -> PromptList:
        """The first `limit` prompts of a data set on the Hub, streamed once into memory.

        Needs the package `datasets` (`pip install "t5slim[prompts]"`). No code of the data set is
        run.

        Args:
            repo_id: the data set, as for `datasets.load_dataset`.
            column: as for `from_file`.
            config: which of its configurations, where there are several.
            split: which of its splits.
            revision: a commit, branch or tag. A commit makes sure of the same prompts next year.
            limit: rows to read; a million take 0.1 to 0.3 GB of memory.

        Raises:
            HubAccessError: the data set doesn't exist, is gated, or can't be reached.
            DistillError: `datasets` is not installed; or there is no such configuration, split or
                column.
        """
        if not isinstance(limit, int) or limit < 1:
            raise DistillError(f"limit is {limit!r}; expected an integer above 0.")
        rows = read_dataset(repo_id, column, config, split, revision)
        made = cls.__new__(cls)
        made._fill(islice(rows, limit), f"the data set {repo_id!r}", repo_id)
        if next(rows, None) is not None:
            logger.warning("Of the data set %r, the first %d rows are used.", repo_id, limit)
        return made

    def _fill(self, rows: Iterable[Row], source: str, short_source: str) -> None:
        kept: dict[str, None] = {}  # an ordered set
        blank = duplicates = 0
        # The delay spares short lists a bar.
        for place, prompt in tqdm(rows, desc=f"read {short_source}", unit=" prompts", delay=2):
            if prompt is not None and not _is_text(prompt):
                raise DistillError(f"{source} holds {prompt!r}; expected strings. It is {place}.")
            prompt = (prompt or "").strip()
            if not prompt:
                blank += 1
            elif prompt in kept:
                duplicates += 1
            else:
                kept[prompt] = None
        if not kept:
            raise DistillError(f"{source} without a prompt in it; at least one is needed.")
        self.prompts = list(kept)
        self._source = short_source
        self._left_out = {"duplicates": duplicates, "blank": blank, "held_out": 0}
        self._order: array[int] = array("q")
        self._order_of: tuple[int | str, int] | None = None

    def prompt(self, index: int, seed: int | str = 0, update: int = 0) -> str:
        """See `PromptSource`. The first draw of an epoch costs half a second per million prompts.

        The others are look-ups.
        """
        epoch, place = divmod(index, len(self.prompts))
        if self._order_of != (seed, epoch):
            self._order = array("q", range(len(self.prompts)))
            random.Random(f"{seed}/{epoch}").shuffle(self._order)
            self._order_of = seed, epoch
        return self.prompts[self._order[place]]

    def facts(self) -> dict[str, Any]:
        """See `PromptSource`; `duplicates`, `blank` and `held_out` count what was left out."""
        count = len(self.prompts)
        return {"kind": "list", "source": self._source, "prompts": count, **self._left_out}

    def fingerprint(self) -> str:
        """See `PromptSource`."""
        return sha256("list", *self.prompts)

    def _held_out(self, share: float) -> Iterator[str]:
        # By hash, so that the first so many of them don't depend on the order in the file.
        return iter(sorted((p for p in self.prompts if hash_place(p) < share), key=hash_place))

    def _without(self, share: float) -> PromptList:
        rest = copy.copy(self)
        rest.prompts = [prompt for prompt in self.prompts if hash_place(prompt) >= share]
        if not rest.prompts:
            raise DistillError(
                f"A share of {share} holds out all of {len(self.prompts)} prompts of "
                f"{self._source}: none is left to train on."
            )
        held_out = self._left_out["held_out"] + len(self.prompts) - len(rest.prompts)
        rest._left_out = {**self._left_out, "held_out": held_out}
        rest._order_of = None
        return rest


class GeneratedPrompts(PromptSource):
    """Prompts made up as they are asked for, without end.

    Args:
        criterion: "compositional" (attribute binding, relations, counts) or "text_rendering"
            (somebody holding a sign that says a common word), after two of the three criteria of
            arXiv 2503.19897; or a function of a `random.Random`, and of nothing else, that returns
            a prompt.

    Raises:
        DistillError: an unknown criterion.
    """

    def __init__(self, criterion: str | Callable[[random.Random], str]) -> None:
        make = CRITERIA.get(criterion) if isinstance(criterion, str) else criterion
        if not callable(make):
            raise DistillError(
                f"The criterion is {criterion!r}; expected {' or '.join(map(repr, CRITERIA))}, or "
                "a function of a random.Random."
            )
        self._make = make
        self._name = getattr(make, "__name__", type(make).__name__)
        self._held_out_share = 0.0

    def prompt(self, index: int, seed: int | str = 0, update: int = 0) -> str:
        """See `PromptSource`."""
        rng = random.Random(f"{seed}/{index}")
        for _ in range(_MAX_TRIES):
            prompt = self._make(rng).strip()
            if prompt and hash_place(prompt) >= self._held_out_share:
                return prompt
        raise DistillError(
            f"{self._name} made {_MAX_TRIES} prompts in a row that were blank or held out (a share "
            f"of {self._held_out_share})."
        )

    def facts(self) -> dict[str, Any]:
        """See `PromptSource`."""
        share = self._held_out_share
        return {"kind": "generated", "criterion": self._name, "held_out_share": share}

    def fingerprint(self) -> str:
        """See `PromptSource`; of 4,096 prompts."""
        return sha256("generated", *map(self.prompt, range(_FINGERPRINT_DRAWS)))

    def _held_out(self, share: float) -> Iterator[str]:
        seen: set[str] = set()
        index = last = 0
        while index - last < _MAX_TRIES / share:  # longer, and there is nothing new to be found
            prompt = self._make(random.Random(f"held out/{index}")).strip()
            index += 1
            if prompt and hash_place(prompt) < share and prompt not in seen:
                last = index
                seen.add(prompt)
                yield prompt

    def _without(self, share: float) -> GeneratedPrompts:
        rest = copy.copy(self)
        rest._held_out_share = max(share, self._held_out_share)
        return rest


def hash_place(prompt: str) -> float:
    """Where a prompt's SHA-256 lies among all, from 0 to below 1; the first six bytes tell."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "big") / 2**48


def sha256(*texts: str) -> str:
    """In hex, of several texts; their lengths are hashed, too, so that no two sequences agree."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def _is_text(value: object) -> bool:
    """A string that UTF-8 can hold: JSON can write half of a pair of surrogates."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
