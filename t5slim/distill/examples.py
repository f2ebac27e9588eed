"""What an update learns from: examples that the teacher's walks leave, drawn in one order or
another.

Everything that is drawn is a function of the seed, the number of the draw and the *lane*: an update
has as many lanes as prompts (batch_size x accumulation x processes), and each lane has its own
prompts, noises and reservoir. So a run can be continued from its counters alone, and how its lanes
are spread over batches and processes changes nothing in what it learns from.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import DistillError
from ..slot import denoiser_text_width
from .calls import tensors_in
from .config import DistillConfig
from .draws import WalkShape, draw_prompt, lanes_of, random_of
from .pipeline import DENOISERS, images_per_prompt, teacher_of, tokenize
from .prompts import PromptSource
from .replay import NO_PROMPT, Rows, collate, split_walk
from .teacher import PromptTable
from .trace import NotAGather
from .walk import Walk, capture

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WalkedCall:
    """A denoiser call of a walk that can't be taken apart into rows."""

    walk: Walk
    index: int

    @property
    def target(self) -> Tensor:
        """The teacher's prediction, (R, ...)."""
        return self.walk.denoiser_calls[self.index].target


@dataclass(frozen=True)
class Batch:
    """What goes through the denoiser together.

    Attributes:
        prompts: numbers of the prompts whose rows are compared: of each of the R rows of `call`,
            if it is `Rows`.
        device: of the pipeline.
        call: the denoiser's inputs and the teacher's prediction; None where it isn't asked.
        thirds: for each row of the call, the third of the trajectory that it is from: 0, 1, 2.
    """

    prompts: list[int]
    device: torch.device
    call: Rows | WalkedCall | None = None
    thirds: Tensor | None = None


@dataclass(frozen=True)
class _Call:
    """A denoiser call in the reservoir, and which of its rows are of which lane."""

    call: Rows | WalkedCall
    prompts: list[int]
    third: int
    rows_of_lane: list[list[int]]

    def __len__(self) -> int:
        return len(self.call.target)


