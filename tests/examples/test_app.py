"""The page of examples/app/, with `pip install gradio` and, for the browser, `playwright`."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shapes_world.generation import CALL, PIPELINE, SD3, SD3_STUDENT, STUDENT, load_pipeline

from t5slim import SlimT5Encoder, patch_pipeline
from t5slim.slot import TextSlot

gr = pytest.importorskip("gradio")
APP = Path(__file__).parents[2] / "examples" / "app" / "app.py"


@pytest.mark.parametrize(("folder", "student"), [(PIPELINE, STUDENT), (SD3, SD3_STUDENT)])
def test_its_code_generates_its_images(folder: Path, student: Path, tmp_path: Path) -> None:
    from app.app import ENCODERS, Demo

    pipe, own = load_pipeline(folder), SlimT5Encoder.from_pretrained(student)
    pipe.save_pretrained(tmp_path)
    teacher, names = TextSlot(pipe).encoder, {"pipeline": str(tmp_path), "student": str(student)}
    names |= {"dtype": "torch.float32", "place": f'to("{pipe.device}")'}
    (*_, code), *columns = Demo(pipe, own, CALL, names).compare('the word "RL"', 3, 4, ENCODERS)
    exec(code, shown := {})
    images = [np.asarray(column[2 * i], int) for i, column in enumerate(columns)]
    one, other, nothing, difference = images
    for name, image in zip(["teacher", "student", "no_text"], images, strict=False):
        assert abs(image - np.asarray(shown[name], int)).max() <= 1, name
    assert abs(one - nothing).mean() > abs(one - other).mean() > 0
    assert np.array_equal(difference, np.minimum(255, 4 * abs(one - other)))
    assert TextSlot(pipe).encoder is teacher and "_t5slim_original" not in vars(pipe)
    with pytest.raises(gr.Error, match="already holds a student: unpatch it"):
        list(Demo(patch_pipeline(pipe, own), own, CALL, names).compare("", 0, 1, ENCODERS))


@pytest.mark.browser
def test_on_a_phone_and_a_laptop_and_without_other_servers(request: pytest.FixtureRequest) -> None:
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        app = subprocess.Popen([sys.executable, "-u", APP], stdout=subprocess.PIPE, text=True)
        request.addfinalizer(app.kill)
        url = next(line.split()[-1] for line in app.stdout if "http://" in line)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for width in (390, 1280):
            page, asked = browser.new_page(viewport={"width": width, "height": 800}), []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.set_default_timeout(120_000)
            page.goto(url)
            page.get_by_label("Prompt", exact=True).fill("a <b>red</b> circle")
            page.locator("input[type=number]").last.fill("2")  # steps
            page.get_by_role("button", name="Generate").click()
            page.get_by_text("of 255 levels").wait_for()
            assert page.locator(".picture img").count() == 4
            assert "'a <b>red</b> circle', 0" in page.locator(".cm-content").inner_text()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert all(address.startswith((url, "data:")) for address in asked)
