"""Runs that are killed, interrupted or damaged, and go on to the same bits."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import signal
import time
from contextlib import redirect_stderr
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from helpers.training import RESUMED, assert_same, history_of, resumable, run, spawn, weights
from safetensors.torch import load_file, save_file
from tiny import PROMPTS, call_kwargs, tiny_flux, tiny_student
from zoo.pictures import picture

from t5slim import SlimT5Encoder
from t5slim.errors import DistillError

STEPS = RESUMED["max_steps"]
LAST = f"{STEPS:08d}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    resumable(folder, checkpoint_every=2, keep_checkpoints=99)
    return folder


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_same_run(one: Path, other: Path) -> None:
    for file in ("model.safetensors", f"checkpoints/{LAST}/state.safetensors"):
        assert_same(load_file(one / file), load_file(other / file))
    assert history_of(one) == history_of(other)


MOMENTUM = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)


# --- runs that end early -------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills: int, whole: Path, tmp_path: Path) -> None:
    spawn(int).join()  # which has loaded everything
    began = time.perf_counter()
    spawn(resumable, tmp_path / "timed").join()
    seconds = time.perf_counter() - began
    for kill in range(kills):
        folder = tmp_path / str(kill)
        process = spawn(resumable, folder)
        # Early, late, and between.
        time.sleep(seconds * random.Random(kill).uniform(kill, kill + 1) / kills)
        process.kill()
        process.join()
        resumable(folder)
        assert_same_run(folder, whole)


@pytest.mark.parametrize(
    "event, nth", [("os.mkdir", 3), ("open", 9), ("os.rename", 2), ("os.rmdir", 1)]
)
def test_killed_while_a_checkpoint_is_written_or_removed(
    event: str, nth: int, whole: Path, tmp_path: Path
) -> None:
    process = spawn(resumable, tmp_path, dies_at=(event, nth))
    process.join()
    assert process.exitcode == -signal.SIGKILL and LAST not in checkpoints(tmp_path)
    resumable(tmp_path)
    assert_same_run(tmp_path, whole)
    assert checkpoints(tmp_path) == ["00000028", LAST]  # the newest two


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint(number: signal.Signals, whole: Path, tmp_path: Path) -> None:
    process = spawn(resumable, tmp_path, checkpoint_every=10**6)
    while not (tmp_path / "history.jsonl").exists():
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 1
    (checkpoint,) = checkpoints(tmp_path)
    assert 1 <= int(checkpoint) < STEPS
    resumable(tmp_path)
    assert_same_run(tmp_path, whole)


def test_ctrl_c_says_how_to_go_on_and_the_batch_may_be_split_otherwise(tmp_path: Path) -> None:
    """4 x 1 and 2 x 2 are the same batch: a run may move to a smaller device."""
    pipe, calls = tiny_flux(), count()

    def interrupt(*_: Any) -> None:
        if next(calls) == 9:
            signal.raise_signal(signal.SIGINT)

    hook = pipe.transformer.register_forward_hook(interrupt)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"after update \d+; .* resume=True to go on"):
        resumable(tmp_path, pipe)
    assert signal.getsignal(signal.SIGINT) is before
    hook.remove()
    split = {"batch_size": 2, "gradient_accumulation_steps": 2}
    assert resumable(tmp_path, pipe, **split).steps == STEPS


@pytest.mark.parametrize(
    "changes",
    [
        {"reservoir_size": 0, "lr_schedule": "linear"},
        {"objective": {"embedding": 1, "relational": 1}, "ema_decay": 0.0},
        {"mixed_precision": "fp16", "lr_schedule": "constant"},
        {"batch_size": 2, "gradient_accumulation_steps": 2, "optimizer": MOMENTUM},
        {"eval_every": 4, "checkpoint_every": 3, "eval_prompts": PROMPTS[4:], "samples_every": 5},
    ],
    ids=str,
)
def test_other_settings_resume_exactly(changes: dict[str, Any], tmp_path: Path) -> None:
    changes = {"max_steps": 10, "eval_every": 2, "keep_checkpoints": 9} | changes
    folders = [tmp_path / name for name in ("whole", "resumed")]
    for folder in folders:
        first = resumable(folder, **changes)
    for name in checkpoints(folders[1])[1:]:
        shutil.rmtree(folders[1] / "checkpoints" / name)
    again = resumable(folders[1], **changes)
    assert_same(weights(again.student), weights(first.student))
    assert history_of(folders[0]) == history_of(folders[1])
    assert len(again.history) == (3 if "samples_every" in changes else 5)
    images = [{p.name: p.read_bytes() for p in f.glob("samples/*")} for f in folders]
    assert images[0] == images[1] and len(images[0]) == (2 if "samples_every" in changes else 0)


# --- checkpoints ---------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def poison(file: Path) -> None:
    """A valid file with a NaN in it."""
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, file)


def test_damaged_checkpoints_are_named_and_the_one_before_them_used(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    files = ("state.safetensors", "state.json", "manifest.json")
    damages = [(file, how) for file in files for how in (truncate, flip_a_bit, Path.unlink)]
    damages += [(file, lambda path: path.write_text("[]")) for file in files[1:]]
    damages += [(files[0], poison)]
    names = checkpoints(folder)[-len(damages) :]
    for name, (file, how) in zip(names, damages, strict=True):
        how(folder / "checkpoints" / name / file)
    resumable(folder)
    for name in names:
        assert f"{name} is damaged and not used" in caplog.text
    assert_same_run(folder, whole)


def test_checkpoints_hold_only_what_is_trained(whole: Path) -> None:
    folder = whole / "checkpoints" / LAST
    tensors = load_file(folder / "state.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"student", "ema", "optimizer", "losses"}
    size = SlimT5Encoder.from_pretrained(whole).num_parameters() * 4
    # Weights, EMA and two moments, with their names: nothing frozen, and no trajectories.
    assert (folder / "state.safetensors").stat().st_size < 4 * size + 20_000


def test_a_finished_run_is_given_back(whole: Path) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*.safetensors")}
    pipe = tiny_flux()
    pipe.transformer.register_forward_hook(lambda *_: pytest.fail("sampled again"))
    result = resumable(whole, pipe)
    assert result.steps == STEPS and len(result.history) == 6
    assert {path: path.read_bytes() for path in whole.rglob("*.safetensors")} == before


def test_a_full_disk_keeps_the_last_checkpoint(whole: Path, tmp_path: Path) -> None:
    """Files can't grow beyond a limit; that refuses a write as a full disk does."""
    pipe = tiny_flux()
    size = (whole / "model.safetensors").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(*_: Any) -> None:
        if (tmp_path / "checkpoints" / "00000008").exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size, hard))

    hook = pipe.transformer.register_forward_hook(fill)
    try:
        # Into memory: the file in which pytest keeps the progress bars may not grow either.
        with (
            redirect_stderr(io.StringIO()),
            pytest.raises(DistillError, match=r"(?s)of update 12 .*large.*Earlier ones are intact"),
        ):
            resumable(tmp_path, pipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    hook.remove()
    assert checkpoints(tmp_path) == ["00000004", "00000008"]
    resumable(tmp_path)
    assert_same_run(tmp_path, whole)


# --- the identity of a run -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"learning_rate": 1e-3}, "config.learning_rate: then 0.005, now 0.001"),
        ({"max_steps": 70}, f"config.max_steps: then {STEPS}, now 70"),
        ({"batch_size": 2}, "prompts_per_step: then 4, now 2"),
        ({"pipeline_kwargs": {"height": 32}}, "pipeline_kwargs: then .*now"),
        ({"eval_prompts": PROMPTS}, "eval_prompts: then null"),
        ({"prompts": PROMPTS[:3]}, "prompts: then"),
        ({"student": {"d_ff": 64}}, "student.d_ff: then 32, now 64"),
        ({"output_dir": None}, "needs the output_dir"),
    ],
)
def test_another_run_isnt_resumed(changes: dict[str, Any], named: str, whole: Path) -> None:
    pipe = tiny_flux()
    arguments: dict[str, Any] = RESUMED | {"prompts": PROMPTS, "output_dir": whole, "resume": True}
    student = tiny_student(pipe, **changes.pop("student", {}))
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(DistillError, match=named):
        run(pipe, student, **arguments | changes)
    assert {path: path.read_bytes() for path in before} == before


def test_damaged_metadata_is_named(tmp_path: Path) -> None:
    (tmp_path / "distillation.json").write_text(json.dumps({"config": {}}))
    with pytest.raises(DistillError, match=r"distillation\.json is damaged"):
        resumable(tmp_path)


def start_from_image(folder: Path, seed: int = 0) -> Any:
    components = {k: v for k, v in tiny_flux().components.items() if v is not None}
    pipe = FluxImg2ImgPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    kwargs = call_kwargs(tiny_flux()) | {"image": picture(seed), "strength": 0.8}
    return resumable(folder, pipe, max_steps=2, eval_every=2, pipeline_kwargs=kwargs)


def test_an_equal_image_resumes_in_another_process(tmp_path: Path) -> None:
    process = spawn(start_from_image, tmp_path)
    process.join()
    assert process.exitcode == 0
    assert start_from_image(tmp_path).steps == 2
    with pytest.raises(DistillError, match=r"pipeline_kwargs: then .*image.*RGB"):
        start_from_image(tmp_path, seed=1)
