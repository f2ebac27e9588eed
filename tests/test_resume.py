"""Runs that are killed, interrupted or damaged, and go on to the same bits."""

import functools
import hashlib
import json
import os
import random
import shutil
import signal
import time
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from helpers.training import (
    RESUMED,
    assert_same,
    calls_of,
    history_of,
    resumable,
    run,
    spawn,
    weights,
)
from safetensors import safe_open
from safetensors.torch import load_file, save
from tiny import PROMPTS, call_kwargs, tiny_flux, tiny_student
from zoo.case import image

from t5slim import SlimT5Encoder
from t5slim.distill.checkpoint import load_checkpoint
from t5slim.errors import ConfigError, DistillError

STEPS = RESUMED["max_steps"]
ERRORS: dict[int, Any] = {signal.SIGTERM: SystemExit, signal.SIGINT: KeyboardInterrupt}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    resumable(folder, checkpoint_every=2, keep_checkpoints=99)
    return folder


def checkpoints(folder: Path) -> dict[int, Path]:
    """The files of the checkpoints by their update, the oldest first."""
    files = sorted((folder / "checkpoints").iterdir())
    return {int(file.name.split("-")[0]): file for file in files}


def assert_same_run(one: Path, other: Path) -> None:
    assert_same(*(load_file(folder / "model.safetensors") for folder in (one, other)))
    assert_same(*(load_file(checkpoints(folder)[STEPS]) for folder in (one, other)))
    assert history_of(one) == history_of(other)


MOMENTUM = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
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
    "event, nth", [("os.mkdir", 1), ("open", 3), ("os.rename", 2), ("os.remove", 5)]
)
def test_killed_as_a_checkpoint_changes(event: str, nth: int, whole: Path, tmp_path: Path) -> None:
    process = spawn(resumable, tmp_path, dies_at=(event, nth))
    process.join()
    assert process.exitcode == -signal.SIGKILL and not any(tmp_path.glob(f"checkpoints/*{STEPS}-*"))
    (tmp_path / ".t5slim-saved").mkdir()  # as of a run that is killed while it saves its student
    (tmp_path / ".t5slim-saved" / "model.safetensors").touch()
    resumable(tmp_path)
    assert_same_run(tmp_path, whole)
    assert [*checkpoints(tmp_path)] == [28, 30]  # the newest two
    assert not [*tmp_path.rglob(".t5slim-*")]


def test_a_second_run_in_the_folder_of_one_is_refused(whole: Path, tmp_path: Path) -> None:
    pipe, other, calls = tiny_flux(), tiny_flux(), count()
    other.transformer.register_forward_hook(lambda *_: pytest.fail("generated"))

    def start_another(*_: Any) -> None:
        if next(calls) in (1, 60):
            with pytest.raises(DistillError, match=r"output_dir .*: another run is writing into"):
                resumable(tmp_path, other)

    pipe.transformer.register_forward_hook(start_another)
    resumable(tmp_path, pipe)
    assert next(calls) > 60
    assert_same_run(tmp_path, whole)


def signal_in_training(pipe: Any, number: int, *when: int) -> Any:
    """Raise a signal in some denoiser calls of the updates, not of what comes before them."""
    calls, before, began = count(), signal.getsignal(number), []

    def interrupt(*_: Any) -> None:
        if began or signal.getsignal(number) is not before:
            began.append(next(calls))
            if began[-1] in when:
                signal.raise_signal(number)

    return pipe.transformer.register_forward_hook(interrupt)


@pytest.mark.parametrize("number", ERRORS)
def test_a_signal_leaves_a_checkpoint(number: int, whole: Path, tmp_path: Path) -> None:
    pipe, before = tiny_flux(), signal.getsignal(number)
    hook = signal_in_training(pipe, number, 5)
    with pytest.raises(ERRORS[number], match=r"after update \d+; .* resume=True to go on"):
        resumable(tmp_path, pipe, checkpoint_every=10**6)
    assert signal.getsignal(number) is before
    (checkpoint,) = checkpoints(tmp_path)
    assert 1 <= checkpoint < STEPS
    hook.remove()
    resumable(tmp_path, pipe)
    assert_same_run(tmp_path, whole)


def test_a_second_signal_does_what_it_always_does(pipe: Any, tmp_path: Path) -> None:
    signal_in_training(pipe, signal.SIGINT, 0, 1)
    with pytest.raises(KeyboardInterrupt):
        resumable(tmp_path, pipe, checkpoint_every=10**6)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"reservoir_size": 0, "lr_schedule": "linear"},
        {"objective": {"embedding": 1, "fisher": 1}, "ema_decay": 0.0},
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
    for checkpoint in [*checkpoints(folders[1]).values()][1:]:
        checkpoint.unlink()
    again = resumable(folders[1], **changes)
    assert_same(weights(again.student), weights(first.student))
    assert history_of(folders[0]) == history_of(folders[1])
    assert len(again.history) == (3 if "samples_every" in changes else 5)
    images = [{p.name: p.read_bytes() for p in f.glob("samples-*")} for f in folders]
    assert images[0] == images[1] and len(images[0]) == (2 if "samples_every" in changes else 0)


def test_no_flipped_bit_is_believed(whole: Path, tmp_path: Path) -> None:
    older, newest = [*checkpoints(whole).values()][-2:]
    identity = json.loads((whole / "distillation.json").read_text())["identity"]
    shutil.copy(older, tmp_path)
    content = newest.read_bytes()
    places = random.Random(0).sample(range(len(content)), 300)
    for place in (0, 7, 8, *places):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        (tmp_path / newest.name).write_bytes(changed)
        assert load_checkpoint(tmp_path, identity)["result"]["steps"] == STEPS - 2
    (tmp_path / newest.name).write_bytes(content)
    assert load_checkpoint(tmp_path, identity)["result"]["steps"] == STEPS


