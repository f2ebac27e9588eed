"""What was made for the teacher's pipeline goes on working under the student, untouched.

    python examples/transfer.py                      # measures the committed ones
    python examples/transfer.py --train lora         # makes one again; or controlnet, or few-step

A LoRA that paints everything in the next colour, a ControlNet that takes the shapes from a sketch,
and a LoRA that paints in two steps what takes the pipeline twenty. All three are trained with the
teacher alone. Then the student takes its place.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from shapes_world import judge, train, world
from shapes_world.painting import CALL, STUDENT, captions, load_pipeline, paint, sheet
from torch import Tensor, nn
from tqdm.auto import tqdm

import t5slim
from t5slim.distill import velocity_gap

HERE = Path(__file__).parent / "shapes_world"
TRANSFER = HERE / "transfer"
KINDS = ("lora", "controlnet", "few-step")
STEPS = 2  # of the few-step denoiser
BATCH = 8
NEXT_COLOR = dict(zip(world.COLORS, [*list(world.COLORS)[1:], "red"], strict=True))
LINEAR = r".*\.(to_(q|k|v|out\.0|add_out)|add_(q|k|v)_proj|ff.*\.(proj|2)|proj_mlp|proj_out)"
Change = Callable[[world.Scene, random.Random], world.Scene]


# --- what is asked of each --------------------------------------------------


def recoloured(scene: world.Scene, _: random.Random) -> world.Scene:
    """Everything in the next colour: red things green, green things blue, ..."""
    things = tuple(replace(thing, color=NEXT_COLOR[thing.color]) for thing in scene.things)
    return replace(scene, things=things, word_color=NEXT_COLOR.get(scene.word_color, ""))


def reshaped(scene: world.Scene, rng: random.Random) -> world.Scene:
    """Other shapes, or another word of the same length; all else is as it was."""
    things = tuple(replace(thing, shape=rng.choice(world.SHAPES)) for thing in scene.things)
    return replace(
        scene, things=things, word="".join(rng.choices(world.LETTERS, k=len(scene.word)))
    )


def sketch(picture: np.ndarray) -> np.ndarray:
    """White where a picture isn't background: (64, 64, 3) uint8, as `picture`."""
    contrast = np.abs(picture.astype(int) - picture[0, 0]).max(-1, keepdims=True)
    return np.broadcast_to(np.where(contrast > 40, 255, 0), picture.shape).astype(np.uint8)


def load(kind: str, pipe: FluxPipeline) -> FluxPipeline | FluxControlNetPipeline:
    """The pipeline with one of the three in it."""
    if kind == "controlnet":
        controlnet = FluxControlNetModel.from_pretrained(TRANSFER / kind).to(pipe.device)
        return FluxControlNetPipeline(**pipe.components, controlnet=controlnet.to(pipe.dtype))
    pipe.load_lora_weights(TRANSFER, weight_name=f"{kind}.safetensors", adapter_name=kind)
    return pipe


def asked(kind: str, scenes: list[world.Scene]) -> tuple[list[world.Scene], dict[str, Any]]:
    """What the judge should see, and how the pipeline is called for it."""
    rng = random.Random(0)
    if kind == "lora":
        return [recoloured(scene, rng) for scene in scenes], {}
    if kind == "few-step":
        return scenes, {"num_inference_steps": STEPS}
    wanted = [reshaped(scene, rng) for scene in scenes]
    sketches = [Image.fromarray(sketch(world.draw(scene, rng))) for scene in wanted]
    return wanted, {"control_image": sketches}


# --- training, with the teacher ---------------------------------------------


@torch.no_grad()
def examples(pipe: FluxPipeline, path: Path, count: int, change: Change) -> train.Data:
    """Captions as the denoiser reads them, and the latents of pictures and sketches of the changed
    scenes: (N, 16, 64). From a file if they were made before."""

    def latents(pictures: list[np.ndarray]) -> Tensor:
        latents = pipe.vae.encode(train.to_tensor(pictures)).latent_dist.mode()
        latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        return FluxPipeline._pack_latents(latents, len(pictures), 16, 8, 8)

    def batches() -> Iterator[train.Data]:
        for start in tqdm(range(0, count, 60), "encoding"):
            pairs = list(train.scenes(10**7 + start, min(60, count - start)))
            texts = [world.describe(scene, rng) for scene, rng in pairs]
            pictures = [world.draw(change(scene, rng), rng) for scene, rng in pairs]
            rows, pooled = train.encode_prompts(pipe, texts)
            yield {
                "latents": latents(pictures), "sketches": latents([sketch(p) for p in pictures]),
                "ids": train.tokenize(pipe.tokenizer_2, texts), "rows": rows, "pooled": pooled,
            }  # fmt: skip

    return {key: x.to(train.DEVICE) for key, x in train.cached(path, batches).items()}


