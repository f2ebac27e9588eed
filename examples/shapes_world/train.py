"""Trains the miniature world's FluxPipeline from nothing, in the order in which FLUX's parts came
to be.

    python examples/shapes_world/train.py --compile    # everything; continues where it stopped

    # or its first half twice as fast, in two shells
    python examples/shapes_world/train.py --compile --threads 1 --stage images
    python examples/shapes_world/train.py --compile --threads 1 --stage language-model

    # the pretrained T5 that a student can start from, for the finished pipeline
    python examples/shapes_world/train.py --threads 1 --stage small-t5

An autoencoder of images. The teacher T5, which learns language, never sees an image, and is frozen
from then on. The pooled vector's encoder, contrastively, as CLIP. The denoiser: rectified
flow on latents, conditioned on what the frozen T5 says. Like FLUX.1-schnell, it takes no guidance.

Every stage is a function of its step numbers alone (data and noise are seeded by them), so a stage
that was stopped continues as if it had not been.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world import corpus, judge, world
from shapes_world.generation import BF16, PIPELINE, SMALL_T5, captions, generate

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILE = False
STEPS = {"vae": 2400, "language-model": 3000, "small-t5": 2000, "clip": 200, "denoiser": 7000}
CAPTIONS = (
    67_200  # training captions whose T5 embeddings and latents are computed once and kept in memory
)
Data = dict[str, Tensor]


# --- the parts ------------------------------------------------------------


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        sample_size=world.SIDE,
    )


TEACHER = {"d_model": 256, "d_kv": 32, "num_heads": 8, "d_ff": 768, "num_layers": 6}
SMALL = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2}


def make_language_model(sizes: dict[str, int]) -> T5ForConditionalGeneration:
    """A T5 encoder of these sizes, and the decoder of two layers that it is trained with."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=corpus.VOCABULARY_SIZE,
            **sizes,
            num_decoder_layers=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            decoder_start_token_id=0,
            scale_decoder_outputs=True,  # as T5 does where input and output embeddings are one
        )
    )


