"""The teacher's rows in a folder, and everything that works from them after T5 has left memory."""

from __future__ import annotations

import io
import logging
import resource
import signal
import subprocess
import sys
import time
import weakref
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_patch import OFFLOADS
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, tiny_student
from transformers import T5Config, T5EncoderModel

import t5slim.distill.cache
from t5slim import patch_pipeline
from t5slim.distill import (
    TeacherCache,
    VelocityGap,
    cache_teacher,
    cached_teacher,
    capture,
    free_teacher,
    velocity_gap,
)
from t5slim.distill.cached import CachedTeacher, describe_teacher
from t5slim.distill.checks import check_student
from t5slim.distill.pipeline import teacher_of
from t5slim.distill.teacher import PromptTable, encode_alike, prompt_keys
from t5slim.errors import DistillError
from t5slim.slot import find_text_slot

pytestmark = pytest.mark.usefixtures("cpu_as_accelerator")

NEGATIVE = {"sd3": "a blue sign", "pixart_sigma": "large"}
TESTS = Path(__file__).parent


def setting(name: str, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    pipe = TINY_PIPELINES[name](seed)
    kwargs = call_kwargs(pipe)
    return pipe, kwargs | ({"negative_prompt": NEGATIVE[name]} if name in NEGATIVE else {})


def asked_of(module: torch.nn.Module) -> list[int]:
    """A list that gets the batch size of each call of `module` from now on."""
    sizes: list[int] = []
    module.register_forward_hook(
        lambda _, args, kwargs, __: sizes.append(len((*args, *kwargs.values())[0])),
        with_kwargs=True,
    )
    return sizes


def walk_of(pipe: Any, kwargs: dict[str, Any], prompts: list[str]) -> list[torch.Tensor]:
    walk = capture(pipe, prompts, pipeline_kwargs=kwargs, encode=PromptTable().teacher_rows)
    return [call.target for call in walk.denoiser_calls]


def assert_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart_sigma"])
def test_rows_depend_on_the_prompt_alone(name: str, tmp_path: Path) -> None:
    pipe, kwargs = setting(name)
    call = capture(pipe, PROMPTS, pipeline_kwargs=kwargs).slot_calls[0]
    ids, mask = call.input_ids, call.attention_mask
    assert (mask is not None) == (name == "pixart_sigma")
    table = PromptTable()
    rows = table.teacher_rows(teacher_of(pipe), ids, mask)
    torch.testing.assert_close(rows, call.rows)  # the teacher's, though of another batch
    assert torch.equal(table.teacher_rows(teacher_of(pipe), ids, mask), rows)  # from memory
    other = PromptTable()
    for i in (4, 0, 3):  # in another order and company
        at = [i, i - 1]
        some = other.teacher_rows(teacher_of(pipe), ids[at], None if mask is None else mask[at])
        assert torch.equal(some, rows[at])
    cache = cache_teacher(pipe, PROMPTS, tmp_path / "rows", pipeline_kwargs=kwargs)
    with cached_teacher(pipe, TeacherCache(tmp_path / "rows")):
        assert isinstance(teacher_of(pipe), CachedTeacher)
        assert torch.equal(PromptTable().teacher_rows(teacher_of(pipe), ids, mask), rows)
    assert len(cache) == len(PROMPTS) + 1 + (name in NEGATIVE)  # and the empty prompt
    assert cache.bytes_on_disk / len(cache) >= rows[0].nbytes


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart_sigma", "stable_audio"])
def test_everything_works_without_t5(name: str, tmp_path: Path) -> None:
    pipe, kwargs = setting(name)
    slot = find_text_slot(pipe)
    student = tiny_student(pipe)
    walk = walk_of(pipe, kwargs, PROMPTS[:3])
    gap = velocity_gap(pipe, student, PROMPTS, pipeline_kwargs=kwargs, batch_size=4)
    cache_teacher(pipe, PROMPTS, tmp_path, pipeline_kwargs=kwargs)

    teacher = weakref.ref(getattr(pipe, slot.name))
    weights = [weakref.ref(parameter) for parameter in teacher().parameters()]
    free_teacher(pipe)
    assert teacher() is None and all(weight() is None for weight in weights)
    with pytest.raises(DistillError, match="cached_teacher"):
        capture(pipe, PROMPTS[:3], pipeline_kwargs=kwargs)

    with cached_teacher(pipe, tmp_path):
        check_student(pipe, student)
        assert_equal(walk_of(pipe, kwargs, PROMPTS[:3]), walk)
        measure = VelocityGap(pipe, PROMPTS, pipeline_kwargs=kwargs, batch_size=4)
        assert measure(student) == gap
        # The pipeline itself works, too, and no part of it holds a T5.
        pipe(PROMPTS[0], output_type="latent", **kwargs)
        assert teacher_of(pipe).num_parameters() == 1
    assert getattr(pipe, slot.name) is None and find_text_slot(pipe) == slot
    patch_pipeline(pipe, student)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_under_offload(offload: str, tmp_path: Path) -> None:
    pipe, kwargs = setting("flux")
    expected = walk_of(pipe, kwargs, PROMPTS[:2])
    facts = describe_teacher(pipe)
    teacher = weakref.ref(pipe.text_encoder_2)
    OFFLOADS[offload](pipe)
    assert describe_teacher(pipe) == facts
    cache_teacher(pipe, PROMPTS, tmp_path, pipeline_kwargs=kwargs)
    with cached_teacher(pipe, tmp_path):  # with T5 waiting for its return
        assert_equal(walk_of(pipe, kwargs, PROMPTS[:2]), expected)
    assert pipe.text_encoder_2 is teacher()
    assert_equal(walk_of(pipe, kwargs, PROMPTS[:2]), expected)
    free_teacher(pipe)
    assert teacher() is None
    with cached_teacher(pipe, tmp_path):
        assert_equal(walk_of(pipe, kwargs, PROMPTS[:2]), expected)
    assert pipe.text_encoder_2 is None


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart_sigma", "chroma", "ltx"])
def test_a_pipeline_with_only_its_text_encoders_fills_the_cache(name: str, tmp_path: Path) -> None:
    pipe, kwargs = setting(name)
    whole = cache_teacher(pipe, PROMPTS, tmp_path / "whole", pipeline_kwargs=kwargs)
    parts = {k: None if k in ("transformer", "vae") else v for k, v in pipe.components.items()}
    encoders = type(pipe)(**parts)
    before = dict(encoders.config)
    cache = cache_teacher(encoders, PROMPTS, tmp_path / "rows", pipeline_kwargs=kwargs)
    assert encoders.transformer is None and dict(encoders.config) == before
    assert cache.teacher == whole.teacher
    assert_same_rows(cache, whole)
    # And the pipeline without T5 is checked against it before a long run.
    free_teacher(pipe)
    cache_teacher(pipe, PROMPTS[:3], tmp_path / "rows", pipeline_kwargs=kwargs)
    with pytest.raises(DistillError, match=r"'green sign', padded to 12.*and 1 more aren't in"):
        cache_teacher(
            pipe, [*PROMPTS, "green sign", "two"], tmp_path / "rows", pipeline_kwargs=kwargs
        )
    assert getattr(pipe, find_text_slot(pipe).name) is None


def assert_same_rows(first: TeacherCache, second: TeacherCache) -> None:
    def rows(cache: TeacherCache) -> dict[str, torch.Tensor]:
        shards = [load_file(path) for path in cache.folder.glob("*.safetensors")]
        return {name.split(".")[0]: t for shard in shards for name, t in shard.items()}

    ours, theirs = rows(first), rows(second)
    assert ours.keys() == theirs.keys() and len(ours) == len(first) > 0
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_is_there_is_not_done_again(tmp_path: Path) -> None:
    pipe, kwargs = setting("flux")
    cache_teacher(pipe, PROMPTS[:3], tmp_path, pipeline_kwargs=kwargs)
    encoded, tokenized = asked_of(pipe.text_encoder_2.encoder), asked_of(pipe.text_encoder)
    pipe.text_encoder_2.train()  # dropout has no place in the teacher's rows
    cache_teacher(pipe, PROMPTS, tmp_path, pipeline_kwargs=kwargs, batch_size=4)
    assert encoded == [8] and tokenized == [4, 3]  # the new ones, in a batch that is filled up
    assert pipe.text_encoder_2.training
    pipe.text_encoder_2.eval()
    for prompts in (PROMPTS, PROMPTS[:3]):
        cache_teacher(pipe, prompts, tmp_path, pipeline_kwargs=kwargs)
    assert encoded == [8] and tokenized == [4, 3]
    table = PromptTable()
    with cached_teacher(pipe, tmp_path):
        cached = capture(pipe, PROMPTS, pipeline_kwargs=kwargs, encode=table.teacher_rows)
    alone = capture(pipe, PROMPTS, pipeline_kwargs=kwargs, encode=PromptTable().teacher_rows)
    assert torch.equal(cached.slot_calls[0].rows, alone.slot_calls[0].rows)


def test_a_prompt_that_is_not_cached_is_shown(tmp_path: Path) -> None:
    pipe, kwargs = setting("flux")
    cache_teacher(pipe, PROMPTS, tmp_path, pipeline_kwargs=kwargs)
    with cached_teacher(pipe, tmp_path):
        with pytest.raises(DistillError, match="'a blue square', padded to 12 tokens, aren't in"):
            walk_of(pipe, kwargs, [PROMPTS[0], "a blue square"])
        with pytest.raises(DistillError, match=r"padded to 8 tokens.*max_sequence_length"):
            walk_of(pipe, kwargs | {"max_sequence_length": 8}, PROMPTS[:1])
        walk_of(pipe, kwargs, ["", PROMPTS[0]])


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    pipe, kwargs = setting("sd3")
    cache = cache_teacher(pipe, PROMPTS[:1], tmp_path, pipeline_kwargs=kwargs)
    files = sorted(tmp_path.iterdir())
    other, _ = setting("sd3", seed=1)
    for attempt in (
        lambda: cache_teacher(other, PROMPTS, tmp_path, pipeline_kwargs=kwargs),
        lambda: cached_teacher(other, cache).__enter__(),
    ):
        with pytest.raises(DistillError, match=r"another teacher .*\. weights: .* in the pipeline"):
            attempt()
    pipe.text_encoder_3.bfloat16()
    with pytest.raises(DistillError, match=r"weights: .*dtype: float32 in the cache, bfloat16 in"):
        cache_teacher(pipe, PROMPTS, tmp_path, pipeline_kwargs=kwargs)
    free_teacher(other)
    # Without T5, its weights can't be compared; all else is.
    with cached_teacher(other, cache):
        walk_of(other, kwargs, PROMPTS[:1])
    other.tokenizer_3.add_tokens(["zebra"])
    with pytest.raises(DistillError, match="tokenizer: "):
        cached_teacher(other, cache).__enter__()
    other.transformer.register_to_config(joint_attention_dim=64)
    with pytest.raises(DistillError, match="width: 32 in the cache, 64 in the pipeline; tokenizer"):
        cached_teacher(other, cache).__enter__()
    assert other.text_encoder_3 is None and sorted(tmp_path.iterdir()) == files


def test_bad_folders(tmp_path: Path) -> None:
    pipe, kwargs = setting("flux")
    with pytest.raises(DistillError, match=r"no cache .* no teacher\.json"):
        TeacherCache(tmp_path / "nowhere")
    (tmp_path / "photo.png").touch()
    with pytest.raises(DistillError, match="holds other files"):
        cache_teacher(pipe, PROMPTS, tmp_path, pipeline_kwargs=kwargs)
    with pytest.raises(DistillError, match=r"Can't write teacher\.json"):
        cache_teacher(pipe, PROMPTS, tmp_path / "photo.png", pipeline_kwargs=kwargs)
    with pytest.raises(DistillError, match="doesn't take"):
        cache_teacher(pipe, PROMPTS, tmp_path / "new", pipeline_kwargs={"heihgt": 16})
    free_teacher(pipe)
    with pytest.raises(DistillError, match="no cache"):
        cache_teacher(pipe, PROMPTS, tmp_path / "new", pipeline_kwargs=kwargs)
    with pytest.raises(DistillError, match="no teacher to learn from"):
        free_teacher(pipe)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "a flipped bit", "no header"])
