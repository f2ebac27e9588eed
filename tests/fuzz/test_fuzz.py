"""Damaged and malicious files of every kind: a call ends by a result, or an error of t5slim."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
import yaml
from helpers.hub import files_of
from helpers.students import OUT_DIM, TINY, embeddings, make_student
from helpers.training import assert_same, history_of, resumable, weights
from huggingface_hub import constants
from hypothesis import example, given
from safetensors.torch import load_file, save_file
from tiny import PROMPTS, call_kwargs, tiny_flux
from transformers import T5Config, T5EncoderModel

from fuzz import harness
from fuzz.harness import Edit, Unacceptable, edited, edits, ends, written
from t5slim import SlimT5Config, SlimT5Encoder
from t5slim.distill import cache_teacher, cached_teacher
from t5slim.distill.__main__ import parse
from t5slim.distill.pipeline import tokenize
from t5slim.distill.prompts import PromptSource
from t5slim.distill.teacher import TeacherCache, prompt_keys
from t5slim.hub import read_json
from t5slim.slot import TextSlot

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by /proc")
NAN = float("nan")
# Of a kind: what reads it, given the names of the files edited; edits to begin with; keys and
# values that mean something in its JSON; and the files to edit, if not all.
Kind = tuple[Callable[[set[str]], list[Any]], Sequence[Edit], str, Sequence[Any], Sequence[str]]


def student(folder: Path, file: str) -> Kind:
    make_student().save_pretrained(folder)
    true = weights(make_student())

    def load() -> None:
        loaded = weights(model := SlimT5Encoder.from_pretrained(folder))
        assert {n: x.shape for n, x in true.items()} == {n: x.shape for n, x in loaded.items()}
        assert all(x.is_floating_point() and x.isfinite().all() for x in loaded.values())
        if file == "config.json":
            assert embeddings(model).isfinite().all()

    keys = """num_labels id2label max_steps out_dim encoder_type dtype torch_dtype model_type
        quantization_config attn_implementation auto_map architectures layer_norm_epsilon
        attribute_map _name_or_path dense_act_fn per_layer_config return_dict hidden_size
        __metadata__ shape data_offsets"""
    known = [Edit("add", 1, 10**8, key) for key in ("num_labels", "vocab_size", "num_layers")]
    known += [Edit("add", 1, value, "dtype") for value in ([], False, "float33")]
    known += [Edit("add", 1, {"quant_method": "gptq"}, "quantization_config")]
    known += [Edit("add", 1, NAN, "layer_norm_epsilon")]
    known += [Edit("insert", 1, b'"d_model":-1,'), Edit("add", 1, "sdpa", "quantization_config")]
    known += [Edit("write", 0, piece) for piece in (b"\xff\xfe{}", b'{"a":' * 50_000)]
    known += [Edit("write", place, piece * 8) for place in (0, 9999) for piece in (b"\xff", b"\0")]
    values = ["float32", "umt5", "sdpa", {"quant_method": "gptq"}, "I8", "F64", 16]
    return (lambda _: [load], known, keys, values, [file])


def shard_indexes(folder: Path, t5: bool = False) -> Kind:
    (T5EncoderModel(T5Config(**TINY)) if t5 else make_student()).save_pretrained(folder)
    (whole := folder / "model.safetensors").rename(folder / "whole.safetensors")
    true = load_file(folder / "whole.safetensors")
    # Of a tensor that is in two of the files, the last is taken; and theirs are the first.
    places = {name: f"-{i % 2}.safetensors" for i, name in enumerate(true)}
    for shard in set(places.values()):
        part = {name: tensor for name, tensor in true.items() if places[name] == shard}
        save_file(part, folder / shard, {"format": "pt"})
    decoy = {name: torch.full_like(tensor, 7) for name, tensor in true.items()}
    save_file(decoy, outside := folder.parent / "decoy.safetensors", {"format": "pt"})
    torch.save(decoy, folder / "decoy.bin")
    content = {"metadata": {"total_size": 9}, "weight_map": places}
    (index := folder / f"{whole.name}.index.json").write_text(json.dumps(content))

    def load() -> None:
        model = SlimT5Encoder.from_pretrained(folder) if not t5 else None
        loaded = (model or SlimT5Encoder.from_t5(folder, OUT_DIM).encoder).state_dict()
        assert_same({name: loaded[name] for name in true}, true)

    values = ["../decoy.safetensors", str(outside), "decoy.bin", "config.json", ".", "", "\0", 1]
    values += ["..\\decoy.safetensors", "x/../../decoy.safetensors", "no.safetensors", index.name]
    values += places.values()
    known = [Edit("set", 4, value) for value in values[:12]]
    known += [Edit("set", 0, {}), Edit("delete", 1), Edit("delete", 2), Edit("set", 2, [])]
    return (lambda _: [load], known, "metadata weight_map", values, [index.name])


RUN: dict[str, Any] = {
    "pipeline": {"name_or_path": "somebody/pipeline", "dtype": {"default": "bfloat16"}},
    "student": {"preset": "small", "d_ff": 32}, "prompts": {"file": "prompts.txt"}, "seed": 1,
    "output_dir": "out", "objective": {"velocity": 1, "embedding": 1.5}, "learning_rate": 1e-4,
    "pipeline_kwargs": {"height": 16, "sizes": [1, 2]}, "guidance_scales": [2.0], "trackers": [],
}  # fmt: skip
LINES = ["student: " + "[" * 5000, "x: " + '{"a": ' * 5000, "? [a, b]\n: c", "x: &a [*a]", "---"]
LINES += ["seed: 0o9", "x: 2024-13-45", "<<: {max_steps: 3}", "prompts: !!omap [a: 1]"]
LINES += ["student: !!python/object/apply:os.mkdir [ran]", "student: !x y", "student: !!set {a}"]
LINES += ["prompts: !!binary =", "output_dir: !!timestamp x", "seed: !!int x", "resume: !!bool x"]


def run_files(folder: Path) -> Kind:
    block = yaml.safe_dump(RUN)
    written(folder, {"block.yaml": block.encode(), "flow.yaml": json.dumps(RUN).encode()})

    def run(file: Path) -> None:
        parse(["--config", str(file)])
        assert not (folder / "ran").exists()

    keys = "config print_config class_path init_args << help max_steps resume pipeline.dtype"
    known = [Edit("insert", 0, f"{line}\n".encode()) for line in [*LINES, block]]
    known += [Edit("add", 1, value, "config", 1) for value in ("flow.yaml", False)]
    return (lambda names: [partial(run, folder / n) for n in names], known, keys, LINES, ())


def prompts(folder: Path) -> Kind:
    table = pd.DataFrame({"caption": [*PROMPTS, 'a "sign", with a comma', "grün"]})
    files = {
        "prompts.csv": table.to_csv().encode(), "prompts.txt": "\n".join(table.caption).encode(),
        "prompts.json": table.to_json(orient="records").encode(),
        "prompts.jsonl": table.to_json(orient="records", lines=True).encode(),
        "prompts.parquet": table.to_parquet(),
    }  # fmt: skip
    sources: list[Any] = [{"generator": "compositional", "count": 5, "seed": 0}, PROMPTS, *files]
    sources += [{"file": "prompts.csv", "column": "caption"}]
    sources += [{"dataset": "csv", "data_files": "prompts.csv", "limit": 3}]
    sources += [{"mixture": [{"weight": 2, "prompts": PROMPTS}, {"weight": 1, "prompts": ["x"]}]}]
    mappings = {f"{i:02}": json.dumps({"of": x}).encode() for i, x in enumerate(sources)}
    written(folder, files | mappings)

    def read(name: str) -> None:
        source = name if "." in name else read_json(Path(name)).get("of")
        found = PromptSource(source).all()
        assert found and all(text and text == text.strip() for text in found)
        assert "\0" not in "".join(found).encode().decode()

    keys = """file dataset generator mixture weight prompts column limit count seed config split
        revision streaming data_files data_dir trust_remote_code token features name of"""
    values = ["prompts.csv", "train", "no/where", *sources]
    known = [Edit("set", 3, 10**9), Edit("set", 1, NAN), Edit("set", 1)]
    return (lambda names: [partial(read, n) for n in names], known, keys, values, ())


def checkpoints(folder: Path, sign: bool = False) -> Kind:
    """With `sign`, they are named as if they were whole, by somebody who made them so."""
    pipe = tiny_flux()
    run = partial(resumable, folder, pipe, max_steps=6, checkpoint_every=2, keep_checkpoints=99)
    true, history = weights(run().student), history_of(folder)

    def resume() -> None:
        for path in [*folder.glob("checkpoints/0*.safetensors")] if sign else ():
            if path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
                path.rename(path.with_name(f"{path.name[:8]}-{digest}.safetensors"))
        student = run().student
        if not sign:
            assert_same(weights(student), true)
            assert history_of(folder) == history

    known = [Edit("flip", place, b"\0", file=3) for place in (0, 7, 8, 99_999)]
    known += [Edit("set", 99, NAN, file=3)]
    known += [Edit("set", 0, [], file=4), *(Edit("folder", file=file) for file in range(8))]
    return (lambda _: [resume], known, "state student ema tensor identity", (), ())


def caches(folder: Path) -> Kind:
    pipes = [tiny_flux(), tiny_flux(text_encoder_2=None)]
    kwargs = call_kwargs(pipes[0])
    cache = cache_teacher(pipes[0], PROMPTS, folder, pipeline_kwargs=kwargs)
    ((ids, mask),) = tokenize(pipes[0], PROMPTS, kwargs)
    true = {key: cache.get(key) for key in prompt_keys(ids, mask)}

    def get(key: str) -> None:
        found = TeacherCache(folder).get(key)
        assert found is None or torch.equal(found, true[key])

    def encode(pipe: Any) -> None:
        with cached_teacher(pipe, folder):
            encoder = TextSlot(pipe).encoder
            assert torch.equal(encoder(ids).last_hidden_state, torch.stack([*true.values()]))
            assert encoder.dtype == torch.float32

    calls = [*(partial(encode, pipe) for pipe in pipes), *(partial(get, key) for key in true)]
    known = [Edit(what, file=file) for what in ("swap", "folder") for file in (2, 7)]
    changes = [(0, {}), (0, []), (1, "32"), (1, -1), (1, 10**12), (3, 3), (4, "nn"), (4, "float64")]
    known += [Edit("set", place, value, file=7) for place, value in changes]
    known += [Edit("delete", place, file=7) for place in (1, 3, 4)]
    return (lambda _: calls, known, "sha256 dtype width", ["float64", 8], ())


KINDS: dict[str, Callable[[Path], Kind]] = {
    "configs": partial(student, file="config.json"), "run files": run_files, "prompts": prompts,
    "tensors": partial(student, file="model.safetensors"), "teacher caches": caches,
    "shard indexes": shard_indexes, "shard indexes of T5": partial(shard_indexes, t5=True),
    "checkpoints": checkpoints, "signed checkpoints": partial(checkpoints, sign=True),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_ends(kind: str, record_property: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # nothing waits for it
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    calls, known, keys, values, only = KINDS[kind](folder := tmp_path / "folder")
    files, counts = files_of(folder), {}
    record_property("ends", counts)
    monkeypatch.chdir(folder)
    for call in calls(set(files) & set(only or files)):  # whole, they are read
        call()

    @given(edits(keys, values, len(only) == 1))
    def damage(changes: list[Edit]) -> None:
        new = edited(files, changes, only)
        monkeypatch.chdir(written(folder, new))
        for call in calls({name for name in new if new[name] != files.get(name)}):
            ends(counts, call)

    for edit in known:
        damage = example([edit])(damage)
    damage()


CALLS: Any = [(lambda: b"x" * (3 * 2**29), Unacceptable), (lambda: time.sleep(9), Unacceptable)]
CALLS += [(lambda: torch.ones(3 * 2**27), Unacceptable), (lambda: bytearray(10**11), MemoryError)]


@pytest.mark.parametrize("call, error", [*CALLS, (lambda: {}[""], KeyError)])
def test_what_is_unacceptable(call: Any, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SECONDS", 5)
    counts: dict[str, int] = {}
    with pytest.raises(error):
        ends(counts, call)
    ends(counts, lambda: bytearray(2**29))
    ends(counts, lambda: SlimT5Config(d_model=0))
    assert counts == {"unacceptable": 1, "result": 1, "ConfigError": 1}