def make_clip() -> CLIPTextModel:
    """One layer, which sees little more than a bag of words, as CLIP does: T5 carries the rest."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=corpus.VOCABULARY_SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=32,
            max_position_embeddings=world.MAX_TOKENS,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=1,
        )
    )


def make_denoiser() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=256,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    )


# --- one loop for all stages ------------------------------------------------


def fit(
    name: str,
    module: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    work: Path,
    steps: int,
    lr: float,
    ema_decay: float = 0.0,
    every: int = 1000,
    look: Callable[[nn.Module], str] | None = None,
    warm_up: int = 200,
) -> nn.Module:
    """AdamW in bf16 autocast, where that is fast, with warm-up and a linear decay over the last
    quarter; returns `module` with its EMA weights.

    Continues from `work/name.safetensors`; every `every` steps, `look`
    describes the module with its EMA weights.
    """
    path, log = work / f"{name}.safetensors", work / f"{name}.jsonl"
    module.to(DEVICE).train()
    params = dict(module.named_parameters())
    state = {f"ema.{k}": p.detach().clone() for k, p in params.items()}
    optimizer = torch.optim.AdamW(
        params.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    start = 0
    if path.exists():
        saved = load_file(path, device=DEVICE)
        start = int(saved["step"])
        with torch.no_grad():
            for key, parameter in params.items():
                parameter.copy_(saved[f"model.{key}"])
                state[f"ema.{key}"].copy_(saved[f"ema.{key}"])
        if start:
            moments = {
                i: {k: saved[f"{k}.{key}"] for k in ("exp_avg", "exp_avg_sq")}
                | {"step": saved["step"].float().cpu()}
                for i, key in enumerate(params)
                if f"exp_avg.{key}" in saved  # not where there is no gradient
            }
            optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})

    def save(step: int) -> None:
        tensors = (
            {"step": torch.tensor(step)}
            | state
            | {f"model.{k}": p.detach() for k, p in params.items()}
        )
        for key, parameter in params.items():
            tensors |= {
                f"{k}.{key}": v for k, v in optimizer.state[parameter].items() if k != "step"
            }
        save_file({k: v.contiguous() for k, v in tensors.items()}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    if COMPILE:
        # A quarter less time a step; needs a C++ compiler. Without the pattern matcher, which would
        # put the fused attention back that `main` avoids on CPUs.
        module.compile(options={"pattern_matcher": False})
    began, recent = time.time(), []
    for step in tqdm(
        range(start, steps), name, initial=start, total=steps, mininterval=5, dynamic_ncols=True
    ):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warm_up, 1.0, (steps - step) / (0.25 * steps))
        torch.manual_seed(step)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=BF16):
            loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        recent.append(loss.detach())
        decay = min(ema_decay, (step + 1) / (step + 10)) if ema_decay else 0.0
        torch._foreach_lerp_(
            [state[f"ema.{k}"] for k in params], [p.detach() for p in params.values()], 1 - decay
        )
        if (step + 1) % every == 0 or step + 1 == steps:
            save(step + 1)
            line = {
                "step": step + 1,
                "loss": float(torch.stack(recent).mean()),
                "seconds": round(time.time() - began),
            }
            recent.clear()
            if look:
                with (
                    torch.no_grad(),
                    EmaWeights(params, state),
                    torch.compiler.set_stance("force_eager"),
                ):
                    line["seen"] = look(module)
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            tqdm.write(f"{name} {line}")
    with torch.no_grad():
        for key, parameter in params.items():
            parameter.copy_(state[f"ema.{key}"])
    return module.eval().requires_grad_(False)


class EmaWeights:
    """Puts the EMA weights into the parameters for a while."""

    def __init__(self, params: dict[str, nn.Parameter], state: dict[str, Tensor]) -> None:
        self.params, self.state = params, state

    def __enter__(self) -> None:
        self.raw = {key: p.detach().clone() for key, p in self.params.items()}
        for key, parameter in self.params.items():
            parameter.copy_(self.state[f"ema.{key}"])

    def __exit__(self, *_: object) -> None:
        for key, parameter in self.params.items():
            parameter.copy_(self.raw[key])


# --- the stages -------------------------------------------------------------


def train_vae(work: Path, steps: int) -> AutoencoderKL:
    """L1 + MSE + a small KL on freshly drawn images; then latents are scaled to unit variance, as
    FLUX's are."""
    vae = make_vae().to(memory_format=torch.channels_last)

    def loss_of_step(step: int) -> Tensor:
        images = to_tensor([world.draw(s, rng) for s, rng in scenes(step, 32)]).to(
            memory_format=torch.channels_last
        )
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample()).sample.float() - images
        return error.abs().mean() + 4 * error.square().mean() + 1e-6 * posterior.kl().mean()

    def look(_: nn.Module) -> str:
        pairs = list(scenes(10**9, 200))
        shown = [world.draw(scene, rng) for scene, rng in pairs]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=BF16):
            back = vae.decode(vae.encode(to_tensor(shown)).latent_dist.mode()).sample.float()
        psnr = 10 * math.log10(4 / float((back - to_tensor(shown)).square().mean()))
        read = judge.accuracy([scene for scene, _ in pairs], to_images(back))
        return f"{psnr:.1f} dB, judge {read}"

    fit("vae", vae, loss_of_step, work, steps, lr=2e-3, ema_decay=0.99, every=250, look=look)
    with torch.no_grad():
        latents = vae.encode(
            to_tensor([world.draw(s, rng) for s, rng in scenes(10**9, 500)])
        ).latent_dist.mode()
    vae.register_to_config(
        shift_factor=float(latents.mean()), scaling_factor=1 / float(latents.std())
    )
    return vae


