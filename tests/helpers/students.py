"""Tiny students without a pipeline."""

import torch

from t5slim import SlimT5Config, SlimT5Encoder

TINY = {  # 3 heads of 4 in a width of 16, as in Flan-T5 small
    "vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
OUT_DIM = 24
IDS = torch.randint(2, 40, (2, 7), generator=torch.Generator().manual_seed(0))
IDS[1, 4:] = 0
MASK = (IDS != 0).long()


def make_student(seed: int = 0, **overrides) -> SlimT5Encoder:
    torch.manual_seed(seed)
    return SlimT5Encoder(SlimT5Config(**(TINY | {"project_out_dim": OUT_DIM} | overrides))).eval()


def embeddings(student: SlimT5Encoder, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return student(IDS, mask)[0]


def close(student: SlimT5Encoder, other: SlimT5Encoder) -> bool:
    """To rounding: memory-mapped weights lie at other addresses, and BLAS sums by alignment."""
    return torch.allclose(embeddings(student), embeddings(other), atol=1e-5)
