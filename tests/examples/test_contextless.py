"""The encoder without context: averaged from the teacher, and used as a student is."""

import numpy as np
import pytest
import torch
from contextless import control, start
from contextless.contextless import ContextlessEncoder, read_prompts, token_kinds, words_of
from contextless.start import Run, train_together
from helpers.training import assert_same
from sizes import MAX_TOKENS, T5_VOCAB
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, tiny_flux, tiny_student

from t5slim import patch_pipeline, unpatch_pipeline
from t5slim.distill import DistillConfig, Objective, TrajectoryReservoir, train
from t5slim.slot import TextSlot


@pytest.fixture(scope="module")
def pipe():
    return tiny_flux()


@pytest.fixture(scope="module")
def encoder(pipe):
    return ContextlessEncoder.from_teacher(pipe, PROMPTS, pipeline_kwargs=call_kwargs(pipe))


def ids_of(pipe, prompts):
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return pipe.tokenizer_2(prompts, max_length=MAX_TOKENS, **options).input_ids


def test_embeddings_are_the_nearest_sums_of_a_word_and_a_position(pipe, encoder):
    ids, kinds = ids_of(pipe, [*PROMPTS, ""]), token_kinds(pipe.tokenizer_2)
    with torch.no_grad():
        wanted = pipe.text_encoder_2(ids)[0].double().flatten(0, 1).numpy()
        got = encoder(ids)[0].flatten(0, 1).numpy()
    words = [word for prompt in ids.tolist() for _, word in words_of(prompt, kinds)]
    keys = [(word, place) for word in words for place in range(len(word))]
    columns = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    design = np.zeros((len(keys), len(columns) + ids.shape[1]))
    for i, key in enumerate(keys):
        design[i, [columns[key], len(columns) + i % ids.shape[1]]] = 1
    nearest = design @ np.linalg.lstsq(design, wanted, rcond=None)[0]
    assert np.abs(got - nearest).max() < 1e-4
    assert np.abs(wanted - nearest).max() > 0.1  # the teacher does have context


def test_a_word_means_the_same_beside_any_other(pipe, encoder):
    one, other = encoder(ids_of(pipe, ["a red circle", "a blue circle"]))[0]
    same = (one == other).all(-1)
    assert same.tolist() == [True, False] + [True] * (len(same) - 2)
    early, late = encoder(ids_of(pipe, ["red circle", "a red circle"]))[0]
    assert not torch.equal(early[0], late[1])  # but for its position
    (behind,) = encoder(torch.full((1, MAX_TOKENS + 3), 5), return_dict=False)[0][:, -4:]
    assert (behind == behind[0]).all()  # all have the last position


def test_tokens_are_read_in_the_words_that_are_known(pipe, encoder):
    """PROMPTS have "squares", of two tokens, "square", and "that", which is spelled."""
    ids = ids_of(pipe, ["squares", "square", "taht", "that"])
    entries, table = encoder.entries_of(ids), encoder.entries.weight
    assert (entries[0, :2] >= T5_VOCAB).all()
    assert torch.equal(entries[1:3], ids[1:3])
    assert not torch.allclose(table[entries[0, 0]], table[ids[1, 0]], atol=0.1)
    # A token that stood in one word only, and never alone, means what it does there.
    assert torch.allclose(table[entries[3, 2]], table[ids[2, 3]], atol=1e-5)
    # One that stood nowhere is the mean of all.
    with torch.no_grad():
        teacher = pipe.text_encoder_2(ids_of(pipe, [*PROMPTS, ""]))[0]
    mean = (teacher - encoder.positions.weight).mean((0, 1))
    unknown = pipe.tokenizer_2.convert_tokens_to_ids("▁filler1")
    assert torch.allclose(table[unknown], mean, atol=1e-4)
    found = words_of(pipe.tokenizer_2("red, hi").input_ids, token_kinds(pipe.tokenizer_2))
    assert [len(word) for _, word in found] == [1, 1, 1, 2, 1]  # red · , · ▁ · hi · </s>


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_it_goes_into_the_slot_and_out_again(name):
    pipe = TINY_PIPELINES[name]().to(torch.bfloat16)
    kwargs, slot = call_kwargs(pipe), TextSlot(pipe)
    teacher = slot.encoder.train()
    table = ContextlessEncoder.from_teacher(pipe, PROMPTS, pipeline_kwargs=kwargs)
    assert slot.encoder is teacher and teacher.training and not table.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert table.dtype == torch.bfloat16 and not table.entries.weight.isnan().any()
    patch_pipeline(pipe, table, keep_teacher=True)
    pipe(PROMPTS[0], **kwargs)
    assert TextSlot(unpatch_pipeline(pipe)).encoder is teacher


def test_students_that_train_together_learn_what_each_would_alone(pipe):
    kwargs, settings = call_kwargs(pipe), {"batch_size": 2, "seed": 3, "max_steps": 6}
    runs = [Run(6, 3, "fisher", ""), Run(6, 3, "embedding", ""), Run(6, 2, "embedding", "")]
    students = {run: tiny_student(pipe, dropout_rate=0.0) for run in runs}
    config = DistillConfig({"fisher": 1.0, "embedding": 1.0}, **settings)
    common = {"pipeline_kwargs": kwargs, "teacher": read_prompts(pipe, PROMPTS, kwargs)}
    objective = Objective(pipe, TrajectoryReservoir(pipe, PROMPTS, config, **common), config)
    train_together(pipe, objective, students, PROMPTS, config, **common)
    for run, student in students.items():
        alone = tiny_student(pipe, dropout_rate=0.0)
        config = DistillConfig(run.objective, **settings | {"seed": run.seed})
        train(pipe, alone, PROMPTS, config, pipeline_kwargs=kwargs)
        assert_same(dict(alone.named_parameters()), dict(student.named_parameters()))


@pytest.mark.slow
def test_the_commands(tmp_path, capsys, monkeypatch):
    few = ["--captions", "2", "--count", "1"]
    monkeypatch.chdir(tmp_path)  # where the image grid is saved
    monkeypatch.setattr("sys.argv", ["control.py", *few, "--steps", "1"])
    control.main()
    assert "teacher: quality 100% (21 to 100)" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["start.py", *few, "--updates", "1", "--seeds", "0"])
    start.main()
    _, *lines = capsys.readouterr().out.splitlines()
    assert (len(lines), len({line.split("  ")[-1] for line in lines})) == (6, 2)  # its rate is 0
