"""Sources of prompts put together: mixtures, and schedules of stages."""

from __future__ import annotations

import copy
import json
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ...errors import DistillError, HubAccessError
from .sources import GeneratedPrompts, PromptList, PromptSource, sha256

# Whatever stands for prompts: see `prompt_source`.
Prompts = PromptSource | Sequence[str] | str | os.PathLike[str] | Mapping[str, Any]

_BLOCK = 1000  # draws of a mixture within which its shares are exact


class PromptMixture(PromptSource):
    """Prompts of several sources, each with its share.

    Of every 1,000 draws, each source gets exactly its share, to the nearest whole, at places drawn
    by the seed. It counts its own draws, so that a list in a mixture has its epochs, too.

    Args:
        parts: pairs of prompts (whatever `prompt_source` takes) and their weight, above 0. Only the
            ratio of the weights counts.

    Raises:
        DistillError: fewer than two parts; a weight that is not above 0, or too small for one draw
            of 1,000; or a schedule among the parts.
    """

    def __init__(self, parts: Iterable[tuple[Prompts, float]]) -> None:
        pairs = list(parts)
        if len(pairs) < 2:
            raise DistillError(f"A mixture of {len(pairs)} parts; expected at least two.")
        weights = [weight for _, weight in pairs]
        for weight in weights:
            if not _is_positive(weight, (int, float)):
                raise DistillError(f"A weight of the mixture is {weight!r}; expected above 0.")
        self._draws = _apportion(weights, _BLOCK)
        for weight, draws in zip(weights, self._draws, strict=True):
            if not draws:
                raise DistillError(
                    f"The weight {weight} in a mixture of {sum(weights):g} gives no draw of "
                    f"{_BLOCK:,}. Raise it, or leave that part out."
                )
        self._parts = [_inner(part, f"mixture[{i}]") for i, (part, _) in enumerate(pairs)]
        self._block: list[tuple[int, int]] = []
        self._block_of: tuple[int | str, int] | None = None

    def prompt(self, index: int, seed: int | str = 0, update: int = 0) -> str:
        """See `PromptSource`."""
        part, own_index = self._drawn(index, seed)
        # A seed of its own: two generators, or two lists of one length, must not go in step.
        return self._parts[part].prompt(own_index, f"{seed}/{part}", update)

    def _drawn(self, index: int, seed: int | str) -> tuple[int, int]:
        """Which part a draw goes to, and how many went there before."""
        block, place = divmod(index, _BLOCK)
        if self._block_of != (seed, block):
            order = [part for part, draws in enumerate(self._draws) for _ in range(draws)]
            random.Random(f"{seed}/{block}").shuffle(order)
            counts = [block * draws for draws in self._draws]
            self._block = []
            for part in order:
                self._block.append((part, counts[part]))
                counts[part] += 1
            self._block_of = seed, block
        return self._block[place]

    def facts(self) -> dict[str, Any]:
        """See `PromptSource`."""
        shares = (draws / _BLOCK for draws in self._draws)
        parts = zip(shares, self._parts, strict=True)
        return {
            "kind": "mixture",
            "parts": [{"share": share, "prompts": part.facts()} for share, part in parts],
        }

    def fingerprint(self) -> str:
        """See `PromptSource`."""
        parts = (part.fingerprint() for part in self._parts)
        return sha256("mixture", json.dumps(self._draws), *parts)

    def _held_out(self, share: float) -> Iterator[str]:
        """Of each part its share, as long as it has any."""
        left = {number: part._held_out(share) for number, part in enumerate(self._parts)}
        index = 0
        while left:
            number, _ = self._drawn(index, "held out")
            index += 1
            if number in left:
                prompt = next(left[number], None)
                if prompt is None:
                    del left[number]
                else:
                    yield prompt

    def _without(self, share: float) -> PromptMixture:
        rest = copy.copy(self)
        rest._parts = [part._without(share) for part in self._parts]
        return rest


