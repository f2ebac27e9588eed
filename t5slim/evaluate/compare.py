"""Measurement of students against the teacher of a pipeline, on the same prompts and noise."""

import math
import os
import timeit
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from operator import index
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional import image as metrics
from tqdm.auto import tqdm

from ..distill import pipeline
from ..distill.metrics import VelocityGap, check_student
from ..distill.prompts import PromptSource
from ..distill.report import peak_memory_gib, reset_peak_memory
from ..distill.teacher import CachedTeacher
from ..errors import ConfigError
from ..hub import local_path, make_folder
from ..patch import is_student, patch_pipeline, student_config, unpatch_pipeline
from ..slot import TextSlot
from .result import LABELS, SAMPLE_KEYS, TEACHER, Comparison

Judge = Callable[[Image.Image, str], Mapping[str, float]]
Distance = Callable[[Image.Image, Image.Image], float]
_RESERVED = {*LABELS, *SAMPLE_KEYS} - {"psnr", "ssim"}
_FORMS = {"file", "dataset", "generator", "mixture"}  # of prompts; other mappings have categories


def compare(
    pipe: Any,
    students: Any,
    prompts: Any,
    *,
    seeds: Sequence[int] = (0,),
    pipeline_kwargs: Mapping[str, Any] | None = None,
    judge: Judge | None = None,
    distances: Mapping[str, Distance] | None = None,
    batch_size: int = 8,
    output_dir: str | os.PathLike[str] | None = None,
) -> Comparison:
    """Generate the same prompts from the same noise under the teacher and under each student.

    Args:
        pipe: A pipeline for images with a T5. In one that was patched with `keep_teacher=True` the
            teacher is back while this runs. To have T5-XXL and a student never in memory together,
            call this within `cached_teacher`.
        students: One, several, or a mapping of names to them: a `SlimT5Encoder` or another encoder
            for the slot, or the folder or Hub id of a student. None: the one in the pipeline.
        prompts: A list or a file, as for `train`; or a mapping of categories to them; or a folder
            with a file of each category, such as `text rendering.txt`.
        seeds: Seeds of the noise; each prompt is generated from each.
        pipeline_kwargs: Arguments of the pipeline's call, as for `train`.
        judge: Called as `judge(image, prompt)` with each image (PIL, RGB); returns numbers by name,
            such as a CLIP score, which are averaged over the images. A name that is left out, or
            NaN, says nothing about that image.
        distances: Functions `distance(image, teacher_image)` by name. The default is "psnr" (dB)
            and "ssim", by torchmetrics. These and the judge are first tried on a blank image.
        batch_size: Prompts that are generated together.
        output_dir: Folder for the result, see `Comparison.save`.

    Returns:
        The `Comparison`. The pipeline and the students are as they were, also after an error.

    Raises:
        ConfigError: No students, prompts or seeds, or two of one name; or a judge or distance
            that uses another measure's name, fails, or returns no number; or a name of more than
            one line.
        NoT5SlotError, PatchError: The pipeline has no T5, or it wasn't kept.
        IncompatibleStudentError: A student has another vocabulary, or another output width.
        DistillError: As for `velocity_gap`; or the pipeline generates no images.
    """
    replacement = TextSlot(pipe).encoder
    kwargs = pipeline.check_pipeline_kwargs(pipe, pipeline_kwargs)
    if students is None and is_student(replacement):
        students = replacement
    named, table, seeds = check_request(students, prompts, seeds, output_dir)
    texts = list(table["prompt"])
    batches = pipeline.batches_of(texts, batch_size)
    measure = partial(_measures, DISTANCES if distances is None else distances, judge)
    blank = Image.new("RGB", (512, 512))
    measure(blank, blank, texts[0])
    settings: Any = {"pipeline_kwargs": kwargs, "batch_size": batch_size}

    samples: list[pd.DataFrame] = []
    runs: list[dict[str, Any]] = []
    with ExitStack() as stack:  # undone in reverse order
        if is_student(replacement):
            stack.callback(replacement.train, replacement.training)
            unpatch_pipeline(pipe)
            stack.callback(patch_pipeline, pipe, replacement, keep_teacher=True)
        teacher: Any = pipeline.teacher_of(pipe)
        device = torch.device(pipe._execution_device)
        encoders = {TEACHER: teacher}
        for name, student in named.items():
            student = check_student(pipe, student)
            stack.callback(student.to, next(student.parameters()).device)
            encoders[name] = student.to(device)
        for encoder in encoders.values():
            stack.enter_context(pipeline.evaluating(encoder))
        tokens, *_ = pipeline.tokenize(pipe, batches[0], kwargs)
        for seed in tqdm(seeds, desc="compare", unit="seed"):
            reset_peak_memory(device)
            # The teacher's trajectory is measured and decoded in one pass.
            gap = VelocityGap(pipe, texts, seed=seed, decode=True, **settings)
            for name, encoder in encoders.items():
                run: dict[str, Any] = {"encoder": name, "gap_of_calls": None}
                sample: dict[str, Any] = {"weight": 0.0, "velocity_gap": math.nan}
                images = gap.images
                if encoder is not teacher:
                    report = gap.report(encoder)
                    sample["weight"] = report.denominators.sum(1).numpy()
                    sample["velocity_gap"] = report.of_prompts.numpy()
                    run["gap_of_calls"] = report.of_calls[~report.of_calls.isnan()].tolist()
                    reset_peak_memory(device)
                    encode, images = pipeline.encoded_by(encoder, pipe), []
                    for batch in batches:
                        images += pipeline.run_pipeline(
                            pipe, batch, kwargs, [seed] * len(batch), encode=encode, decode=True
                        )
                if not isinstance(encoder, CachedTeacher):  # which says nothing of T5's costs
                    run |= _costs(device, tokens, encoder)
                runs.append(run)
                others = [None] * len(texts) if encoder is teacher else gap.images
                measures = pd.DataFrame(map(measure, images, others, texts))
                part = table.assign(encoder=name, seed=seed, image=images, **sample)
                samples.append(part.join(measures))
    facts = {"pipeline": type(pipe).__name__, "pipeline_kwargs": kwargs, "seeds": seeds}
    facts |= {"teacher": _place(teacher), "dtype": str(teacher.dtype)}
    comparison = Comparison(pd.concat(samples, ignore_index=True), pd.DataFrame(runs), facts)
    if output_dir is not None:
        comparison.save(output_dir)
    return comparison


