"""The teacher's embeddings in memory and in a folder, and all that works without T5 in memory."""

import time
import weakref
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.memory import clear_device_cache
from helpers.pipelines import OFFLOADS, interrupted
from helpers.training import spawn
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, tiny_student
from transformers import T5Config, T5EncoderModel
from zoo import CASES

from t5slim import T5SlimError, patch_pipeline
from t5slim.distill import VelocityGap, cache_teacher, cached_teacher, capture, velocity_gap
from t5slim.distill.metrics import check_student
from t5slim.distill.pipeline import teacher_of, tokenize
from t5slim.distill.teacher import (
    CachedTeacher,
    TeacherCache,
    TeacherEmbeddings,
    describe_teacher,
    prompt_keys,
)
from t5slim.errors import DistillError
from t5slim.slot import TextSlot

pytestmark = pytest.mark.usefixtures("cpu_as_accelerator")

NEGATIVE = {"sd3": "a blue sign", "pixart_sigma": "large"}
CPU = torch.device("cpu")
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def setting(name: str, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    pipe = TINY_PIPELINES[name](seed)
    kwargs = call_kwargs(pipe)
    return pipe, kwargs | ({"negative_prompt": NEGATIVE[name]} if name in NEGATIVE else {})


def cached(folder: Path, name: str = "flux") -> tuple[Any, dict[str, Any], TeacherCache]:
    """A pipeline, how it is called, and the cache of `PROMPTS`."""
    pipe, kwargs = setting(name)
    return pipe, kwargs, cache_teacher(pipe, PROMPTS, folder, pipeline_kwargs=kwargs)


def batches_of(module: torch.nn.Module) -> list[int]:
    """A list that gets the batch size of each call of `module` from now on."""
    sizes: list[int] = []
    module.register_forward_hook(lambda _, args, output: sizes.append(len(output[0])))
    return sizes


def targets_of(pipe: Any, kwargs: dict[str, Any], prompts: list[str]) -> list[torch.Tensor]:
    trajectory = capture(pipe, prompts, pipeline_kwargs=kwargs)
    return [call.target for call in trajectory.denoiser_calls]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a cache, each with the embeddings of one prompt."""
    return {file.name: file.read_bytes() for file in folder.glob("??/*.safetensors")}


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart_sigma"])
def test_a_prompt_is_encoded_once(name: str, tmp_path: Path) -> None:
    pipe, kwargs, _ = cached(tmp_path, name)
    ids, mask = tokenize(pipe, PROMPTS, kwargs)[0]
    assert (mask is not None) == (name == "pixart_sigma")
    teacher, encoded = TeacherEmbeddings(), batches_of(teacher_of(pipe).encoder)
    embeddings = teacher.encode(teacher_of(pipe), ids, mask)
    assert torch.equal(teacher.encode(teacher_of(pipe), ids, mask), embeddings)  # from memory
    assert encoded == [8] and len(teacher.indices) == len(PROMPTS)  # one batch, filled up
    with torch.no_grad():
        torch.testing.assert_close(embeddings, teacher_of(pipe)(ids, mask)[0])
    with cached_teacher(pipe, TeacherCache(tmp_path)):
        assert isinstance(teacher_of(pipe), CachedTeacher)
        assert torch.equal(TeacherEmbeddings().encode(teacher_of(pipe), ids, mask), embeddings)
    assert len(contents(tmp_path)) == len(PROMPTS) + 1 + (name in NEGATIVE)  # and the empty prompt


def test_embeddings_of_a_prompt_dont_depend_on_its_batch() -> None:
    """Bit for bit, of a teacher whose matrix products are large enough to be cut in blocks."""
    torch.manual_seed(0)
    shape = {"d_model": 256, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 8}
    teacher = T5EncoderModel(T5Config(vocab_size=512, **shape)).eval()
    ids = torch.randint(512, (20, 24))
    whole = TeacherEmbeddings().encode(teacher, ids, None)
    for pick in ([3], [7, 3], [19, 3, 5, 4, 8, 9, 11, 0, 1], list(range(19, -1, -1))):
        assert torch.equal(TeacherEmbeddings().encode(teacher, ids[pick], None), whole[pick])


def test_a_mask_belongs_to_the_prompt() -> None:
    ids = torch.tensor([[5, 1, 0], [5, 1, 0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    keys = [*prompt_keys(ids, mask), *prompt_keys(ids[:1], None), *prompt_keys(ids[:1, :2], None)]
    assert len(set(keys)) == 4
    assert prompt_keys(ids.int(), mask.bool()) == keys[:2]


def test_prompts_of_different_lengths(tmp_path: Path) -> None:
    """Bria encodes each prompt alone, without padding."""
    pipe, teacher = CASES["BriaPipeline"].pipe(), TeacherEmbeddings()
    each = [pipe.tokenizer([prompt], return_tensors="pt").input_ids for prompt in PROMPTS[:3]]
    alone = [teacher.encode(pipe.text_encoder, ids, None)[0] for ids in each]
    together = teacher.get(pipe.text_encoder, [0, 1, 2], CPU)
    ids, mask = teacher.tokens([0, 1, 2], CPU)
    assert mask is not None
    for i, own in enumerate(alone):
        assert torch.equal(together[i, : len(own)], own) and not together[i, len(own) :].any()
        assert mask[i].sum() == len(own) and torch.equal(ids[i, : len(own)], each[i][0])
    assert teacher.tokens([1, 1], CPU)[1] is None
    cache = cache_teacher(pipe, PROMPTS[:3], tmp_path)
    for own, ids in zip(alone, each, strict=True):
        assert torch.equal(cache.get(prompt_keys(ids, None)[0]), own)


@pytest.mark.parametrize(
    ("name", "offload"),
    [*product(["flux"], OFFLOADS), *product(["sd3", "pixart_sigma", "stable_audio"], ["none"])],
)
def test_everything_works_without_t5(name: str, offload: str, tmp_path: Path) -> None:
    pipe, kwargs = setting(name)
    slot, student = TextSlot(pipe), tiny_student(pipe)
    targets = targets_of(pipe, kwargs, PROMPTS[:3])
    gap = velocity_gap(pipe, student, PROMPTS, pipeline_kwargs=kwargs, batch_size=4)
    facts, teacher = describe_teacher(pipe), weakref.ref(slot.encoder)
    weights = [weakref.ref(parameter) for parameter in teacher().parameters()]
    OFFLOADS[offload](pipe)
    assert describe_teacher(pipe) == facts
    cache_teacher(pipe, PROMPTS, tmp_path, pipeline_kwargs=kwargs)
    with cached_teacher(pipe, tmp_path):  # with T5 waiting for its return
        assert_equal(targets_of(pipe, kwargs, PROMPTS[:3]), targets)
    assert slot.encoder is teacher()
    assert_equal(targets_of(pipe, kwargs, PROMPTS[:3]), targets)
    slot.replace(None)
    if offload != "none":
        clear_device_cache(garbage_collection=True)
    assert teacher() is None and all(weight() is None for weight in weights)
    with pytest.raises(DistillError, match="cached_teacher"):
        capture(pipe, PROMPTS[:3], pipeline_kwargs=kwargs)
    with cached_teacher(pipe, tmp_path):
        check_student(pipe, student)
        assert_equal(targets_of(pipe, kwargs, PROMPTS[:3]), targets)
        measure = VelocityGap(pipe, PROMPTS, pipeline_kwargs=kwargs, batch_size=4)
        assert measure(student) == gap
        # The pipeline itself works, too, and no part of it holds a T5.
        pipe(PROMPTS[0], output_type="latent", **kwargs)
        assert teacher_of(pipe).num_parameters() == 1
    assert slot.encoder is None and TextSlot(pipe).name == slot.name
    patch_pipeline(pipe, student)


@pytest.mark.parametrize("offload", ["none", "model", "sequential"])
def test_an_interrupt_leaves_t5_in_the_slot(offload: str, tmp_path: Path) -> None:
    """Wherever in `cached_teacher` it comes."""
    pipe, _, cache = cached(tmp_path)
    OFFLOADS[offload](pipe)
    teacher = pipe.text_encoder_2
    context = cached_teacher(pipe, cache)
    calls = interrupted(context.__enter__)
    assert calls > 5 and isinstance(pipe.text_encoder_2, CachedTeacher)
    context.__exit__(None, None, None)
    for nth in range(1, calls + 1, calls // 40):
        assert interrupted(cached_teacher(pipe, cache).__enter__, nth) >= nth
        assert pipe.text_encoder_2 is teacher, nth


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart_sigma", "chroma", "ltx"])
def test_a_pipeline_with_only_its_text_encoders_fills_the_cache(name: str, tmp_path: Path) -> None:
    pipe, kwargs, whole = cached(tmp_path / "whole", name)
    parts = {k: None if k in ("transformer", "vae") else v for k, v in pipe.components.items()}
    encoders = type(pipe)(**parts)
    before = dict(encoders.config)
    cache = cache_teacher(encoders, PROMPTS, tmp_path / "embeddings", pipeline_kwargs=kwargs)
    assert encoders.transformer is None and dict(encoders.config) == before
    assert cache.teacher == whole.teacher
    assert contents(cache.folder) == contents(whole.folder)


def test_a_prompt_that_is_not_cached_is_shown(tmp_path: Path) -> None:
    pipe, kwargs, _ = cached(tmp_path)
    with cached_teacher(pipe, tmp_path):
        with pytest.raises(DistillError, match="'a blue square', padded to 12 tokens, isn't in"):
            targets_of(pipe, kwargs, [PROMPTS[0], "a blue square"])
        with pytest.raises(DistillError, match=r"padded to 8 tokens.*pipeline_kwargs"):
            targets_of(pipe, kwargs | {"max_sequence_length": 8}, PROMPTS[:1])
        targets_of(pipe, kwargs, ["", PROMPTS[0]])
    # Before a long run, a pipeline without T5 can be checked.
    TextSlot(pipe).replace(None)
    cache_teacher(pipe, PROMPTS[:3], tmp_path, pipeline_kwargs=kwargs)
    with pytest.raises(DistillError, match="'green sign', padded to 12"):
        cache_teacher(pipe, [*PROMPTS, "green sign"], tmp_path, pipeline_kwargs=kwargs)
    assert TextSlot(pipe).encoder is None


def test_cached_prompts_are_not_encoded_again(tmp_path: Path) -> None:
    pipe, kwargs = setting("flux")
    cache_teacher(pipe, PROMPTS[:3], tmp_path, pipeline_kwargs=kwargs)
    encoded = batches_of(pipe.text_encoder_2.encoder)
    pipe.text_encoder_2.train()  # dropout has no place in the teacher's embeddings
    cache_teacher(pipe, PROMPTS, tmp_path, pipeline_kwargs=kwargs, batch_size=4)
    assert encoded == [8]  # the new ones, in a batch that is filled up
    assert pipe.text_encoder_2.training
    cache_teacher(pipe, PROMPTS, tmp_path, pipeline_kwargs=kwargs)
    assert encoded == [8]
    with cached_teacher(pipe, tmp_path):
        from_cache = targets_of(pipe, kwargs, PROMPTS)
    pipe.text_encoder_2.eval()
    assert_equal(from_cache, targets_of(pipe, kwargs, PROMPTS))


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    pipe, kwargs, cache = cached(tmp_path, "sd3")
    files = sorted(tmp_path.iterdir())
    other, _ = setting("sd3", seed=1)
    with pytest.raises(DistillError, match=r"another teacher: its weights is .*, this pipeline's "):
        cached_teacher(other, cache).__enter__()
    pipe.text_encoder_3.bfloat16()
    with pytest.raises(DistillError, match="dtype is float32, this pipeline's bfloat16"):
        cache_teacher(pipe, PROMPTS, tmp_path, pipeline_kwargs=kwargs)
    TextSlot(other).replace(None)
    # Without T5, its weights can't be compared; all else is.
    with cached_teacher(other, cache):
        targets_of(other, kwargs, PROMPTS[:1])
    other.tokenizer_3.add_tokens(["zebra"])
    with pytest.raises(DistillError, match="its tokenizer is "):
        cached_teacher(other, cache).__enter__()
    other.transformer.register_to_config(joint_attention_dim=64)
    with pytest.raises(DistillError, match="width is 32, this pipeline's 64"):
        cached_teacher(other, cache).__enter__()
    assert other.text_encoder_3 is None and sorted(tmp_path.iterdir()) == files


SPOILS: dict[str, Callable[[Path, Path], Any]] = {
    "truncated": lambda file, _: file.write_bytes(file.read_bytes()[:-100]),
    "other bits": lambda file, _: file.write_bytes(file.read_bytes()[:-100] + bytes(100)),
    "another prompt's": lambda file, other: file.write_bytes(other.read_bytes()),
    "a loop": lambda file, _: [file.unlink(), file.symlink_to(file.name)],
    "a folder": lambda file, _: [file.unlink(), file.mkdir()],
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_damaged_file_is_not_believed(spoil: str, tmp_path: Path, caplog: Any) -> None:
    pipe, kwargs, cache = cached(tmp_path)
    expected = targets_of(pipe, kwargs, PROMPTS)
    other, _, file, *_ = sorted(tmp_path.glob("??/*.safetensors"))
    SPOILS[spoil](file, other)
    with cached_teacher(pipe, cache), pytest.raises(DistillError, match="cache_teacher"):
        targets_of(pipe, kwargs, ["", *PROMPTS])
    assert (f"{file} is damaged" in caplog.text) == (spoil != "a loop")  # which isn't there
    assert file.exists() == file.is_dir()
    encoded = batches_of(pipe.text_encoder_2.encoder)
    if file.is_dir():
        with pytest.raises(T5SlimError, match=str(file)):
            cache_teacher(pipe, PROMPTS, tmp_path, pipeline_kwargs=kwargs)
        file.rmdir()
        encoded.clear()
    cache_teacher(pipe, PROMPTS, tmp_path, pipeline_kwargs=kwargs)
    assert encoded == [8]  # one prompt, in a batch that is filled up
    with cached_teacher(pipe, cache):
        assert_equal(targets_of(pipe, kwargs, PROMPTS), expected)


def test_the_same_bytes_as_another_tensor_are_not_believed(tmp_path: Path) -> None:
    """Of which the SHA-256 is right."""
    _, _, cache = cached(tmp_path)
    file = sorted(tmp_path.glob("??/*.safetensors"))[0]
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for then, now in ((b'"F32"', b'"I32"'), (b"[12,32]", b"[32,12]"), (b"[12,32]", b"[1,12,32]")):
        changed = content[8:header].replace(then, now)
        file.write_bytes(len(changed).to_bytes(8, "little") + changed + content[header:])
        with pytest.raises(DistillError, match=r"unlike its teacher\.json"):
            cache.get(file.stem)
        assert file.exists()


def test_folders_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, kwargs, _ = cached(tmp_path / "whole")
    with pytest.raises(DistillError, match="may not hold 'heihgt'"):
        cache_teacher(pipe, PROMPTS, tmp_path / "new", pipeline_kwargs={"heihgt": 16})
    for folder in (__file__, "a\0b"):
        with pytest.raises(T5SlimError, match="can't be made a folder"):
            cache_teacher(pipe, PROMPTS, folder, pipeline_kwargs=kwargs)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with cached_teacher(pipe, "~/whole"):
        cache_teacher(pipe, PROMPTS, "~/whole", pipeline_kwargs=kwargs)
    TextSlot(pipe).replace(None)
    with pytest.raises(DistillError, match=r"no cached embeddings.*No such file"):
        cache_teacher(pipe, PROMPTS, "~/new", pipeline_kwargs=kwargs)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def fill(folder: Path, prompts: list[str]) -> None:
    pipe, kwargs = setting("flux")
    cache_teacher(pipe, prompts, folder, pipeline_kwargs=kwargs, batch_size=8)


def test_two_processes_fill_one_folder_and_one_is_killed(tmp_path: Path) -> None:
    many, folder = [f"a red star {n}" for n in range(200)], tmp_path / "embeddings"
    killed, other = spawn(fill, folder, many[:120]), spawn(fill, folder, many[80:])
    while len(contents(folder)) < 20:
        assert killed.is_alive()
        time.sleep(0.01)
    killed.kill()
    killed.join()
    other.join()
    assert other.exitcode == 0
    fill(folder, many)
    fill(tmp_path / "one", many)
    assert contents(folder) == contents(tmp_path / "one")