class PromptSchedule(PromptSource):
    """Prompts of one source after the other, in stages of so many updates of the student.

    A run that is shorter cuts the last stage; one that is longer stays with it.

    Args:
        stages: pairs of prompts (whatever `prompt_source` takes) and the updates they are for.

    Attributes:
        starts: the update, from 0, with which each stage begins.

    Raises:
        DistillError: no stages; updates that are not above 0; or a schedule among the stages.
    """

    def __init__(self, stages: Iterable[tuple[Prompts, int]]) -> None:
        pairs = list(stages)
        if not pairs:
            raise DistillError("A schedule without stages; expected at least one.")
        self._updates = [updates for _, updates in pairs]
        for updates in self._updates:
            if not _is_positive(updates, int):
                raise DistillError(
                    f"A stage of the schedule has {updates!r} updates; expected an integer above 0."
                )
        self._stages = [_inner(stage, f"schedule[{i}]") for i, (stage, _) in enumerate(pairs)]
        self.starts = [sum(self._updates[:i]) for i in range(len(pairs))]

    @classmethod
    def paper(cls, captions: Prompts, updates: int = 320_000) -> PromptSchedule:
        """The three stages of arXiv 2503.19897, with our own prompts for two of its criteria.

        Compositional prompts for 50,000 updates, text rendering for 70,000, all three criteria for
        200,000, there in the proportions of the authors' script: about 2 (captions) : 1 : 1.

        Args:
            captions: for the third criterion, image quality, whatever `prompt_source` takes. The
                paper has 100,000 of LAION-Aesthetics.
            updates: of the whole run; the stages keep their ratio.
        """
        compositional, text = map(GeneratedPrompts, ("compositional", "text_rendering"))
        everything = PromptMixture([(captions, 2), (compositional, 1), (text, 1)])
        stages = (compositional, text, everything)
        return cls(zip(stages, _apportion([50, 70, 200], updates), strict=True))

    def check_updates(self, updates: int) -> None:
        """Refuse a run of so few updates that its last stage is never reached.

        Raises:
            DistillError: it is not.
        """
        if updates <= self.starts[-1]:
            raise DistillError(
                f"The last stage of the prompts begins after {self.starts[-1]:,} updates, and the "
                f"run has {updates:,}. Make the run longer, or the stages shorter."
            )

    def prompt(self, index: int, seed: int | str = 0, update: int = 0) -> str:
        """See `PromptSource`."""
        stage = sum(start <= update for start in self.starts) - 1
        return self._stages[stage].prompt(index, f"{seed}/{stage}", update)

    def facts(self) -> dict[str, Any]:
        """See `PromptSource`."""
        stages = zip(self._updates, self._stages, strict=True)
        return {
            "kind": "schedule",
            "stages": [{"updates": updates, "prompts": stage.facts()} for updates, stage in stages],
        }

    def fingerprint(self) -> str:
        """See `PromptSource`."""
        stages = (stage.fingerprint() for stage in self._stages)
        return sha256("schedule", json.dumps(self._updates), *stages)

    def _held_out(self, share: float) -> Iterator[str]:
        """Of the last stage, which is what a schedule leads up to."""
        return self._stages[-1]._held_out(share)

    def _without(self, share: float) -> PromptSchedule:
        rest = copy.copy(self)
        rest._stages = [stage._without(share) for stage in self._stages]
        return rest


def prompt_source(prompts: Prompts, name: str = "prompts") -> PromptSource:
    """Whatever stands for prompts, as a source.

    Args:
        prompts: a source; a list of strings; the path of a file (`PromptList.from_file`); or, as a
            YAML file would have it, a mapping of one of these five forms:

                {file: captions.parquet, column: caption}
                {dataset: somebody/captions, column: caption, limit: 100000}
                {generator: compositional}
                {mixture: [{weight: 2, prompts: ...}, {weight: 1, prompts: ...}]}
                {schedule: [{updates: 50000, prompts: ...}, {updates: 200000, prompts: ...}]}

            `column` and what else `PromptList.from_dataset` takes may be left out; `...` is again
            any of these.
        name: what errors call it.

    Raises:
        DistillError: something else, or prompts that can't be read.
        HubAccessError: a data set that can't be reached.
    """
    try:
        if isinstance(prompts, PromptSource):
            return prompts
        if isinstance(prompts, Mapping):
            return _from_mapping(prompts)
        if isinstance(prompts, (str, os.PathLike)):
            return PromptList.from_file(prompts)
        if isinstance(prompts, Iterable):
            return PromptList(prompts)
        raise DistillError(f"{prompts!r}; expected a list of prompts, or a file.")
    except (DistillError, HubAccessError) as error:
        raise type(error)(f"{name}: {error}") from error.__cause__


