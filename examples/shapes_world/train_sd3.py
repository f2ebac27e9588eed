"""Trains the miniature world's StableDiffusion3Pipeline around the FLUX pipeline's frozen T5 and
autoencoder.

    python examples/shapes_world/train_sd3.py --compile    # continues where it stopped

Two CLIPs, contrastively; then the denoiser, which starts from the weights of FLUX's and learns to
say the same. The stages are those of `train.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world import corpus, train, world
from shapes_world.generation import SD3, SD3_CLIP_TOKENS, load_pipeline, shared_parts
from shapes_world.train import DEVICE, Data

CAPTIONS = 12_000  # of training, as `train.CAPTIONS`
CLIP_WIDTHS = (32, 48)
STEPS = {"clip": 200, "denoiser": 2000}


def make_clip(width: int, seed: int) -> CLIPTextModelWithProjection:
    """Weak, as `train.make_clip`; of two layers, as SD3 reads the last but one."""
    torch.manual_seed(seed)
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=corpus.VOCABULARY_SIZE,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=width // 16,
            projection_dim=width,
            max_position_embeddings=SD3_CLIP_TOKENS,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=1,
        )
    )


def make_denoiser(flux: FluxTransformer2DModel) -> SD3Transformer2DModel:
    """SD3's blocks with the weights of FLUX's: the double blocks as they are, single blocks twice,
    for the text and for the image.

    The first single block, which FLUX misses least, is left out. Two differences are left to
    training, the first a large one: SD3 adds places to the image where FLUX rotates queries and
    keys, and its feed-forward layers follow attention where a single block has both side by side.
    """
    width = flux.inner_dim
    sd3 = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=256,
        caption_projection_dim=width,
        pooled_projection_dim=sum(CLIP_WIDTHS),
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    state = dict(sd3.state_dict())
    for name, tensor in flux.state_dict().items():
        if name.startswith("x_embedder"):  # FLUX packs 2x2 latents, SD3 convolves them
            name = name.replace("x_embedder", "pos_embed.proj")
            state[name] = tensor.reshape(state[name].shape)
        elif name.startswith("proj_out"):  # channels before places within a patch, and after
            state[name] = tensor.unflatten(0, (16, 4)).transpose(0, 1).flatten(0, 1)
        elif not name.startswith("single_transformer_blocks"):
            state[name] = tensor if tensor.shape == state[name].shape else state[name] * 0
    doubles = len(flux.transformer_blocks)
    for i, block in enumerate(flux.single_transformer_blocks[1:], doubles):
        for name, tensor in _joint_block(block, last=i == sd3.config.num_layers - 1).items():
            state[f"transformer_blocks.{i}.{name}"] = tensor
    sd3.load_state_dict(state)
    return sd3


def _joint_block(block: nn.Module, last: bool) -> Data:
    """The weights of a FLUX single block, as those of SD3's joint block."""
    single, width = block.state_dict(), block.attn.inner_dim
    out, out_bias = single["proj_out.weight"], single["proj_out.bias"]
    joint = {f"ff.net.0.proj.{kind}": single[f"proj_mlp.{kind}"] for kind in ("weight", "bias")}
    joint |= {"ff.net.2.weight": out[:, width:], "ff.net.2.bias": torch.zeros_like(out_bias)}
    attention = {"attn.to_out.0.weight": out[:, :width], "attn.to_out.0.bias": out_bias}
    attention |= {name: tensor for name, tensor in single.items() if name.startswith("attn.")}
    joint |= attention
    twins = {"to_q": "add_q_proj", "to_k": "add_k_proj", "to_v": "add_v_proj"}
    twins |= {"norm_q": "norm_added_q", "norm_k": "norm_added_k", "to_out.0": "to_add_out"}
    for name, tensor in attention.items():
        _, module, kind = name.replace("to_out.0", "to_out*0").split(".")
        module = module.replace("*", ".")
        if not (last and module == "to_out.0"):
            joint[f"attn.{twins[module]}.{kind}"] = tensor
    for kind in ("weight", "bias"):
        modulation = single[f"norm.linear.{kind}"]  # shift, scale, gate
        joint[f"norm1.linear.{kind}"] = torch.cat([modulation, modulation])
        shift, scale, _ = modulation.chunk(3)
        joint[f"norm1_context.linear.{kind}"] = (
            torch.cat([scale, shift]) if last else joint[f"norm1.linear.{kind}"]
        )
    if not last:  # of the last block's text, nothing is read
        feed_forward = {name: tensor for name, tensor in joint.items() if name.startswith("ff.")}
        joint |= {name.replace("ff.", "ff_context."): t for name, t in feed_forward.items()}
    return joint