def train_language_model(
    work: Path,
    steps: int,
    tokenizer: PreTrainedTokenizerFast,
    name: str = "language-model",
    sizes: dict[str, int] = TEACHER,
) -> T5EncoderModel:
    """Says a text in which words are masked again as it was, encoder and decoder, as T5 and BART.

    Without an attention mask over the padding, which is how FLUX calls its T5. An encoder alone,
    that fills in masked words, is no teacher: its embeddings say what could stand there, not what
    does (of the energy of a letter's embedding, 0.1% told the letter). A decoder must find each
    word, and its place, in the embeddings.
    """
    model, sentences, width = make_language_model(sizes), documentation(work), 48
    mask_id = tokenizer.convert_tokens_to_ids("<extra_id_0>")

    def loss_of_step(step: int) -> Tensor:
        rng = random.Random(step)
        texts = [rng.choice(sentences) for _ in range(38)]
        texts += [corpus.caption_text(rng) for _ in range(26)]
        ids = tokenizer(
            texts, padding="max_length", max_length=width, truncation=True, return_tensors="pt"
        ).input_ids
        masked = (torch.rand(ids.shape) < 0.15) & (ids > 1)
        labels = ids.masked_fill(ids == 0, -100)
        return model(ids.masked_fill(masked, mask_id).to(DEVICE), labels=labels.to(DEVICE)).loss

    # Heads that look at different distances from the start. With T5's own initialisation (0.06)
    # attention begins as a plain average, and an encoder still guessed words by their frequency
    # alone after 1,500 steps.
    attention = model.encoder.block[0].layer[0].SelfAttention
    nn.init.normal_(attention.relative_attention_bias.weight, std=2.0)
    fit(name, model, loss_of_step, work, steps, lr=1e-3, ema_decay=0.995, every=500)
    # A config that says so would make transformers look for a decoder.
    config = T5Config.from_dict(model.config.to_dict() | {"is_encoder_decoder": False})
    teacher = T5EncoderModel(config)
    teacher.shared, teacher.encoder = model.shared, model.encoder
    return teacher.eval().requires_grad_(False)


def encode_images(
    work: Path, vae: AutoencoderKL, tokenizer: PreTrainedTokenizerFast, count: int = CAPTIONS
) -> Data:
    """Draws, describes and encodes `count` scenes, once: every epoch sees the same ones."""

    def encode() -> Iterator[Data]:
        for seed in tqdm(range(count // 480), "encoding images"):
            pairs = list(scenes(10**6 + seed, 480))
            images = to_tensor([world.draw(scene, rng) for scene, rng in pairs])
            texts = [world.describe(scene, rng) for scene, rng in pairs]
            with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=BF16):
                latents = vae.encode(images).latent_dist.mode().float()
            latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
            packed = FluxPipeline._pack_latents(latents, len(pairs), 16, 8, 8)
            yield {"latents": packed.bfloat16().cpu(), "ids": tokenize(tokenizer, texts).cpu()}

    return cached(work / "images.safetensors", encode)


def encode_texts(work: Path, teacher: T5EncoderModel, ids: Tensor) -> Data:
    """The frozen teacher's embeddings for the captions: (N, 32, 256)."""

    def encode() -> Iterator[Data]:
        for batch in tqdm(ids.split(480), "encoding captions"):
            with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=BF16):
                yield {"embeddings": teacher(batch.to(DEVICE)).last_hidden_state.bfloat16().cpu()}

    return cached(work / "embeddings.safetensors", encode)


