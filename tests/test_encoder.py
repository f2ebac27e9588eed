"""SlimT5Encoder against a T5EncoderModel and a projection put together by hand."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    MT5Config,
    MT5EncoderModel,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

from t5slim import ConfigError, ProjectionAdapter, SlimT5Config, SlimT5Encoder

TINY = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 3,  # 3 heads of 4 in a width of 16, as in Flan-T5 small
    "feed_forward_proj": "gated-gelu",
}
OUT_DIM = 24
IDS = torch.randint(2, 40, (2, 7), generator=torch.Generator().manual_seed(0))
IDS[1, 4:] = 0
MASK = (IDS != 0).long()
# The config.json of a published student, at our size.
PUBLISHED_CONFIG = {
    "_name_or_path": "google/flan-t5-base",
    "architectures": ["T5EncoderWithProjection"],
    "classifier_dropout": 0.0,
    **TINY,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_decoder_layers": 2,
    "out_dim": OUT_DIM,
    "output_past": True,
    "pad_token_id": 0,
    "project_in_dim": 16,
    "project_out_dim": OUT_DIM,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "task_specific_params": {"summarization": {"max_length": 200, "prefix": "summarize: "}},
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.45.0",
    "use_cache": True,
}


class Oracle(nn.Module):
    """The paper's student, from its description."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = T5EncoderModel(T5Config(**TINY))
        self.final_projection = nn.Sequential(
            nn.Linear(16, OUT_DIM, bias=False),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(OUT_DIM, OUT_DIM, bias=False),
        )

    def forward(self, ids, mask=None):
        return self.final_projection(self.encoder(ids, attention_mask=mask).last_hidden_state)


def write_published(folder, oracle, embeddings=("shared.weight",), config=PUBLISHED_CONFIG):
    """Write a checkpoint in the published layout, name by name."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for name, value in oracle.state_dict().items():
        if not name.endswith(("shared.weight", "embed_tokens.weight")):
            tensors[name] = value.clone()
    names = {"shared.weight": "encoder.", "encoder.embed_tokens.weight": "encoder."}
    for name in embeddings:
        tensors[names[name] + name] = oracle.encoder.shared.weight.detach().clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def oracle():
    return Oracle().eval()


@pytest.fixture
def published(tmp_path, oracle):
    return write_published(tmp_path / "published", oracle)


def make_student(seed=0, **overrides):
    torch.manual_seed(seed)
    return SlimT5Encoder(SlimT5Config(**(TINY | {"project_out_dim": OUT_DIM} | overrides))).eval()


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
@pytest.mark.parametrize(
    "embeddings",
    [
        ("shared.weight",),
        ("encoder.embed_tokens.weight",),
        ("shared.weight", "encoder.embed_tokens.weight"),
    ],
    ids=["shared", "embed_tokens", "both"],
)
def test_published_layout(tmp_path, oracle, embeddings, mask, recwarn, caplog, capfd):
    folder = write_published(tmp_path / "published", oracle, embeddings)
    for name in ("transformers", "huggingface_hub"):
        logging.getLogger(name).addHandler(caplog.handler)  # they don't propagate
    student = SlimT5Encoder.from_pretrained(folder)
    assert not recwarn.list and not caplog.records and capfd.readouterr() == ("", "")
    with torch.no_grad():
        rows = student(IDS, mask).last_hidden_state
        torch.testing.assert_close(rows, oracle(IDS, mask), atol=1e-5, rtol=0)
    assert rows.shape == (2, 7, OUT_DIM)
    assert not student.training
    assert student.encoder.shared.weight is student.encoder.encoder.embed_tokens.weight


def test_loading_is_silent_in_a_fresh_process(published):
    code = f"import t5slim; t5slim.SlimT5Encoder.from_pretrained({str(published)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_saved_names_and_keys_are_the_published_ones(tmp_path, published):
    SlimT5Encoder.from_pretrained(published).save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    with (
        safe_open(published / "model.safetensors", "pt") as before,
        safe_open(tmp_path / "saved" / "model.safetensors", "pt") as after,
    ):
        assert set(after.keys()) == set(before.keys())
        for name in before.keys():  # noqa: SIM118, not a dict
            assert torch.equal(after.get_tensor(name), before.get_tensor(name)), name
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    expected = PUBLISHED_CONFIG | {"model_type": "slim_t5", "architectures": ["SlimT5Encoder"]}
    # An encoder neither decodes nor caches; the rest describes the files or was renamed.
    expected |= {"is_encoder_decoder": False, "use_cache": False, "dtype": "float32"}
    for key in ("_name_or_path", "torch_dtype", "transformers_version", "decoder_start_token_id"):
        expected.pop(key)
    assert expected.items() <= config.items()


def test_readers_of_the_published_layout_read_ours(tmp_path, oracle):
    """A class like the authors': a T5 config, and an encoder and a Sequential by these names."""

    class T5EncoderWithProjection(PreTrainedModel):
        config_class = T5Config

        def __init__(self, config):
            super().__init__(config)
            self.encoder = T5EncoderModel(config)
            self.final_projection = nn.Sequential(
                nn.Linear(config.project_in_dim, config.project_out_dim, bias=False),
                nn.ReLU(),
                nn.Dropout(0.0),
                nn.Linear(config.project_out_dim, config.project_out_dim, bias=False),
            )
            self.post_init()

    student = make_student()
    student.save_pretrained(tmp_path)
    read, info = T5EncoderWithProjection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        rows = read.final_projection(read.encoder(IDS)[0])
        torch.testing.assert_close(rows, student(IDS)[0])
    # And one that knows nothing of transformers' loading.
    missing, unexpected = oracle.load_state_dict(load_file(tmp_path / "model.safetensors"), False)
    assert (missing, unexpected) == (["encoder.encoder.embed_tokens.weight"], [])


