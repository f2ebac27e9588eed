"""Runs that are killed, interrupted or damaged, and go on."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import PROMPTS, call_kwargs, tiny_flux, tiny_student

from t5slim import SlimT5Encoder
from t5slim.distill import DistillConfig, checkpoints, train
from t5slim.distill.tracking import CLOCK_SCALARS
from t5slim.errors import DistillError

CONFIG: dict[str, Any] = {
    "max_steps": 60, "batch_size": 4, "reservoir_walks": 8, "warmup_steps": 2, "ema_decay": 0.9,
    "learning_rate": 5e-3, "eval_every": 10, "checkpoint_every": 4, "empty_prompt_share": 0.2,
    "objective": {"embedding": {"until": 12}, "velocity": {"start": 4}},
}  # fmt: skip


def start(folder: Path, dies_at_sync: int | None = None, **changes: Any) -> Any:
    """The run, in this process: the same each time, whatever was drawn before."""
    torch.set_num_threads(1)
    pipe = tiny_flux()
    torch.manual_seed(1)
    student = tiny_student(pipe)
    if dies_at_sync is not None:
        count, sync = iter(range(10**6)), checkpoints._sync

        def sync_and_die(path: Path) -> None:
            sync(path)
            if next(count) == dies_at_sync:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoints._sync = sync_and_die
    return train(
        pipe, student, PROMPTS, DistillConfig(**{**CONFIG, **changes}),
        pipeline_kwargs=call_kwargs(pipe), output_dir=folder, resume=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def spawn() -> Any:
    """Processes that have imported everything already: a start takes a tenth of a second."""
    context = multiprocessing.get_context("forkserver")
    modules = ["t5slim.distill.trainer", "torch.utils.tensorboard", "matplotlib.figure"]
    context.set_forkserver_preload(["test_resume", *modules])

    def begin(*args: Any, **kwargs: Any) -> Any:
        process = context.Process(target=start, args=args, kwargs=kwargs)
        process.start()
        return process

    return begin


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a run that nobody stopped, and how long it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    began = time.perf_counter()
    start(folder)
    return folder, time.perf_counter() - began


def assert_same_run(one: Path, other: Path) -> None:
    for file in ("model.safetensors", "checkpoints/00000060/state.safetensors"):
        tensors, others = load_file(one / file), load_file(other / file)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    histories = [
        [
            {k: v for k, v in json.loads(line).items() if k not in CLOCK_SCALARS}
            for line in (folder / "history.jsonl").read_text().splitlines()
        ]
        for folder in (one, other)
    ]
    assert histories[0] == histories[1] and len(histories[0]) == 6


def test_killed_at_20_random_moments(
    spawn: Any, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    whole, seconds = uninterrupted
    moments = random.Random(0)
    reached: set[str] = set()
    for number in range(20):
        folder = tmp_path / str(number)
        process = spawn(folder)
        time.sleep(moments.uniform(0.1, 0.2 + seconds))
        process.kill()
        process.join()
        reached |= {path.name for path in folder.glob("checkpoints/*")}
        process = spawn(folder)
        process.join()
        assert process.exitcode == 0
        assert_same_run(folder, whole)
    assert len(reached) > 6  # kills came early, late, and between


@pytest.mark.parametrize("sync", [0, 2, 3, 9, 14])
def test_killed_while_a_checkpoint_is_written(
    spawn: Any, uninterrupted: tuple[Path, float], tmp_path: Path, sync: int
) -> None:
    process = spawn(tmp_path, dies_at_sync=sync)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "checkpoints" / "00000060").exists()
    start(tmp_path)
    assert_same_run(tmp_path, uninterrupted[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint(
    spawn: Any, uninterrupted: tuple[Path, float], tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    process = spawn(folder, checkpoint_every=10**6)
    while not (folder / "history.jsonl").exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode != 0
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert 10 <= int(checkpoint.name) < 60
    start(folder)
    assert_same_run(folder, uninterrupted[0])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no tensors", "no counters", "json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    uninterrupted: tuple[Path, float],
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "run"
    start(folder, eval_every=10, checkpoint_every=25, keep_checkpoints=9)
    model = load_file(folder / "model.safetensors")
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == [
        "00000025", "00000050", "00000060",
    ]  # fmt: skip
    for name in ("00000050", "00000060"):
        file = folder / "checkpoints" / name / "state.safetensors"
        if damage == "truncated":
            os.truncate(file, file.stat().st_size // 2)
        elif damage == "flipped":
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        elif damage == "no tensors":
            file.unlink()
        elif damage == "no counters":
            file.with_name("state.json").unlink()
        else:
            file.with_name("state.json").write_text("[]")
    result = start(folder)
    assert result.steps == 60
    for name in ("00000050", "00000060"):
        assert f"{name} is damaged and not used" in caplog.text
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(after[name], model[name]) for name in model)


def test_a_finished_run_is_given_back(
    uninterrupted: tuple[Path, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = uninterrupted
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    monkeypatch.setattr("t5slim.distill.examples.capture", None)  # nothing is walked again
    result = start(folder)
    assert result.steps == 60 and len(result.history) == 6
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == before


def test_only_the_newest_checkpoints_are_kept(uninterrupted: tuple[Path, float]) -> None:
    folder = uninterrupted[0] / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["00000056", "00000060"]


def test_a_checkpoint_holds_no_frozen_weight_and_no_reservoir(
    uninterrupted: tuple[Path, float],
) -> None:
    folder, _ = uninterrupted
    student = SlimT5Encoder.from_pretrained(folder)
    file = folder / "checkpoints" / "00000060" / "state.safetensors"
    assert file.stat().st_size <= 4.1 * 4 * student.num_parameters() + 20_000  # names of tensors
    names = {name.split(".", 2)[1] for name in load_file(file)}
    assert names == {"student", "average", "optimizer"}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"learning_rate": 1e-3}, "config.learning_rate: then 0.005, now 0.001"),
        ({"max_steps": 70}, "config.max_steps: then 60, now 70"),
        ({"batch_size": 2}, "prompts_per_update: then 4, now 2"),
    ],
)
def test_another_run_cant_be_continued(
    uninterrupted: tuple[Path, float], changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(DistillError, match=named):
        start(uninterrupted[0], **changes)


def test_other_prompts_or_another_student_cant_continue(uninterrupted: tuple[Path, float]) -> None:
    folder, _ = uninterrupted
    pipe = tiny_flux()
    arguments: dict[str, Any] = {"pipeline_kwargs": call_kwargs(pipe), "output_dir": folder}
    config = DistillConfig(**CONFIG)
    with pytest.raises(DistillError, match="prompts: then"):
        train(pipe, tiny_student(pipe), PROMPTS[:3], config, resume=True, **arguments)
    wider = tiny_student(pipe, d_ff=64)
    with pytest.raises(DistillError, match="student 0: d_ff: then"):
        train(pipe, wider, PROMPTS, config, resume=True, **arguments)
    with pytest.raises(DistillError, match="resume=True to go on"):
        train(pipe, tiny_student(pipe), PROMPTS, config, **arguments)
    with pytest.raises(DistillError, match="needs the output_dir"):
        train(pipe, tiny_student(pipe), PROMPTS, config, resume=True)


def test_the_same_update_in_other_pieces_goes_on(
    uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    """4 x 1 and 2 x 2 are the same batch: a run may move to a smaller device."""
    folder = tmp_path / "run"
    first = DistillConfig(**CONFIG | {"checkpoint_every": 30})
    pipe = tiny_flux()
    torch.manual_seed(1)
    student = tiny_student(pipe)
    calls = iter(range(10**6))

    def stop(*_: Any) -> None:
        if next(calls) == 60:
            signal.raise_signal(signal.SIGINT)

    handle = pipe.transformer.register_forward_hook(stop)
    arguments: Any = {"pipeline_kwargs": call_kwargs(pipe), "output_dir": folder, "resume": True}
    with pytest.raises(KeyboardInterrupt, match="resume=True"):
        train(pipe, student, PROMPTS, first, **arguments)
    handle.remove()
    pieces = DistillConfig(**CONFIG | {"batch_size": 2, "gradient_accumulation_steps": 2})
    result = train(pipe, student, PROMPTS, pieces, **arguments)
    assert result.steps == 60


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cant_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises((DistillError, PermissionError)):
        start(tmp_path / "run")


def test_a_full_disk_keeps_the_last_checkpoint(
    uninterrupted: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's own error, from a file that takes nothing."""
    save = checkpoints.save_file
    calls = iter(range(10**6))

    def save_to_full_disk(tensors: Any, path: Path) -> None:
        if next(calls) == 2:
            with open("/dev/full", "wb", buffering=0) as file:
                file.write(b"0")
        save(tensors, path)

    folder = tmp_path / "run"
    monkeypatch.setattr(checkpoints, "save_file", save_to_full_disk)
    with pytest.raises(DistillError, match=r"(?s)of update 12.*No space.*update 8 is whole"):
        start(folder)
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["00000004", "00000008"]
    start(folder)
    assert_same_run(folder, uninterrupted[0])
