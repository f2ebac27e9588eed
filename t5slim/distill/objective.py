"""The losses of a distillation, their weighted sum, and the start of a student.

B samples, T text tokens, D channels of the teacher's embeddings.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from accelerate.utils import reduce  # type: ignore[import-untyped]
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..encoder import SlimT5Encoder
from ..errors import DistillError
from .config import DistillConfig
from .pipeline import autocast_denoisers, call_encoder, teacher_of
from .replay import predictions
from .reservoir import Batch, TrajectoryReservoir

FISHER_SAMPLES = 512


class Objective:
    """The weighted sum of the losses in `config.objective`, for one pipeline.

    Args:
        pipe: The pipeline with the teacher.
        reservoir: That of the batches, still unused: `fisher_information` draws from it first.
        config: The settings of both.
    """

    def __init__(self, pipe: Any, reservoir: TrajectoryReservoir, config: DistillConfig) -> None:
        self._pipe, self._teacher, self._config = pipe, reservoir.teacher, config
        self._device = torch.device(pipe._execution_device)
        weighted = "fisher" in config.objective
        self._fisher = fisher_information(pipe, reservoir, config) if weighted else None

    def __call__(
        self, student: Callable[..., Any], batch: Batch, weights: Mapping[str, float]
    ) -> Tensor:
        """The weighted sum of the losses, each a mean over its samples.

        Args:
            student: Called as an encoder is.
            batch: From a `TrajectoryReservoir`.
            weights: From `DistillConfig.weights_at`.

        Returns:
            () float32, differentiable in the student's weights.
        """

        @cache  # encoded once, for the prediction and for the losses of embeddings
        def embeddings_of(prompts: tuple[int, ...]) -> Tensor:
            different = list(dict.fromkeys(prompts))
            encoded = call_encoder(student, *self._teacher.tokens(different, self._device))
            return encoded[[different.index(prompt) for prompt in prompts]]

        losses: dict[str, Tensor] = {}
        prompts = tuple(batch if isinstance(batch, list) else batch.prompts)
        if "velocity" in weights:
            assert not isinstance(batch, list)
            with autocast_denoisers(self._pipe, self._config.autocast_dtype):
                (prediction,) = predictions(self._pipe, [batch], embeddings_of)
            losses["velocity"] = velocity_loss(prediction, batch.target)
        if by_embedding := weights.keys() - {"velocity"}:
            embeddings = embeddings_of(prompts)
            _, mask = self._teacher.tokens(prompts, self._device)
            target = self._teacher.get(teacher_of(self._pipe), prompts, self._device)
            for name in by_embedding:
                metric = self._fisher if name == "fisher" else None
                losses[name] = embedding_loss(embeddings, target, mask, metric)
        return torch.stack([weights[name] * losses[name].mean() for name in weights]).sum()

    @torch.no_grad()
    def initialize(self, student: SlimT5Encoder, reservoir: TrajectoryReservoir) -> None:
        """Initialize a student as a table of the teacher's mean embeddings.

        Its token embeddings are the means of the teacher's embeddings of each token, reduced to
        their principal components (in the metric of F, if the objective has "fisher"), and its
        projection undoes that. Its layers add nothing yet: the last matrix of each is zero.

        Args:
            student: In float32, on the pipeline's device; changed in place.
            reservoir: Of this process. The prompts of its first updates are averaged, up to 2,048.
        """
        table = student.encoder.get_input_embeddings().weight
        first, last = (student.final_projection[i].weight for i in (0, -1))
        sums = table.new_zeros(len(table), len(last) + 1)
        steps = range(min(math.ceil(2048 / reservoir.together), self._config.max_steps))
        for step in tqdm(steps, "average the teacher's embeddings", leave=False):
            for prompts in reservoir.batches(step, denoiser=False):
                assert isinstance(prompts, list)
                ids, mask = self._teacher.tokens(prompts, self._device)
                target = self._teacher.get(teacher_of(self._pipe), prompts, self._device).float()
                counts = (torch.ones_like(ids) if mask is None else mask).bool()
                counts &= target.isfinite().all(-1)
                sums.index_add_(0, ids[counts], F.pad(target[counts], (0, 1), value=1.0))  # a count
        sums = reduce(sums).cpu().double()  # MPS has no float64
        seen = sums[:, -1] > 0
        metric = torch.eye(len(last)) if self._fisher is None else self._fisher
        # F = R R^T. Multiplied by R, means are as far apart as the denoiser finds them.
        root = torch.linalg.cholesky(metric.cpu().double())
        means = sums[seen, :-1] / sums[seen, -1:] @ root
        width = min(table.shape[1], len(first) // 2)
        # The largest eigenvalues come last.
        components = torch.linalg.eigh(means.T @ means).eigenvectors[:, 1 - width :]
        reduced = (means.mean(0) @ components).repeat(len(table), 1)  # of tokens in no prompt
        reduced[seen] = means @ components
        # T5's last norm divides an embedding by its length: one channel makes all equally long.
        squares = reduced.square().sum(1, keepdim=True)
        scale = (squares.max() / table.shape[1]).sqrt()
        table.zero_()[:, :width] = torch.cat([reduced, (squares.max() - squares).sqrt()], 1) / scale
        student.encoder.encoder.final_layer_norm.weight.fill_(1)
        # ReLU(x) - ReLU(-x) = x. The last layer doesn't read the other channels yet.
        identity = torch.eye(width, table.shape[1])
        first[: 2 * width] = torch.cat([identity, -identity])
        back = F.pad(torch.linalg.solve_triangular(root.T, components * scale, upper=True), (0, 1))
        last.zero_()[:, : 2 * width] = torch.cat([back, -back], 1)
        for name, weight in student.encoder.named_parameters():
            if name.endswith((".o.weight", ".wo.weight")):
                weight.zero_()


def velocity_loss(prediction: Tensor, target: Tensor) -> Tensor:
    r"""Distance of the denoiser's predictions under the student and under the teacher.

    The vision loss of the paper, $L = E_p \| v(x_t, t, E_T(p)) - v(x_t, t, E_S(p)) \|^2$, with v
    the frozen denoiser at the same x_t and t: the text is compared by what the denoiser makes of
    it. As a mean over the elements of a prediction instead of their sum, so that its size doesn't
    depend on the resolution.

    Source: Wang et al., CVPR 2025, arXiv 2503.19897, section 3.

    Args:
        prediction: (B, ...) any float dtype, the denoiser's output for the student.
        target: (B, ...), its output for the teacher.

    Returns:
        (B,) float32, the mean squared error of each sample.
    """
    error = F.mse_loss(prediction.float(), target.float(), reduction="none")
    return error.flatten(1).mean(1)


def embedding_loss(
    embeddings: Tensor,
    target: Tensor,
    attention_mask: Tensor | None = None,
    fisher: Tensor | None = None,
) -> Tensor:
    r"""Distance of the student's token embeddings and the teacher's.

    $L = \sum_t d_t^\top F d_t$, with d the difference of two embeddings: with the
    `fisher_information` F, what the differences would add to `velocity_loss` if they were small and
    didn't interact, for no denoiser pass; without, naive distillation, the mean squared error.

    Where the pipeline gives the encoder a mask (PixArt, Chroma), the embeddings of the mask count;
    where it gives none (FLUX.1, SD3), all of them, as the denoiser then attends to padding, too.

    Source: Wang et al., CVPR 2025, arXiv 2503.19897, "naive distillation"; F is ours.

    Args:
        embeddings: (B, T, D) any float dtype, the student's output.
        target: (B, T, D), the teacher's.
        attention_mask: (B, T), 1 for a token that counts, or None: all count.
        fisher: (D, D) float32, or None.

    Returns:
        (B,) float32: with F, in the unit of `velocity_loss`.
    """
    difference = embeddings.float() - target.float()
    mask_BT = torch.ones_like(difference[..., 0]) if attention_mask is None else attention_mask
    if fisher is None:
        error_BT = difference.square().mean(-1)
        return (error_BT * mask_BT).sum(1) / mask_BT.sum(1).clamp(min=1)
    return ((difference @ fisher * difference).sum(-1) * mask_BT).sum(1)


def fisher_information(pipe: Any, reservoir: TrajectoryReservoir, config: DistillConfig) -> Tensor:
    r"""Measure how much the denoiser's predictions depend on each direction of an embedding.

    $F = E[J^\top J] / n$, with J the Jacobian of a prediction of n elements with respect to the
    embedding of one token, at the teacher's embeddings along its trajectories: an error d of that
    embedding adds about $d^\top F d$ to `velocity_loss`. It is the Fisher information of a Gaussian
    whose mean is the prediction, estimated by the gradients of random projections: with r from
    N(0, I), $E[J^\top r r^\top J] = J^\top J$. Measured on 512 samples, or those of
    a shorter run; 1% of its mean eigenvalue is added, for directions that none of them showed.

    Args:
        pipe: The pipeline with the teacher.
        reservoir: Of this process; new. The trajectories stay in it.
        config: The settings of both.

    Returns:
        (D, D) float32 on the pipeline's device, symmetric and positive definite, of all processes.
    """
    device, teacher = torch.device(pipe._execution_device), reservoir.teacher
    total, tokens = torch.zeros((), device=device), torch.zeros((), device=device)
    steps = range(min(math.ceil(FISHER_SAMPLES / reservoir.together), config.max_steps))
    for step in tqdm(steps, "measure the Fisher information", leave=False):
        for group, batch in zip(reservoir.groups, reservoir.batches(step), strict=True):
            assert not isinstance(batch, list)
            leaves: list[Tensor] = []

            def embeddings_of(prompts: Sequence[int], leaves: list[Tensor] = leaves) -> Tensor:
                leaves.append(teacher.get(teacher_of(pipe), prompts, device).requires_grad_())
                return leaves[-1]

            with autocast_denoisers(pipe, config.autocast_dtype):
                (prediction,) = predictions(pipe, [batch], embeddings_of)
            # Each sample's own noise, however the samples are spread over batches and processes.
            seeds = [step * reservoir.together + group[i % len(group)] for i in range(len(batch))]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            noise = randn_tensor(prediction.shape, generators, device, prediction.dtype)
            # Where the pipeline isn't a gather, a call needn't read all of the prompts.
            for gradient in torch.autograd.grad(prediction, leaves, noise, materialize_grads=True):
                of_tokens = gradient.float().flatten(0, 1).nan_to_num(0, 0, 0)  # float16 overflows
                total = total + of_tokens.T @ of_tokens / prediction[0].numel()
                tokens += of_tokens.any(1).sum()  # without those that a mask hides
    total, tokens = reduce((total, tokens), "sum")
    if not total.any():
        raise DistillError(f"The denoiser of this {type(pipe).__name__} reads nothing of its T5.")
    fisher = total / tokens
    return fisher + 0.01 * fisher.diagonal().mean() * torch.eye(len(fisher), device=device)