def flow_loss(data: train.Data, denoiser_for: Callable[[Tensor], Any]) -> Tensor:
    """Rectified flow, as the denoiser itself was trained; `denoiser_for` takes the numbers of the
    examples, (B,)."""
    pick, x, noise, t = train.noisy_batch(data, BATCH)
    x_t = torch.lerp(x, noise, t[:, None, None])
    velocity = train.denoise(denoiser_for(pick), x_t, t, data["rows"][pick], data["pooled"][pick])
    return (velocity - (noise - x)).square().mean()


def train_lora(
    kind: str,
    pipe: FluxPipeline,
    loss_of_step: Callable[[int], Tensor],
    work: Path,
    steps: int,
    lr: float,
) -> None:
    pipe.transformer.requires_grad_(False).add_adapter(LoraConfig(r=8, target_modules=LINEAR))
    named = pipe.transformer.named_modules()
    layers = nn.ModuleList(m for name, m in named if name.endswith(("lora_A", "lora_B")))
    train.fit(kind, layers, loss_of_step, work, steps, lr, every=50)
    weights = {k: w.half() for k, w in get_peft_model_state_dict(pipe.transformer).items()}
    FluxPipeline.save_lora_weights(TRANSFER, weights, weight_name=f"{kind}.safetensors")


def make_lora(pipe: FluxPipeline, work: Path, count: int = 960, steps: int = 920) -> None:
    data = examples(pipe, work / "recoloured.safetensors", count, recoloured)

    def loss_of_step(step: int) -> Tensor:
        return flow_loss(data, lambda pick: pipe.transformer)

    train_lora("lora", pipe, loss_of_step, work, steps, lr=2e-3)


def make_controlnet(pipe: FluxPipeline, work: Path, count: int = 960, steps: int = 1400) -> None:
    data = examples(pipe, work / "reshaped.safetensors", count, reshaped)
    denoiser = pipe.transformer.requires_grad_(False)
    controlnet = FluxControlNetModel.from_transformer(
        denoiser, num_layers=1, num_single_layers=0,
        attention_head_dim=denoiser.config.attention_head_dim,
        num_attention_heads=denoiser.config.num_attention_heads,
    )  # fmt: skip

    def controlled(pick: Tensor) -> Callable[..., tuple[Tensor]]:
        def both(**kwargs: Any) -> tuple[Tensor]:
            blocks, singles = controlnet(controlnet_cond=data["sketches"][pick], **kwargs)
            return denoiser(
                controlnet_block_samples=blocks, controlnet_single_block_samples=singles, **kwargs
            )

        return both

    def loss_of_step(step: int) -> Tensor:
        return flow_loss(data, controlled)

    train.fit("controlnet", controlnet, loss_of_step, work, steps, lr=1e-3, every=50)
    controlnet.register_to_config(_name_or_path="")  # the denoiser's folder, it would be
    controlnet.half().save_pretrained(TRANSFER / "controlnet")


def make_few_step(pipe: FluxPipeline, work: Path, count: int = 300, steps: int = 200) -> None:
    """From captions alone. A step learns the way that the denoiser goes in five, from where the
    steps before it have come to."""
    denoiser = pipe.transformer
    texts = [world.describe(scene, rng) for scene, rng in train.scenes(10**7, count)]
    rows, pooled = train.encode_prompts(pipe, texts)
    x = torch.randn(count, 16, 64, generator=torch.Generator().manual_seed(0)).to(rows)
    way = [x]
    with torch.no_grad():
        for i in tqdm(range(5 * STEPS), "walking"):
            t = torch.full((count,), 1 - i / (5 * STEPS)).to(rows)
            batches = zip(*(y.split(60) for y in (x, t, rows, pooled)), strict=True)
            velocity = torch.cat([train.denoise(denoiser, *batch) for batch in batches])
            x = x - velocity / (5 * STEPS)
            way.append(x)

    def loss_of_step(step: int) -> Tensor:
        pick = torch.randint(count, (BATCH,))
        x, loss = way[0][pick], torch.zeros((), device=train.DEVICE)
        for i in range(STEPS):
            t = torch.full((BATCH,), 1 - i / STEPS).to(x)
            velocity = train.denoise(denoiser, x, t, rows[pick], pooled[pick])
            target = (x - way[5 * (i + 1)][pick]) * STEPS
            loss = loss + (velocity - target).square().mean()
            x = x - velocity.detach() / STEPS
        return loss

    train_lora("few-step", pipe, loss_of_step, work, steps, lr=2e-3)


