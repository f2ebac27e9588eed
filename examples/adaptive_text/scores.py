"""Scores for adaptive embeddings in the miniature world: what is there, and what is best.

A score is made for an `AdaptiveText`, as the oracle asks it for another prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from shapes_world import world
from shapes_world.generation import captions
from shapes_world.train import pooled_vectors, to_tensor, tokenize
from torch import Tensor, nn
from torch.nn import functional as F

from adaptive_text.adaptive_text import AdaptiveText, Score

SCORES = ("oracle", "drawn", "CLIP", "random")
Make = Callable[[AdaptiveText], Score]


def scores_of(pipe: Any, scenes: Sequence[world.Scene], texts: Sequence[str]) -> dict[str, Make]:
    """The scores for these captions, by name."""
    known = dict(zip(texts, latents_of(pipe, scenes), strict=True))
    clip = clip_score(pipe)

    def oracle(sampler: AdaptiveText) -> Score:
        """What the denoiser predicts at this x_t under the encoder in the slot, the teacher."""
        return lambda clean, _: -distance(clean, sampler.clean(sampler.slot_embeddings))

    def drawn(clean: Tensor, prompts: Sequence[str]) -> Tensor:
        """The image that the caption describes, which a user doesn't have."""
        return -distance(clean, torch.stack([known[prompt] for prompt in prompts]))

    def control(clean: Tensor, _: Sequence[str]) -> Tensor:
        """Nothing: a random direction of each update."""
        return (clean * torch.randn_like(clean)).flatten(1).sum(1)

    others = {"drawn": drawn, "CLIP": clip, "random": control}
    return {"oracle": oracle} | {name: lambda _, s=s: s for name, s in others.items()}


def distance(one: Tensor, other: Tensor) -> Tensor:
    """(B,), the squared distances of latents."""
    return (one - other).square().flatten(1).sum(1)


@torch.no_grad()
def latents_of(pipe: Any, scenes: Sequence[world.Scene]) -> Tensor:
    """(N, 16, 64), the latents of drawn scenes as the denoiser takes them."""
    images = to_tensor([world.draw(scene) for scene in scenes])
    latents = torch.cat([pipe.vae.encode(part).latent_dist.mode() for part in images.split(100)])
    latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    return pipe._pack_latents(latents, *latents.shape)


def clip_score(pipe: Any) -> Score:
    """Similarity by the pipeline's CLIP.

    Of that, a pipeline keeps the text half alone. So an image half is fitted to it, on the latents
    of training scenes and as the first was (`shapes_world/train.py`), but three times as long.
    """
    torch.manual_seed(0)
    scenes, captions_ = captions(1000, held_out=False)
    latents, texts = latents_of(pipe, scenes).flatten(1), text_vectors(pipe, captions_)
    tower = nn.Sequential(
        nn.Linear(latents.shape[1], 256), nn.GELU(), nn.Linear(256, texts.shape[1])
    ).to(latents)
    optimizer = torch.optim.AdamW(tower.parameters(), 1e-3)
    for _ in range(600):
        pick = torch.randint(len(texts), (192,))
        logits = texts[pick] @ F.normalize(tower(latents[pick]), dim=-1).T / 0.1
        target = torch.arange(len(pick), device=logits.device)
        optimizer.zero_grad()
        (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)).backward()
        optimizer.step()
    tower.requires_grad_(False)

    def score(clean: Tensor, prompts: Sequence[str]) -> Tensor:
        return (F.normalize(tower(clean.flatten(1)), dim=-1) * text_vectors(pipe, prompts)).sum(1)

    return score


@torch.no_grad()
def text_vectors(pipe: Any, texts: Sequence[str]) -> Tensor:
    """(B, D), of the pipeline's CLIP, normalised."""
    parts = tokenize(pipe.tokenizer, list(texts)).split(500)
    return F.normalize(torch.cat([pooled_vectors(pipe.text_encoder, p) for p in parts]), dim=-1)
