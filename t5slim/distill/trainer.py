"""Distil a student in the place of a pipeline's T5."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from signal import SIGINT
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.tracking import get_available_trackers  # type: ignore[import-untyped]
from accelerate.utils import (  # type: ignore[import-untyped]
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
)
from diffusers.optimization import get_scheduler
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..encoder import SlimT5Encoder
from ..errors import DistillError
from ..hub import check_no_lora, hub_errors, update_model_card, write_atomic
from . import report
from .calls import call_encoder
from .checkpoint import TrainingState, interruptible, load_checkpoint, master_weights
from .config import DistillConfig
from .metrics import VelocityGap, check_student
from .objective import Objective
from .pipeline import (
    Encode,
    check_no_cache,
    check_pipeline_kwargs,
    denoisers,
    encoded_by,
    frozen,
    generate,
    is_sharded,
)
from .prompts import Prompts, PromptSource, load_prompts
from .reservoir import TrajectoryReservoir

logger = logging.getLogger(__name__)


def train(
    pipe: Any,
    student: SlimT5Encoder,
    prompts: Prompts,
    config: DistillConfig | None = None,
    *,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    eval_prompts: Prompts | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    push_to_hub: bool | str = False,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
) -> report.DistillResult:
    """Distil `student` to take the place of the T5 in `pipe`. No images are needed, only prompts.

    The pipeline is the teacher: it is run on the prompts as a user would run it, and the student
    learns to make its denoiser predict the same. Teacher, denoiser and everything else in the
    pipeline are frozen; the student's encoder and projection are trained in float32, whatever the
    student's dtype.

        result = train(pipe, student, "prompts.txt", pipeline_kwargs={"height": 512, "width": 512})
        patch_pipeline(pipe, result.student)

    On several GPUs, start with `accelerate launch`, each process with the pipeline on its own
    device.

    A run with an `output_dir` can be killed at any moment. Called again with `resume=True` and
    otherwise the same, it goes on from its last checkpoint, to bitwise the same weights (where the
    device computes the same twice). On SIGTERM and Ctrl-C it writes one first.

    Args:
        pipe: A pipeline with a T5 in its text slot, on the device to train on.
        student: With the vocabulary of that T5 and its output width. Trained in place.
        prompts: A list, or a file with one prompt on each line; or see `t5slim.distill.prompts`.
        config: The settings; `DistillConfig.paper()` has those of the paper.
        pipeline_kwargs: How to call the pipeline: `height`, `width`, `num_inference_steps`,
            `guidance_scale`, `max_sequence_length`, `negative_prompt`...: what the student should
            be good at. `num_inference_steps` may be smaller than in use: 20 in the paper.
        eval_prompts: Prompts to measure the velocity gap on every `config.eval_every` updates, as a
            list or file. They should not be among `prompts`.
        output_dir: Where to save the student (at each evaluation and in the end) with
            `history.jsonl`, `distillation.json` and `checkpoints/`; in the end also `README.md`, a
            model card, and `run.png`, a plot. Loaded with
            `SlimT5Encoder.from_pretrained(output_dir)`.
        resume: Go on with the run in `output_dir`; start it, if there is none yet.
        push_to_hub: Upload the student in the end, with its model card: to this repository
            (`owner/name`), or, if True, to one that is named as `output_dir`. It is made before the
            training.
        optimizer: Makes the optimizer of a list of parameters, with a learning rate of its own,
            which the schedule scales. Default: AdamW with the config's settings.

    Returns:
        The result, whose `student` is the one passed.

    Raises:
        DistillError: An argument or the launch doesn't fit, before the training; or too many
            successive gradients aren't finite: the student then holds the last good weights.
        NoT5SlotError, IncompatibleStudentError: As for `patch_pipeline`.
        HubAccessError: The repository of `push_to_hub` can't be made or written.
        KeyboardInterrupt: After a checkpoint was written.
    """
    config, kwargs = config or DistillConfig(), dict(pipeline_kwargs or {})
    folder = None if output_dir is None else Path(output_dir).expanduser()
    _check_trainable(pipe, student, config)
    check_pipeline_kwargs(pipe, kwargs)
    source = PromptSource(prompts)
    held_out = None if eval_prompts is None else load_prompts(eval_prompts)
    if folder is not None or push_to_hub:
        check_no_lora(student)
    if folder is None and resume:
        raise DistillError("resume=True needs the output_dir of the run to go on with.")
    if config.samples_every and (held_out is None or folder is None):
        raise DistillError("samples_every needs eval_prompts, for the images, and an output_dir.")
    accelerator = Accelerator(
        # Not the argument of that name, which the environment overrides.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps
        ),
        log_with=_trackers(config, folder) or None,
        project_config=ProjectConfiguration(logging_dir=folder and folder / "logs"),
    )
    check_launch(accelerator, config)
    # Precision is the config's: accelerate fixes it once for a process (see `call_denoiser`).
    accelerator.native_amp, accelerator.scaler = False, None
    main, processes = accelerator.is_main_process, accelerator.num_processes
    facts = report.run_facts(pipe, student, config, kwargs, source, held_out, processes)
    checkpoint = None
    if folder is not None:
        facts = report.check_output_dir(folder, resume, facts)
        checkpoint = load_checkpoint(folder / report.CHECKPOINTS) if resume else None
    repo_id = _create_repository(push_to_hub, folder) if main else None
    folder = folder if main else None
    device = torch.device(pipe._execution_device)

    with ExitStack() as stack:
        stack.enter_context(frozen(pipe, config.gradient_checkpointing))
        stack.enter_context(master_weights(student, device))
        # Dropout draws from the global generators: seeded below, and given back as they were.
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        interrupted = stack.enter_context(interruptible())
        reservoir = TrajectoryReservoir(
            pipe, source, config, pipeline_kwargs=kwargs,
            process=(accelerator.process_index, processes),
        )  # fmt: skip
        objective = Objective(pipe, reservoir.teacher, config)
        measure = None
        # A sharded denoiser is called by all processes, or by none.
        if held_out is not None and (main or is_sharded(pipe)):
            measure = VelocityGap(pipe, held_out, pipeline_kwargs=kwargs)
        sampled = measure.prompts[:4] if measure and config.samples_every else []
        sample = partial(_generate, pipe, sampled, kwargs, config.seed)
        # At once: a device without room for the decoder is noticed now.
        teacher_images = sample(call_encoder)
        parameters = [p for p in student.parameters() if p.requires_grad]
        optim = (optimizer or _adamw(config))(parameters)
        # The student is on the pipeline's device, which needn't be accelerate's.
        model = accelerator.prepare(student.train(), device_placement=[False])
        state = TrainingState(student, optim, reservoir, config, device)
        result = state.result
        result.output_dir = folder
        if checkpoint is not None:
            state.restore(checkpoint, config.max_steps)
            result.history = report.read_history(folder, result.steps)
        for group in optim.param_groups:
            group.setdefault("initial_lr", group["lr"])
        # Not prepared: accelerate would step it once for each process.
        scheduler = get_scheduler(
            "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule,
            optim,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.max_steps,
            last_epoch=result.steps - result.skipped - 1,
        )
        stack.enter_context(_tracking(accelerator, facts, folder, result.steps))
        report.reset_peak_memory(device)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            report.write_run(folder, facts, result)

        def encode(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(device.type, config.autocast_dtype, config.mixed_precision != "no"):
                return model(*args, **kwargs)

        bar = tqdm(total=config.max_steps, initial=result.steps, desc="distil", disable=not main)
        stack.enter_context(bar)
        while result.steps < config.max_steps:
            start = time.perf_counter()
            weights = config.weights_at(result.steps)
            batches = reservoir.batches(result.steps, denoiser="velocity" in weights)
            for i, batch in enumerate(batches, start=1):
                # Dropout, too, is a function of the update, so that no generator needs saving.
                micro_step = result.steps * config.gradient_accumulation_steps + i
                place = micro_step * processes + accelerator.process_index
                torch.manual_seed((config.seed << 32) + place)
                with accelerator.accumulate(model):
                    loss = objective(encode, batch, weights)
                    accelerator.backward(state.scaler.scale(loss))
                    state.note_loss(loss.detach())
            state.scaler.unscale_(optim)
            learning_rate = float(scheduler.get_last_lr()[0])
            if state.update(accelerator.clip_grad_norm_(state.parameters, config.max_grad_norm)):
                scheduler.step()
            result.steps += 1
            result.seconds += time.perf_counter() - start
            result.teacher_samples = reservoir.teacher_samples
            result.student_samples = reservoir.student_samples
            finished = result.steps == config.max_steps
            if finished or result.steps % config.eval_every == 0:
                total, count = accelerator.reduce(state.losses, "sum").tolist()
                result.loss = total / count if count else float("nan")
                result.peak_memory_gib = _highest(
                    accelerator, report.peak_memory_gib(device), device
                )
                with state.ema_weights():
                    if measure is not None:
                        # Real tokens and padding apart cost two more passes: in the end only.
                        result.report = measure.report(student, parts=finished)
                        result.gap = result.gap_without_ema = result.report.gap
                    if folder is not None and not finished:
                        student.save_pretrained(folder)
                if measure is not None and state.ema:
                    result.gap_without_ema = measure(student)
                entry = result.add_history(
                    learning_rate, state.grad_norms, facts["prompts_per_step"]
                )
                state.grad_norms = []
                state.losses.zero_()
                with _side_job("The trackers' entry"):
                    accelerator.log({k: v for k, v in entry.items() if k != "step"}, result.steps)
                if folder is not None:
                    report.write_run(folder, facts, result)
                shown = {"loss": result.loss, "gap": result.gap}
                bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items() if v is not None})
            if teacher_images and (finished or result.steps % config.samples_every == 0):
                with _side_job("The image grid"):
                    with state.ema_weights():
                        images = sample(encoded_by(student, pipe))
                    columns = {
                        "teacher": teacher_images,
                        f"student, update {result.steps:,}": images,
                    }
                    _show(report.image_grid(sampled, columns), result.steps, folder, accelerator)
            stop = int(_highest(accelerator, interrupted(), device))
            if folder and (finished or stop or result.steps % config.checkpoint_every == 0):
                state.save(folder / report.CHECKPOINTS, config.keep_checkpoints)
            if stop:
                how = f"; train again with output_dir={str(folder)!r} and resume=True to go on"
                message = f"Stopped after update {result.steps}{how if folder else ''}."
                raise KeyboardInterrupt(message) if stop == SIGINT else SystemExit(message)
            bar.update()
        if state.ema:
            state.ema.copy_to(state.parameters)
        accelerator.unwrap_model(model)
    if main:  # with the student in its own dtype again
        _finish(result, facts, repo_id)
    return result


# --- before a run ---


def _check_trainable(pipe: Any, student: Any, config: DistillConfig) -> None:
    """Refuse a student that can't learn, or can't from this pipeline."""
    if isinstance(student, (list, tuple)) or isinstance(pipe, (list, tuple)):
        raise DistillError(
            "train takes one pipeline and one student. For a series of students, or one student of "
            "several pipelines, write the loop: see examples/series and examples/joint."
        )
    if not isinstance(student, SlimT5Encoder):
        raise DistillError(
            f"student is a {type(student).__name__}; expected a SlimT5Encoder. To make one of a "
            "small T5, see SlimT5Encoder.from_t5. To compile one, call student.compile(); "
            "to give it a LoRA, peft.inject_adapter_in_model(config, student)."
        )
    check_student(pipe, student)
    check_no_cache(pipe)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise DistillError("No parameter of the student requires a gradient: it can't learn.")
    dtypes = {getattr(denoiser, "dtype", None) for denoiser in denoisers(pipe).values()}
    scaled = config.mixed_precision == "fp16"
    if "velocity" in config.weights_at(0) and torch.float16 in dtypes and not scaled:
        # The gradients of a mean over 100,000 elements are below float16's smallest number, 6e-8.
        raise DistillError(
            f"The denoiser of this {type(pipe).__name__} is in float16, through which gradients "
            'vanish. Load the pipeline in bfloat16 or float32, or set mixed_precision="fp16", '
            "which scales the loss."
        )


def check_launch(accelerator: Accelerator, config: DistillConfig) -> None:
    """Refuse a launch that would train otherwise than the config says."""
    for name, variable, value in (
        ("mixed precision", "ACCELERATE_MIXED_PRECISION", config.mixed_precision),
        ("a dynamo backend", "ACCELERATE_DYNAMO_BACKEND", "no"),
    ):
        if (launched := os.environ.get(variable, "no").lower()) not in ("no", value):
            raise DistillError(
                f"{variable}, or accelerate launch, sets {name} to {launched!r}, and the config to "
                f"{value!r}: set it in the config alone. To compile, call student.compile() and "
                "pipe.transformer.compile() before train."
            )
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise DistillError(
            f"This was launched with {kind.value}, which shards what is trained: the student, "
            "which is small. Launch with distributed_type MULTI_GPU; to shard the denoiser, which "
            "is large, see docs/command-line.md."
        )


def _trackers(config: DistillConfig, folder: Path | None) -> list[str]:
    available = set(map(str, get_available_trackers()))
    if config.trackers is None:
        return ["tensorboard"] if folder and "tensorboard" in available else []
    if missing := ", ".join(set(config.trackers) - available):
        raise DistillError(f"trackers holds {missing!r}, which isn't installed: pip install it")
    if not folder and "tensorboard" in config.trackers:
        raise DistillError("TensorBoard writes into a folder: pass an output_dir.")
    return list(config.trackers)


def _create_repository(push_to_hub: bool | str, folder: Path | None) -> str | None:
    """Create it, if it doesn't exist: rather now than after a week of training."""
    if push_to_hub is False:
        return None
    if push_to_hub is True and folder is None:
        raise DistillError("push_to_hub=True names the repository after output_dir: pass one.")
    name = folder.resolve().name if folder is not None and push_to_hub is True else push_to_hub
    with hub_errors(f"push_to_hub: {name!r}"):
        return HfApi().create_repo(str(name), exist_ok=True).repo_id


