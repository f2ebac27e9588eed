"""The model card of a student, written from facts alone.

The facts stand between two comments, so that they can be replaced, and the words that somebody
wrote around them stay.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import Template
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError

from . import __version__

if TYPE_CHECKING:
    from .encoder import SlimT5Encoder

_TAGS = ["t5slim", "t5", "text-to-image", "diffusers"]
_FACTS = re.compile(r"<!-- t5slim: facts.*?<!-- t5slim: end of facts -->", re.DOTALL)
_TEMPLATE = Template("""\
# $name

<!-- t5slim: facts; what stands here will be replaced when the student is trained again -->
A small text encoder that stands in for T5-XXL in
[diffusers](https://github.com/huggingface/diffusers) pipelines: a T5 encoder and a projection, made
with [t5slim](https://pypi.org/project/t5slim).

| | |
|---|---|
| made from | $base$revision |
| encoder | $layers layers, width $d_model, vocabulary $vocabulary: $encoder million parameters |
| projection | from $d_model to $out_dim: $adapter million parameters |
| in all | $total million parameters, $size GiB in $dtype |
| T5-XXL's encoder | 4,762 million parameters, 8.87 GiB in bfloat16 |
| versions | t5slim $t5slim, transformers $transformers, torch $torch |

$notes
<!-- t5slim: end of facts -->

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


def create_model_card(model: SlimT5Encoder, repo_id: str, notes: str = "") -> ModelCard:
    """A new card for a student that is going to be `repo_id` on the Hub.

    Args:
        model: the student.
        repo_id: or the name of a folder.
        notes: further facts, in Markdown.
    """
    config = model.config
    base = getattr(config, "base_model", None)
    revision = getattr(config, "base_model_revision", None)
    adapter = sum(weight.numel() for weight in model.final_projection.parameters())
    total = sum(weight.numel() for weight in model.parameters())  # counts the tied embedding once
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    text = _TEMPLATE.substitute(
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        notes=notes,
        base=f"[{base}](https://huggingface.co/{base})" if base else "not recorded",
        revision=f" at {revision}" if revision else "",
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


def from_repository(repo_id: str, token: str | bool | None) -> ModelCard | None:
    """The card that is in a repository, or None."""
    try:
        return ModelCard.load(repo_id, token=token)  # type: ignore[arg-type]
    except EntryNotFoundError:
        return None


def write_facts(
    card: ModelCard | None,
    model: SlimT5Encoder,
    repo_id: str,
    notes: str = "",
    tags: Sequence[str] = (),
) -> ModelCard:
    """A card with its facts replaced and our tags added to its metadata; or a new one.

    Args:
        card: one that is there, whose other words stay, or None.
        model: this and the following as in `create_model_card`.
        repo_id: where the card is going to be.
        notes: further facts.
        tags: further tags.
    """
    new = create_model_card(model, repo_id, notes)
    facts = _FACTS.search(new.text)
    assert facts is not None
    if card is None:
        card = new
    else:
        card.text = _FACTS.sub(lambda _: facts[0], card.text)
    data: Any = card.data
    data.tags = list(dict.fromkeys([*(data.tags or []), *_TAGS, *tags]))
    data.library_name = data.library_name or "t5slim"
    return card
