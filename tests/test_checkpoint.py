"""Broken checkpoints and configs are refused with what to do about it; saves are atomic."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from t5slim import CheckpointError, ConfigError, SlimT5Config, SlimT5Encoder

TINY = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 2}
IDS = torch.arange(10).view(2, 5)


def make_student(seed: int = 0) -> SlimT5Encoder:
    torch.manual_seed(seed)
    return SlimT5Encoder(SlimT5Config(**TINY, project_out_dim=24)).eval()


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


def refused(folder, error, *parts):
    """Loading raises `error`, whose text has these parts in this order."""
    with pytest.raises(error) as caught:
        SlimT5Encoder.from_pretrained(folder)
    text, position = str(caught.value), 0
    for part in parts:
        assert part in text[position:], text
        position = text.index(part, position)


def test_lists_missing_unexpected_and_misshaped_tensors(folder):
    def change(tensors):
        del tensors["final_projection.3.weight"], tensors["encoder.shared.weight"]
        tensors["extra.b"] = tensors["extra.a"] = torch.zeros(1)
        tensors["extra.a"] = torch.ones(1)
        tensors["final_projection.0.weight"] = torch.zeros(25, 16)

    edit_tensors(folder, change)
    refused(
        folder,
        CheckpointError,
        "missing: encoder.encoder.embed_tokens.weight, encoder.shared.weight, final_projection.3",
        "unexpected: extra.a, extra.b",
        "of another shape: final_projection.0.weight is (25, 16) and not (24, 16)",
    )


def test_a_plain_t5_is_sent_to_from_t5(tmp_path):
    T5EncoderModel(T5Config(**TINY)).save_pretrained(tmp_path)
    refused(tmp_path, CheckpointError, "final_projection.0.weight", "from_t5")
    with pytest.raises(ConfigError, match="expected a T5, mT5 or UMT5, got model_type 'slim_t5'"):
        make_student().save_pretrained(tmp_path / "student")
        SlimT5Encoder.from_t5(tmp_path / "student")


def test_from_t5_is_as_strict(tmp_path):
    T5EncoderModel(T5Config(**TINY)).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("encoder.final_layer_norm.weight"))
    with pytest.raises(CheckpointError, match=r"missing: encoder.final_layer_norm.weight"):
        SlimT5Encoder.from_t5(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(folder, value):
    edit_tensors(folder, lambda t: t["final_projection.0.weight"][3, 2].fill_(value))
    refused(folder, CheckpointError, "NaN or infinity in final_projection.0.weight", "revision")


def test_two_different_embeddings(folder):
    def change(tensors):
        embedding = tensors["encoder.shared.weight"]
        tensors["encoder.encoder.embed_tokens.weight"] = embedding + 1

    edit_tensors(folder, change)
    refused(folder, CheckpointError, "embed_tokens.weight", "different values")


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
    refused(folder, CheckpointError, "model.safetensors isn't a whole safetensors", "download it")


def test_pickle_only_folder(folder):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(folder / "exploded"),)

    (folder / "model.safetensors").unlink()
    refused(folder, CheckpointError, "holds no weights: expected model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(folder, CheckpointError, "only pickled weights", "safetensors only", "save_pretrained")
    assert not (folder / "exploded").exists()


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, CheckpointError, "holds no config.json")


@pytest.mark.parametrize(
    "text, message",
    [("{", "isn't valid JSON"), ("[1]", "expected a JSON object, got a list")],
)
def test_config_is_no_json_object(folder, text, message):
    (folder / "config.json").write_text(text)
    refused(folder, ConfigError, "config.json", message)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"project_outdim": 24}, "unknown key 'project_outdim'"),
        ({"nonsense": None}, "unknown key 'nonsense'"),
        ({"model_type": "bert"}, "got model_type 'bert'"),
        ({"d_model": 10**9, "project_in_dim": 10**9}, "billion parameters"),
        ({"num_layers": 10**9}, "billion parameters"),
        ({"vocab_size": 10**12}, "billion parameters"),
        ({"project_out_dim": 10**7}, "billion parameters"),
        ({"d_ff": -1}, "d_ff: expected a whole number above 0, got -1"),
        ({"num_heads": 0}, "num_heads: expected a whole number above 0, got 0"),
        ({"project_out_dim": -4096}, "project_out_dim: expected a whole number"),
        ({"project_out_dim": 24.0}, "project_out_dim: expected a whole number"),
        ({"d_model": "16"}, "d_model"),
        ({"d_kv": None}, "d_kv"),
        ({"project_in_dim": 32}, "project_in_dim is 32"),
        ({"dropout_rate": 1.5}, "dropout_rate"),
        ({"feed_forward_proj": "gated-no", "dense_act_fn": "no"}, "feed_forward_proj"),
        ({"feed_forward_proj": "a-b-c"}, "feed_forward_proj"),
        ({"torch_dtype": "float17", "dtype": None}, "float17"),
    ],
)
def test_config_values(folder, values, message):
    edit_config(folder, **values)
    refused(folder, ConfigError, message)


def test_heads_that_do_not_fit_the_tensors(folder):
    edit_config(folder, num_heads=3)
    refused(folder, CheckpointError, "SelfAttention.q.weight is (8, 16) and not (12, 16)")


def test_config_in_python_is_checked_as_well():
    with pytest.raises(ConfigError, match=r"'d_modle'.*Did you mean 'd_model'"):
        SlimT5Config(d_modle=16)
    with pytest.raises(ConfigError, match="project_in_dim is 8"):
        SlimT5Config(d_model=16, project_in_dim=8)
    assert SlimT5Config(out_dim=24).project_out_dim == 24
    assert SlimT5Config(hidden_size=256).d_model == 256


def test_an_unknown_argument_is_an_error(folder):
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
    with torch.no_grad():
        torch.testing.assert_close(
            SlimT5Encoder.from_pretrained(folder)(IDS)[0], make_student(1)(IDS)[0]
        )


def test_save_leaves_other_files_alone(folder):
    (folder / "notes.txt").write_text("mine")
    make_student(1).save_pretrained(folder, variant="fp16")
    names = {"config.json", "model.safetensors", "model.fp16.safetensors", "notes.txt"}
    assert {path.name for path in folder.iterdir()} == names
    with torch.no_grad():
        torch.testing.assert_close(
            SlimT5Encoder.from_pretrained(folder, variant="fp16")(IDS)[0], make_student(1)(IDS)[0]
        )


def test_shards(folder):
    """From one file to several and back, the student that loads is the one that was saved last."""
    for seed, size in ((1, "2KB"), (2, "1KB"), (3, "1GB")):
        make_student(seed).save_pretrained(folder, max_shard_size=size)
        with torch.no_grad():
            torch.testing.assert_close(
                SlimT5Encoder.from_pretrained(folder)(IDS)[0], make_student(seed)(IDS)[0]
            )
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    make_student(1).save_pretrained(folder, max_shard_size="2KB")
    next(folder.glob("model-00002-*")).unlink()
    refused(folder, CheckpointError, "lacks the shards model-00002-of-")


def test_save_into_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        make_student().save_pretrained(tmp_path / "file")
