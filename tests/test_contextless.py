"""The encoder without context: a table of words and positions, averaged from the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from tiny import PROMPTS, T5_VOCAB, TEXT_WIDTH, TINY_PIPELINES, call_kwargs, tiny_flux
from torch import Tensor

from t5slim import (
    ContextlessEncoder,
    DistillError,
    EvaluateError,
    IncompatibleStudentError,
    patch_pipeline,
    unpatch_pipeline,
)
from t5slim.contextless import _kinds, _words_of
from t5slim.distill import cache_teacher, cached_teacher, free_teacher, train
from t5slim.evaluate import compare, lens


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return tiny_flux()


@pytest.fixture(scope="module")
def encoder(pipe: FluxPipeline) -> ContextlessEncoder:
    return ContextlessEncoder.from_teacher(pipe, PROMPTS, pipeline_kwargs=call_kwargs(pipe))


def ids_of(pipe: Any, prompts: list[str]) -> Tensor:
    length = call_kwargs(pipe)["max_sequence_length"]
    tokens = pipe.tokenizer_2(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids


def word(pipe: Any, ids: Tensor, position: int) -> tuple[Any, ...]:
    """What the row at a position may depend on: its word, its place in it, its position."""
    start = max(s for s, _ in _words_of(ids.tolist(), _kinds(pipe.tokenizer_2)) if s <= position)
    found = dict(_words_of(ids.tolist(), _kinds(pipe.tokenizer_2)))[start]
    return found, position - start


def test_rows_are_the_nearest_sums_of_a_word_and_a_position(
    pipe: FluxPipeline, encoder: ContextlessEncoder
) -> None:
    ids = ids_of(pipe, [*PROMPTS, ""])
    with torch.no_grad():
        wanted = pipe.text_encoder_2(ids)[0].double().flatten(0, 1).numpy()
        got = encoder(ids)[0].flatten(0, 1).numpy()
    words = [(*word(pipe, row, i),) for row in ids for i in range(len(row))]
    entry = {key: n for n, key in enumerate(dict.fromkeys(words))}
    length = ids.shape[1]
    design = np.zeros((len(words), len(entry) + length))
    for n, key in enumerate(words):
        design[n, entry[key]] = design[n, len(entry) + n % length] = 1
    tables = np.linalg.lstsq(design, wanted, rcond=None)[0]
    assert np.abs(got - design @ tables).max() < 1e-4
    assert np.abs(wanted - design @ tables).max() > 0.1  # the teacher does have context


def test_a_word_means_the_same_beside_any_other(
    pipe: FluxPipeline, encoder: ContextlessEncoder
) -> None:
    one, other = encoder(ids_of(pipe, ["a red circle", "a blue circle"]))[0]
    same = (one == other).all(-1)
    assert same.tolist() == [True, False] + [True] * (len(same) - 2)
    early, late = encoder(ids_of(pipe, ["red circle", "a red circle"]))[0]
    assert not torch.equal(early[0], late[1])  # but for its position
    assert torch.allclose(early[0] - early[1], late[1] - late[2] + _steps(encoder), atol=1e-5)


def _steps(encoder: ContextlessEncoder) -> Tensor:
    tags = encoder.places.weight
    return (tags[0] - tags[1]) - (tags[1] - tags[2])


def test_a_token_of_a_known_word_is_read_in_it(
    pipe: FluxPipeline, encoder: ContextlessEncoder
) -> None:
    """PROMPTS have "squares", of two tokens, "square", and "that", which is spelled."""
    ids = ids_of(pipe, ["squares", "square", "taht"])
    entries = encoder._entries_of(ids)
    assert (entries[0, :2] >= T5_VOCAB).all()
    assert torch.equal(entries[1:], ids[1:])
    square_in_word, square, s_in_word = encoder.entries.weight[
        [int(entries[0, 0]), int(ids[1, 0]), int(entries[0, 1])]
    ]
    assert not torch.allclose(square_in_word, square, atol=0.1)
    # A token that stood in one word only, and never alone, means what it does there.
    h_in_word = encoder.entries.weight[encoder._entries_of(ids_of(pipe, ["that"]))[0, 2]]
    assert torch.allclose(h_in_word, encoder.entries.weight[ids[2, 3]], atol=1e-5)
    assert not torch.allclose(s_in_word, encoder.entries.weight[ids[0, 1]], atol=0.1)


def test_an_unknown_token_is_the_mean_of_all(
    pipe: FluxPipeline, encoder: ContextlessEncoder
) -> None:
    unknown = pipe.tokenizer_2.convert_tokens_to_ids(["▁filler1", "▁filler2"])
    rows = encoder.entries.weight[unknown]
    assert torch.equal(rows[0], rows[1])
    ids = ids_of(pipe, [*PROMPTS, ""])
    with torch.no_grad():
        mean = (pipe.text_encoder_2(ids)[0] - encoder.places.weight).mean((0, 1))
    assert torch.allclose(rows[0], mean, atol=1e-4)


def test_punctuation_is_no_part_of_a_word(pipe: FluxPipeline) -> None:
    tokenizer = pipe.tokenizer_2
    ids = tokenizer("red, hi.red").input_ids
    words = [tokenizer.convert_ids_to_tokens(list(w)) for _, w in _words_of(ids, _kinds(tokenizer))]
    assert words == [["▁red"], [","], ["▁"], ["h", "i"], ["."], ["r", "e", "d"], ["</s>"]]


def test_longer_prompts_have_the_last_tag(encoder: ContextlessEncoder) -> None:
    ids = torch.full((1, encoder.config.num_places + 3), 5)
    rows = encoder(ids, attention_mask=torch.ones_like(ids), return_dict=False)[0]
    assert rows.shape == (1, ids.shape[1], TEXT_WIDTH)
    assert torch.equal(rows[0, -4:], rows[0, -4].expand(4, -1))
    assert not torch.equal(rows[0, -5], rows[0, -4])


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart_sigma", "ltx", "chroma"])
def test_it_goes_into_the_slot_and_out_again(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    kwargs = call_kwargs(pipe)
    table = ContextlessEncoder.from_teacher(pipe, PROMPTS, pipeline_kwargs=kwargs)

    def painted() -> Tensor:
        output = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), **kwargs)
        return torch.tensor(np.asarray(output[0][0]))

    before = painted()
    patch_pipeline(pipe, table, keep_teacher=True)
    assert not torch.equal(painted(), before)
    unpatch_pipeline(pipe)
    assert torch.equal(painted(), before)


def test_a_patched_pipeline_is_saved_and_loaded(
    encoder: ContextlessEncoder, tmp_path: Path
) -> None:
    pipe = patch_pipeline(tiny_flux(), encoder)
    pipe.save_pretrained(tmp_path)
    loaded = FluxPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert type(loaded.text_encoder_2) is ContextlessEncoder
    ids = ids_of(pipe, [*PROMPTS, "ih filler1"])
    assert torch.equal(loaded.text_encoder_2(ids)[0], encoder(ids)[0])


def test_a_save_replaces_another_in_one_step(encoder: ContextlessEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    encoder.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == encoder.state_dict().keys()
    again = ContextlessEncoder.from_pretrained(tmp_path, local_files_only=True)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_cached_rows_make_the_same_table(encoder: ContextlessEncoder, tmp_path: Path) -> None:
    pipe = tiny_flux()
    kwargs = call_kwargs(pipe)
    cache_teacher(pipe, PROMPTS, tmp_path, pipeline_kwargs=kwargs)
    free_teacher(pipe)
    with cached_teacher(pipe, tmp_path):
        table = ContextlessEncoder.from_teacher(pipe, PROMPTS, pipeline_kwargs=kwargs)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, table.state_dict()[name])


def test_the_teacher_is_left_as_it_was() -> None:
    pipe = tiny_flux()
    teacher = pipe.text_encoder_2.train()
    ContextlessEncoder.from_teacher(pipe, PROMPTS, pipeline_kwargs=call_kwargs(pipe))
    assert pipe.text_encoder_2 is teacher and teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_dtype_and_device_are_the_teachers() -> None:
    pipe = tiny_flux().to(torch.bfloat16)
    table = ContextlessEncoder.from_teacher(pipe, PROMPTS, pipeline_kwargs=call_kwargs(pipe))
    assert table.dtype == torch.bfloat16 and not table.training
    assert table(ids_of(pipe, PROMPTS))[0].dtype == torch.bfloat16


def test_it_is_compared_with_the_teacher(pipe: FluxPipeline, encoder: ContextlessEncoder) -> None:
    seen = compare(
        pipe, {"table": encoder}, PROMPTS[:2], pipeline_kwargs=call_kwargs(pipe), distances={}
    )
    gap = seen.mean("table", "velocity_gap")
    assert gap is not None and gap.value > 0


def test_it_is_refused_where_it_does_not_fit(
    pipe: FluxPipeline, encoder: ContextlessEncoder
) -> None:
    with pytest.raises(DistillError, match="expected a SlimT5Encoder"):
        train(pipe, encoder, PROMPTS, pipeline_kwargs=call_kwargs(pipe))
    with pytest.raises(EvaluateError, match="no layers"):
        lens(pipe, PROMPTS[0], {"table": encoder}, pipeline_kwargs=call_kwargs(pipe))
    wide = TINY_PIPELINES["flux"](seed=1)
    wide.transformer.register_to_config(joint_attention_dim=64)
    with pytest.raises(IncompatibleStudentError, match="width 32"):
        patch_pipeline(wide, encoder)
    with pytest.raises(DistillError, match="at least one is needed"):
        ContextlessEncoder.from_teacher(pipe, [], pipeline_kwargs=call_kwargs(pipe))
    with pytest.raises(DistillError, match="hieght"):
        ContextlessEncoder.from_teacher(pipe, PROMPTS, pipeline_kwargs={"hieght": 8})