def cached(path: Path, batches: Callable[[], Iterator[Data]]) -> Data:
    """The joined batches, from a file if they were made before."""
    if not path.exists():
        parts = list(batches())
        joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        save_file(joined, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    return load_file(path)


def train_clip(
    work: Path, steps: int, data: Data, text: PreTrainedModel, name: str = "clip"
) -> PreTrainedModel:
    """A small CLIP: captions against latents, contrastively; only its `text` half goes into the
    pipeline."""
    width = text.config.projection_dim
    image = nn.Sequential(nn.Linear(1024, 256), nn.GELU(), nn.Linear(256, width))
    both = nn.ModuleDict({"text": text, "image": image})

    def loss_of_step(step: int) -> Tensor:
        pick = torch.randint(len(data["ids"]), (192,))
        texts = pooled_vectors(text, data["ids"][pick].to(DEVICE))
        images = both["image"](data["latents"][pick].to(DEVICE).float().flatten(1))
        logits = F.normalize(texts.float(), dim=-1) @ F.normalize(images.float(), dim=-1).T / 0.1
        target = torch.arange(len(pick), device=DEVICE)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    fit(name, both, loss_of_step, work, steps, lr=1e-3, ema_decay=0.99)
    return text


def train_denoiser(work: Path, steps: int, pipe: FluxPipeline, data: Data) -> None:
    """Rectified flow: v = noise - latents at x_t = (1 - t) latents + t noise, with t logit-normal
    (as SD3 and FLUX)."""
    denoiser = pipe.transformer
    whiten(denoiser.context_embedder, data["embeddings"][:4000].float().flatten(0, 1))
    empty = encode_prompts(pipe, [""])

    def loss_of_step(step: int) -> Tensor:
        pick, x, noise, t = noisy_batch(data, 64)
        embeddings = data["embeddings"][pick].to(DEVICE)
        with torch.no_grad():
            pooled = pooled_vectors(pipe.text_encoder, data["ids"][pick].to(DEVICE)).float()
        # Without a caption one time in ten, so that the empty prompt means something;
        # without the pooled vector more often, as SD3 trains its text encoders, so that T5 must be
        # read.
        embeddings = torch.where(
            torch.rand(64, 1, 1, device=DEVICE) < 0.1, empty[0].to(embeddings), embeddings
        )
        pooled = pooled * (torch.rand(64, 1, device=DEVICE) > 0.3)
        velocity = denoise(denoiser, torch.lerp(x, noise, t[:, None, None]), t, embeddings, pooled)
        return (velocity - (noise - x)).square().mean()

    fit(
        "denoiser",
        denoiser,
        loss_of_step,
        work,
        steps,
        1e-3,
        0.999,
        look=lambda _: generate_and_judge(pipe),
    )


def whiten(embedder: nn.Linear, embeddings: Tensor) -> None:
    """Starts the denoiser's first text layer as a whitening of T5's embeddings.

    The variances of a language model's embeddings differ by thousands from direction to direction,
    and what tells words and their places apart need not be where they are large.
    """
    width = embedder.out_features
    mean, (variances, directions) = embeddings.mean(0), torch.linalg.eigh(torch.cov(embeddings.T))
    variances, directions = variances[-width:], directions[:, -width:]
    rotation = torch.linalg.qr(
        torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    )[0]
    # The floor keeps directions of almost no variance from being blown up.
    weight = rotation @ ((variances + 0.01).rsqrt()[:, None] * directions.T)
    with torch.no_grad():
        embedder.weight.copy_(weight)
        embedder.bias.copy_(-weight @ mean)


def export(pipe: FluxPipeline, out: Path) -> None:
    """Writes the pipeline in half precision."""
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(out)
    for config in out.glob("text_encoder*/config.json"):  # loaded like the rest, in float32
        config.write_text(config.read_text().replace('"float16"', '"float32"'))


def eight_bit(model: nn.Module) -> None:
    """Rounds the matrices of a model in half precision to float8_e4m3fn, half the size as a file.
    `from_pretrained` makes them float32 again.

    The layers that write the output stay as they are: of SD3's denoiser and of the ControlNet, the
    velocity notices their rounding more than that of any other, and they are small.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and not name.startswith(("proj_out", "controlnet_blocks")):
            parameter.data = parameter.data.to(torch.float8_e4m3fn)


# --- what the stages share --------------------------------------------------


def noisy_batch(
    data: Data, size: int, shares: tuple[float, ...] = (0.15, 0.4, 0.45)
) -> tuple[Tensor, ...]:
    """Indices of captions (B,), their latents (B, 16, 64), noise, and times (B,). `shares`: of the
    criteria."""
    # The captions' criteria take turns. Text is the hardest, and single objects are soon learned.
    criterion = torch.multinomial(torch.tensor(shares), size, replacement=True)
    pick = 3 * torch.randint(len(data["ids"]) // 3, (size,)) + criterion
    x = data["latents"][pick].to(DEVICE).float()
    # Towards noise, where the text must say what the latents don't show.
    t = (torch.randn(size, device=DEVICE) + 0.6).sigmoid()
    return pick, x, torch.randn_like(x), t


def pooled_vectors(clip: PreTrainedModel, ids: Tensor) -> Tensor:
    """A CLIP's pooled vectors for the denoiser: (B, width), projected if it has a projection."""
    output = clip(ids)
    return output["text_embeds"] if "text_embeds" in output else output["pooler_output"]


def denoise(
    denoiser: nn.Module, x_t: Tensor, t: Tensor, embeddings: Tensor, pooled: Tensor
) -> Tensor:
    """The denoiser's velocity in float32, called as FluxPipeline calls it. x_t: (B, 16, 64)."""
    img_ids = FluxPipeline._prepare_latent_image_ids(1, 4, 4, x_t.device, torch.float32)
    return denoiser(
        hidden_states=x_t,
        timestep=t,
        pooled_projections=pooled,
        encoder_hidden_states=embeddings,
        txt_ids=torch.zeros(embeddings.shape[1], 3, device=x_t.device),
        img_ids=img_ids,
        return_dict=False,
    )[0].float()


def encode_prompts(pipe: FluxPipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        embeddings, pooled, _ = pipe.encode_prompt(
            prompts, None, device=DEVICE, max_sequence_length=world.MAX_TOKENS
        )
    return embeddings, pooled


def generate_and_judge(pipe: DiffusionPipeline, count: int = 50) -> str:
    """Accuracy on `count` held-out captions of each criterion."""
    scenes, texts = captions(count, held_out=True)
    return str(judge.accuracy(scenes, generate(pipe, texts)))


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    return tokenizer(
        texts,
        padding="max_length",
        max_length=world.MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).input_ids.to(DEVICE)


def to_tensor(images: list[np.ndarray]) -> Tensor:
    """(B, 64, 64, 3) uint8 images as (B, 3, 64, 64) float32 in -1..1."""
    return torch.from_numpy(np.stack(images)).to(DEVICE).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(tensor: Tensor) -> list[np.ndarray]:
    return list(
        ((tensor.float().cpu() + 1) * 127.5)
        .round()
        .clamp(0, 255)
        .byte()
        .permute(0, 2, 3, 1)
        .numpy()
    )


def scenes(seed: int, count: int) -> Iterator[tuple[world.Scene, random.Random]]:
    """Training scenes of all criteria in turn, and the random numbers that go with them."""
    rng = random.Random(seed)
    for i in range(count):
        yield world.sample_scene(rng, world.CRITERIA[i % 3]), rng


def documentation(work: Path) -> list[str]:
    path = work / "documentation.json"
    if not path.exists():
        path.write_text(json.dumps(corpus.documentation_sentences()))
    return json.loads(path.read_text())


def tokenizer_of(work: Path) -> PreTrainedTokenizerFast:
    path = work / "tokenizer"
    if not path.exists():
        corpus.train_tokenizer(documentation(work)).save_pretrained(path)
    return PreTrainedTokenizerFast.from_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=HERE / "work", help="checkpoints and logs")
    parser.add_argument(
        "--out", type=Path, default=PIPELINE, help="where the finished pipeline goes"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the part in training")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument(
        "--stage",
        choices=("images", "language-model", "small-t5"),
        help="only this stage (the first two can run side by side)",
    )
    parser.add_argument("--denoiser-steps", type=int, default=STEPS["denoiser"])
    args = parser.parse_args()
    global COMPILE
    COMPILE = args.compile
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)

    if args.stage == "small-t5":
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out / "tokenizer_2")
        steps = STEPS["small-t5"]
        small = train_language_model(args.work, steps, tokenizer, "small-t5", SMALL)
        small.half().save_pretrained(SMALL_T5)
        return
    tokenizer = tokenizer_of(args.work)
    if args.stage != "language-model":
        vae = train_vae(args.work, STEPS["vae"])
        data = encode_images(args.work, vae, tokenizer)
        clip = train_clip(args.work, STEPS["clip"], data, make_clip())
    if args.stage != "images":
        teacher = train_language_model(args.work, STEPS["language-model"], tokenizer)
    if args.stage:
        return
    data |= encode_texts(args.work, teacher, data["ids"])
    denoiser = make_denoiser().to(DEVICE)
    if DEVICE == "cpu":
        # With so few tokens, the backward pass of the fused kernel was 43% of a step.
        denoiser.set_attention_backend("_native_math")
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # speaks for CPUs, too
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = FluxPipeline(scheduler, vae, clip, tokenizer, teacher, tokenizer, denoiser)
    train_denoiser(args.work, args.denoiser_steps, pipe, data)
    export(pipe, args.out)


if __name__ == "__main__":
    main()