def test_the_comfyui_node_finds_its_tensors_in_ours(tmp_path):
    """DistillT5ComfyUI (model/utils.py, model/t5.py) takes `encoder.` off what begins with it
    twice, and looks for a T5 of its own config: 12 gated layers, 12 heads of 64, 4096 channels.
    """
    config = SlimT5Config.preset("base")
    with torch.device("meta"):
        student = SlimT5Encoder(config)
    names = {
        name.replace("encoder.encoder.", "encoder.", 1).replace("encoder.shared", "shared")
        for name in student.state_dict()
        if name != "encoder.encoder.embed_tokens.weight"  # shared.weight by its other name
    }
    attention, gated = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    block = [f"{attention}.{x}" for x in "qkvo"] + [f"{gated}.{x}" for x in ("wi_0", "wi_1", "wo")]
    block += ["layer.0.layer_norm", "layer.1.layer_norm"]
    expected = {f"encoder.block.{i}.{name}.weight" for i in range(12) for name in block}
    expected |= {
        "shared.weight",
        "encoder.final_layer_norm.weight",
        f"encoder.block.0.{attention}.relative_attention_bias.weight",
        "final_projection.0.weight",
        "final_projection.3.weight",
    }
    assert names == expected
    assert config.num_heads * config.d_kv == config.d_model == 768  # it knows no other inner width
    make_student().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


def test_round_trip_of_the_auto_classes(tmp_path):
    student = make_student()
    student.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is SlimT5Config
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is SlimT5Encoder
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS)[0], student(IDS)[0])
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert half.dtype == torch.bfloat16 and half.config._attn_implementation == "eager"


