"""A page to try a student in the browser, beside its teacher and beside no text at all.

    python examples/app/app.py
    python examples/app/app.py --pipeline black-forest-labs/FLUX.1-dev --cpu-offload

The first opens the miniature pipeline of `shapes_world/`, the second one of yours.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops, ImageStat
from torch import nn

from t5slim import patch_pipeline, unpatch_pipeline
from t5slim.slot import TextSlot

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world.generation import CALL, PIPELINE, STUDENT, captions

ENCODERS = ["Teacher", "Student", "No text"]
GAIN = 4  # of the difference, most of which would be too dark to be seen
PROMPTS = [
    'a fox holding a sign that says "hello"',
    "a red cube on the left of a blue sphere, and a green cone behind them",
    "a portrait of an old fisherman in warm evening light, film photograph",
]
CODE = """\
import torch
from diffusers import DiffusionPipeline

import t5slim

pipe = DiffusionPipeline.from_pretrained({pipeline!r}, dtype={dtype})
pipe.{place}
prompt, seed = {prompt!r}, {seed}
call = {call}


def generate(prompt, **text):
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, **text, **call).images[0]


teacher = generate(prompt)
no_text = generate({empty})  # T5 reads an empty prompt
t5slim.patch_pipeline(pipe, {student!r}, keep_teacher=True)
student = generate(prompt)
t5slim.unpatch_pipeline(pipe)
"""


@dataclass
class Demo:
    """A pipeline with its teacher, a student for it, and what the page says of them.

    Attributes:
        pipe: The pipeline, which is left as it was.
        student: The student.
        call: Arguments of the pipeline's call, beside prompt, noise and number of steps.
        names: Where they come from: pipeline, dtype, place and student of `CODE`.
    """

    pipe: Any
    student: nn.Module
    call: dict[str, Any]
    names: dict[str, Any]

    @property
    def text_argument(self) -> str:
        """The argument with a prompt for T5 alone, as FLUX's `prompt_2`; else `prompt`."""
        name = TextSlot(self.pipe).name.replace("text_encoder", "prompt")
        return name if name in inspect.signature(type(self.pipe).__call__).parameters else "prompt"

    def generate(self, encoder: str, prompt: str, seed: int, steps: int) -> tuple[Image.Image, str]:
        """The image under one of `ENCODERS`, and what it cost."""
        pipe, cuda = self.pipe, torch.cuda.is_available()
        times: list[float] = []

        def clock(*_: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter())

        text: dict[str, Any] = {"prompt": prompt}
        if encoder == "No text":  # a list: FLUX and SD3 take an empty string for none given
            text[self.text_argument] = [""]
        with ExitStack() as stack:
            if encoder == "Student":
                teacher = TextSlot(pipe).encoder
                patch_pipeline(pipe, self.student, keep_teacher=True)
                stack.callback(self.student.to, "cpu")
                stack.callback(unpatch_pipeline, pipe)
                teacher.to("cpu")  # so that the peak is that of one encoder
            module = TextSlot(pipe).encoder
            stack.enter_context(module.register_forward_pre_hook(clock))
            stack.enter_context(module.register_forward_hook(clock))
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            clock()
            generator = torch.Generator().manual_seed(seed)
            call = self.call | {"num_inference_steps": steps}
            image = pipe(**text, generator=generator, **call).images[0]
            clock()
            seconds = times[-1] - times[0]
            encoding = sum(times[2:-1:2]) - sum(times[1:-1:2])  # SD3 has a negative prompt, too
            mib = sum(weight.nbytes for weight in module.parameters()) / 2**20
            costs = [
                f"{seconds:.2f} s in all, {encoding:.3f} s of them to encode",
                f"Weights of the encoder: {mib:,.1f} MiB",
            ]
            if cuda:
                peak = torch.cuda.max_memory_allocated() / 2**30
                costs.append(f"Peak GPU memory with this encoder alone: {peak:.2f} GiB")
        return image, "  \n".join(costs)

    def compare(
        self, prompt: str, seed: int, steps: int, encoders: list[str]
    ) -> Iterator[list[Any]]:
        """What changes among the outputs of the page: code, then column by column."""
        images: dict[str, Image.Image] = {}
        yield [None, ""] * 4 + [self.code(prompt, seed, steps)]
        try:
            for i, encoder in enumerate(ENCODERS):
                if encoder in encoders:
                    images[encoder], costs = self.generate(encoder, prompt, seed, steps)
                    yield column(i, images[encoder], costs)
        except Exception as error:
            text = escape(f"{type(error).__name__}: {error}")
            raise gr.Error(text, duration=None) from error
        if {"Teacher", "Student"} <= images.keys():
            change = ImageChops.difference(images["Teacher"], images["Student"])
            mean = sum(ImageStat.Stat(change).mean) / 3
            text = f"Mean: {mean:.2f} of 255 levels  \nShown {GAIN} times as bright"
            yield column(3, change.point(lambda level: level * GAIN), text)

    def code(self, prompt: str, seed: int, steps: int) -> str:
        """Lines that generate the same images without this page."""
        name = self.text_argument
        empty = '""' if name == "prompt" else f'prompt, {name}=[""]'
        call = self.call | {"num_inference_steps": steps}
        return CODE.format(**self.names, prompt=prompt, seed=seed, call=call, empty=empty)

    def page(self, prompts: list[str], steps: int) -> gr.Blocks:
        """The page, with prompts and a number of steps to begin with."""
        others = "" if self.text_argument == "prompt" else ", while every other encoder reads yours"
        outputs: list[Any] = []
        with gr.Blocks(title="t5slim", analytics_enabled=False) as page:
            gr.Markdown(
                f"# t5slim\nThe same prompt and noise in a {type(self.pipe).__name__}: under its "
                "T5, the teacher; under a student in its place; and under no text at all, which is "
                f"the teacher that reads an empty prompt{others}."
            )
            prompt = gr.Textbox(prompts[0], label="Prompt")
            gr.Examples(prompts, prompt, label="Prompts to try")
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0)
                count = gr.Slider(1, max(50, steps), steps, step=1, label="Steps")
                encoders = gr.CheckboxGroup(ENCODERS, value=ENCODERS, label="Encoders")
            button = gr.Button("Generate", variant="primary")
            with gr.Row():
                for name in [*ENCODERS, "Difference"]:
                    with gr.Column(min_width=140):
                        gr.Markdown(f"### {name}")
                        shown: Any = {"show_label": False, "buttons": ["download", "fullscreen"]}
                        image = gr.Image(label=name, format="png", elem_classes="picture", **shown)
                        outputs += [image, gr.Markdown()]
            code: Any = {"value": self.code(prompts[0], 0, steps), "language": "python"}
            outputs.append(gr.Code(**code, label="The same in Python", show_line_numbers=False))
            # One generation at a time: each changes the pipeline.
            inputs: Any = [prompt, seed, count, encoders]
            triggers = [button.click, prompt.submit]
            gr.on(triggers, self.compare, inputs, outputs, concurrency_limit=1)
        return page