def test_a_damaged_shard_is_set_aside(damage: str, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "t5slim")
    pipe, kwargs = setting("flux")
    prompts = ["", *PROMPTS]
    expected = walk_of(pipe, kwargs, prompts)
    cache_teacher(pipe, PROMPTS[:2], tmp_path, pipeline_kwargs=kwargs)
    (shard,) = tmp_path.glob("*.safetensors")
    cache_teacher(pipe, PROMPTS, tmp_path, pipeline_kwargs=kwargs)
    content = bytearray(shard.read_bytes())
    if damage == "a flipped bit":
        content[-100] ^= 4  # of rows: found when they are read
    elif damage == "no header":
        content[:8] = bytes(8)
    else:
        del content[{"truncated": 1000, "empty": 0}[damage] :]
    shard.write_bytes(content)

    cache = TeacherCache(tmp_path)
    with cached_teacher(pipe, cache), pytest.raises(DistillError, match="cache_teacher"):
        walk_of(pipe, kwargs, prompts)
    assert f"{shard} is damaged" in caplog.text
    assert not shard.exists() and shard.with_suffix(".damaged").exists()
    encoded = asked_of(pipe.text_encoder_2.encoder)
    cache_teacher(pipe, PROMPTS, tmp_path, pipeline_kwargs=kwargs)
    assert encoded == [8]  # two prompts and the empty one, in a batch that is filled up
    with cached_teacher(pipe, cache):  # which finds the new shard
        assert_equal(walk_of(pipe, kwargs, prompts), expected)


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """Files can't grow beyond a limit here; that refuses a write as a full disk does."""
    pipe, kwargs = setting("flux")
    cache_teacher(pipe, PROMPTS[:2], tmp_path, pipeline_kwargs=kwargs)
    files = sorted(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        # Into memory: the file in which pytest keeps the progress bars may not grow either.
        with (
            redirect_stderr(io.StringIO()),
            pytest.raises(DistillError, match=r"Can't write rows-.*the same call goes on"),
        ):
            cache_teacher(pipe, PROMPTS, tmp_path, pipeline_kwargs=kwargs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.iterdir()) == files
    assert len(cache_teacher(pipe, PROMPTS, tmp_path, pipeline_kwargs=kwargs)) == len(PROMPTS) + 1


MANY = [f"a red star {n}" for n in range(200)]


def start_filling(folder: Path, prompts: list[str]) -> subprocess.Popen[str]:
    """Another process that fills the cache, a shard for each prompt."""
    code = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from test_teacher_cache import setting
import t5slim.distill.cache
from t5slim.distill import cache_teacher
t5slim.distill.cache.SHARD_BYTES = 1
pipe, kwargs = setting("flux")
cache_teacher(pipe, {prompts!r}, {str(folder)!r}, pipeline_kwargs=kwargs)
"""
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def test_two_processes_fill_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    processes = [start_filling(folder, MANY[:120]), start_filling(folder, MANY[80:])]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    pipe, kwargs = setting("flux")
    encoded = asked_of(pipe.text_encoder_2.encoder)
    cache = cache_teacher(pipe, MANY, folder, pipeline_kwargs=kwargs)
    assert len(cache) == len(MANY) + 1 and not encoded
    assert_same_rows(cache, cache_teacher(pipe, MANY, tmp_path / "one", pipeline_kwargs=kwargs))


def test_a_process_that_is_killed_while_it_fills(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    process = start_filling(folder, MANY)
    while len(list(folder.glob("*.safetensors"))) < 20:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    there = len(TeacherCache(folder))
    assert 20 <= there < len(MANY)
    pipe, kwargs = setting("flux")
    encoded = asked_of(pipe.text_encoder_2.encoder)
    cache = cache_teacher(pipe, MANY, folder, pipeline_kwargs=kwargs)
    assert len(encoded) == -(-(len(MANY) + 1 - there) // 8)  # batches of 8
    assert_same_rows(cache, cache_teacher(pipe, MANY, tmp_path / "one", pipeline_kwargs=kwargs))


def test_a_long_fill_is_written_in_shards(tmp_path: Path, monkeypatch: Any) -> None:
    pipe, kwargs = setting("flux")
    rows = capture(pipe, PROMPTS[:1], pipeline_kwargs=kwargs).slot_calls[0].rows
    monkeypatch.setattr(t5slim.distill.cache, "SHARD_BYTES", 3 * rows.nbytes)
    cache_teacher(pipe, MANY[:10], tmp_path, pipeline_kwargs=kwargs)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4  # of 3, 3, 3 and 2 prompts
    monkeypatch.setattr(t5slim.distill.cache, "SHARD_SECONDS", 0.0)
    cache_teacher(pipe, MANY[10:15], tmp_path, pipeline_kwargs=kwargs)
    assert len(list(tmp_path.glob("*.safetensors"))) == 9


def test_a_mask_belongs_to_the_prompt() -> None:
    ids = torch.tensor([[5, 1, 0], [5, 1, 0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    keys = [*prompt_keys(ids, mask), *prompt_keys(ids[:1], None), *prompt_keys(ids[:1, :2], None)]
    assert len(set(keys)) == 4
    assert prompt_keys(ids.int(), mask.bool()) == keys[:2]


def test_rows_of_a_prompt_dont_depend_on_its_batch() -> None:
    """Bit for bit, of a teacher whose matrix products are large enough to be cut in blocks."""
    torch.manual_seed(0)
    shape = {"d_model": 256, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 8}
    teacher = T5EncoderModel(T5Config(vocab_size=512, **shape)).eval()
    ids = torch.randint(512, (20, 24))
    whole = encode_alike(teacher, ids, None)
    for pick in ([3], [7, 3], [19, 3, 5, 4, 8, 9, 11, 0, 1], list(range(19, -1, -1))):
        assert torch.equal(encode_alike(teacher, ids[pick], None), whole[pick])
