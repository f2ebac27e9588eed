"""SlimT5Encoder against a T5EncoderModel and a projection put together by hand."""

import json
import logging
import subprocess
import sys

import pytest
import torch
import transformers
from helpers.students import IDS, MASK, OUT_DIM, TINY, close, embeddings, make_student
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, T5Config, T5EncoderModel, T5ForConditionalGeneration

import t5slim
from t5slim import ProjectionAdapter, SlimT5Config, SlimT5Encoder

# The config.json of a published student, at our size.
PUBLISHED_CONFIG = {
    **TINY,
    "architectures": ["T5EncoderWithProjection"],
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "model_type": "t5",
    "n_positions": 512,
    "out_dim": OUT_DIM,
    "project_in_dim": 16,
    "project_out_dim": OUT_DIM,
    "task_specific_params": {"summarization": {"max_length": 200, "prefix": "summarize: "}},
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.45.0",
}
SHARED, EMBED = "encoder.shared.weight", "encoder.encoder.embed_tokens.weight"


class Oracle(nn.Module):
    """The paper's student, from its description."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = T5EncoderModel(T5Config(**TINY))
        first, last = nn.Linear(16, OUT_DIM, bias=False), nn.Linear(OUT_DIM, OUT_DIM, bias=False)
        self.final_projection = nn.Sequential(first, nn.ReLU(), nn.Dropout(0.1), last)

    def forward(self, ids, mask=None):
        return (self.final_projection(self.encoder(ids, attention_mask=mask)[0]),)

    def write(self, folder, names=(SHARED,)):
        """Write a checkpoint in the published layout, with the embedding under these names."""
        tensors = {name: value.clone() for name, value in self.state_dict().items()}
        embedding = tensors.pop(SHARED)
        del tensors[EMBED]
        tensors |= {name: embedding.clone() for name in names}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(PUBLISHED_CONFIG))
        return tensors


@pytest.fixture
def silent(recwarn, caplog):
    """Nothing is warned of or logged."""
    for name in ("transformers", "huggingface_hub"):
        logging.getLogger(name).addHandler(caplog.handler)  # they don't propagate
    yield
    assert not recwarn.list and not caplog.records


@pytest.mark.parametrize("names", [(SHARED,), (EMBED,), (SHARED, EMBED)])
def test_published_layout(tmp_path, names, silent):
    oracle = Oracle().eval()
    published = oracle.write(tmp_path)
    oracle.write(tmp_path, names)
    student = SlimT5Encoder.from_pretrained(tmp_path)
    for mask in (None, MASK):
        ours, theirs = embeddings(student, mask), embeddings(oracle, mask)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert ours.shape == (2, 7, OUT_DIM) and not student.training
    assert student.encoder.shared.weight is student.encoder.encoder.embed_tokens.weight

    student.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[name], published[name]) for name in saved)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config.pop("model_type"), config.pop("architectures")) == ("slim_t5", ["SlimT5Encoder"])
    # What is about decoding is another now, or dropped.
    same = {*TINY, "dense_act_fn", "is_gated_act", "out_dim", "project_in_dim", "project_out_dim"}
    assert all(config[key] == PUBLISHED_CONFIG[key] for key in {*same, "tie_word_embeddings"})


def test_forward():
    student = make_student(dropout_rate=0.3)
    assert student.final_projection[2].p == 0.3
    expected = embeddings(student)
    with torch.no_grad():
        for output in (
            student(input_ids=IDS).last_hidden_state,
            student(IDS, return_dict=False)[0],
            student(inputs_embeds=student.get_input_embeddings()(IDS))[0],
        ):
            assert torch.equal(output, expected)
        assert torch.equal(student(input_ids=IDS, attention_mask=MASK)[0], student(IDS, MASK)[0])
        assert not torch.allclose(student(IDS, MASK)[0], expected)
        assert len(student(IDS, None, None, True, return_dict=False)) == 2
        states = student(IDS, output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [(2, 7, 16)] * 3


@pytest.mark.parametrize("encoder_type", ["t5", "umt5"])
def test_forward_takes_what_t5encodermodel_takes(encoder_type):
    student = make_student(encoder_type=encoder_type)
    expected = embeddings(student)
    for name in ("use_cache", "head_mask", "past_key_values", "cache_position", "return_dict"):
        for value in (None, True):
            with torch.no_grad():
                assert torch.equal(student(IDS, **{name: value})[0], expected), name
    student.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = student(IDS, output_attentions=True).attentions
    assert [one.shape for one in attentions] == [(2, 3, 7, 7)] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, dtype):
    """The activations of real T5s exceed float16 behind `wo`; see the class's docstring."""
    student = make_student()
    with torch.no_grad():
        for block in student.encoder.encoder.block:
            block.layer[1].DenseReluDense.wi_1.weight *= 1e3
            block.layer[1].DenseReluDense.wo.weight *= 1e3
    student.save_pretrained(tmp_path)
    T5EncoderModel(T5Config(**TINY)).save_pretrained(tmp_path / "t5")
    half = SlimT5Encoder.from_pretrained(tmp_path, dtype=dtype)
    for model in (half, SlimT5Encoder.from_t5(tmp_path / "t5", dtype=dtype)):
        for name, weight in model.named_parameters():
            wide = dtype == torch.float16 and name.endswith(".wo.weight")
            assert weight.dtype == (torch.float32 if wide else dtype), name
        assert model.dtype == embeddings(model).dtype == dtype
    error = (embeddings(half).float() - embeddings(student)).abs().max()
    assert error < (0.02 if dtype == torch.float16 else 0.2)


