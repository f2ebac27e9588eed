"""Work without T5: its rows are cached, it leaves memory, and a stand-in in its slot reads them.

    cache_teacher(pipe, prompts, "rows", pipeline_kwargs=kwargs)
    free_teacher(pipe)  # or load the pipeline without it: text_encoder_2=None
    with cached_teacher(pipe, "rows"):
        train(pipe, student, prompts, pipeline_kwargs=kwargs)

A prompt takes S x D numbers of the teacher's dtype: 0.63 MB for 77 tokens of 4096 channels in
bfloat16, 4.2 MB for 512. The rows of its padding are among them, as FLUX.1 and SD3 read those, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, T5Config
from transformers.modeling_outputs import BaseModelOutput

from ..errors import DistillError
from ..slot import (
    check_device_map,
    denoiser_text_width,
    fill_slot,
    find_text_slot,
    free_memory,
    offload_paused,
    restore_slot,
    slot_entry,
)
from .cache import TeacherCache, sha256_of
from .checks import Prompts, load_prompts
from .pipeline import check_pipeline_kwargs, teacher_of, tokenize
from .states import frozen
from .teacher import PromptTable, encode_alike, prompt_keys, tokenize_empty

# Of each tensor of the teacher, evenly spread: enough to know it from one that was trained further.
_SAMPLE = 1024
_ADDED_TOGETHER = 64


def cache_teacher(
    pipe: Any,
    prompts: Prompts,
    folder: str | os.PathLike[str],
    *,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    batch_size: int = 64,
) -> TeacherCache:
    """Have the teacher encode prompts, and keep its rows in a folder.

    The prompts are tokenized by the pipeline's own call, and with them its negative prompt (as
    `pipeline_kwargs` has it) and the empty prompt. What the folder holds already isn't encoded
    again, so that a call that was killed goes on where it stopped; several processes can fill one
    folder, each best with its own part of the prompts.

    The pipeline needs only what its class asks for to encode a prompt: FLUX.1, SD3, PixArt, Chroma,
    LTX, Wan, CogVideoX, AuraFlow and Mochi can be loaded with `transformer=None, vae=None` (the
    first two with their CLIP). Where it holds no T5 either, the folder must hold every prompt: then
    this is a check, to be made before a long run.

    Args:
        pipe: a pipeline with the teacher in its text slot, under offload or not, and in the dtype
            in which it will run: T5's rows are cached in T5's.
        prompts: a list, or a text file with one on each line; those to be evaluated, too.
        folder: a new one, or one that holds rows of the same teacher.
        pipeline_kwargs: how the pipeline will be called, as for `capture`.
        batch_size: prompts that are tokenized together.

    Returns:
        The cache, with all of the prompts.

    Raises:
        NoT5SlotError: the pipeline has no T5.
        DistillError: no prompts; `pipeline_kwargs` that the pipeline doesn't take; a folder with
            rows of another teacher; a disk without room for the rows; or a pipeline without T5 and
            prompts that the folder doesn't hold.
    """
    kwargs = dict(pipeline_kwargs or {})
    prompts = [*dict.fromkeys([*load_prompts(prompts, "prompts"), ""])]
    check_pipeline_kwargs(pipe, kwargs)
    teacher = describe_teacher(pipe)
    cache = TeacherCache(folder, teacher)
    digest = _digest(pipe, prompts, kwargs, teacher)
    if cache.holds_all(digest):
        return cache

    has_teacher = "weights" in teacher
    with nullcontext() if has_teacher else cached_teacher(pipe, cache):
        table, device = tokenized(pipe, prompts, kwargs, batch_size)
    keys = table.keys
    missing = [n for n, key in enumerate(keys) if key not in cache]
    if missing and not has_teacher:
        tokenizer = getattr(pipe, find_text_slot(pipe).tokenizer_name)
        (ids,) = table.batch(missing[:1], device)[0]
        raise _not_cached(cache, tokenizer, ids, len(missing))
    if missing:
        _encode(pipe, cache, table, missing, device)
    cache.record(digest, keys)
    return cache


def free_teacher(pipe: Any) -> None:
    """Take the T5 out of a pipeline, whose slot is empty then, and give its memory back.

    Memory is given back if nothing else refers to that T5: no variable, no other pipeline. To work
    on with its cached rows, see `cached_teacher`; to have it again, load it, and
    `pipe.register_modules(text_encoder_2=...)`.

    Args:
        pipe: a pipeline with a T5 in its text slot, under offload or not.

    Raises:
        NoT5SlotError: the pipeline has no text slot.
        DistillError: there is nothing in it.
        PatchError: `device_map` spreads the pipeline over several devices.
    """
    teacher_of(pipe)
    check_device_map(getattr(pipe, "hf_device_map", None))
    fill_slot(pipe, find_text_slot(pipe), None)
    free_memory()


@contextmanager
def cached_teacher(
    pipe: Any, cache: TeacherCache | str | os.PathLike[str]
) -> Iterator[TeacherCache]:
    """For a while, a stand-in that reads cached rows is the teacher in a pipeline's text slot.

    Whatever works with a pipeline and its T5 works here without: `capture`, `VelocityGap`, `train`,
    and the pipeline itself. Afterwards what was in the slot, a T5 or nothing, is there again. A T5
    that is still in the pipeline stays in memory for that; see `free_teacher`.

    Args:
        pipe: a pipeline, with or without its T5.
        cache: what `cache_teacher` returned, or its folder.

    Yields:
        The cache. The stand-in has the dtype of the cached rows.

    Raises:
        NoT5SlotError: the pipeline has no text slot.
        DistillError: the folder holds no cache, or that of another teacher; or, within, a prompt is
            used that isn't cached.
        PatchError: `device_map` spreads the pipeline over several devices.
    """
    if not isinstance(cache, TeacherCache):
        cache = TeacherCache(cache)
    cache.check(describe_teacher(pipe))
    check_device_map(getattr(pipe, "hf_device_map", None))
    slot = find_text_slot(pipe)
    host, entry = getattr(pipe, slot.name), slot_entry(pipe, slot)
    stand_in = CachedTeacher(cache, getattr(pipe, slot.tokenizer_name))
    with offload_paused(pipe):
        stand_in.to(pipe._execution_device if host is None else host.device)
        fill_slot(pipe, slot, stand_in)
    try:
        yield cache
    finally:
        restore_slot(pipe, slot, host, entry)


class CachedTeacher(PreTrainedModel):
    """Stands for a T5 in a pipeline's text slot, and answers with its cached rows.

    Args:
        cache: where the rows are.
        tokenizer: the pipeline's, which turns the ids of a missing prompt into words again.
    """

    config_class = T5Config

    def __init__(self, cache: TeacherCache, tokenizer: Any) -> None:
        teacher = cache.teacher
        config = T5Config(d_model=teacher["width"])
        config.name_or_path = teacher["name_or_path"]
        super().__init__(config)
        self._cache = cache
        self._tokenizer = tokenizer
        # Where pipelines find the dtype and the device. A layer, as the hooks of offload go on
        # layers.
        zero = torch.zeros(1, 1, dtype=getattr(torch, teacher["dtype"]))
        self.marker = nn.Embedding.from_pretrained(zero)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutput:
        """The rows of cached prompts, (B, S, D), on the device of `input_ids` and as T5 made them.

        Raises:
            DistillError: one isn't cached.
        """
        rows = []
        for ids, key in zip(input_ids, prompt_keys(input_ids, attention_mask), strict=True):
            row = self._cache.rows(key)
            if row is None:
                raise _not_cached(self._cache, self._tokenizer, ids)
            rows.append(row)
        return BaseModelOutput(last_hidden_state=torch.stack(rows).to(input_ids.device))


def describe_teacher(pipe: Any) -> dict[str, Any]:
    """What is known of the T5 that belongs to a pipeline, for `TeacherCache`.

    Returns:
        `width` and `tokenizer`; and, if it holds a T5, `name_or_path`, `revision` (the commit, if
        it came from the Hub), `dtype` and `weights`.

    Raises:
        NoT5SlotError: the pipeline has no text slot.
    """
    slot = find_text_slot(pipe)
    vocabulary = sorted(getattr(pipe, slot.tokenizer_name).get_vocab().items())
    facts = {
        "width": denoiser_text_width(pipe),
        "tokenizer": hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest(),
    }
    encoder = getattr(pipe, slot.name)
    if encoder is None or isinstance(encoder, CachedTeacher):
        return facts
    with offload_paused(pipe):  # under sequential offload, weights are on the meta device
        weights = fingerprint(encoder)
    return facts | {
        "name_or_path": encoder.config.name_or_path,
        "revision": getattr(encoder.config, "_commit_hash", None),
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "weights": weights,
    }


def tokenized(
    pipe: Any, prompts: list[str], kwargs: dict[str, Any], batch_size: int
) -> tuple[PromptTable, torch.device]:
    """Everything that a T5 is asked when the pipeline is called on these prompts, and where."""
    encoder: Any = teacher_of(pipe)
    width = denoiser_text_width(pipe)
    assert width is not None  # the encoder's own, if the denoiser doesn't say
    table = PromptTable()
    device = encoder.device

    def note(_: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        nonlocal device
        device = input_ids.device  # not the encoder's, if that is offloaded
        table.numbers(input_ids, attention_mask)
        # As `VelocityGap` pads it; nearly always that is also the pipeline's own empty prompt.
        table.numbers(*tokenize_empty(pipe, input_ids, attention_mask))
        return torch.zeros(*input_ids.shape, width, dtype=encoder.dtype, device=device)

    with tqdm(total=len(prompts), desc="tokenize", unit="prompt") as bar:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            tokenize(pipe, batch, kwargs, note)
            bar.update(len(batch))
    return table, device


def _encode(
    pipe: Any, cache: TeacherCache, table: PromptTable, missing: list[int], device: torch.device
) -> None:
    encoder: Any = teacher_of(pipe)
    tokens = len(missing) * table.batch(missing[:1], device)[0].numel()
    size = tokens * cache.teacher["width"] * encoder.dtype.itemsize
    free = shutil.disk_usage(cache.folder).free
    if size > free:
        raise DistillError(
            f"The teacher's rows of {len(missing):,} prompts take {size / 1e9:.1f} GB, and the "
            f"disk of {str(cache.folder)!r} has {free / 1e9:.1f} GB free. Pass a folder on another "
            "disk, fewer prompts, or pipeline_kwargs with a smaller max_sequence_length."
        )
    keys = table.keys
    bar = tqdm(total=len(missing), desc="teacher", unit="prompt")
    with frozen(pipe, gradient_checkpointing=False), bar:
        try:
            for start in range(0, len(missing), _ADDED_TOGETHER):
                numbers = missing[start : start + _ADDED_TOGETHER]
                new = [n for n in numbers if keys[n] not in cache]  # or another process was faster
                if new:
                    rows = encode_alike(encoder, *table.batch(new, device))
                    for n, row in zip(new, rows, strict=True):
                        cache.add(keys[n], row)
                bar.update(len(numbers))
        finally:
            cache.flush()
            pipe.maybe_free_model_hooks()


def _not_cached(cache: TeacherCache, tokenizer: Any, ids: Tensor, count: int = 1) -> DistillError:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    others = f" and {count - 1:,} more" if count > 1 else ""
    return DistillError(
        f"The teacher's rows for the prompt {text!r}, padded to {len(ids)} tokens,{others} aren't "
        f"in {str(cache.folder)!r}. Call t5slim.distill.cache_teacher on a pipeline with its T5, "
        "with all prompts (negative and evaluated ones, too) and the same pipeline_kwargs: "
        "max_sequence_length, negative_prompt and guidance decide what is asked of T5."
    )


def _digest(pipe: Any, prompts: list[str], kwargs: dict[str, Any], teacher: dict[str, Any]) -> str:
    """Of what decides which ids T5 is asked for: so that they needn't be found a second time."""
    inputs = [type(pipe).__name__, version("diffusers"), teacher["tokenizer"], kwargs, prompts]
    text = json.dumps(inputs, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(module: nn.Module) -> str:
    """Of the weights, whatever they are called and wherever they are: SHA-256 in hex."""
    digests = set()  # offload can make two of tensors that were tied
    for tensor in (*module.parameters(), *module.buffers()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLE)].cpu()
        digests.add(f"{tuple(tensor.shape)} {sha256_of(sample)}")
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