def test_forward_contract(oracle):
    student = make_student()
    with torch.no_grad():
        rows = student(IDS)[0]
        for output in (
            student(input_ids=IDS).last_hidden_state,
            student(IDS, output_hidden_states=False)[0],
            student(IDS, return_dict=False)[0],
            student(inputs_embeds=student.get_input_embeddings()(IDS))[0],
        ):
            assert torch.equal(output, rows)
        masked = student(IDS, MASK)[0]
        assert torch.equal(student(input_ids=IDS, attention_mask=MASK)[0], masked)
        assert not torch.allclose(masked, rows)
        states = student(IDS, output_hidden_states=True)
        assert len(student(IDS, None, None, True, return_dict=False)) == 2
    assert [state.shape for state in states.hidden_states] == [(2, 7, 16)] * 3
    assert student.config.d_model == 16 and student.config.project_out_dim == OUT_DIM
    assert student.device.type == "cpu" and student.dtype == torch.float32
    with pytest.raises(TypeError, match="mask"):
        student(IDS, mask=MASK)


@pytest.mark.skipif(
    not T5EncoderModel._supports_sdpa, reason="this transformers has T5 without SDPA"
)
def test_attention_implementations_agree(tmp_path):
    make_student().save_pretrained(tmp_path)
    fast = SlimT5Encoder.from_pretrained(tmp_path, attn_implementation="sdpa")
    slow = SlimT5Encoder.from_pretrained(tmp_path, attn_implementation="eager")
    assert fast.encoder.config._attn_implementation == "sdpa"
    with torch.no_grad():
        for mask in (None, MASK):
            torch.testing.assert_close(fast(IDS, mask)[0], slow(IDS, mask)[0])
        attentions = slow(IDS, output_attentions=True).attentions
    assert [weights.shape for weights in attentions] == [(2, 3, 7, 7)] * 2
    with pytest.raises(ValueError, match="set_attn_implementation"):
        fast(IDS, output_attentions=True)
    fast.set_attn_implementation("eager")
    assert len(fast(IDS, output_attentions=True).attentions) == 2


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(published, dtype, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student = SlimT5Encoder.from_pretrained(published, **{name: dtype})
    for parameter_name, weight in student.named_parameters():
        wide = dtype == torch.float16 and parameter_name.endswith(".wo.weight")
        assert weight.dtype == (torch.float32 if wide else dtype), parameter_name
    assert student.dtype == dtype
    with torch.no_grad():
        rows = student(IDS)[0]
        exact = SlimT5Encoder.from_pretrained(published)(IDS)[0]
    assert rows.dtype == dtype
    torch.testing.assert_close(rows.float(), exact, atol=0.1, rtol=0.05)


def test_float16_keeps_what_it_could_not_hold(tmp_path):
    """The activations of real T5s exceed float16 behind `wo`; see the class's docstring."""
    student = make_student()
    with torch.no_grad():
        for block in student.encoder.encoder.block:
            block.layer[1].DenseReluDense.wi_1.weight *= 1e3
            block.layer[1].DenseReluDense.wo.weight *= 1e3
        student.save_pretrained(tmp_path)
        rows = student(IDS)[0]
        loaded = SlimT5Encoder.from_pretrained(tmp_path, dtype=torch.float16)
        torch.testing.assert_close(loaded(IDS)[0].float(), rows, atol=0.02, rtol=0.02)
        cast = loaded.to(torch.float16)
        assert not torch.allclose(cast(IDS)[0].float(), rows, atol=0.1)


def test_float16_round_trip(tmp_path, published):
    half = SlimT5Encoder.from_pretrained(published, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    again = SlimT5Encoder.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.float16
    assert again.encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(again(IDS)[0], half(IDS)[0])


def test_device_map(published, oracle):
    student = SlimT5Encoder.from_pretrained(published, device_map="cpu")
    with torch.no_grad():
        torch.testing.assert_close(student(IDS)[0], oracle(IDS))


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        student = make_student(dropout_rate=0.0).train()
        student.final_projection[2].p = 0.0
        if checkpointing:
            # transformers 5 renames it
            name = "activation" if hasattr(student, "is_activation_checkpointing") else "gradient"
            getattr(student, f"{name}_checkpointing_enable")()
            assert getattr(student, f"is_{name}_checkpointing")
        student(IDS)[0].square().mean().backward()
        gradients.append({name: weight.grad for name, weight in student.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_new_tokens_as_textual_inversion_adds_them(tmp_path):
    student = make_student()
    with torch.no_grad():
        rows = student(IDS)[0]
        student.resize_token_embeddings(42)
        torch.testing.assert_close(student(IDS)[0], rows)
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
            rows = adapter(scale * torch.randn(64, dims[0]))
        assert rows.square().mean().sqrt().item() == pytest.approx(scale, rel=0.35)
    assert [tuple(weight.shape) for weight in adapter.parameters()] == [dims[::-1], (dims[1],) * 2]


def test_a_fresh_student_has_a_fresh_adapter():
    """transformers' own initialization must not replace the adapter's."""
    student = make_student(d_model=64, project_out_dim=64)
    assert student.final_projection[0].weight.std().item() == pytest.approx(
        (2 / 64) ** 0.5, rel=0.05
    )
    assert student.final_projection[3].weight.std().item() == pytest.approx(64**-0.5, rel=0.05)


def test_dropout_rate_speaks_for_the_adapter_too():
    """A student of 0.3 M parameters learns nothing by heart, and dropout only costs it."""
    still = make_student(dropout_rate=0.0).train()
    assert torch.equal(still(IDS)[0], still(IDS)[0])
    assert make_student(dropout_rate=0.3).final_projection[2].p == 0.3


@pytest.mark.parametrize(
    "name, millions", [("small", 54), ("base", 130), ("large", 362), ("xl", 1249)]
)
def test_presets(name, millions):
    with torch.device("meta"):
        student = SlimT5Encoder(SlimT5Config.preset(name))
    assert round(sum(weight.numel() for weight in student.parameters()) / 1e6) == millions
    assert student.config.project_out_dim == 4096 and student.config.is_gated_act


def test_preset_overrides_and_unknown_names():
    assert SlimT5Config.preset("base", project_out_dim=2048).project_out_dim == 2048
    with pytest.raises(ConfigError, match=r"small, base, large, xl, got 'huge'"):
        SlimT5Config.preset("huge")


class TestFromT5:
    @pytest.fixture
    def t5(self, tmp_path):
        """A whole T5 on disk, as in Flan-T5 with a head of its own."""
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(T5Config(**TINY, tie_word_embeddings=False)).eval()
        model.save_pretrained(tmp_path / "t5")
        return model, tmp_path / "t5"

    def test_encoder_is_the_pretrained_one(self, t5, recwarn, caplog, capfd):
        model, folder = t5
        capfd.readouterr()
        logging.getLogger("transformers").addHandler(caplog.handler)
        student = SlimT5Encoder.from_t5(folder, OUT_DIM)
        assert not recwarn.list and not caplog.records and capfd.readouterr() == ("", "")
        with torch.no_grad():
            expected = model.encoder(IDS)[0]
            torch.testing.assert_close(student.encoder(IDS)[0], expected)
            rows = student(IDS)[0]
        assert rows.shape == (2, 7, OUT_DIM) and not student.training
        ratio = rows.square().mean().sqrt() / expected.square().mean().sqrt()
        assert 0.5 < ratio < 2

    def test_trains_saves_and_loads(self, t5, tmp_path):
        student = SlimT5Encoder.from_t5(t5[1], OUT_DIM)
        student(IDS)[0].mean().backward()
        assert all(weight.grad is not None for weight in student.parameters())
        student.save_pretrained(tmp_path / "student")
        loaded = SlimT5Encoder.from_pretrained(tmp_path / "student")
        with torch.no_grad():
            torch.testing.assert_close(loaded(IDS)[0], student(IDS)[0])
        assert str(tmp_path) not in (tmp_path / "student" / "config.json").read_text()

    def test_dtype(self, t5):
        student = SlimT5Encoder.from_t5(t5[1], OUT_DIM, dtype=torch.float16)
        wide = {name for name, weight in student.named_parameters() if weight.dtype != torch.half}
        assert len(wide) == 2 and all(".wo." in name for name in wide)
        student.set_attn_implementation("eager")
        assert student.encoder.config._attn_implementation == "eager"

    def test_mt5_and_encoder_only_files(self, tmp_path):
        sizes = {key: value for key, value in TINY.items() if key != "feed_forward_proj"}
        model = MT5EncoderModel(MT5Config(**sizes)).eval()
        model.save_pretrained(tmp_path)
        student = SlimT5Encoder.from_t5(tmp_path, OUT_DIM)
        with torch.no_grad():
            torch.testing.assert_close(student.encoder(IDS)[0], model(IDS)[0])

    def test_umt5(self, tmp_path):
        """Each of its layers has position biases of its own, which a T5 has no place for."""
        torch.manual_seed(0)
        model = UMT5EncoderModel(UMT5Config(**TINY)).eval()
        model.save_pretrained(tmp_path / "umt5")
        student = SlimT5Encoder.from_t5(tmp_path / "umt5", OUT_DIM)
        bias = "encoder.encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
        assert student.config.encoder_type == "umt5" and bias in student.state_dict()
        with torch.no_grad():
            for mask in (None, MASK):
                expected = model(IDS, attention_mask=mask)[0]
                rows = student.encoder(IDS, attention_mask=mask)[0]
                torch.testing.assert_close(rows, expected)
            expected = student.final_projection(model(IDS)[0])
            torch.testing.assert_close(student(IDS)[0], expected)

        student(IDS)[0].mean().backward()
        assert all(weight.grad is not None for weight in student.parameters())
        student.save_pretrained(tmp_path / "student")
        for cls in (SlimT5Encoder, AutoModel):
            loaded = cls.from_pretrained(tmp_path / "student")
            assert isinstance(loaded, SlimT5Encoder)
            with torch.no_grad():
                torch.testing.assert_close(loaded(IDS)[0], student(IDS)[0])
        half = SlimT5Encoder.from_pretrained(tmp_path / "student", dtype=torch.float16)
        assert half.encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float
        config = SlimT5Config.preset("small", encoder_type="umt5", vocab_size=256_384)
        assert json.loads(config.to_json_string())["encoder_type"] == "umt5"
        assert "encoder_type" not in json.loads(SlimT5Config.preset("small").to_json_string())
        with pytest.raises(ConfigError, match="encoder_type: expected 't5' or 'umt5', got 'bert'"):
            SlimT5Config(encoder_type="bert")

    def test_refuses_what_is_no_t5(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bart", "d_model": 16}))
        with pytest.raises(ConfigError, match="expected a T5, mT5 or UMT5, got model_type 'bart'"):
            SlimT5Encoder.from_t5(tmp_path)

    def test_never_holds_the_decoder(self, tmp_path):
        """Beside a small encoder, the decoder's 50 MB would show in the process' peak memory."""
        sizes = TINY | {"d_model": 256, "d_ff": 4096, "num_layers": 1}
        for name, decoder_layers in (("warm-up", 1), ("t5", 4)):
            config = T5Config(**sizes, num_decoder_layers=decoder_layers)
            T5ForConditionalGeneration(config).save_pretrained(tmp_path / name)
        code = f"""
import resource, t5slim
peaks = []
for name in ("warm-up", "t5"):
    t5slim.SlimT5Encoder.from_t5({str(tmp_path)!r} + "/" + name, 16)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(1024 * (peaks[1] - peaks[0]))
"""
        encoder = 4 * sum(
            weight.numel()
            for weight in SlimT5Encoder(SlimT5Config(**sizes, project_out_dim=16)).parameters()
        )
        file = (tmp_path / "t5" / "model.safetensors").stat().st_size
        assert file > 50e6 > 3 * encoder
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert int(done.stdout) < encoder, done.stderr