def test_new_tokens_as_textual_inversion_adds_them(tmp_path):
    student, expected = make_student(), embeddings(make_student())
    student.resize_token_embeddings(42)
    torch.testing.assert_close(embeddings(student), expected)
    with torch.no_grad():
        student.get_input_embeddings().weight[41] = 1.0
    student.save_pretrained(tmp_path)
    loaded = SlimT5Encoder.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 42
    assert (loaded.get_input_embeddings().weight[41] == 1).all()


@pytest.mark.parametrize("dims", [(16, 24), (512, 4096), (64, 32)])
def test_fresh_adapter_keeps_the_scale(dims):
    torch.manual_seed(0)
    adapter = ProjectionAdapter(*dims).eval()
    for scale in (0.1, 1.0):
        with torch.no_grad():
            output = adapter(scale * torch.randn(64, dims[0]))
        assert output.square().mean().sqrt().item() == pytest.approx(scale, rel=0.35)
    assert [tuple(weight.shape) for weight in adapter.parameters()] == [dims[::-1], (dims[1],) * 2]


@pytest.mark.parametrize(
    "name, millions", [("small", 54), ("base", 130), ("large", 362), ("xl", 1249)]
)
def test_presets(name, millions):
    with torch.device("meta"):
        student = SlimT5Encoder(SlimT5Config.preset(name))
    assert round(student.num_parameters() / 1e6) == millions
    assert student.config.parameters / 1e6 == pytest.approx(millions, rel=0.02)
    assert student.config.project_out_dim == 4096 and student.config.is_gated_act
    # Which is written, though it is the default: older readers want it.
    assert json.loads(student.config.to_json_string())["out_dim"] == 4096
    assert SlimT5Config.preset(name, project_out_dim=2048).project_out_dim == 2048


T5S = {
    # With a decoder, and a head of its own as in Flan-T5.
    "t5": lambda: T5ForConditionalGeneration(T5Config(**TINY, tie_word_embeddings=False)),
    "mt5": lambda: transformers.MT5EncoderModel(transformers.MT5Config(**TINY)),
    # Each of its layers has position biases of its own, which a T5 has no place for.
    "umt5": lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**TINY)),
}


@pytest.mark.parametrize("family", T5S)
def test_from_t5(tmp_path, family, silent):
    torch.manual_seed(0)
    model = T5S[family]().eval()
    model.save_pretrained(tmp_path / "t5")
    student = SlimT5Encoder.from_t5(tmp_path / "t5", OUT_DIM)
    assert not student.training
    assert student.config.encoder_type == ("umt5" if family == "umt5" else "t5")
    for mask in (None, MASK):
        expected = model.get_encoder()(IDS, attention_mask=mask)[0]
        torch.testing.assert_close(student.encoder(IDS, attention_mask=mask)[0], expected)
    assert embeddings(student).shape == (2, 7, OUT_DIM) and not embeddings(student).any()
    student.final_projection[3].weight.data.normal_()
    student(IDS)[0].mean().backward()
    assert all(weight.grad is not None for weight in student.parameters())
    student.save_pretrained(tmp_path / "student")
    for cls in (SlimT5Encoder, AutoModel, transformers.AutoModelForTextEncoding):
        loaded = cls.from_pretrained(tmp_path / "student")
        assert type(loaded) is SlimT5Encoder and close(loaded, student)
    assert str(tmp_path) not in (tmp_path / "student" / "config.json").read_text()


def test_import_is_light_and_registers_the_student():
    code = """
import sys, t5slim, transformers
print({"diffusers", "t5slim.distill", "t5slim.evaluate"} & set(sys.modules))
config = transformers.AutoConfig.for_model("slim_t5", d_model=16, d_kv=4, d_ff=8, num_layers=1)
print(type(config).__name__, type(transformers.AutoModel.from_config(config)).__name__)
print(hasattr(sys.modules["t5slim.encoder"], "PreTrainedModel"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("set()\nSlimT5Config SlimT5Encoder\nTrue\n", "")


def test_public_names():
    for name in t5slim.__all__:
        value = getattr(t5slim, name)
        assert value.__name__ == name
        if name.endswith("Error") and name != "T5SlimError":
            assert issubclass(value, t5slim.T5SlimError)
            assert issubclass(value, OSError if name == "HubAccessError" else ValueError)
    assert t5slim.distill.__name__ == "t5slim.distill"
    assert not hasattr(t5slim, "patch_pipelin")
