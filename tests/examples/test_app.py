"""The page of examples/app/: its images, its code, and the page itself in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shapes_world.generation import CALL, PIPELINE, SD3, SD3_STUDENT, STUDENT, load_pipeline

from t5slim import SlimT5Encoder, patch_pipeline
from t5slim.slot import TextSlot

gr = pytest.importorskip("gradio")
ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVE = """(async () => {
const all = selector => [...document.querySelectorAll(selector)];
const until = async found => {
  for (let i = 0; i < 600 && !found(); i++) await new Promise(done => setTimeout(done, 100));
  return found();
};
const prompt = await until(() => document.querySelector("textarea"));
prompt.value = 'a "red" <b> circle';
prompt.dispatchEvent(new Event("input"));
all("button").find(button => button.textContent.trim() === "Generate").click();
await until(() => document.body.textContent.includes("Mean difference"));
return {
  images: all("img").filter(image => image.naturalWidth === 64).length,
  code: all(".cm-line").map(line => line.textContent).join("\\n"),
  width: document.documentElement.scrollWidth,
};
})()"""


@pytest.mark.parametrize(("folder", "student"), [(PIPELINE, STUDENT), (SD3, SD3_STUDENT)])
def test_the_printed_code_generates_the_images(
    folder: Path, student: Path, tmp_path: Path
) -> None:
    from app.app import ENCODERS, Demo

    pipe = load_pipeline(folder)
    pipe.save_pretrained(tmp_path)
    teacher, own = TextSlot(pipe).encoder, SlimT5Encoder.from_pretrained(student)
    names = {"pipeline": str(tmp_path), "student": str(student)}
    demo = Demo(pipe, own, CALL, names | {"dtype": "torch.float32", "place": 'to("cpu")'})
    *_, outputs = demo.compare('the yellow word "RL" on white', 3, 4, ENCODERS)
    printed: dict[str, Any] = {}
    exec(outputs[-1], printed)
    images = [np.asarray(image, int) for image in outputs[:8:2]]
    for name, image in zip(["teacher", "student", "no_text"], images, strict=False):
        assert abs(image - np.asarray(printed[name], int)).max() <= 1, name
    assert abs(images[0] - images[2]).mean() > abs(images[0] - images[1]).mean() > 0
    assert np.array_equal(images[3], np.minimum(255, 4 * abs(images[0] - images[1])))
    assert TextSlot(pipe).encoder is teacher and "_t5slim_original" not in vars(pipe)

    patch_pipeline(pipe, own)
    with pytest.raises(gr.Error, match="already holds a student: unpatch it"):
        list(demo.compare("a red circle", 0, 1, ENCODERS))
    assert TextSlot(pipe).encoder is own
