"""The velocity gap: how much of what the denoiser reads from the prompt the student loses."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ..encoder import SlimT5Encoder
from ..errors import ConfigError, DistillError
from ..hub import check_weights
from ..patch import check_fit, student_config
from ..slot import TextSlot, compute_dtype, embedding_width, is_student
from .objective import velocity_loss
from .pipeline import batches_of, call_encoder, evaluating, teacher_of
from .prompts import Prompts, PromptSource
from .replay import NO_PROMPT, Call, EmbeddingsOf, predictions, split_trajectory
from .teacher import TeacherEmbeddings
from .trajectory import capture


@dataclass(frozen=True, repr=False)
class GapReport:
    """A velocity gap by prompt and by denoiser call, and where it comes from.

    Attributes:
        distances: (P, C) float64, for each of P prompts and C calls the squared distance of the
            predictions under the student and under the teacher. Zero for an empty prompt.
        denominators: (P, C) float64, those of the empty prompt and the teacher.
    """

    distances: Tensor
    denominators: Tensor

    @property
    def gap(self) -> float:
        """The velocity gap: 0 is the teacher, 1 an empty prompt."""
        return (self.distances.sum() / self.denominators.sum()).item()

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the gap over other such prompts: a percentile bootstrap, seeded."""
        P = len(self.distances)
        drawn = torch.randint(P, (2000, P), generator=torch.Generator().manual_seed(0))
        gaps = self.distances.sum(1)[drawn].sum(1) / self.denominators.sum(1)[drawn].sum(1)
        low, high = gaps.nanquantile(gaps.new_tensor([0.025, 0.975])).tolist()
        return low, high

    @property
    def median(self) -> float:
        """The gap of the median prompt, which a few misread ones don't move as they do the gap."""
        return self.of_prompts.nanmedian().item()

    @property
    def of_prompts(self) -> Tensor:
        """(P,), the gap of each prompt; NaN for an empty one."""
        return self.distances.sum(1) / self.denominators.sum(1)

    @property
    def of_calls(self) -> Tensor:
        """(C,), the gap at each call; NaN for a call that reads the negative prompt alone."""
        return self.distances.sum(0) / self.denominators.sum(0)

    def __repr__(self) -> str:
        low, high = self.interval
        return f"{self.gap:.4f} (95% interval {low:.4f} to {high:.4f}; median {self.median:.4f})"


