"""Replay buffer of teacher trajectories, from which the batches of a run are drawn.

Everything that is drawn is a function of the seed, its purpose, the update and the *global sample
index*: an update has as many as prompts (batch_size x accumulation x processes), and each has its
own prompts, noise and trajectories. So a run resumes from its counters alone, and how its samples
are spread over batches and processes changes nothing in what it learns from.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from ..errors import DistillError
from .config import DistillConfig
from .pipeline import denoisers, images_per_prompt, tokenize
from .prompts import Prompts, PromptSource
from .replay import NO_PROMPT, Samples, TrajectoryCall, collate, split_trajectory
from .teacher import TeacherEmbeddings
from .trajectory import capture


@dataclass(frozen=True)
class Batch:
    """Samples that go through the denoiser together.

    Attributes:
        prompts: The index of each sample's prompt in the reservoir's `TeacherEmbeddings`.
        call: The denoiser's inputs and the teacher's prediction; None if it isn't called.
    """

    prompts: list[int]
    call: Samples | TrajectoryCall | None = None


@dataclass(frozen=True)
class _Call:
    """A denoiser call, and which of its samples belong to which prompt of its trajectories."""

    call: Samples | TrajectoryCall
    samples_of: list[list[int]]


class TrajectoryReservoir:
    """Shuffled batches from the latest trajectories of the teacher, on one process.

    A batch holds a sample for each global sample index, of any of its prompts, noises and
    timesteps. The reservoir fills as training goes on: new trajectories are sampled whenever the
    samples drawn are `reuse` times those that were captured, so that no update waits for it to be
    full. With `reservoir_size=0`, batches are the consecutive calls of the latest trajectories.

    Args:
        pipe: The pipeline with the teacher.
        prompts: Of all processes, as for `train`.
        config: The settings.
        pipeline_kwargs: How to call the pipeline.
        teacher: The teacher's embeddings; pass the same to pipelines that share their T5.
        process: The index of this process, and their number.

    Attributes:
        teacher: The teacher's embeddings, for `Objective`.
        teacher_samples: How many samples the denoiser predicted for the teacher, on all processes.
        student_samples: How many it predicted for the student, each of them also backwards.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Prompts,
        config: DistillConfig,
        *,
        pipeline_kwargs: Mapping[str, Any] | None = None,
        teacher: TeacherEmbeddings | None = None,
        process: tuple[int, int] = (0, 1),
    ) -> None:
        self.teacher = TeacherEmbeddings() if teacher is None else teacher
        self.teacher_samples = self.student_samples = 0
        self._pipe = pipe
        self._prompts = PromptSource(prompts)
        self._config = config
        self._kwargs = dict(pipeline_kwargs or {})
        self._takes_guidance = any(
            getattr(getattr(denoiser, "config", None), "guidance_embeds", False)
            for denoiser in denoisers(pipe).values()
        )
        index, self._processes = process
        size, groups = config.batch_size, config.gradient_accumulation_steps
        self._together = size * groups * self._processes
        if 0 < config.reservoir_size < self._together:
            raise DistillError(
                f"reservoir_size is {config.reservoir_size}, but the trajectories of "
                f"{self._together} prompts are sampled together (batch_size {size} x "
                f"gradient_accumulation_steps {groups} x {self._processes} processes): make it at "
                "least that, or 0."
            )
        # The global sample indices of each batch: always the same ones share a denoiser call.
        starts = [(group * self._processes + index) * size for group in range(groups)]
        self._groups = [list(range(start, start + size)) for start in starts]
        depth = max(1, config.reservoir_size // self._together)
        self._held: deque[list[list[_Call]]] = deque(maxlen=depth)  # rounds of groups of calls
        # The counters, from which everything else follows.
        self._rounds = 0  # of trajectories
        self._due = 0.0  # samples of a group that are still to be drawn before the next round
        self._position = 0  # along the latest trajectories, without a reservoir
        self._readings = 0  # updates that didn't call the denoiser
        self._tokenized: dict[str, int] = {}
        self._layouts: dict[Any, Any] = {}

    # --- batches ---

    def batches(self, step: int, *, denoiser: bool = True) -> Iterator[Batch]:
        """The batches of update number `step` (from 0), one for each accumulation step.

        With `denoiser=False`, they are prompts and nothing else, and the denoiser isn't called.
        """
        if not denoiser:
            self._readings += 1
            for group in self._groups:
                yield self._read(group)
            return
        if self._config.reservoir_size:
            if self._due <= 0:
                self._sample_trajectories()
                captured = sum(len(call.call) for call in self._held[-1][0])
                self._due += self._config.reuse * captured
            batches = [self._drawn(step, group) for group in range(len(self._groups))]
            assert batches[0].call is not None
            self._due -= len(batches[0].call)
        else:
            if not self._held or self._position == len(self._held[-1][0]):
                self._sample_trajectories()
                self._position = 0
            calls = [group[self._position].call for group in self._held[-1]]
            batches = [Batch(call.prompts, call) for call in calls]
            self._position += 1
        for batch in batches:
            assert batch.call is not None
            self.student_samples += len(batch.call) * self._processes
            yield batch

    def _drawn(self, step: int, group: int) -> Batch:
        """One sample for each global sample index, all able to share a denoiser call."""
        calls = [call for held in self._held for call in held[group]]
        # The same for all groups and processes, whose trajectories are built alike.
        sizes = [len(call.call) for call in calls]
        (chosen,) = self._random("call", step).choices(calls, weights=sizes)
        if isinstance(chosen.call, TrajectoryCall):
            return Batch(chosen.call.prompts, chosen.call)
        kind = chosen.call.signature
        alike = [c for c in calls if isinstance(c.call, Samples) and c.call.signature == kind]
        picks: list[tuple[Samples, int]] = []
        for place, sample in enumerate(self._groups[group]):
            source = self._random("row", step, sample)
            drawn = source.choice(alike)
            assert isinstance(drawn.call, Samples)
            picks.append((drawn.call, source.choice(drawn.samples_of[place])))
        samples = collate(picks)
        return Batch(samples.prompts, samples)

    def _read(self, group: list[int]) -> Batch:
        """The next prompts, tokenized as the pipeline does it."""
        start = (self._readings - 1) * self._together
        prompts = [self._prompt(start + sample) for sample in group]
        if new := [p for p in dict.fromkeys(prompts) if p not in self._tokenized]:
            self._tokenized |= dict(zip(new, self._tokenize(new), strict=True))
        return Batch([self._tokenized[prompt] for prompt in prompts])

    # --- trajectories ---

    def _sample_trajectories(self) -> None:
        """Sample the trajectories of the next prompt of each global sample index."""
        self._held.append([self._captured(self._rounds, group) for group in self._groups])
        self._rounds += 1

    def _captured(self, round_: int, group: list[int]) -> list[_Call]:
        config = self._config
        draws = [round_ * self._together + sample for sample in group]
        kwargs = dict(self._kwargs)
        if self._takes_guidance and config.guidance_scales:
            scales = config.guidance_scales
            kwargs["guidance_scale"] = self._random("guidance", round_).choice(scales)
        trajectory = capture(
            self._pipe,
            [self._prompt(draw) for draw in draws],
            pipeline_kwargs=kwargs,
            seed=[self._random("noise", draw).getrandbits(62) for draw in draws],
            zero_pooled=config.zero_pooled,
            encode=self.teacher.encode,
            autocast_dtype=config.autocast_dtype,
            layouts=self._layouts,
        )
        self.teacher_samples += trajectory.denoiser_samples * self._processes
        calls: list[_Call] = []
        for call in split_trajectory(trajectory, self.teacher):
            if isinstance(call, TrajectoryCall):
                calls.append(_Call(call, []))
                continue
            # Samples of a zeroed text have nothing to teach.
            kept = [i for i, prompt in enumerate(call.prompts) if prompt != NO_PROMPT]
            # The images of a prompt stand together; the branches of guidance follow each other.
            images = images_per_prompt(self._kwargs)
            samples_of: list[list[int]] = [[] for _ in draws]
            for place, i in enumerate(kept):
                samples_of[i // images % len(draws)].append(place)
            if all(samples_of):
                whole = len(kept) == len(call)
                calls.append(_Call(call if whole else call.select(kept), samples_of))
        return calls

    # --- prompts ---

    def _prompt(self, draw: int) -> str:
        if self._random("empty", draw).random() < self._config.prompt_dropout:
            return ""
        return self._prompts.prompt(draw, self._config.seed)

    def _tokenize(self, prompts: list[str]) -> list[int]:
        calls = tokenize(self._pipe, prompts, self._kwargs)
        indices = [index for ids, mask in calls for index in self.teacher.add(ids, mask)]
        return indices[: len(prompts)]  # negative prompts are encoded after the prompts

    def _random(self, *key: Any) -> random.Random:
        # A string is hashed by SHA-512: the same on every machine, and no two keys alike.
        return random.Random(f"{self._config.seed}/{key}")

    # --- resuming ---

    def state(self) -> dict[str, Any]:
        """Plain values, from which `restore` goes on."""
        names = ("_rounds", "_due", "_position", "_readings", "teacher_samples", "student_samples")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: Mapping[str, Any], *, finished: bool = False) -> None:
        """Go on from `state`; the trajectories that the reservoir held are sampled again.

        They are bitwise the same, and needn't be saved: 256 of FLUX at 512 pixels would be 1.3 GB
        with each checkpoint. If the run is `finished`, nothing will be drawn any more.
        """
        held = range(max(0, state["_rounds"] - (self._held.maxlen or 0)), state["_rounds"])
        for round_ in [] if finished else tqdm(held, "sample the trajectories again", leave=False):
            self._held.append([self._captured(round_, group) for group in self._groups])
        for name, value in state.items():
            setattr(self, name, value)
