"""What holds of each pipeline class, measured on the tiny real pipeline of its case.

`python tests/zoo/table.py` writes it into the table of docs/pipelines.md.
"""

import inspect
import math
import re
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm
from transformers import T5EncoderModel, UMT5EncoderModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.trajectories import CPU, assert_replays, captured, known
from tiny import TEXT_WIDTH, tiny_student

import t5slim
from t5slim.distill import DistillConfig, TrajectoryReservoir
from t5slim.distill.objective import fisher_information
from t5slim.distill.pipeline import call_encoder
from t5slim.distill.replay import Samples, predictions
from t5slim.errors import DistillError
from t5slim.slot import TextSlot
from zoo import CASES
from zoo.case import Case

TABLE = Path(__file__).parents[2] / "docs" / "pipelines.md"


def main() -> None:
    warnings.simplefilter("ignore")
    groups: dict[str, list[str]] = defaultdict(list)
    for case in tqdm(CASES.values(), "pipelines"):
        groups[measure(case)].append(f"`{case.name}`")
    lines = [
        f"{group} {', '.join(sorted(groups[group]))} |"
        for group in sorted(groups, key=lambda group: (not group.startswith("| gather"), group))
    ]
    distilled = sum(case.route != "none" for case in CASES.values())
    text = re.sub(r"diffusers [\d.]+", f"diffusers {diffusers.__version__}", TABLE.read_text())
    text = re.sub(r"\d+ classes; \d+ of", f"{len(CASES)} classes; {distilled} of", text)
    head, *_ = text.partition("| gather")
    TABLE.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def measure(case: Case) -> str:
    """Find the slot; patch, unpatch; capture; replay by the library's route; lead a gradient.

    Returns the beginning of the line in docs/pipelines.md that the class shares with its like.
    """
    pipe, call = case.pipe(), case.call()
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    name, t5 = TextSlot(pipe).name, TextSlot(pipe).encoder
    student = tiny_student(pipe, **case.student)
    assert isinstance(t5, (T5EncoderModel, UMT5EncoderModel))
    for encoder in (student, None, t5):  # None: as loaded without T5
        pipe.register_modules(**{name: encoder})
        slot = TextSlot(pipe)
        assert slot.name == TextSlot(case.cls).name == name and slot.encoder is encoder
        assert slot.tokenizer is getattr(pipe, name.replace("text_encoder", "tokenizer"))
        assert slot.width == TEXT_WIDTH or (case.refused and encoder is None)
    place = f"`{name}` | {type(t5).__name__.removesuffix('EncoderModel')} |"
    original = latents(pipe, case, call)
    t5slim.patch_pipeline(pipe, student, keep_teacher=True)
    assert not torch.equal(latents(pipe, case, call), original)
    t5slim.unpatch_pipeline(pipe)
    assert torch.equal(latents(pipe, case, call), original)

    # A capture may end in the middle of a call, for which PAG sets other attention processors.
    denoiser = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    processors = getattr(denoiser, "attn_processors", None)
    seeds = range(len(case.texts))  # a noise for each prompt, as in training
    try:
        _, calls, teacher = captured(pipe, case.texts, pipeline_kwargs=call, seed=seeds)
    except DistillError as reason:
        assert case.refused and case.refused in str(reason), reason
        return f"| none: {reason} | {place}"
    assert getattr(denoiser, "attn_processors", None) == processors
    gather = isinstance(calls[0], Samples)
    # The split may find what the capture didn't, and says so in the trajectory of its calls.
    route, why = ("gather", "") if gather else ("fallback", calls[0].trajectory.reason)
    assert route == case.route and case.fallback in why, why
    assert_replays(pipe, calls, teacher)
    own = predictions(pipe, calls, lambda i: call_encoder(student, *teacher.tokens(known(i), CPU)))
    losses = [(p - call.target).square().mean() for p, call in zip(own, calls, strict=True)]
    torch.stack(losses).mean().backward()
    # Not to clip, but for the norm and its check.
    assert clip_grad_norm_(student.parameters(), math.inf, error_if_nonfinite=True) > 0
    config = DistillConfig(max_steps=3, batch_size=len(case.texts), prompt_dropout=0.0)
    reservoir = TrajectoryReservoir(pipe, case.texts, config, pipeline_kwargs=call)
    assert fisher_information(pipe, reservoir, config).isfinite().all()
    return f"| {route}: {why} | {place}" if why else f"| {route} | {place}"


def latents(pipe: Any, case: Case, call: dict[str, Any]) -> Tensor:
    """The latents that the pipeline generates from the case's prompts, from the same noise."""
    torch.manual_seed(0)  # some draw beside their generator
    takes = list(inspect.signature(type(pipe).__call__).parameters)
    texts = case.texts[0] if case.prompts == 1 else case.texts
    more = {
        "prompt" if "prompt" in takes else takes[1]: texts,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    if "content_prompt" in call:  # VisualCloze's second one
        more["content_prompt"] = [call["content_prompt"]] * len(case.texts)
    output = pipe(**call | {name: value for name, value in more.items() if name in takes})[0]
    if isinstance(output, (list, tuple)):
        output = torch.stack([torch.as_tensor(part) for part in output])
    return torch.as_tensor(output).float()


if __name__ == "__main__":
    main()