def write_checkpoint(folder: Path, step: int, metadata: Any, tensors: Any) -> None:
    """As a run does: by its SHA-256, it is whole."""
    content = save(tensors, metadata)
    name = f"{step:08d}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    (folder / "checkpoints" / name).write_bytes(content)


def test_spoiled_checkpoints(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Damaged ones and foreign ones are named, and the one before them is used."""
    folder = shutil.copytree(whole, tmp_path / "run")
    files = folder / "checkpoints"
    first, *_, intact, cut, changed, empty = checkpoints(folder).values()
    cut.write_bytes(cut.read_bytes()[:-1])
    changed.write_bytes(changed.read_bytes().replace(b'\\"skipped\\": 0', b'\\"skipped\\": 1'))
    empty.write_bytes(b"")
    resumable(folder / "other", max_steps=29, learning_rate=1e-3)
    spoiled = [cut, changed, empty, Path(shutil.move(checkpoints(folder / "other")[29], files))]
    write_checkpoint(folder, 32, {}, {"student": torch.ones(1)})
    write_checkpoint(folder, 31, {"state": "[" * 10**5}, {"a": torch.ones(1)})
    spoiled += [checkpoints(folder)[step] for step in (31, 32)]
    spoiled.append(first.rename(files / first.name.replace("02-", "99-")))
    (files / first.name.replace("02-", "98-")).mkdir()
    os.mkfifo(files / "99999999-pipe.safetensors")
    (files / "00000097").symlink_to("00000097")
    (files / "5 \n").touch()
    (folder / "history.jsonl").write_text("neither is this")
    resumable(folder, keep_checkpoints=99)
    assert not [file for file in spoiled if f"{file} is damaged and not used" not in caplog.text]
    assert str(intact) not in caplog.text
    assert_same_run(folder, whole)
    assert not empty.exists()  # but the one that was written instead
    again, before = ((run / "history.jsonl").read_text().splitlines() for run in (folder, whole))
    assert again[:4] == before[:4]  # to the second: what is in `intact` isn't learned anew


@pytest.mark.parametrize(
    "part, value",
    [
        ("optimizer", MOMENTUM),
        ("student.final_projection.0.weight", torch.ones(1)),
        ("ema.0", torch.ones(1)),
        ("scaler", {"scale": 2.0}),
        ("optimizer.AdamW", {"first": {}}),
        ("result.seconds", "long"),
        ("reservoir._due", "1.0"),
    ],
)
def test_a_checkpoint_that_doesnt_fit(part: str, value: Any, whole: Path, tmp_path: Path) -> None:
    """Of another optimizer, or edited and signed anew: before anything is sampled."""
    folder = shutil.copytree(whole, tmp_path / "run")
    checkpoints(folder)[STEPS].unlink()
    file = checkpoints(folder)[STEPS - 2]
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors, state = load_file(file), json.loads(metadata["state"])
    changes = {part: value} if value is MOMENTUM else {}
    *parents, name = part.split(".")
    if part in tensors:
        tensors[part] = value
    elif not changes:
        functools.reduce(dict.__getitem__, parents, state)[name] = value
    file.unlink()
    write_checkpoint(folder, STEPS - 2, metadata | {"state": json.dumps(state)}, tensors)
    pipe = tiny_flux()
    student, calls = tiny_student(pipe), calls_of(pipe.transformer)
    before = weights(student)
    with pytest.raises(DistillError, match="The newest checkpoint doesn't fit"):
        resumable(folder, pipe, student=student, **changes)
    assert not calls
    assert_same(student.state_dict(), before)


@pytest.mark.parametrize("content", ["", "{}", '{"identity": 3}', "[" * 10**5])
def test_damaged_metadata_is_named(content: str, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "distillation.json").write_text(content)
    with pytest.raises(ConfigError, match=r"distillation\.json"):
        resumable(folder)


def test_checkpoints_hold_only_what_is_trained(whole: Path) -> None:
    file = checkpoints(whole)[STEPS]
    assert {n.split(".")[0] for n in load_file(file)} == {"student", "ema", "optimizer", "losses"}
    size = SlimT5Encoder.from_pretrained(whole).num_parameters() * 4
    # Weights, EMA and two moments, with their names: nothing frozen, and no trajectories.
    assert file.stat().st_size < 4 * size + 20_000


def test_a_finished_run_is_given_back_whatever_the_split_of_its_batch(whole: Path) -> None:
    """4 x 1 and 2 x 2 are the same batch: a run may move to a smaller device."""
    before = {path: path.read_bytes() for path in whole.rglob("*.safetensors")}
    pipe = tiny_flux()
    pipe.transformer.register_forward_hook(lambda *_: pytest.fail("sampled again"))
    result = resumable(whole, pipe, batch_size=2, gradient_accumulation_steps=2)
    assert result.steps == STEPS and len(result.history) == 6
    assert {path: path.read_bytes() for path in whole.rglob("*.safetensors")} == before


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"learning_rate": 1e-3}, "config.learning_rate: then 0.005, now 0.001"),
        ({"mixed_precision": "bf16"}, 'config.mixed_precision: then "no", now "bf16"'),
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


def test_an_equal_image_is_known_by_its_content(tmp_path: Path) -> None:
    pipe = FluxImg2ImgPipeline.from_pipe(tiny_flux())

    def start(seed: int) -> Any:
        kwargs = call_kwargs(tiny_flux()) | {"image": image(seed), "strength": 0.8}
        return resumable(tmp_path, pipe, max_steps=2, pipeline_kwargs=kwargs)

    assert start(0).steps == start(0).steps == 2
    with pytest.raises(DistillError, match=r"pipeline_kwargs: then .*image"):
        start(1)