def load_prompts(prompts: Prompts, name: str = "prompts") -> list[str]:
    """The prompts of a list, file or data set.

    Args:
        prompts: as for `prompt_source`.
        name: what errors call them.

    Raises:
        DistillError: a source without end; or see `prompt_source`.
    """
    source = prompt_source(prompts, name)
    if not isinstance(source, PromptList):
        raise DistillError(
            f"{name}: a {type(source).__name__}; expected a list of prompts, or a file. "
            "split_held_out makes a list of what it holds out."
        )
    return source.prompts


def split_held_out(
    prompts: Prompts, share: float = 0.01, count: int = 64
) -> tuple[PromptSource, list[str]]:
    """Prompts to train on, and some to measure with that are never among them.

        train_prompts, eval_prompts = split_held_out("prompts.txt")

    A prompt's hash alone decides on which side it is: on every machine, in every file and mixture,
    whatever stands before it.

    Args:
        prompts: as for `prompt_source`.
        share: of all prompts that is held out, above 0 and below 1.
        count: how many of these to return at most; a gap is measured on each of them.

    Returns:
        The source without its held-out prompts, and up to `count` of these.

    Raises:
        DistillError: a share or count out of range; nothing is held out, or all; or see
            `prompt_source`.
    """
    if not 0 < share < 1:
        raise DistillError(f"share is {share!r}; expected a number above 0 and below 1.")
    if not _is_positive(count, int):
        raise DistillError(f"count is {count!r}; expected an integer above 0.")
    source = prompt_source(prompts)
    held_out: dict[str, None] = {}  # an ordered set: two parts of a mixture may hold the same
    for prompt in source._held_out(share):
        held_out[prompt] = None
        if len(held_out) == count:
            break
    if not held_out:
        raise DistillError(
            f"No prompt falls into the share of {share} that is held out: there are too few. Make "
            "it larger."
        )
    return source._without(share), list(held_out)


_OPTIONS = {
    "file": ("column",),
    "dataset": ("column", "config", "split", "revision", "limit"),
    "generator": (),
    "mixture": (),
    "schedule": (),
}


def _from_mapping(mapping: Mapping[str, Any]) -> PromptSource:
    kinds = [key for key in mapping if key in _OPTIONS]
    if len(kinds) != 1:
        raise DistillError(f"{dict(mapping)!r}; expected one of the keys {', '.join(_OPTIONS)}.")
    (kind,) = kinds
    options = dict(mapping)
    value = options.pop(kind)
    for key in options:
        if key not in _OPTIONS[kind]:
            allowed = ", ".join(_OPTIONS[kind]) or "nothing else"
            raise DistillError(f"The key {key!r} beside {kind!r}; there can be {allowed}.")
    combines = kind in ("mixture", "schedule")
    types: Any = (list, tuple) if combines else (str, os.PathLike)
    if not isinstance(value, types):
        expected = "a list" if combines else "a string"
        raise DistillError(f"{kind} is {value!r}; expected {expected}.")
    if kind == "file":
        return PromptList.from_file(value, **options)
    if kind == "dataset":
        return PromptList.from_dataset(value, **options)
    if kind == "generator":
        return GeneratedPrompts(value)
    amount = "weight" if kind == "mixture" else "updates"
    for part in value:
        if not isinstance(part, Mapping) or set(part) != {amount, "prompts"}:
            raise DistillError(
                f"{kind} holds {part!r}; expected a mapping with the keys {amount} and prompts."
            )
    pairs = [(part["prompts"], part[amount]) for part in value]
    return PromptMixture(pairs) if kind == "mixture" else PromptSchedule(pairs)


def _inner(prompts: Prompts, name: str) -> PromptSource:
    source = prompt_source(prompts, name)
    if isinstance(source, PromptSchedule):
        raise DistillError(f"{name}: a schedule, which can only be the outermost.")
    return source


def _is_positive(value: Any, types: Any) -> bool:
    return isinstance(value, types) and not isinstance(value, bool) and 0 < value < math.inf


def _apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the ratio of the weights that add up to `total` (largest remainders)."""
    exact = [weight * total / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole
