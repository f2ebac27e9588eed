"""LoRA, ControlNet and few-step LoRA of the teacher's pipeline, untouched, under the student.

    python examples/transfer/transfer.py                 # measures the committed ones
    python examples/transfer/transfer.py --train lora    # trains one again; or another of the three

A LoRA that gives everything the next colour, a ControlNet that takes the shapes from a sketch, and
a LoRA that does in two steps what takes the pipeline twenty. All three are trained with the teacher
alone. Then the student takes its place.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

import t5slim
from t5slim.distill import velocity_gap

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world import judge, train, world
from shapes_world.generation import CALL, STUDENT, captions, generate, grid, load_pipeline

HERE = Path(__file__).parents[1] / "shapes_world"
TRANSFER = HERE / "transfer"
KINDS = ("lora", "controlnet", "few-step")
STEPS = 2  # of the few-step denoiser
BATCH = 8
NEXT_COLOR = dict(zip(world.COLORS, [*list(world.COLORS)[1:], "red"], strict=True))
LINEAR = r".*\.(to_(q|k|v|out\.0|add_out)|add_(q|k|v)_proj|ff.*\.(proj|2)|proj_mlp|proj_out)"
Change = Callable[[world.Scene, random.Random], world.Scene]


# --- the tasks --------------------------------------------------------------


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


def sketch(image: np.ndarray) -> np.ndarray:
    """White where an image isn't background: (64, 64, 3) uint8, as `image`."""
    contrast = np.abs(image.astype(int) - image[0, 0]).max(-1, keepdims=True)
    return np.broadcast_to(np.where(contrast > 40, 255, 0), image.shape).astype(np.uint8)


def load(kind: str, pipe: FluxPipeline) -> FluxPipeline | FluxControlNetPipeline:
    """The pipeline with one of the three in it."""
    if kind == "controlnet":
        controlnet = FluxControlNetModel.from_pretrained(TRANSFER / kind).to(pipe.device)
        return FluxControlNetPipeline(**pipe.components, controlnet=controlnet.to(pipe.dtype))
    pipe.load_lora_weights(TRANSFER, weight_name=f"{kind}.safetensors", adapter_name=kind)
    return pipe


def task(kind: str, scenes: list[world.Scene]) -> tuple[list[world.Scene], dict[str, Any]]:
    """The scenes that the judge should see, and the arguments of the pipeline's call for them."""
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
    """Captions as the denoiser reads them, and the latents of images and sketches of the changed
    scenes: (N, 16, 64). From a file if they were made before."""

    def latents(images: list[np.ndarray]) -> Tensor:
        latents = pipe.vae.encode(train.to_tensor(images)).latent_dist.mode()
        latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        return FluxPipeline._pack_latents(latents, len(images), 16, 8, 8)

    def batches() -> Iterator[train.Data]:
        for start in tqdm(range(0, count, 60), "encoding"):
            pairs = list(train.scenes(10**7 + start, min(60, count - start)))
            texts = [world.describe(scene, rng) for scene, rng in pairs]
            images = [world.draw(change(scene, rng), rng) for scene, rng in pairs]
            embeddings, pooled = train.encode_prompts(pipe, texts)
            yield {
                "latents": latents(images),
                "sketches": latents([sketch(image) for image in images]),
                "ids": train.tokenize(pipe.tokenizer_2, texts),
                "embeddings": embeddings,
                "pooled": pooled,
            }

    return {key: x.to(train.DEVICE) for key, x in train.cached(path, batches).items()}


def flow_loss(data: train.Data, denoiser_for: Callable[[Tensor], Any]) -> Tensor:
    """Rectified flow, as the denoiser itself was trained; `denoiser_for` takes the indices of the
    examples, (B,)."""
    pick, x, noise, t = train.noisy_batch(data, BATCH)
    x_t = torch.lerp(x, noise, t[:, None, None])
    text = data["embeddings"][pick], data["pooled"][pick]
    velocity = train.denoise(denoiser_for(pick), x_t, t, *text)
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
    train.eight_bit(controlnet.half())
    controlnet.save_pretrained(TRANSFER / "controlnet")


def make_few_step(pipe: FluxPipeline, work: Path, count: int = 300, steps: int = 200) -> None:
    """From captions alone. A step learns five of the denoiser's, from where the steps before it
    have come to."""
    denoiser = pipe.transformer
    texts = [world.describe(scene, rng) for scene, rng in train.scenes(10**7, count)]
    embeddings, pooled = train.encode_prompts(pipe, texts)
    x = torch.randn(count, 16, 64, generator=torch.Generator().manual_seed(0)).to(embeddings)
    states = [x]
    with torch.no_grad():
        for i in tqdm(range(5 * STEPS), "sampling trajectories"):
            t = torch.full((count,), 1 - i / (5 * STEPS)).to(x)
            batches = zip(*(y.split(60) for y in (x, t, embeddings, pooled)), strict=True)
            velocity = torch.cat([train.denoise(denoiser, *batch) for batch in batches])
            x = x - velocity / (5 * STEPS)
            states.append(x)

    def loss_of_step(step: int) -> Tensor:
        pick = torch.randint(count, (BATCH,))
        x, loss = states[0][pick], torch.zeros((), device=train.DEVICE)
        for i in range(STEPS):
            t = torch.full((BATCH,), 1 - i / STEPS).to(x)
            velocity = train.denoise(denoiser, x, t, embeddings[pick], pooled[pick])
            target = (x - states[5 * (i + 1)][pick]) * STEPS
            loss = loss + (velocity - target).square().mean()
            x = x - velocity.detach() / STEPS
        return loss

    train_lora("few-step", pipe, loss_of_step, work, steps, lr=2e-3)


MAKE = {"lora": make_lora, "controlnet": make_controlnet, "few-step": make_few_step}

# --- the measure ------------------------------------------------------------


def measure(
    kind: str, student: nn.Module, scenes: list[world.Scene], texts: list[str]
) -> tuple[float, dict[str, list[np.ndarray]]]:
    """The student's velocity gap on 24 other captions, and images of `texts` under the teacher and
    under the student."""
    pipe = load(kind, load_pipeline())
    few_scenes, few_texts = captions(8, held_out=True, seed=1)
    _, few_changes = task(kind, few_scenes)
    gap = velocity_gap(
        pipe, student, few_texts, pipeline_kwargs=CALL | few_changes, batch_size=len(few_texts)
    )
    # Each caption has its own sketch, so all are generated in one batch.
    _, changes = task(kind, scenes)
    images = {"teacher": generate(pipe, texts, batch_size=len(texts), **changes)}
    t5slim.patch_pipeline(pipe, student)
    images["student"] = generate(pipe, texts, batch_size=len(texts), **changes)
    return gap, images


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", default=KINDS, help=f"of {', '.join(KINDS)}; or all")
    parser.add_argument("--train", action="store_true", help="train them, and don't measure")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="checkpoints and logs")
    parser.add_argument("--student", default=STUDENT, help="a folder or Hub id")
    parser.add_argument("--count", type=int, default=50, help="images of each criterion")
    parser.add_argument("--out", type=Path, default=Path("transfer.png"), help="image grid")
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
    usual = generate(pipe, texts, batch_size=len(texts))
    in_few_steps = generate(pipe, texts, batch_size=len(texts), num_inference_steps=STEPS)
    shown = [
        criterion * args.count + i for i in range(min(2, args.count)) for criterion in range(3)
    ]
    columns: dict[str, list[np.ndarray]] = {}
    print(f"{'':<12}{'gap':>6}  {'right':<12}{'without':>10}{'teacher':>10}{'student':>10}")
    for kind in args.kinds:
        gap, images = measure(kind, student, scenes, texts)
        wanted, changes = task(kind, scenes)
        images = {"without": in_few_steps if kind == "few-step" else usual} | images
        right = [judge.accuracy(wanted, generated) for generated in images.values()]
        for criterion in world.CRITERIA:
            head = f"{kind:<12}{gap:>6.3f}" if criterion == world.CRITERIA[0] else ""
            row = "".join(f"{of[criterion]:>10.1%}" for of in right)
            print(f"{head:<20}{criterion:<12}{row}")
        if kind == "few-step":
            # In two steps the undistilled denoiser, too, generates what it should, but blurred.
            off = [np.subtract(generated, usual, dtype=float) for generated in images.values()]
            row = "".join(f"{np.sqrt(np.square(difference).mean()):>10.2f}" for difference in off)
            print(f"{'':<12}off its twenty steps{row}   (root mean square, of 255)")
        if kind == "controlnet":
            columns["sketch"] = [np.asarray(one) for one in changes["control_image"]]
        columns |= {kind: images["teacher"], f"{kind}, student": images["student"]}
    columns = {name: [images[i] for i in shown] for name, images in columns.items()}
    grid([texts[i] for i in shown], columns, cell=160).quantize(128).save(args.out)
    print(f"\nEach under the teacher and under the student: {args.out}")


if __name__ == "__main__":
    main()