def check_request(
    students: Any, prompts: Any, seeds: Any, output_dir: Any
) -> tuple[dict[str, Any], pd.DataFrame, list[int]]:
    """Check what needs no pipeline; return students by name, prompts with categories, and seeds."""
    named = students
    if not isinstance(students, Mapping):
        single = isinstance(students, str | nn.Module) or not isinstance(students, Iterable | None)
        given = [students] if single else list(students or ())
        named = {_place(student) or f"student {i}": student for i, student in enumerate(given, 1)}
        if len(named) < len(given):
            raise ConfigError("Two students have one name: pass a mapping of names to students.")
    if not named or TEACHER in named:
        raise ConfigError(f"Got students {[*named]}; expected one or more, none {TEACHER!r}.")
    if isinstance(prompts, str | os.PathLike) and os.path.isdir(folder := local_path(prompts)):
        prompts = {file.stem: file for file in sorted(Path(folder).glob("*.txt"))}
    by_category = isinstance(prompts, Mapping) and not _FORMS & prompts.keys()
    parts = prompts if by_category else {None: prompts}
    _check_names({*named, *parts} - {None})
    for student in named.values():
        if not isinstance(student, nn.Module):
            student_config(student)
    pairs = [(text, key) for key, part in parts.items() for text in PromptSource(part).all()]
    table = pd.DataFrame(pairs, columns=["prompt", "category"])
    try:
        seeds = torch.tensor([index(seed) for seed in seeds]).tolist()
    except (RuntimeError, TypeError, ValueError) as error:  # or over 64 bits
        raise ConfigError(f"Got seeds {seeds!r:.80}; expected integers, as a list.") from error
    for name, values in (("prompts", list(table["prompt"])), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"Got {name} {values!s:.200}; expected one or more, and each once.")
    if output_dir is not None:
        make_folder(output_dir)
    return dict(named), table, seeds


def _check_names(names: Iterable[Any]) -> None:
    """Refuse names that a table or page can't show: they have one line of printable text."""
    for name in names:
        if not (isinstance(name, str) and name.isprintable()):
            raise ConfigError(f"{name!r} is no name; expected one line of printable text.")


def _place(encoder: Any) -> str:
    """Folder or Hub id of an encoder, empty for one that was never saved."""
    if isinstance(encoder, nn.Module):
        return getattr(getattr(encoder, "config", None), "name_or_path", None) or ""
    return str(encoder)


def _costs(
    device: torch.device, tokens: tuple[Tensor, Tensor | None], encoder: nn.Module
) -> dict[str, float | None]:
    """Size, peak memory since its reset, and the time to encode a prompt, by a batch of them."""
    parameters = list(encoder.parameters())
    encode = partial(pipeline.call_encoder, encoder, *tokens)
    with torch.no_grad():  # `item` waits for the device; the fastest counts, after a warm-up
        seconds = timeit.repeat(lambda: encode().sum().item(), number=1, repeat=4)
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "weights_mib": sum(parameter.nbytes for parameter in parameters) / 2**20,
        "encode_ms": min(seconds) / len(tokens[0]) * 1000,
        "peak_memory_gib": peak_memory_gib(device),
    }


def _measures(
    distances: Mapping[str, Distance],
    judge: Judge | None,
    image: Image.Image,
    other: Image.Image | None,
    text: str,
) -> dict[str, float]:
    """Distances to the teacher's image (NaN, if there is none) and scores of the judge, by name."""
    try:
        measures = {
            name: math.nan if other is None else float(distance(image, other))
            for name, distance in distances.items()
        }
        scores = {} if judge is None else dict(judge(image, text))
        scores = {name: float(value) for name, value in scores.items()}
    except Exception as error:  # of the user's code, or of what it returns
        raise ConfigError(
            f"A judge or distance failed ({error!r}). Expected judge(image, prompt), which returns "
            "numbers by name; and distances such as {'l1': f}, by f(image, teacher_image)."
        ) from error
    _check_names({*measures, *scores})
    if taken := measures.keys() & scores | _RESERVED & {*measures, *scores}:
        raise ConfigError(f"{min(taken)!r} is the name of another measure. Pick another.")
    return measures | scores


# (1, 3, H, W) from 0 to 1
_to_tensor = VaeImageProcessor(do_resize=False, do_normalize=False, do_convert_rgb=True).preprocess


def _distance(metric: Callable[..., Any]) -> Distance:
    """A metric of tensors as a distance of images."""
    return lambda image, other: metric(_to_tensor(image), _to_tensor(other), data_range=1.0).item()


DISTANCES = {
    "psnr": _distance(metrics.peak_signal_noise_ratio),  # in dB, infinite for equal images
    "ssim": _distance(metrics.structural_similarity_index_measure),  # 1 for equal images
}
