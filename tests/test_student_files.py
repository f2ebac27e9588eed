"""Broken checkpoints and configs are refused with what to do about it; saves are atomic."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers.students import TINY, close, make_student
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, T5Config, T5EncoderModel

from t5slim import CheckpointError, ConfigError, HubAccessError, SlimT5Config, SlimT5Encoder


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
    assert not [part for part in parts if part not in str(caught.value)]


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_not_finite(folder, value):
    edit_tensors(folder, lambda tensors: tensors["final_projection.0.weight"][3, 2].fill_(value))
    refused(folder, CheckpointError, "NaN or infinity in: final_projection.0.weight", "revision")


def test_missing_unexpected_and_misshaped(folder):
    def change(tensors):
        del tensors["final_projection.3.weight"], tensors["encoder.shared.weight"]
        tensors["extra.a"], tensors["extra.b"] = torch.ones(1), torch.zeros(1)
        tensors["final_projection.0.weight"] = torch.zeros(25, 16)

    edit_tensors(folder, change)
    parts = ["missing: encoder.", "shared.weight, final_projection.3.weight", "from_t5"]
    parts += ["unexpected: extra.a, extra.b", "of another shape (in the file, in the config): "]
    parts += ["('final_projection.0.weight', torch.Size([25, 16]), torch.Size([24, 16]))"]
    refused(folder, CheckpointError, *parts)


def test_a_plain_t5_is_sent_to_from_t5_which_is_as_strict(tmp_path, folder):
    T5EncoderModel(T5Config(**TINY)).save_pretrained(tmp_path / "t5")
    refused(tmp_path / "t5", CheckpointError, "final_projection.0.weight", "from_t5")
    edit_tensors(tmp_path / "t5", lambda tensors: tensors.pop("encoder.final_layer_norm.weight"))
    missing = "missing: encoder.final_layer_norm.weight"
    refused(tmp_path / "t5", CheckpointError, missing, load=SlimT5Encoder.from_t5)
    refused(folder, ConfigError, "got model_type 'slim_t5'", load=SlimT5Encoder.from_t5)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2141\nsize 12\n"


@pytest.mark.parametrize("content", [pickle.dumps([1.0] * 100), LFS], ids=["pickle", "LFS"])
def test_no_safetensors_file(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, CheckpointError, str(folder), "If it isn't whole", "download")


def test_pickle_only_folder(folder):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(folder / "exploded"),)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(folder, CheckpointError, "holds no weights: expected model.safetensors", "Pickled")
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "isn't valid JSON"), ("[1]", "got a list"), ("[" * 10**5, "isn't valid JSON")],
)
def test_config_is_no_json_object(folder, text, message):
    (folder / "config.json").write_text(text)
    refused(folder, ConfigError, message)
    (folder / "config.json").unlink()
    refused(folder, CheckpointError, "holds no config.json")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"d_model": 10**9, "project_in_dim": 10**9}, "at most 6 billion"),
        ({"relative_attention_num_buckets": 2**31 - 1}, "at most 6 billion"),
        ({"num_layers": 10**9}, "num_layers: expected from 1 to 1,000"),
        ({"project_out_dim": 24.0}, "project_out_dim: expected a positive integer"),
        ({"d_model": "16"}, "d_model"),
        ({"project_in_dim": 32}, "project_in_dim: expected d_model = 16, got 32"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon: expected a finite number"),
        ({"feed_forward_proj": "gated-no"}, "feed_forward_proj"),
        ({"encoder_type": ["t5"]}, "encoder_type: expected 't5' or 'umt5'"),
        ({"initializer_factor": float("nan")}, "initializer_factor: expected a number from 0"),
        ({"dropout_rate": -float("inf")}, "dropout_rate"),
        ({"relative_attention_num_buckets": 3}, "from 4 to 128"),
        ({"relative_attention_max_distance": 8}, "from 33 to 1,000,000"),  # a division by zero
        ({"base_model": ["google/flan-t5-base"]}, "base_model: expected a string"),
        ({"quantization_config": 4}, "invalid config"),
    ],
)
def test_config_values(folder, values, message):
    edit_config(folder, **values)
    refused(folder, ConfigError, message)


@pytest.mark.parametrize(
    "values", [{"vocab_size": 3 * 10**8}, {"num_layers": 1000, "encoder_type": "umt5"}]
)
def test_no_memory_for_what_is_not_there(folder, values):
    """The sizes of a T5-XXL are allowed, and wouldn't be missed before they took 20 GB."""
    edit_config(folder, **values)
    refused(folder, CheckpointError, "28,168 bytes can't hold what its config.json asks for")