def column(i: int, image: Image.Image, text: str) -> list[Any]:
    """Outputs of which one column changes: Gradio writes each image again that it is given."""
    outputs = [gr.skip()] * 9
    outputs[2 * i : 2 * i + 2] = image, text
    return outputs


def main() -> None:
    """Load, warm up, and serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    miniature = os.path.relpath(PIPELINE)
    parser.add_argument("--pipeline", default=miniature, help="folder or Hub id of a pipeline")
    parser.add_argument("--student", help="folder or Hub id; default: that published for FLUX.1")
    parser.add_argument("--cpu-offload", action="store_true", help="enable_model_cpu_offload()")
    args = parser.parse_args()
    prompts, call, dtype, device = PROMPTS, {}, torch.float32, "cpu"
    if torch.cuda.is_available():
        dtype, device = torch.bfloat16, "cuda"
    if args.pipeline == miniature:
        prompts = captions(1, held_out=True, chatter=0)[1][::-1]
        args.student, call, dtype = args.student or os.path.relpath(STUDENT), CALL, torch.float32
    pipe = DiffusionPipeline.from_pretrained(args.pipeline, dtype=dtype)
    pipe.enable_model_cpu_offload() if args.cpu_offload else pipe.to(device)
    patch_pipeline(pipe, args.student, keep_teacher=True)
    student = TextSlot(pipe).encoder
    unpatch_pipeline(pipe)
    place = "enable_model_cpu_offload()" if args.cpu_offload else f'to("{device}")'
    names = {"pipeline": args.pipeline, "student": student.config.name_or_path}
    names |= {"dtype": dtype, "place": place}
    demo = Demo(pipe, student.to("cpu"), call, names)
    for encoder in ENCODERS:  # the first call under each is slower than those that follow
        demo.generate(encoder, prompts[0], 0, 1)
    steps = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    scaling = "pixelated" if args.pipeline == miniature else "auto"
    css = ".picture .image-frame { width: 100%; }"
    css += f".picture img {{ object-fit: contain; image-rendering: {scaling}; }}"
    demo.page(prompts, call.get("num_inference_steps", steps)).launch(footer_links=[], css=css)


if __name__ == "__main__":
    main()
