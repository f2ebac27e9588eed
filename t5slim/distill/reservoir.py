"""Replay buffer of teacher trajectories, from which the batches of a run are drawn.

Everything that is drawn is a function of the seed, its purpose, the update and the *global sample
index*: an update has as many as prompts (batch_size x accumulation x processes), and each has its
own prompts, noise and trajectories. So a run resumes from its counters alone, and how its samples
are spread over batches and processes changes nothing in what it learns from.
"""

import random
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from .config import DistillConfig
from .pipeline import autocast_denoisers, denoisers, tokenize
from .prompts import Prompts, PromptSource
from .replay import NO_PROMPT, Call, Samples, collate, split_trajectory
from .teacher import TeacherEmbeddings
from .trajectory import capture

# A denoiser call; or only prompts, by their index in the reservoir's `TeacherEmbeddings`.
Batch = Call | list[int]


class TrajectoryReservoir:
    """Shuffled batches from the latest trajectories of the teacher, on one process.

    A batch holds a sample for each global sample index, of any of its prompts, noises and
    timesteps. The reservoir fills as training goes on: new trajectories are sampled whenever the
    samples drawn are `reuse` times those that were captured, so that no update waits for it to be
    full. It holds those of one update at least. With `reservoir_size=0`, batches are the
    consecutive calls of the latest trajectories.

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
        together: The prompts of an update, on all processes.
        groups: The global sample indices of each batch of an update on this process.
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
        self._capture = partial(
            capture, pipe, zero_pooled=config.zero_pooled, teacher=self.teacher, layouts={}
        )
        self._pipe = pipe
        self._prompts = PromptSource(prompts)
        self._config = config
        self._kwargs = dict(pipeline_kwargs or {})
        configs = [denoiser.config for denoiser in denoisers(pipe).values()]
        self._takes_guidance = any(getattr(c, "guidance_embeds", False) for c in configs)
        index, self._processes = process
        size, groups = config.batch_size, config.gradient_accumulation_steps
        self.together = size * groups * self._processes
        # The global sample indices of each batch: always the same ones share a denoiser call.
        starts = [(group * self._processes + index) * size for group in range(groups)]
        self.groups = [range(start, start + size) for start in starts]
        depth = max(1, config.reservoir_size // self.together)
        self._held: deque[list[list[Call]]] = deque(maxlen=depth)  # rounds of groups of calls
        # The counters, from which everything else follows.
        self._rounds = 0  # of trajectories
        # Samples of a group (or calls, without a reservoir) to be drawn before the next round.
        self._due = 0.0
        self._tokenized: dict[str, int] = {}

    def batches(self, step: int, *, denoiser: bool = True) -> Iterator[Batch]:
        """The batches of update number `step` (from 0), one for each accumulation step.

        With `denoiser=False`, they are prompts and nothing else, and the denoiser isn't called.
        """
        if not denoiser:
            yield from (self._read(step, group) for group in self.groups)
            return
        consecutive = self._config.reservoir_size == 0
        again = range(max(0, self._rounds - (self._held.maxlen or 0)), self._rounds)
        if again and not self._held:  # what `restore` left out
            count = self.teacher_samples
            for round_ in tqdm(again, "sample the trajectories again", leave=False):
                self._held.append([self._captured(round_, group) for group in self.groups])
            self.teacher_samples = count
        if self._due <= 0 or not self._held:
            self._held.append([self._captured(self._rounds, group) for group in self.groups])
            self._rounds += 1
            latest = self._held[-1][0]
            self._due += len(latest) if consecutive else self._config.reuse * sum(map(len, latest))
        if consecutive:  # the calls that are due are the last ones
            batches = [calls[-int(self._due)] for calls in self._held[-1]]
        else:
            batches = [self._drawn(step, group) for group in range(len(self.groups))]
        self._due -= 1 if consecutive else len(batches[0])
        self.student_samples += sum(map(len, batches)) * self._processes
        yield from batches

    def _drawn(self, step: int, group: int) -> Call:
        """One sample for each global sample index, all able to share a denoiser call."""
        calls = [call for held in self._held for call in held[group]]
        # The same for all groups and processes, whose trajectories are built alike.
        (chosen,) = self._random("call", step).choices(calls, weights=[*map(len, calls)])
        if not isinstance(chosen, Samples):
            return chosen
        kind = chosen.signature
        alike = [call for call in calls if isinstance(call, Samples) and call.signature == kind]
        picks: list[tuple[Samples, int]] = []
        for place, sample in enumerate(self.groups[group]):
            source = self._random("row", step, sample)
            drawn = source.choice(alike)
            own = [i for i, of_sample in enumerate(drawn.places) if of_sample == place]
            picks.append((drawn, source.choice(own)))
        return collate(picks)

    def _read(self, step: int, group: range) -> list[int]:
        """The prompts of an update, tokenized as the pipeline does it."""
        prompts = [self._prompt(step * self.together + sample) for sample in group]
        # All of them, if one is new: `pipeline_kwargs` may hold an image for each of a batch.
        if not self._tokenized.keys() >= {*prompts}:
            calls = tokenize(self._pipe, prompts, self._kwargs)
            indices = [index for ids, mask in calls for index in self.teacher.add(ids, mask)]
            self._tokenized |= zip(prompts, indices, strict=False)  # then negative prompts
        return [self._tokenized[prompt] for prompt in prompts]

    def _captured(self, round_: int, group: range) -> list[Call]:
        """The teacher's calls for the prompts of a group in this round, each with all of them."""
        config = self._config
        draws = [round_ * self.together + sample for sample in group]
        kwargs = dict(self._kwargs)
        if self._takes_guidance and (scales := config.guidance_scales):
            kwargs["guidance_scale"] = self._random("guidance", round_).choice(scales)
        with autocast_denoisers(self._pipe, config.autocast_dtype):
            trajectory = self._capture(
                [self._prompt(draw) for draw in draws],
                pipeline_kwargs=kwargs,
                seed=[self._random("noise", draw).getrandbits(62) for draw in draws],
            )
        samples = sum(len(call.target) for call in trajectory.denoiser_calls)
        self.teacher_samples += samples * self._processes
        # Samples of a zeroed text have nothing to teach.
        split = [(call, call.without(NO_PROMPT)) for call in split_trajectory(trajectory)]
        return [kept for call, kept in split if kept and {*kept.places} == {*call.places}]

    def _prompt(self, draw: int) -> str:
        if self._random("empty", draw).random() < self._config.prompt_dropout:
            return ""
        return self._prompts.prompt(draw, self._config.seed)

    def _random(self, *key: Any) -> random.Random:
        # A string is hashed by SHA-512: the same on every machine, and no two keys alike.
        return random.Random(f"{self._config.seed}/{key}")

    def state(self) -> dict[str, Any]:
        """Plain values, from which `restore` goes on."""
        names = ("_rounds", "_due", "teacher_samples", "student_samples")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; the trajectories that were held are sampled again, once they matter.

        They are bitwise the same; 256 of FLUX at 512 pixels would be 1.3 GB in each checkpoint.
        """
        self._held.clear()
        vars(self).update({name: state[name] for name in self.state()})