def velocity_gap(
    pipe: Any,
    student: nn.Module | str | os.PathLike[str],
    prompts: Prompts,
    *,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> float:
    """The change of the denoiser's predictions when the student takes the teacher's place.

    gap = sum ||v(x_t, t, E_S(p)) - v(x_t, t, E_T(p))||^2 / sum ||v(x_t, t, E_T("")) - v(x_t, t,
    E_T(p))||^2

    over `prompts` and every step of the teacher's trajectory. 0: the denoiser can't tell the
    student from the teacher. 1: the student says no more than an empty prompt. It has no unit.
    Samples of the empty prompt itself (in classifier-free guidance) are left out.

    Args:
        pipe: A pipeline with the teacher in its text slot, in the precision to measure in.
        student: An encoder for that slot, on the pipeline's device; or a student's folder or id.
        prompts: Prompts that the student wasn't trained on, as a list or a text file.
        pipeline_kwargs: How to call the pipeline, as for `capture`.
        seed: Of the noise that the trajectories start from.
        batch_size: Prompts whose trajectories are sampled together. If `pipeline_kwargs` holds
            something for each, such as a list of control images, it must be their number.

    Returns:
        The gap. To measure several students, or one several times, keep a `VelocityGap` instead.

    Raises:
        NoT5SlotError: The pipeline has no T5.
        DistillError: No prompts; a pipeline with this very student in its slot; or a denoiser whose
            predictions don't depend on the prompt.
        IncompatibleStudentError: The student has another vocabulary or embedding width.
    """
    student = check_student(pipe, student)
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    return VelocityGap(pipe, prompts, pipeline_kwargs=pipeline_kwargs, **options)(student)


def check_student(pipe: Any, student: Any) -> nn.Module:
    """Refuse a student that doesn't fit the pipeline, or that is the teacher itself."""
    teacher = teacher_of(pipe)
    # A plain T5, such as a quantized one, may stand for a student as well.
    if is_student(student) or embedding_width(getattr(student, "config", None)) is None:
        check_fit(student_config(student), TextSlot(pipe))
    if not isinstance(student, nn.Module):
        student = SlimT5Encoder.from_pretrained(student, dtype=compute_dtype(teacher))
        student.to(pipe._execution_device)
    if not any(hasattr(part, "_hf_hook") for part in student.modules()):  # which hold weights
        check_weights(student)
    memory = {parameter.data_ptr() for parameter in student.parameters()} - {0}  # 0: on meta
    for name, part in pipe.components.items():
        parameters = part.parameters() if isinstance(part, nn.Module) else ()
        if not memory.isdisjoint(parameter.data_ptr() for parameter in parameters):
            raise DistillError(
                "The student is the teacher, or shares its weights or another component's: some "
                f"are in the {name} of the pipeline. To put T5 back, see t5slim.unpatch_pipeline."
            )
    return student


class VelocityGap:
    """`velocity_gap` of any number of students, for one pipeline and set of prompts, captured once.

    Each call costs one denoiser pass for each step and prompt, a third of what the first costs. To
    measure a part of the tokens, pass an encoder whose other embeddings are the teacher's.

    Args:
        pipe, prompts, pipeline_kwargs, seed, batch_size: As for `velocity_gap`.
        decode: Keep the images in which the teacher's trajectories end. Each prompt's noise is then
            that of `seed` alone, whatever its batch.

    Attributes:
        prompts: The prompts that are measured, each once.
        images: If `decode`, the teacher's image of each.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Prompts,
        *,
        pipeline_kwargs: Mapping[str, Any] | None = None,
        seed: int = 0,
        batch_size: int = 16,
        decode: bool = False,
    ) -> None:
        teacher_of(pipe)
        if not isinstance(seed, int):
            raise ConfigError(f"seed is {seed!r}; expected an integer.")
        self.prompts = PromptSource(prompts).all()
        self.images: list[Image.Image] = []
        self._pipe = pipe
        self._device = torch.device(pipe._execution_device)
        self._teacher = TeacherEmbeddings()
        # Of prompts whose trajectories were sampled together: the place of the first among all, the
        # index of their empty prompt in `TeacherEmbeddings`, and the denoiser calls that read them.
        self._batches: list[tuple[int, int, dict[int, Call]]] = []
        options: Any = {"pipeline_kwargs": pipeline_kwargs, "decode": decode, "layouts": {}}
        batches = batches_of(self.prompts, batch_size)
        for n, batch in enumerate(tqdm(batches, desc="capture for the velocity gap", leave=False)):
            seeds = [seed] * len(batch) if decode else seed + n
            trajectory = capture(pipe, batch, seed=seeds, teacher=self._teacher, **options)
            if decode and (made := len(trajectory.images)) != len(batch):
                raise DistillError(f"{len(batch)} prompts gave {made} images: set decode=False.")
            self.images += trajectory.images
            self._calls = len(trajectory.denoiser_calls)
            encoded = [prompt for prompts in trajectory.encoder_calls for prompt in prompts]
            self._empty = self._teacher.add_empty(TextSlot(pipe).tokenizer, encoded)
            # Without the samples of the empty prompt, and those of a text that is zeroed.
            split = enumerate(split_trajectory(trajectory))
            kept = {i: call.without(NO_PROMPT, self._empty) for i, call in split}
            calls = {i: call for i, call in kept.items() if call is not None}
            self._batches.append((n * batch_size, self._empty, calls))
        self._denominators = self._distances(self._of_empty_prompt)
        if not self._denominators.sum() > 0:
            raise DistillError("The denoiser reads nothing of these prompts. Are they empty?")

    def __call__(self, student: nn.Module) -> float:
        """The gap of a student; its mode (train or eval) is as before when this returns."""
        return self.report(student).gap

    def report(self, student: nn.Module) -> GapReport:
        """The gap of a student by prompt and call; its mode is as before."""
        tokens = partial(self._teacher.tokens, device=self._device)
        with evaluating(student):
            distances = self._distances(lambda prompts: call_encoder(student, *tokens(prompts)))
        return GapReport(distances, self._denominators)

    @torch.no_grad()
    def _distances(self, embeddings_of: EmbeddingsOf) -> Tensor:
        """(P, C), as in `GapReport`, if the text is what `embeddings_of` says."""
        totals = torch.zeros(len(self.prompts), self._calls, dtype=torch.float64)
        for first, empty, calls in self._batches:
            read = {prompt for call in calls.values() for prompt in call.prompts}
            if not (prompts := tuple(sorted(read - {empty}))):
                continue
            embeddings = embeddings_of(prompts)
            known = dict(zip(prompts, embeddings, strict=True))
            # Of a trajectory as a whole, the empty prompt is and stays the teacher's.
            known[empty] = self._of_teacher((empty,))[0].to(embeddings)
            found = predictions(self._pipe, [*calls.values()], partial(_padded, known))
            for (i, call), prediction in zip(calls.items(), found, strict=True):
                losses = velocity_loss(prediction, call.target).to("cpu", torch.float64)
                places = first + torch.tensor(call.places)
                totals[:, i].index_add_(0, places, losses * call.target[0].numel())
        return totals

    def _of_teacher(self, indices: tuple[int, ...]) -> Tensor:
        """(B, S, D), the teacher's own."""
        return self._teacher.get(teacher_of(self._pipe), indices, self._device)

    def _of_empty_prompt(self, indices: tuple[int, ...]) -> Tensor:
        """(B, S, D), those of the empty prompt for each, with zeros behind if it is shorter."""
        *_, empty = self._of_teacher((*indices, self._empty))
        return empty.expand(len(indices), -1, -1)


def _padded(embeddings: Mapping[int, Tensor], prompts: tuple[int, ...]) -> Tensor:
    return pad_sequence([embeddings[prompt] for prompt in prompts], batch_first=True)
