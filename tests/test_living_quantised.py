"""Quantised denoisers, T5s and students: patched, distilled from, undone.

Each library is tried if it is installed; the tests need no GPU, but for bitsandbytes' denoisers.
Plain assignment of a student would do as well in float32. Elsewhere its rows keep their float32,
which a denoiser in bfloat16 refuses, or computes in: the torchao case shows it.
"""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
import transformers
from diffusers import FluxPipeline, FluxTransformer2DModel, GGUFQuantizationConfig
from test_patch import paint
from tiny import PROMPTS, call_kwargs, tiny_flux, tiny_student

from t5slim import SlimT5Encoder, patch_pipeline, unpatch_pipeline
from t5slim.distill import DistillConfig, capture, train

# Inside of them, and on their way into a model; not ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def torchao(library):
    from torchao.quantization import Int8WeightOnlyConfig

    return library.TorchAoConfig(Int8WeightOnlyConfig())


def quanto(library):
    key = "weights" if library is transformers else "weights_dtype"
    return library.QuantoConfig(**{key: "int8"})


def eight_bit(library):
    return library.BitsAndBytesConfig(load_in_8bit=True)


def four_bit(library):
    return library.BitsAndBytesConfig(load_in_4bit=True)


# How to quantise, what to import, and the dtype to compute in.
LIBRARIES = {
    "torchao": (torchao, "torchao", torch.bfloat16),
    "quanto": (quanto, "optimum.quanto", torch.float32),
    "bitsandbytes, 8 bits": (eight_bit, "bitsandbytes", torch.bfloat16),
    "bitsandbytes, 4 bits": (four_bit, "bitsandbytes", torch.float32),
}
DENOISERS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name.startswith("bits") and not torch.cuda.is_available(),
            reason="diffusers quantises with bitsandbytes on a GPU only",
        ),
    )
    for name in LIBRARIES
]


def wanted(name):
    quantise, module, dtype = LIBRARIES[name]
    pytest.importorskip(module)
    return quantise, dtype


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    tiny_flux().save_pretrained(folder)
    return folder


def load(folder, dtype, **parts):
    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=dtype, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda") if torch.cuda.is_available() else pipe


def equal(one, other):
    if hasattr(one, "dequantize") and type(one) not in (torch.Tensor, torch.nn.Parameter):
        one, other = one.dequantize(), other.dequantize()
    return torch.equal(one, other)


def learns(pipe, dtype):
    """A student, taught through this pipeline for one update."""
    guest = tiny_student(tiny_flux()).to(pipe.device)
    before = copy.deepcopy(guest.state_dict())
    config = DistillConfig(max_steps=1, batch_size=2, objective="velocity")
    train(pipe, guest, PROMPTS[:2], config, pipeline_kwargs=call_kwargs(pipe, steps=2))
    assert not any(torch.equal(before[name], weight) for name, weight in guest.named_parameters())
    return guest


@pytest.mark.parametrize("name", LIBRARIES)
def test_t5(name, folder):
    """Patched with a student of its computing dtype, learned from, and given back bit for bit."""
    quantise, dtype = wanted(name)
    teacher = transformers.T5EncoderModel.from_pretrained(
        folder, subfolder="text_encoder_2", quantization_config=quantise(transformers), dtype=dtype
    )
    assert any(type(parameter) is not torch.nn.Parameter for parameter in teacher.parameters())
    pipe = load(folder, dtype, text_encoder_2=teacher)
    old, before = paint(pipe), copy.deepcopy(teacher.state_dict())
    plain = load(folder, dtype)
    walk = capture(pipe, PROMPTS[:1], pipeline_kwargs=call_kwargs(pipe, steps=1))
    exact = capture(plain, PROMPTS[:1], pipeline_kwargs=call_kwargs(pipe, steps=1))
    error = walk.slot_calls[0].rows.float() - exact.slot_calls[0].rows.float()
    # Of a T5 of this size 4 bits leave little; rows that had nothing in common would be at 1.4.
    bound = 1.0 if name.endswith("4 bits") else 0.2
    assert 0 < error.std() < bound * exact.slot_calls[0].rows.float().std()
    guest = learns(pipe, dtype)

    patch_pipeline(pipe, guest, keep_teacher=True)
    assert {parameter.dtype for parameter in guest.parameters()} == {dtype}
    assert not torch.equal(paint(pipe), old)
    unpatch_pipeline(pipe)
    assert pipe.text_encoder_2 is teacher
    after = teacher.state_dict()
    assert before.keys() == after.keys()
    assert all(equal(before[key], after[key]) for key in before)
    assert torch.equal(paint(pipe), old)


@pytest.mark.parametrize("name", DENOISERS)
def test_denoiser(name, folder):
    """The gradient reaches the student through it."""
    quantise, dtype = wanted(name)
    denoiser = FluxTransformer2DModel.from_pretrained(
        folder,
        subfolder="transformer",
        quantization_config=quantise(diffusers),
        torch_dtype=dtype,
    )
    assert any(type(parameter) is not torch.nn.Parameter for parameter in denoiser.parameters())
    pipe = load(folder, dtype, transformer=denoiser)
    old, guest = paint(pipe), learns(pipe, dtype)
    patch_pipeline(pipe, guest, keep_teacher=True)
    assert not torch.equal(paint(pipe), old)
    assert torch.equal(paint(unpatch_pipeline(pipe)), old)
    if dtype == torch.bfloat16:
        pipe.text_encoder_2 = tiny_student(tiny_flux()).to(pipe.device)
        rows, _, _ = pipe.encode_prompt(PROMPTS[0], None)
        assert rows.dtype == torch.float32


@pytest.mark.parametrize("name", LIBRARIES)
def test_student(name, folder, tmp_path):
    """Loaded quantised, it paints nearly what it paints in full."""
    quantise, dtype = wanted(name)
    student = tiny_student(tiny_flux())
    student.save_pretrained(tmp_path)
    guest = SlimT5Encoder.from_pretrained(
        tmp_path, quantization_config=quantise(transformers), dtype=dtype
    )
    kinds = [type(parameter) for parameter in guest.parameters()]
    assert set(kinds) - {torch.nn.Parameter}
    full = paint(patch_pipeline(load(folder, dtype), student)).float()
    pipe = load(folder, dtype)
    old = paint(pipe)
    patch_pipeline(pipe, guest, keep_teacher=True)
    assert [type(parameter) for parameter in guest.parameters()] == kinds
    error = paint(pipe).float() - full
    assert 0 < error.std() < 0.3 * (old.float() - full).std()
    assert torch.equal(paint(unpatch_pipeline(pipe)), old)


def test_gguf_denoiser(folder, tmp_path):
    """A file in 8 bits. (A T5 of a GGUF file is dequantised by transformers: one as any other.)"""
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "transformer.gguf"
    writer = gguf.GGUFWriter(file, "flux")
    for name, weight in tiny_flux().transformer.state_dict().items():
        kind = gguf.GGMLQuantizationType.F32
        if weight.ndim == 2 and weight.shape[1] % 32 == 0 and "embed" not in name:
            kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    denoiser = FluxTransformer2DModel.from_single_file(
        str(file),
        config=str(folder / "transformer"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    assert any(parameter.dtype == torch.uint8 for parameter in denoiser.parameters())
    pipe = load(folder, torch.float32, transformer=denoiser)
    old, guest = paint(pipe), learns(pipe, torch.float32)
    patch_pipeline(pipe, guest, keep_teacher=True)
    assert pipe.text_encoder_2.dtype == torch.float32
    assert not torch.equal(paint(pipe), old)
    assert torch.equal(paint(unpatch_pipeline(pipe)), old)
