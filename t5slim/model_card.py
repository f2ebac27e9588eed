"""The model card of a student on the Hub, written from facts alone."""

from __future__ import annotations

from collections.abc import Sequence
from string import Template
from typing import TYPE_CHECKING

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError

from . import __version__

if TYPE_CHECKING:
    from .encoder import SlimT5Encoder

_TAGS = ["t5slim", "t5", "text-to-image", "diffusers"]
_TEMPLATE = Template("""\
# $name

A small text encoder that stands in for T5-XXL in
[diffusers](https://github.com/huggingface/diffusers) pipelines: a T5 encoder and a projection, made
with [t5slim](https://pypi.org/project/t5slim).

| | |
|---|---|
| made from | $base |
| encoder | $layers layers, width $d_model, vocabulary $vocabulary: $encoder million parameters |
| projection | from $d_model to $out_dim: $adapter million parameters |
| in all | $total million parameters, $size GiB in $dtype |
| T5-XXL's encoder | 4,762 million parameters, 8.87 GiB in bfloat16 |
| versions | t5slim $t5slim, transformers $transformers, torch $torch |

## Use

Into the pipeline that the student was distilled for:

```python
import t5slim

pipe = t5slim.patch_pipeline(pipe, "$repo_id")
```

## Licence

A student starts from a pretrained T5 and learns from the predictions of a pipeline: the licences of
both may bind it. That of FLUX.1 [dev], for one, is non-commercial. Name the licence in this card's
metadata before you share the weights.

## Method

L. Wang, D. Liu, X. Liu, X. He: *Scaling Down Text Encoders of Text-to-Image Diffusion Models*, CVPR
2025, [arXiv 2503.19897](https://arxiv.org/abs/2503.19897).
""")


def create_model_card(model: SlimT5Encoder, repo_id: str) -> ModelCard:
    """A new card for a student that is going to be `repo_id` on the Hub."""
    config = model.config
    base = getattr(config, "base_model", None)
    adapter = sum(weight.numel() for weight in model.final_projection.parameters())
    total = sum(weight.numel() for weight in model.parameters())  # counts the tied embedding once
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    text = _TEMPLATE.substitute(
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        base=f"[{base}](https://huggingface.co/{base})" if base else "not recorded",
        layers=config.num_layers,
        d_model=config.d_model,
        vocabulary=f"{config.vocab_size:,}",
        out_dim=config.project_out_dim,
        encoder=f"{(total - adapter) / 1e6:,.1f}",
        adapter=f"{adapter / 1e6:,.1f}",
        total=f"{total / 1e6:,.1f}",
        size=f"{size / 2**30:.2f}",
        dtype=str(model.dtype).removeprefix("torch."),
        t5slim=__version__,
        transformers=transformers.__version__,
        torch=torch.__version__,
    )
    data = ModelCardData(library_name="t5slim", base_model=base, tags=_TAGS)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def for_repository(
    model: SlimT5Encoder, repo_id: str, tags: Sequence[str], token: str | bool | None
) -> ModelCard:
    """The repository's own card, with our tags added to its metadata; or a new one."""
    try:
        card = ModelCard.load(repo_id, token=token)  # type: ignore[arg-type]
    except EntryNotFoundError:
        card = create_model_card(model, repo_id)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *_TAGS, *tags]))
    card.data.library_name = card.data.library_name or "t5slim"
    return card