MAKE = {"lora": make_lora, "controlnet": make_controlnet, "few-step": make_few_step}

# --- the measure ------------------------------------------------------------


def measure(
    kind: str, student: nn.Module, scenes: list[world.Scene], texts: list[str]
) -> tuple[float, dict[str, list[np.ndarray]]]:
    """The student's velocity gap on 24 other captions, and pictures of `texts` under the teacher
    and under the student."""
    pipe = load(kind, load_pipeline())
    few_scenes, few_texts = captions(8, held_out=True, seed=1)
    _, few_changes = asked(kind, few_scenes)
    gap = velocity_gap(
        pipe, student, few_texts, pipeline_kwargs=CALL | few_changes, batch_size=len(few_texts)
    )
    # Each caption has its own sketch, so all are painted in one batch.
    _, changes = asked(kind, scenes)
    pictures = {"teacher": paint(pipe, texts, batch_size=len(texts), **changes)}
    t5slim.patch_pipeline(pipe, student)
    pictures["student"] = paint(pipe, texts, batch_size=len(texts), **changes)
    return gap, pictures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", default=KINDS, help=f"of {', '.join(KINDS)}; or all")
    parser.add_argument("--train", action="store_true", help="train them, and don't measure")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="checkpoints and logs")
    parser.add_argument("--student", default=STUDENT, help="a folder or Hub id")
    parser.add_argument("--count", type=int, default=50, help="pictures of each criterion")
    parser.add_argument("--out", type=Path, default=Path("transfer.png"), help="the picture")
    args = parser.parse_args()
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"kinds are {', '.join(KINDS)}, not {', '.join(unknown)}")
    torch.manual_seed(0)
    if args.train:
        args.work.mkdir(parents=True, exist_ok=True)
        for kind in args.kinds:
            MAKE[kind](load_pipeline(), args.work)
        return

    student = t5slim.SlimT5Encoder.from_pretrained(args.student, dtype=torch.float32)
    student.to(train.DEVICE)
    scenes, texts = captions(args.count, held_out=True)
    pipe = load_pipeline()
    usual = paint(pipe, texts, batch_size=len(texts))
    in_few_steps = paint(pipe, texts, batch_size=len(texts), num_inference_steps=STEPS)
    shown = [criterion * args.count + i for i in (0, 1) for criterion in range(3)]
    columns: list[tuple[str, list[np.ndarray]]] = []
    print(f"{'':<12}{'gap':>6}  {'right':<12}{'without':>10}{'teacher':>10}{'student':>10}")
    for kind in args.kinds:
        gap, pictures = measure(kind, student, scenes, texts)
        wanted, changes = asked(kind, scenes)
        pictures = {"without": in_few_steps if kind == "few-step" else usual} | pictures
        right = [judge.accuracy(wanted, painted) for painted in pictures.values()]
        for criterion in world.CRITERIA:
            head = f"{kind:<12}{gap:>6.3f}" if criterion == world.CRITERIA[0] else ""
            row = "".join(f"{of[criterion]:>10.1%}" for of in right)
            print(f"{head:<20}{criterion:<12}{row}")
        if kind == "few-step":
            # In two steps the undistilled denoiser, too, shows what it should, but blurred.
            off = [np.subtract(painted, usual, dtype=float) for painted in pictures.values()]
            row = "".join(f"{np.sqrt(np.square(difference).mean()):>10.2f}" for difference in off)
            print(f"{'':<12}off its twenty steps{row}   (root mean square, of 255)")
        if kind == "controlnet":
            columns.append(("sketch", [np.asarray(s) for s in changes["control_image"]]))
        columns += [(kind, pictures["teacher"]), ("student", pictures["student"])]
    sheet(
        [name for name, _ in columns],
        [texts[i] for i in shown],
        [[pictures[i] for i in shown] for _, pictures in columns],
        scale=2,
    ).quantize(128).save(args.out)
    print(f"\nEach under the teacher and under the student: {args.out}")


if __name__ == "__main__":
    main()
