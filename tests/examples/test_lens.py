"""Diffusion Lens, the example."""

import numpy as np
import pytest
import torch
from lens.lens import hidden_states, lens, lens_grid, main
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, component, tiny_flux, tiny_ltx, tiny_student
from transformers import T5EncoderModel, UMT5EncoderModel

from t5slim import patch_pipeline
from t5slim.errors import DistillError


@pytest.mark.parametrize("name", ["flux", "sd3", "chroma"])
def test_the_last_layer_gives_the_images_of_the_whole_encoder(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    student = tiny_student(pipe, num_layers=3)
    kwargs = call_kwargs(pipe)
    seen = lens(pipe, PROMPTS[:2], {"mine": student}, seed=4, pipeline_kwargs=kwargs)
    assert [list(images) for images in seen.values()] == [[0, 1, 2], [0, 1, 2, 3]]
    assert lens_grid(PROMPTS, seen, [1, 0]).width > 4 * seen["mine"][0][1].width
    some = lens(pipe, PROMPTS[1:2], {"mine": student}, layers=(0, 3, -1), pipeline_kwargs=kwargs)
    assert [list(images) for images in some.values()] == [[0, 2], [0, 3]]
    for encoder in seen:
        if encoder == "mine":
            patch_pipeline(pipe, student)
        generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
        images = pipe(PROMPTS[:2], generator=generators, **kwargs | {"output_type": "pil"}).images
        assert np.array_equal([*seen[encoder].values()][-1], images)
        assert not np.array_equal(seen[encoder][0][1], images[1])


@pytest.mark.parametrize(
    ("encoder_type", "cls"), [("t5", T5EncoderModel), ("umt5", UMT5EncoderModel)]
)
def test_hidden_states_are_those_of_an_encoder_with_fewer_layers(encoder_type, cls) -> None:
    teacher = component(cls).eval()
    student = tiny_student(tiny_flux(), num_layers=2, encoder_type=encoder_type)
    ids = torch.arange(3, 15).view(2, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    for encoder in (teacher, student):
        stack = encoder.encoder.encoder if encoder is student else encoder.encoder
        projection = encoder.final_projection if encoder is student else torch.nn.Identity()
        with torch.no_grad():
            words = projection(stack.final_layer_norm(stack.embed_tokens(ids)))
            whole = encoder(ids, attention_mask=mask)[0]
            kept = stack.block
            stack.block = kept[:1]
            first = encoder(ids, attention_mask=mask)[0]
            stack.block = kept
        for layer, expected in enumerate((words, first, whole)):
            assert torch.equal(hidden_states(encoder, layer, ids, mask), expected)


def test_what_has_no_layers_or_no_images_is_refused() -> None:
    pipe = tiny_flux()
    with pytest.raises(ValueError, match=r"layers is \[9\]; a T5EncoderModel has 0 to 2"):
        lens(pipe, PROMPTS, layers=[9])
    with pytest.raises(ValueError, match="A Linear has no layers of a T5"):
        lens(pipe, PROMPTS, {"x": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="generates no images"):
        lens(tiny_ltx(), PROMPTS[:1], layers=[0], pipeline_kwargs=call_kwargs(tiny_ltx()))
    with pytest.raises(DistillError, match="expected a list of texts"):
        lens(pipe, PROMPTS[0], layers=[0], pipeline_kwargs=call_kwargs(pipe))


def test_the_command(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the image grid is saved
    monkeypatch.setattr("sys.argv", ["lens.py", "--count", "1", "--steps", "1"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["teacher"] * 7 + ["student"] * 3
    assert "quality 100% (21 to 100)" in lines[6]