def train_denoiser(
    work: Path, steps: int, pipe: StableDiffusion3Pipeline, data: Data, flux: FluxPipeline
) -> None:
    """Learns FLUX's velocities at x_t = (1 - t) latents + t noise: what rectified flow comes to,
    without the noise of its target (noise - latents). And what its blocks make of the image, plus
    the places that SD3 adds."""
    denoiser, size, tokens = pipe.transformer, 16, SD3_CLIP_TOKENS
    blocks = [*flux.transformer.transformer_blocks, *flux.transformer.single_transformer_blocks[1:]]
    wanted, states = image_states(blocks), image_states(denoiser.transformer_blocks)
    places = denoiser.pos_embed.pos_embed
    empty_embeddings, empty_pooled = encode_prompts(pipe, [""])
    widths = torch.tensor(CLIP_WIDTHS, device=DEVICE)
    seldom = torch.tensor([0.46, 0.46, 0.1], device=DEVICE)

    def loss_of_step(step: int) -> Tensor:
        pick, x, noise, t = train.noisy_batch(data, size, (0.4, 0.3, 0.3))
        x_t = torch.lerp(x, noise, t[:, None, None])
        t5_embeddings = data["embeddings"][pick].to(DEVICE).float()
        # Without any text one time in ten, which is what classifier-free guidance starts from. The
        # encoders are left out singly, too, as SD3 does: a CLIP nearly every second time, so that
        # T5 must be read.
        text = torch.rand(size, 1, device=DEVICE) > 0.1
        keep = (torch.rand(size, 3, device=DEVICE) > seldom) & text
        with torch.no_grad():
            embeddings, pooled = clip_states(pipe, data["clip_ids"][pick].to(DEVICE))
            target = train.denoise(
                flux.transformer,
                x_t,
                t,
                torch.where(text[..., None], t5_embeddings, empty_embeddings[:, tokens:]),
                train.pooled_vectors(flux.text_encoder, data["ids"][pick].to(DEVICE)) * text,
            )
        keep_pooled = keep[:, :2].repeat_interleave(widths, 1)
        pooled = torch.where(keep_pooled, pooled, empty_pooled)
        keep_embeddings = nn.functional.pad(keep_pooled, (0, 256 - sum(CLIP_WIDTHS)))[:, None]
        embeddings = torch.where(keep_embeddings, embeddings, empty_embeddings[:, :tokens])
        t5_embeddings = torch.where(
            keep[:, 2, None, None], t5_embeddings, empty_embeddings[:, tokens:]
        )
        # A step counts in thousandths, as StableDiffusion3Pipeline calls it.
        velocity = denoiser(
            unpack(x_t),
            torch.cat([embeddings, t5_embeddings], 1),
            pooled,
            1000 * t,
            return_dict=False,
        )[0].float()
        loss = (velocity - unpack(target)).square().mean()
        for state, goal in zip(states, wanted, strict=True):
            loss = loss + (state - goal - places).square().mean() / goal.var() / len(states)
        states.clear()
        wanted.clear()
        return loss

    def look(_: nn.Module) -> str:
        seen = train.generate_and_judge(pipe, 10)
        states.clear()
        return seen

    train.fit(
        "denoiser",
        denoiser,
        loss_of_step,
        work,
        steps,
        1e-3,
        0.99,
        every=250,
        look=look,
        warm_up=50,
    )


def image_states(blocks: Iterable[nn.Module]) -> list[Tensor]:
    """A list to which each call of a block appends its hidden states of the image."""
    states: list[Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda _module, _args, output: states.append(output[1]))
    return states


def unpack(latents: Tensor) -> Tensor:
    """FLUX's (B, 16, 64) as (B, 16, 8, 8)."""
    return FluxPipeline._unpack_latents(latents, world.SIDE, world.SIDE, 8)


def clip_states(pipe: StableDiffusion3Pipeline, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The CLIPs' embeddings (B, 8, 256) and pooled vectors (B, 80), as in `encode_prompt`."""
    outputs = [
        clip(ids, output_hidden_states=True) for clip in (pipe.text_encoder, pipe.text_encoder_2)
    ]
    embeddings = torch.cat([output.hidden_states[-2].float() for output in outputs], -1)
    pooled = torch.cat([output.text_embeds.float() for output in outputs], -1)
    return nn.functional.pad(embeddings, (0, 256 - embeddings.shape[-1])), pooled


def encode_prompts(pipe: StableDiffusion3Pipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        embeddings, _, pooled, _ = pipe.encode_prompt(
            prompts,
            None,
            None,
            device=DEVICE,
            do_classifier_free_guidance=False,
            max_sequence_length=world.MAX_TOKENS,
        )
    return embeddings, pooled


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=train.HERE / "work-sd3", help="checkpoints and logs"
    )
    parser.add_argument("--out", type=Path, default=SD3, help="where the finished parts go")
    parser.add_argument("--compile", action="store_true", help="torch.compile the part in training")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--steps", type=int, default=STEPS["denoiser"])
    args = parser.parse_args()
    train.COMPILE = args.compile
    args.work.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)

    flux = load_pipeline()
    data = train.encode_images(args.work, flux.vae, flux.tokenizer, CAPTIONS)
    data |= train.encode_texts(args.work, flux.text_encoder_2, data["ids"])
    # A caption cut to the CLIPs' length ends as every caption does.
    ids = data["ids"][:, :SD3_CLIP_TOKENS].clone()
    ids[ids[:, -1] != 0, -1] = flux.tokenizer.eos_token_id
    data["clip_ids"] = ids
    clips = [
        train.train_clip(args.work, STEPS["clip"], data | {"ids": ids}, clip, name)
        for name, clip in (("clip", make_clip(32, seed=1)), ("clip_2", make_clip(48, seed=2)))
    ]
    if DEVICE == "cpu":
        # See `train.main`; SD3's attention has no `set_attention_backend`.
        torch.backends.cuda.enable_flash_sdp(False)  # speaks for CPUs, too
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    shared = shared_parts(flux)
    pipe = StableDiffusion3Pipeline(
        transformer=make_denoiser(flux.transformer).to(DEVICE),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=clips[0],
        text_encoder_2=clips[1],
        **shared,
    )
    train_denoiser(args.work, args.steps, pipe, data, flux)
    pipe.register_modules(**dict.fromkeys(shared))
    train.export(pipe, args.out)
    train.eight_bit(pipe.transformer)
    pipe.transformer.save_pretrained(args.out / "transformer")


if __name__ == "__main__":
    main()
