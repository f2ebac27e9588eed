"""Distil a student in the place of a pipeline's T5."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from signal import SIGINT
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.tracking import get_available_trackers  # type: ignore[import-untyped]
from diffusers.optimization import get_scheduler
from huggingface_hub import HfApi
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm.auto import tqdm

from ..encoder import SlimT5Config, SlimT5Encoder
from ..errors import DistillError
from ..hub import check_no_lora, hub_errors, local_path, model_card, write_atomic
from . import pipeline, report
from .checkpoint import TrainingState, interruptible, locked, master_weights
from .config import DistillConfig
from .metrics import VelocityGap, check_student
from .objective import Objective
from .prompts import Prompts, PromptSource
from .reservoir import TrajectoryReservoir

logger = logging.getLogger(__name__)


def train(
    pipe: Any,
    student: SlimT5Encoder | SlimT5Config,
    prompts: Prompts,
    config: DistillConfig | None = None,
    *,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    eval_prompts: Prompts | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    push_to_hub: str | None = None,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
) -> report.DistillResult:
    """Distil `student` to take the place of the T5 in `pipe`. No images are needed, only prompts.

    The pipeline is the teacher: it is run on the prompts as a user would run it, and the student
    learns to make its denoiser predict the same. Teacher, denoiser and everything else in the
    pipeline are frozen; the student's encoder and projection are trained in float32, whatever the
    student's dtype.

    A run with an `output_dir` can be killed at any moment. Called again with `resume=True` and
    otherwise the same, it goes on from its last checkpoint, to bitwise the same weights (where the
    device computes the same twice). On SIGTERM and Ctrl-C it writes one first.

    Args:
        pipe: A pipeline with a T5 in its text slot, on this process's device, to train on.
        student: With the vocabulary of that T5 and its output width. Trained in place. Or a
            config, for a new student, initialized by `Objective.initialize`.
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
        push_to_hub: Upload the student in the end, with its model card, to this repository
            (`owner/name`). It is made before the training.
        optimizer: Makes the optimizer of a list of parameters, with a learning rate of its own,
            which the schedule scales. Default: `config.adamw`.

    Returns:
        The result, whose `student` is the one passed, or the new one.

    Raises:
        DistillError: An argument or the launch doesn't fit, before the training; or too many
            successive gradients aren't finite: the student then holds the last good weights.
        NoT5SlotError, IncompatibleStudentError: As for `patch_pipeline`.
        HubAccessError: The repository of `push_to_hub` can't be made; or, in the end, when the
            student is trained and saved, not be written.
        OSError: A checkpoint can't be written; earlier ones are intact.
        KeyboardInterrupt, SystemExit: On Ctrl-C, SIGTERM; with `output_dir`, after a checkpoint.
    """
    config = DistillConfig() if config is None else config
    if not isinstance(config, DistillConfig):
        raise DistillError(f"config is {config!r:.80}; expected DistillConfig(**config).")
    if fresh := isinstance(student, SlimT5Config):
        with torch.inference_mode(False), torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(config.seed)
            student = SlimT5Encoder(deepcopy(student))
    _check_trainable(pipe, student, config)
    kwargs = pipeline.check_pipeline_kwargs(pipe, pipeline_kwargs)
    folder = None if output_dir is None else Path(local_path(output_dir))
    source = PromptSource(prompts)
    held_out = None if eval_prompts is None else PromptSource(eval_prompts).all()
    if folder or push_to_hub:
        check_no_lora(student)
    if folder is None and resume:
        raise DistillError("resume=True needs the output_dir of the run to go on with.")
    if config.samples_every and not (held_out and folder):
        raise DistillError("samples_every needs eval_prompts, for the images, and an output_dir.")
    if missing := ", ".join(set(config.trackers) - set(map(str, get_available_trackers()))):
        raise DistillError(f"trackers: {missing}; expected some that accelerate finds installed.")
    check_launch(config)
    logs = folder and folder / "logs"
    accelerator = Accelerator(log_with=list(config.trackers) or None, project_dir=logs)
    main, processes = accelerator.is_main_process, accelerator.num_processes
    facts = report.run_facts(pipe, student, config, kwargs, source, held_out, processes)
    if folder is not None:
        report.check_output_dir(folder, resume, facts)
    if push_to_hub and main:  # rather now than after a week of training
        with hub_errors(f"push_to_hub: {push_to_hub!r}"):
            push_to_hub = HfApi().create_repo(push_to_hub, exist_ok=True).repo_id
    device = torch.device(pipe._execution_device)

    with locked(folder) if folder and main else nullcontext(), ExitStack() as stack:
        checkpoints = Path(folder or "", report.CHECKPOINTS)
        folder = folder if main else None
        stack.enter_context(torch.inference_mode(False))  # which enables gradients, too
        kwargs = pipeline.map_tensors(kwargs, lambda _, t: t.clone() if t.is_inference() else t)
        stack.enter_context(pipeline.frozen(pipe, config.gradient_checkpointing))
        stack.enter_context(master_weights(student, device))
        # Dropout draws from the global generators: seeded below, and given back as they were.
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        optim = optimizer(trained) if optimizer else config.adamw(trained, student.config.d_model)
        common: Any = {"pipeline_kwargs": kwargs, "process": (accelerator.process_index, processes)}
        reservoir = TrajectoryReservoir(pipe, source, config, **common)
        # On every process: a sharded denoiser is called by all of them, or by none.
        options: Any = {"pipeline_kwargs": kwargs, "batch_size": config.batch_size}
        measure = VelocityGap(pipe, held_out, **options) if held_out else None
        sampled = measure.prompts[:4] if measure and config.samples_every else []

        def sample(encode: pipeline.Encode) -> list[Image.Image]:
            generate = partial(pipeline.run_pipeline, pipe, encode=encode, decode=True)
            calls = enumerate(sampled, config.seed)  # one by one, to save memory
            return [image for seed, text in calls for image in generate([text], kwargs, [seed])]

        teacher_images = sample(pipeline.call_encoder)  # at once: is there room for the decoder?
        if sampled and not teacher_images:
            raise DistillError(f"samples_every: {type(pipe).__name__} makes no images.")
        state = TrainingState(student, optim, reservoir, config)
        if resume:
            state.restore(checkpoints, facts["identity"])
        if state.result.steps < config.max_steps:  # if resumed, by the samples that it began with
            new = TrajectoryReservoir(pipe, source, config, **common, teacher=reservoir.teacher)
            objective = Objective(pipe, new if state.result.steps else reservoir, config)
            del new  # its trajectories would stay in memory beside those of the run
        if state.result.steps == 0 and fresh:
            objective.initialize(student, reservoir)
            state = TrainingState(student, optim, reservoir, config)  # whose EMA begins with that
        result = state.result
        result.output_dir = folder
        # Not prepared by accelerate, which may compile or cast as an earlier Accelerator said.
        model = DistributedDataParallel(student) if processes > 1 else student
        for group in optim.param_groups:
            group.setdefault("initial_lr", group["lr"])
        scheduler = get_scheduler(  # not prepared: accelerate would step it once for each process
            "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule,
            optim,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.max_steps,
            last_epoch=result.steps - result.skipped - 1,
        )
        accelerator.init_trackers("t5slim", {k: str(v) for k, v in vars(config).items()})
        for tracker in accelerator.trackers:
            # `end_training` would end the process group, too, with which a notebook trains again.
            stack.callback(_side_job("The end of a tracker")(tracker.finish))
        report.reset_peak_memory(device)
        if folder is not None:
            report.write_run(folder, facts, result)

        dtype = config.autocast_dtype
        encode = torch.autocast(device.type, dtype, dtype is not None)(model.__call__)
        quiet = {} if main else {"disable": True}  # False would outweigh TQDM_DISABLE
        bar = tqdm(total=config.max_steps, initial=result.steps, desc="distil", **quiet)
        stack.enter_context(bar)
        interrupted = stack.enter_context(interruptible())
        groups = config.gradient_accumulation_steps
        while result.steps < config.max_steps:
            start = time.perf_counter()
            weights = config.weights_at(result.steps)
            batches = reservoir.batches(result.steps, denoiser="velocity" in weights)
            for i, batch in enumerate(batches, start=1):
                # Dropout, too, is a function of the update, so that no generator needs saving.
                draw = (result.steps * groups + i) * processes + accelerator.process_index
                torch.manual_seed((config.seed << 32) + draw)
                with accelerator.no_sync(model) if i < groups else nullcontext():
                    loss = objective(encode, batch, weights)
                    state.scaler.scale(loss / groups).backward()
                state.losses[0] += loss.detach().nan_to_num(0, 0, 0)
                state.losses[1] += loss.isfinite()
            state.scaler.unscale_(optim)
            learning_rate = float(scheduler.get_last_lr()[0])
            if state.update(accelerator.clip_grad_norm_(state.parameters, config.max_grad_norm)):
                scheduler.step()
            result.steps += 1
            result.seconds += time.perf_counter() - start
            result.teacher_samples = reservoir.teacher_samples
            result.student_samples = reservoir.student_samples
            finished = result.steps == config.max_steps
            # Then the student is ready, and nothing else may fail the run.
            guarded = _side_job if finished else nullcontext
            if finished or result.steps % config.eval_every == 0:
                total, count = accelerator.reduce(state.losses, "sum").tolist()
                result.loss = total / count if count else float("nan")
                result.peak_memory_gib = report.peak_memory_gib(device)
                result.report = result.gap = None  # if the evaluation fails
                with guarded("The last evaluation"), state.ema_weights():
                    if measure is not None:
                        result.report = measure.report(student)
                        result.gap = result.report.gap
                    if folder is not None and not finished:
                        student.save_pretrained(folder)
                entry = result.add_history(learning_rate)
                state.losses.zero_()
                with _side_job("The trackers' entry"):
                    accelerator.log({k: v for k, v in entry.items() if k != "step"}, result.steps)
                if folder is not None and not finished:
                    report.write_run(folder, facts, result)
                bar.set_postfix(loss=result.loss, velocity_gap=result.gap)
            if teacher_images and (finished or result.steps % config.samples_every == 0):
                with _side_job("The image grid"), state.ema_weights():
                    student_images = sample(pipeline.encoded_by(student, pipe))
                    images = {"teacher": teacher_images, "student": student_images}
                    if folder is not None:
                        grid = report.image_grid(sampled, images)
                        grid.save(folder / f"samples-{result.steps:08d}.png")
            # The signal that any process got, or 0.
            signals = torch.tensor([*interrupted, 0], device=device).max()
            stop = int(accelerator.gather(signals).max())
            if saving := finished or stop or result.steps % config.checkpoint_every == 0:
                state.losses = accelerator.reduce(state.losses, "mean")  # every process loads them
            if folder and saving:
                with guarded("The last checkpoint"):
                    state.save(checkpoints, config.keep_checkpoints, facts["identity"])
            if stop:
                how = f"; train again with output_dir={str(folder)!r} and resume=True to go on"
                message = f"Stopped after update {result.steps}{how if folder else ''}."
                raise KeyboardInterrupt(message) if stop == SIGINT else SystemExit(message)
            bar.update()
        if state.ema:
            state.ema.copy_to(state.parameters)
        stack.close()  # the student is in its own dtype again
        if main:
            _finish(result, facts, push_to_hub)
    return result


def _check_trainable(pipe: Any, student: Any, config: DistillConfig) -> None:
    """Refuse a student that can't learn, or can't from this pipeline."""
    if not isinstance(student, SlimT5Encoder):
        raise DistillError(
            f"student is a {type(student).__name__}; expected one SlimT5Encoder, compiled in place,"
            " or a SlimT5Config for a new one."
        )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise DistillError("The student has no weights to train: all are frozen.")
    check_student(pipe, student)
    pipeline.check_no_cache(pipe)
    for name, module in {"student": student, **pipe.components}.items():
        parts = [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []
        if any(part.is_inference() for part in parts):
            raise DistillError(f"The {name} was made under torch.inference_mode: load it outside.")
    half = any(part.dtype == torch.float16 for part in pipeline.denoisers(pipe).values())
    if half and "velocity" in config.objective and config.mixed_precision != "fp16":
        # The gradients of a mean over 100,000 elements are below float16's smallest number, 6e-8.
        raise DistillError('Gradients vanish in a float16 denoiser: set mixed_precision="fp16".')


def check_launch(config: DistillConfig) -> None:
    """Refuse a launch that would train otherwise than the config says.

    Before the first Accelerator of a process, which keeps what it finds in the environment.
    """
    kinds = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
    allowed = {f"ACCELERATE_USE_{kind}": "false" for kind in kinds}
    allowed["ACCELERATE_DYNAMO_BACKEND"] = "no"
    allowed["ACCELERATE_MIXED_PRECISION"] = config.mixed_precision
    for variable, value in allowed.items():
        if (launched := os.environ.get(variable, "no").lower()) not in ("", "no", "false", value):
            raise DistillError(
                f"{variable}, or accelerate launch, says {launched!r}; expected {value!r}: the "
                "precision is the config's, and a student is neither compiled so nor sharded."
            )


@contextmanager
def _side_job(what: str) -> Iterator[None]:
    """Turn a failure into a warning: none of these jobs may cost a trained student."""
    try:
        yield
    except Exception as error:
        logger.warning("%s failed: %s: %s", what, type(error).__name__, error)


def _finish(result: report.DistillResult, facts: Mapping[str, Any], repo_id: str | None) -> None:
    """Save the student, then what shows it: a failure there doesn't lose the student."""
    folder, student, images = result.output_dir, result.student, []
    if result.gap is not None and not result.gap <= 0.9:  # 1 is that of an empty prompt
        logger.warning(
            f"The student says hardly more than an empty prompt (gap {result.gap:.2}): try from_t5."
        )
    if folder is not None:
        student.save_pretrained(folder)
        with _side_job("The run's history"):
            report.write_run(folder, facts, result)
        with _side_job("The plot of the run, for which pip install 't5slim[train]',"):
            report.plot_run(result.history, folder / "run.png")
        images = [*folder.glob("run.png"), *sorted(folder.glob("samples-*.png"))[-1:]]
    shown = report.card_facts(facts, result, [image.name for image in images])
    if folder is not None and not (folder / "README.md").exists():  # somebody's own words stay
        with _side_job("The model card"):
            card = model_card(student, folder.resolve().name, **shown)
            write_atomic(folder / "README.md", str(card).encode())
    if repo_id:
        student.push_to_hub(repo_id, files=images, **shown)
