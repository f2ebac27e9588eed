"""Broken checkpoints and configs are refused with what to do about it; saves are atomic."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from helpers.students import TINY, close, make_student
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, T5Config, T5EncoderModel

from t5slim import CheckpointError, ConfigError, SlimT5Config, SlimT5Encoder


def holds(folder, seed, **kwargs):
    """The student of this seed is the one that loads."""
    return close(SlimT5Encoder.from_pretrained(folder, **kwargs), make_student(seed))


@pytest.fixture
def folder(tmp_path):
    make_student().save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def refused(folder, error, *parts, load=SlimT5Encoder.from_pretrained):
    """Loading raises `error`, whose text has these parts."""
    with pytest.raises(error) as caught:
        load(folder)
    for part in parts:
        assert part in str(caught.value)


def lacks(tensors):
    del tensors["final_projection.3.weight"], tensors["encoder.shared.weight"]
    tensors["extra.a"], tensors["extra.b"] = torch.ones(1), torch.zeros(1)
    tensors["final_projection.0.weight"] = torch.zeros(25, 16)


def differs(tensors):
    tensors["encoder.encoder.embed_tokens.weight"] = tensors["encoder.shared.weight"] + 1


LACKS = (
    "missing: encoder.",
    "shared.weight, final_projection.3.weight",
    "unexpected: extra.a, extra.b",
    "of another shape: final_projection.0.weight is (25, 16) and not (24, 16)",
    "from_t5",
)
NOT_FINITE = ("NaN or infinity in: final_projection.0.weight", "revision")
TENSORS = {
    "missing, unexpected and misshaped": (lacks, LACKS),
    "NaN": (lambda t: t["final_projection.0.weight"][3, 2].fill_(float("nan")), NOT_FINITE),
    "infinity": (lambda t: t["final_projection.0.weight"][3, 2].fill_(-float("inf")), NOT_FINITE),
    "two embeddings": (differs, ("different values", "embed_tokens.weight")),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(folder, case):
    change, parts = TENSORS[case]
    edit_tensors(folder, change)
    refused(folder, CheckpointError, *parts)


def test_a_plain_t5_is_sent_to_from_t5_which_is_as_strict(tmp_path, folder):
    T5EncoderModel(T5Config(**TINY)).save_pretrained(tmp_path / "t5")
    refused(tmp_path / "t5", CheckpointError, "final_projection.0.weight", "from_t5")
    edit_tensors(tmp_path / "t5", lambda tensors: tensors.pop("encoder.final_layer_norm.weight"))
    missing = "missing: encoder.final_layer_norm.weight"
    refused(tmp_path / "t5", CheckpointError, missing, load=SlimT5Encoder.from_t5)
    refused(folder, ConfigError, "got model_type 'slim_t5'", load=SlimT5Encoder.from_t5)


@pytest.mark.parametrize(
    "content",
    [
        lambda whole: whole[:-1000],
        lambda whole: whole[:100],
        lambda whole: b"",
        lambda whole: pickle.dumps({"weight": [1.0] * 100}),
        lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2141\nsize 12\n",
    ],
    ids=["truncated", "truncated header", "empty", "a pickle", "a Git LFS pointer"],
)
def test_not_a_whole_safetensors_file(folder, content):
    file = folder / "model.safetensors"
    file.write_bytes(content(file.read_bytes()))
    refused(folder, CheckpointError, str(folder), "a whole safetensors file", "download")


def test_what_its_file_cannot_hold_is_never_allocated(folder):
    edit_config(folder, relative_attention_num_buckets=2**31 - 1)
    refused(folder, CheckpointError, "bytes for 12,88", "another model's")


def test_pickle_only_folder(folder):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(folder / "exploded"),)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(folder, CheckpointError, "holds no weights: expected model.safetensors", "Pickled")
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize(
    "text, error, message",
    [
        (None, CheckpointError, "holds no config.json"),
        ("{", ConfigError, "isn't valid JSON"),
        ("[1]", ConfigError, "expected a JSON object, got a list"),
    ],
)
def test_config_is_no_json_object(folder, text, error, message):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    refused(folder, error, message)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"project_outdim": 24}, "unknown key 'project_outdim'"),
        ({"nonsense": None}, "unknown key 'nonsense'"),
        ({"model_type": "bert"}, "model_type: expected 't5' or 'slim_t5', got 'bert'"),
        ({"d_model": 10**9, "project_in_dim": 10**9}, "at most 20 billion"),
        ({"num_layers": 10**9}, "at most 20 billion"),
        ({"project_out_dim": 10**7}, "at most 20 billion"),
        ({"vocab_size": 10**400}, "vocab_size: expected an integer from 1"),
        ({"d_ff": -1}, "d_ff: expected an integer from 1"),
        ({"num_heads": 0}, "num_heads: expected an integer from 1"),
        ({"project_out_dim": 24.0}, "project_out_dim: expected an integer"),
        ({"d_model": "16"}, "d_model"),
        ({"d_kv": None}, "d_kv"),
        ({"project_in_dim": 32}, "project_in_dim: expected d_model = 16, got 32"),
        ({"dropout_rate": 1.5}, "dropout_rate"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon: expected a finite number"),
        ({"feed_forward_proj": "gated-no", "dense_act_fn": "no"}, "feed_forward_proj"),
        ({"feed_forward_proj": "a-b-c"}, "feed_forward_proj"),
        ({"encoder_type": ["t5"]}, "encoder_type: expected 't5' or 'umt5'"),
        ({"torch_dtype": "float17", "dtype": None}, "float17"),
    ],
)
def test_config_values(folder, values, message):
    edit_config(folder, **values)
    refused(folder, ConfigError, message)


def test_config_in_python():
    with pytest.raises(ConfigError, match="unknown key 'd_modle'"):
        SlimT5Config(d_modle=16)
    assert SlimT5Config(out_dim=24).project_out_dim == 24
    assert SlimT5Config(hidden_size=256).d_model == 256


def test_arguments_of_from_pretrained(folder):
    """Those of the config change it, as in transformers; an unknown one is an error."""
    assert SlimT5Encoder.from_pretrained(folder, dropout_rate=0.3).config.dropout_rate == 0.3
    with pytest.raises(TypeError, match="local_file_only"):
        SlimT5Encoder.from_pretrained(folder, local_file_only=True)


def test_save_replaces_whole_files_only(folder, monkeypatch):
    """A save that fails half-way leaves the student that was there, and no debris."""
    import transformers.modeling_utils as modeling

    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def disk_full(tensors, filename, **kwargs):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(modeling, "safe_save_file", disk_full)
        with pytest.raises(OSError, match="No space left"):
            make_student(1).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    make_student(1).save_pretrained(folder)
    assert holds(folder, 1)


def test_save_leaves_other_files_alone(folder):
    (folder / "notes.txt").write_text("mine")
    make_student(1).save_pretrained(folder, variant="fp16")
    names = {"config.json", "model.safetensors", "model.fp16.safetensors", "notes.txt"}
    assert {path.name for path in folder.iterdir()} == names
    assert holds(folder, 1, variant="fp16")


def test_shards(folder):
    """As of a large T5. A student itself is always saved as one file, which then is what loads."""
    PreTrainedModel.save_pretrained(make_student(1), folder, max_shard_size="2KB")
    (folder / "model.safetensors").unlink()
    assert holds(folder, 1)
    next(folder.glob("model-00002-*")).unlink()
    refused(folder, CheckpointError, "lacks the shards model-00002-of-")
    make_student(2).save_pretrained(folder, max_shard_size="2KB")
    assert holds(folder, 2)