def _adamw(config: DistillConfig) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(
        parameters, config.learning_rate, weight_decay=config.weight_decay, fused=True
    )


# --- during a run ---


def _highest(accelerator: Accelerator, value: float, device: torch.device) -> float:
    """The highest value of any process."""
    if accelerator.num_processes == 1:
        return value
    return accelerator.gather(torch.tensor([float(value)], device=device)).max().item()


def _generate(
    pipe: Any, prompts: list[str], kwargs: Mapping[str, Any], seed: int, encode: Encode
) -> list[Image.Image]:
    """An image of each prompt; none where the pipeline generates none."""
    images: list[Image.Image] = []
    for i, prompt in enumerate(tqdm(prompts, desc="sample images", leave=False)):
        images += generate(pipe, [prompt], kwargs, [seed + i], encode)[:1]
    return images


def _show(grid: Image.Image, step: int, folder: Path | None, accelerator: Accelerator) -> None:
    """Save an image grid, and show it in the trackers."""
    if folder is not None:
        (folder / "samples").mkdir(exist_ok=True)
        for path in (folder / "samples" / f"{step:08d}.png", folder / "samples.png"):
            write_atomic(path, report.png(grid))
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(grid)[None]}, step=step, **layout)


@contextmanager
def _tracking(
    accelerator: Accelerator, facts: Mapping[str, Any], folder: Path | None, step: int
) -> Iterator[None]:
    """Trackers that show the run's facts, and go on after update `step`."""
    wandb = {"id": facts["run_id"], "resume": "allow", "config": dict(facts)}
    if folder is not None:
        wandb |= {"name": folder.name, "dir": str(folder)}
    # Entries of TensorBoard for updates that are made again are taken back.
    init_kwargs = {"wandb": wandb, "tensorboard": {"purge_step": step + 1}}
    accelerator.init_trackers("t5slim", init_kwargs=init_kwargs)
    try:
        yield
    finally:
        # Not by `end_training`, which ends the process group, too: a notebook couldn't train a
        # second time.
        with _side_job("The end of the trackers"):
            for tracker in accelerator.trackers:
                tracker.finish()