def test_keys_of_others_are_dropped(folder):
    """Of two billion labels, transformers would make a dictionary; a kernel is code on the Hub."""
    others = {"n_positions": 512, "is_decoder": True, "id2label": 3, "classifier_dropout": 1e400}
    others |= {"num_labels": 2**31 - 1, "attn_implementation": "someone/kernel"}
    edit_config(folder, nonsense=None, **others)
    assert holds(folder, 0)
    config = SlimT5Encoder.from_pretrained(folder).config
    assert not hasattr(config, "nonsense") and config.classifier_dropout == 0


def test_config_in_python():
    with pytest.raises(ConfigError, match="config has no d_modle, num_layer"):
        SlimT5Config.preset("base", num_layer=2, d_modle=8)
    with pytest.raises(ConfigError, match="small, base, large, xl, got 'huge'"):
        SlimT5Config.preset("huge")
    assert SlimT5Config(out_dim=24).project_out_dim == 24
    assert SlimT5Config(hidden_size=256).d_model == 256


def test_arguments_of_from_pretrained(folder, monkeypatch):
    """Those of the config change it, as in transformers; an unknown one is an error."""
    load = SlimT5Encoder.from_pretrained
    assert load(folder, dropout_rate=0.3).config.dropout_rate == 0.3
    assert load(folder, attn_implementation="eager").config._attn_implementation == "eager"
    for wrong in ({"layer_norm_epsilon": float("nan")}, {"hidden_size": "16"}):
        with pytest.raises(ConfigError, match=r"layer_norm_epsilon|d_model"):
            load(folder, **wrong)
    with pytest.raises(CheckpointError, match="attn_implementation"):
        load(folder, attn_implementation="magic")
    student, info = load(folder, output_loading_info=True)
    assert close(student, make_student()) and not info["missing_keys"]
    monkeypatch.setenv("HOME", str(folder))
    T5EncoderModel(T5Config(**TINY)).save_pretrained(folder / "t5")
    student = SlimT5Encoder.from_t5("~/t5", 24, output_loading_info=True, dropout_rate=0.3)
    assert (student.config.d_model, student.config.dropout_rate) == (16, 0.3)
    with pytest.raises(CheckpointError, match="local_file_only"):
        SlimT5Encoder.from_pretrained(folder, local_file_only=True)


def test_save_replaces_whole_files_only(folder, monkeypatch):
    """A save that fails half-way leaves what was there, and no debris."""
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def disk_full(tensors, filename, **kwargs):
        Path(filename).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", disk_full)
        with pytest.raises(OSError, match="No space left"):
            make_student(1).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    make_student(1).save_pretrained(folder)
    make_student(2).save_pretrained(folder, variant="fp16")
    assert holds(folder, 1) and holds(folder, 2, variant="fp16")
    assert {path.name for path in folder.iterdir()} == {*before, "model.fp16.safetensors"}


def test_shards(folder):
    """As of a large T5. A student itself is always saved as one file, which then is what loads."""
    PreTrainedModel.save_pretrained(make_student(1), folder, max_shard_size="2KB")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    assert holds(folder, 1)
    next(folder.glob("model-00002-*")).unlink()
    refused(folder, HubAccessError, "No such file", "model-00002-of-")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "../other.safetensors"}}))
    refused(folder, CheckpointError, str(index))
    make_student(2).save_pretrained(folder, max_shard_size="2KB")
    assert holds(folder, 2)


def test_an_adapter_beside_the_weights(folder):
    """transformers would load it, and may take the weights from what it names."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    refused(folder, CheckpointError, "no adapter_config.json", "merge")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_a_wrapper(folder, prefix):
    file = folder / "model.safetensors"
    save_file({prefix + name: value for name, value in load_file(file).items()}, file)
    refused(folder, CheckpointError, f"begin with {prefix!r}", "inside of that wrapper")


def test_paths(folder, monkeypatch):
    """`~` is the user's home; and the path of a file isn't that of a student."""
    monkeypatch.setenv("HOME", str(folder.parent))
    assert holds("~/student", 0) and holds(Path("~/student"), 0)
    make_student(1).save_pretrained("~/saved")
    assert holds(folder.parent / "saved", 1)
    for name in ("model.safetensors", "config.json"):
        refused(folder / name, CheckpointError, "expected a folder or Hub id")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8(folder, dtype):
    """A T5 can't compute in it."""
    make_student().to(dtype).save_pretrained(folder)
    refused(folder, ConfigError, "dtype: expected 16 bits or more", "dtype=torch.bfloat16")
    student = SlimT5Encoder.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(
        student.encoder.shared.weight, make_student().encoder.shared.weight.to(dtype).float()
    )