class Examples:
    """The batches of a run, on one process.

    With a reservoir, a batch is drawn from all trajectories in it: of each lane one row, of any of
    its prompts, noises and timesteps. Without, it is the next call of the latest walk: the paper's
    step following. The reservoir fills as training goes on: a round of walks is made whenever the
    rows drawn are `reuse` times those that were walked, so that no update waits for it to be full.

    Args:
        pipe: the pipeline with the teacher.
        prompts: of all processes.
        config: the settings.
        pipeline_kwargs: how the pipeline is called.
        table: numbers the prompts.
        process: number of this process, and how many there are.

    Attributes:
        teacher_rows: batch rows that the denoiser predicted for the teacher, over all processes.
        student_rows: batch rows that it was asked for a student (each of them also backwards).
    """

    def __init__(
        self,
        pipe: Any,
        prompts: PromptSource,
        config: DistillConfig,
        pipeline_kwargs: Mapping[str, Any],
        table: PromptTable,
        process: tuple[int, int] = (0, 1),
    ) -> None:
        self.teacher_rows = 0
        self.student_rows = 0
        self._pipe = pipe
        self._prompts = prompts
        self._config = config
        self._kwargs = dict(pipeline_kwargs)
        self._table = table
        self._device = torch.device(pipe._execution_device)
        self._takes_guidance = any(
            getattr(getattr(getattr(pipe, name, None), "config", None), "guidance_embeds", False)
            for name in DENOISERS
        )
        width = denoiser_text_width(pipe)
        assert width is not None  # the encoder's own, if the denoiser doesn't say
        self._width = width
        index, self._processes = process
        size, groups = config.batch_size, config.gradient_accumulation_steps
        self._lanes = lanes_of(config, self._processes)
        if 0 < config.reservoir_walks < self._lanes:
            raise DistillError(
                f"reservoir_walks is {config.reservoir_walks}, but {self._lanes} prompts are "
                f"walked together (batch_size {size} x gradient_accumulation_steps {groups} x "
                f"{self._processes} processes): make it at least that, or 0."
            )
        # A group goes through the denoiser together, always the same lanes.
        starts = [(group * self._processes + index) * size for group in range(groups)]
        self._groups = [list(range(start, start + size)) for start in starts]
        depth = max(1, config.reservoir_walks // self._lanes)
        self._walks: deque[list[list[_Call]]] = deque(maxlen=depth)  # rounds of groups of calls
        self._updates: deque[int] = deque(maxlen=depth)  # in which they were walked
        # The counters, from which everything else follows.
        self._rounds = 0  # of walks
        self._due = 0.0  # rows of a group that are still to be drawn before the next round
        self._position = 0  # along the latest walk, without a reservoir
        self._readings = 0  # updates that asked the denoiser nothing
        self._tokenized: dict[str, int] = {}
        self._known: dict[Any, Any] = {}  # what `trace` found in earlier walks

    # --- batches ---

    def batches(self, update: int, walked: bool) -> Iterator[Batch]:
        """The batches of an update, one for each accumulation step.

        Args:
            update: its number, from 0.
            walked: whether the denoiser is asked; otherwise batches are prompts and nothing else.
        """
        if not walked:
            self._readings += 1
            for lanes in self._groups:
                yield self._read(update, lanes)
            return
        if self._config.reservoir_walks:
            if self._due <= 0:
                self._walk_round(update)
                self._due += self._config.reuse * sum(map(len, self._walks[-1][0]))
            batches = [self._drawn(update, group) for group in range(len(self._groups))]
            assert batches[0].call is not None
            self._due -= len(batches[0].call.target)
        else:
            if not self._walks or self._position == len(self._walks[-1][0]):
                self._walk_round(update)
                self._position = 0
            calls = [group[self._position] for group in self._walks[-1]]
            self._position += 1
            batches = [_whole(call, self._device) for call in calls]
        for batch in batches:
            assert batch.call is not None
            self.student_rows += len(batch.call.target) * self._processes
            yield batch

    def _drawn(self, update: int, group: int) -> Batch:
        """One row of each lane, all of a kind that can share a denoiser call."""
        calls = [call for walk in self._walks for call in walk[group]]
        # The same for all groups and processes, whose walks are built alike.
        (chosen,) = self._random("call", update).choices(calls, weights=list(map(len, calls)))
        if isinstance(chosen.call, WalkedCall):
            return _whole(chosen, self._device)
        kind = chosen.call.signature
        alike = [c for c in calls if isinstance(c.call, Rows) and c.call.signature == kind]
        picks: list[tuple[Rows, int]] = []
        thirds = []
        for place, lane in enumerate(self._groups[group]):
            source = self._random("row", update, lane)
            drawn = source.choice(alike)
            assert isinstance(drawn.call, Rows)
            picks.append((drawn.call, source.choice(drawn.rows_of_lane[place])))
            thirds.append(drawn.third)
        rows = collate(picks)
        return Batch(rows.prompts, self._device, rows, torch.tensor(thirds))

    def _read(self, update: int, lanes: list[int]) -> Batch:
        first = (self._readings - 1) * self._lanes
        prompts = [self._prompt(first + lane, update) for lane in lanes]
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._tokenized]
        if new:
            self._tokenized |= dict(zip(new, self._tokenize(new), strict=True))
        return Batch([self._tokenized[prompt] for prompt in prompts], self._device)

    # --- walks ---

    def walk(self) -> WalkShape:
        """Walk the next prompts, and say what that asked. For plans: `batches` walks by itself."""
        before, size = self.teacher_rows, self._config.batch_size
        self._walk_round(0)
        calls = self._walks[-1][0]
        return WalkShape(
            (self.teacher_rows - before) // self._lanes,
            tuple(len(call) // size for call in calls),
            any(isinstance(call.call, WalkedCall) for call in calls),
        )

    @property
    def walk_bytes(self) -> int:
        """Of the latest walk in the reservoir, on this process' device."""
        found: dict[int, int] = {}  # the text of a walk is one tensor for all of its calls
        for group in self._walks[-1]:
            for call in group:
                for tensor in _tensors(call.call):
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
        return sum(found.values())

    def _walk_round(self, update: int) -> None:
        """Walk the next prompt of each lane."""
        self._walks.append([self._walk(self._rounds, update, lanes) for lanes in self._groups])
        self._updates.append(update)
        self._rounds += 1

    def _walk(self, round_: int, update: int, lanes: list[int]) -> list[_Call]:
        config, draws = self._config, [round_ * self._lanes + lane for lane in lanes]
        prompts = [self._prompt(draw, update) for draw in draws]
        kwargs = dict(self._kwargs)
        if self._takes_guidance and config.guidance_scales:
            kwargs["guidance_scale"] = self._random("guidance", round_).choice(
                config.guidance_scales
            )
        walk = capture(
            self._pipe, prompts, pipeline_kwargs=kwargs,
            seed=[self._random("noise", draw).getrandbits(62) for draw in draws],
            zero_pooled=config.zero_pooled, encode=self._table.teacher_rows,
            autocast_dtype=config.autocast_dtype,
        )  # fmt: skip
        self.teacher_rows += walk.denoiser_rows * self._processes
        calls: Sequence[Rows | WalkedCall]
        try:
            calls = split_walk(self._pipe, walk, self._table, self._known)
        except NotAGather as reason:
            if round_ == 0:
                logger.info(
                    "%s: %s. The student is led through the whole pipeline instead.",
                    type(self._pipe).__name__, reason,
                )  # fmt: skip
            calls = [WalkedCall(walk, i) for i in range(len(walk.denoiser_calls))]
        found = (self._with_lanes(c, i, len(calls), walk) for i, c in enumerate(calls))
        return [call for call in found if call is not None]

    def _with_lanes(
        self, call: Rows | WalkedCall, index: int, calls: int, walk: Walk
    ) -> _Call | None:
        third = 3 * index // calls
        if isinstance(call, WalkedCall):
            prompts = [
                number
                for slot_call in walk.slot_calls
                for number in self._table.numbers(slot_call.input_ids, slot_call.attention_mask)
            ]
            return _Call(call, prompts, third, [])
        # Several images of a prompt stand together; the branches of guidance follow each other.
        images = images_per_prompt(self._kwargs)
        lanes: list[list[int]] = [[] for _ in walk.prompts]
        # Those of a zeroed text have nothing to teach.
        kept = [i for i, number in enumerate(call.prompts) if number != NO_PROMPT]
        for place, row in enumerate(kept):
            lanes[row // images % len(lanes)].append(place)
        if not all(lanes):
            return None
        rows = call if len(kept) == len(call) else call.select(kept)
        return _Call(rows, rows.prompts, third, lanes)

    # --- prompts ---

    def _prompt(self, draw: int, update: int) -> str:
        return draw_prompt(self._prompts, self._config, draw, update)

    def _tokenize(self, prompts: list[str]) -> list[int]:
        """Number prompts, tokenized as the pipeline does it."""
        numbers: list[int] = []
        dtype: Any = teacher_of(self._pipe).dtype

        def note(_: Any, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
            numbers.extend(self._table.numbers(input_ids, attention_mask))
            return torch.zeros(*input_ids.shape, self._width, dtype=dtype, device=input_ids.device)

        tokenize(self._pipe, prompts, self._kwargs, note)
        # Negative prompts are encoded after the prompts.
        return numbers[: len(prompts)]

    def _random(self, *key: Any) -> random.Random:
        return random_of(self._config, *key)

    # --- continuing ---

    def state(self) -> dict[str, Any]:
        """Plain values, from which `restore` goes on."""
        return {name: getattr(self, f"_{name}") for name in _COUNTERS} | {
            "updates": list(self._updates),
            "teacher_rows": self.teacher_rows,
            "student_rows": self.student_rows,
        }

    def restore(self, state: Mapping[str, Any], walk: bool = True) -> None:
        """Go on from `state`; the trajectories that were in the reservoir are walked again.

        They are bitwise what they were, and needn't be saved: 256 walks of FLUX at 512 pixels would
        be 1.3 GB with each checkpoint.

        Args:
            state: from `state`.
            walk: False: nothing will be drawn any more, as the run was finished.
        """
        for name in _COUNTERS:
            setattr(self, f"_{name}", state[name])
        self._updates.extend(state["updates"])
        rounds = range(self._rounds - len(self._updates), self._rounds)
        again = list(zip(rounds, self._updates, strict=True)) if walk else []
        for round_, update in tqdm(again, "walk again", leave=False):
            self._walks.append([self._walk(round_, update, lanes) for lanes in self._groups])
        self.teacher_rows, self.student_rows = state["teacher_rows"], state["student_rows"]


def _tensors(call: Rows | WalkedCall) -> Iterable[Tensor]:
    """What it keeps; a call that can't be taken apart keeps its whole walk."""
    if isinstance(call, WalkedCall):
        walk = call.walk
        parts: list[Any] = [[c.kwargs, c.output] for c in walk.denoiser_calls]
        parts.append([c.rows for c in walk.slot_calls])
    else:
        parts = [[text.positions, text.constant] for text in call.text.values()]
        parts += [call.kwargs, call.batched, call.target]
    return tensors_in(parts).values()


_COUNTERS = ("rounds", "due", "position", "readings")


def _whole(call: _Call, device: torch.device) -> Batch:
    return Batch(call.prompts, device, call.call, torch.full((len(call),), call.third))