@contextmanager
def _side_job(what: str) -> Iterator[None]:
    """Turn a failure into a warning: none of these jobs may cost a trained student."""
    try:
        yield
    except Exception as error:
        logger.warning("%s failed: %s: %s", what, type(error).__name__, error)


def _finish(result: report.DistillResult, facts: Mapping[str, Any], repo_id: str | None) -> None:
    """Save the student, then what shows it: a failure there doesn't lose the student."""
    folder, student = result.output_dir, result.student
    if folder is not None:
        student.save_pretrained(folder)
        report.write_run(folder, facts, result)
        with _side_job("The plot of the run, for which pip install 't5slim[train]',"):
            report.plot_run(result.history, folder / "run.png")
        with _side_job("The model card"):
            _write_card(folder, result, facts)
    if repo_id is not None:
        images = _images(folder)
        notes = report.card_notes(facts, result, [image.name for image in images])
        try:
            student.push_to_hub(repo_id, notes=notes, files=images)
        except Exception as error:
            again = f"student.push_to_hub({repo_id!r})"
            if folder is not None:
                again = f"hf upload {repo_id} {folder} . --exclude 'checkpoints/*' 'logs/*'"
            raise DistillError(
                f"The student is trained, but couldn't be uploaded. To try again: {again}\n{error}"
            ) from error


def _images(folder: Path | None) -> list[Path]:
    paths = [] if folder is None else [folder / name for name in ("run.png", "samples.png")]
    return [path for path in paths if path.exists()]


def _write_card(folder: Path, result: report.DistillResult, facts: Mapping[str, Any]) -> None:
    """Write `README.md`; somebody's own words in it stay."""
    path = folder / "README.md"
    card = ModelCard.load(path) if path.exists() else None
    notes = report.card_notes(facts, result, [image.name for image in _images(folder)])
    card = update_model_card(card, result.student, folder.resolve().name, notes)
    write_atomic(path, str(card).encode())
