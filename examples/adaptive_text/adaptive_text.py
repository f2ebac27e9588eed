"""Adaptive text embeddings: those of a prompt are refined while its image is sampled.

Source: Na et al., NeurIPS 2025, "Diffusion Adaptive Text Embedding for Text-to-Image Diffusion
Models", arXiv 2510.23974.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from t5slim.distill import capture
from t5slim.distill.pipeline import call_encoder, first_tensor, frozen, map_tensors, run_pipeline
from t5slim.errors import DistillError

Score = Callable[[Tensor, Sequence[str]], Tensor]  # clean latents (B, ...) and prompts -> (B,)


class AdaptiveText:
    """A pipeline that refines the embeddings of its prompts at some of its sampling steps.

    At these, the clean latents are predicted from x_t and scored, and the embeddings c_t move along
    the normalised gradient of the score, from where they are or from the encoder's own c, and back
    into the ball ||c_t - c|| <= radius. Sampling goes on with them, until they are refined again.
    The arguments are attributes, and may be changed between two calls of `generate`.

    Args:
        pipe: A flow-matching pipeline (FLUX, SD3, ...) with an encoder in its text slot.
        steps: The sampling steps to refine at; the first is 0.
        step_size: The length of an update, as a share of ||c||.
        radius: Of the ball, as a share of ||c||.
        updates: At each of these steps.
        restart: Start every update from c. With `step_size=radius`, it is the paper's equation.
        encoder: To be used in the place of the one in the slot; None: that one.
        pipeline_kwargs: How to call the pipeline.

    Attributes:
        extra_passes: Samples that went through the denoiser for updates alone, there or back.
        slot_embeddings: (B, S, D), those of the encoder in the slot, for an oracle's score.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        steps: Collection[int],
        step_size: float,
        radius: float,
        updates: int = 1,
        restart: bool = False,
        encoder: nn.Module | None = None,
        pipeline_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if "FlowMatch" not in (name := type(pipe.scheduler).__name__):
            raise DistillError(f"The scheduler is a {name}; expected one of flow matching.")
        self.pipe, self.steps, self.restart, self.encoder = pipe, steps, restart, encoder
        self.step_size, self.radius, self.updates = step_size, radius, updates
        self.kwargs = dict(pipeline_kwargs or {})
        self.extra_passes = 0
        self._sources: dict[int, list[Any]] = {}  # of each denoiser call, by the size of the batch

    def generate(
        self, prompts: Sequence[str], score: Score, seed: int | Sequence[int] = 0
    ) -> tuple[Image.Image, ...]:
        """Generate an image of each prompt; `score` is higher where latents fit their prompt."""
        if len(prompts) not in self._sources:
            # T5's embeddings stand at the same places in every step.
            found = capture(
                self.pipe, prompts, pipeline_kwargs=self.kwargs | {"num_inference_steps": 2}
            )
            if found.reason:
                raise DistillError(f"T5's embeddings can't be replaced here: {found.reason}.")
            self._sources[len(prompts)] = [call.sources for call in found.denoiser_calls]
        self.prompts, self._score, self._encoded = prompts, score, []
        self._calls = itertools.cycle(self._sources[len(prompts)])
        with frozen(self.pipe, gradient_checkpointing=False):
            return run_pipeline(
                self.pipe, prompts, self.kwargs, seed,
                encode=self._encode, denoise=self._denoise, decode=True,
            )  # fmt: skip

    def clean(self, embeddings: Tensor) -> Tensor:
        """The clean latents that the denoiser predicts at this step with embeddings (B, S, D)."""
        x_t, scheduler = self._call[1]["hidden_states"], self.pipe.scheduler
        self.extra_passes += len(x_t)
        velocity, B = first_tensor(self._predict(embeddings)), len(self.prompts)
        if len(velocity) == 2 * B:  # classifier-free guidance, the negative prompts first
            negative, positive = velocity.chunk(2)
            velocity = negative + self.pipe.guidance_scale * (positive - negative)
        return x_t[-B:] - scheduler.sigmas[scheduler.step_index or 0] * velocity

    def _encode(self, forward: Callable[..., Any], ids: Tensor, mask: Tensor | None) -> Tensor:
        in_slot = call_encoder(forward, ids, mask)
        used = in_slot if self.encoder is None else call_encoder(self.encoder, ids, mask)
        if not self._encoded:  # the prompts; negative prompts follow, and stay as they are
            self.slot_embeddings, self.embeddings = in_slot, used
        self._encoded.append(used.to(in_slot))
        return self._encoded[-1]

    def _denoise(self, _: str, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        self._call = forward, kwargs, next(self._calls)
        own = torch.arange(self.embeddings.shape[:2].numel(), device=self.embeddings.device)
        # Where guidance calls the denoiser twice, only one of its calls reads the prompts.
        reads = any(torch.isin(source, own).any() for source in self._call[2].values())
        if reads and (self.pipe.scheduler.step_index or 0) in self.steps:
            for _ in range(self.updates):
                self._refine()
        return self._predict(self.embeddings)

    def _predict(self, embeddings: Tensor) -> Any:
        forward, kwargs, sources = self._call
        text = torch.cat([one.flatten(0, 1) for one in (embeddings, *self._encoded[1:])])

        def argument(path: tuple[Any, ...], tensor: Tensor) -> Tensor:
            if (source := sources.get(path)) is None:
                return tensor
            replaced = text[source.clamp(min=0)].to(tensor)
            return torch.where((source < 0)[..., None], tensor, replaced)

        return forward(**map_tensors(kwargs, argument))

    def _refine(self) -> None:
        c = self._encoded[0].float()
        start = (c if self.restart else self.embeddings).detach().requires_grad_()
        with torch.enable_grad():
            score = self._score(self.clean(start), self.prompts).sum()
            (gradient,) = torch.autograd.grad(score, start)
        self.extra_passes += len(self._call[1]["hidden_states"])  # the way back
        offset = start.detach() + self.step_size * norm(c) * gradient / norm(gradient) - c
        self.embeddings = c + offset * (self.radius * norm(c) / norm(offset)).clamp(max=1)


def norm(embeddings: Tensor) -> Tensor:
    """(B, 1, 1), of each prompt's embeddings (B, S, D) together."""
    length = torch.linalg.vector_norm(embeddings, dim=(1, 2), keepdim=True)
    return length.clamp(min=torch.finfo(length.dtype).tiny)
