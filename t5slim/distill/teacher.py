"""The teacher's embeddings: each prompt encoded once, and always to the same bits."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..slot import TextSlot
from .calls import call_encoder

_MAX_BYTES = 8 << 30  # of the teacher's embeddings in host memory
_BATCH = 8


class TeacherEmbeddings:
    """The prompts that pass through the text slot, each encoded by the teacher only once.

    A prompt is what the encoder sees of it, ids and mask: the empty prompt of classifier-free
    guidance is one entry. Of the embeddings 8 GiB stay, the least recently used make room.

    The embeddings of a prompt depend on nothing but the prompt, bit for bit: neither on its batch
    nor on what was encoded before. So a run that was resumed sees those of one that wasn't.
    """

    def __init__(self) -> None:
        self.indices: dict[str, int] = {}  # of prompts, by their `prompt_keys`
        self._ids: list[Tensor] = []
        self._masks: list[Tensor | None] = []
        self._embeddings: OrderedDict[int, Tensor] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
        """The index of each prompt of a batch, ids and mask (B, S); a new one gets the next."""
        ids = input_ids.to("cpu", torch.int32)
        mask = None if attention_mask is None else attention_mask.to("cpu")
        keys = prompt_keys(ids, mask)
        for i, key in enumerate(keys):
            if key not in self.indices:
                self.indices[key] = len(self._ids)
                self._ids.append(ids[i].clone())
                self._masks.append(None if mask is None else mask[i].clone())
        return [self.indices[key] for key in keys]

    def tokens(self, indices: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Ids (B, S) int64, and mask (B, S) or None, of prompts by index.

        Bria encodes each prompt alone, without padding: those are padded here, with a mask.
        """
        ids = [self._ids[i] for i in indices]
        masks = [mask for i in indices if (mask := self._masks[i]) is not None]
        if not masks and len(set(map(len, ids))) > 1:
            masks = [torch.ones_like(i) for i in ids]
        padded = pad_sequence(ids, batch_first=True).to(device, torch.int64)
        return padded, pad_sequence(masks, batch_first=True).to(device) if masks else None

    def encode(
        self, forward: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """The teacher's embeddings of a batch, (B, S, D): `encode` for `capture`."""
        return self.get(forward, self.add(input_ids, attention_mask), input_ids.device)

    def get(
        self, forward: Callable[..., Any], indices: Sequence[int], device: torch.device
    ) -> Tensor:
        """The teacher's embeddings of prompts by index, (B, S, D); the shorter end with zeros."""
        missing = [i for i in dict.fromkeys(indices) if i not in self._embeddings]
        for length in sorted({len(self._ids[i]) for i in missing}):
            together = [i for i in missing if len(self._ids[i]) == length]
            encoded = encode_in_batches(forward, *self.tokens(together, device))
            for i, embeddings in zip(together, encoded, strict=True):
                self._embeddings[i] = embeddings.to("cpu", copy=True)
                self._bytes += embeddings.nbytes
        for i in indices:
            self._embeddings.move_to_end(i)
        result = pad_sequence([self._embeddings[i] for i in indices], batch_first=True).to(device)
        while self._bytes > _MAX_BYTES and len(self._embeddings) > 1:
            self._bytes -= self._embeddings.popitem(last=False)[1].nbytes
        return result


def encode_prompts(
    encoder: Any, teacher: TeacherEmbeddings, indices: Sequence[int], device: torch.device
) -> Tensor:
    """A student's embeddings of prompts by index, (B, S, D)."""
    return call_encoder(encoder, *teacher.tokens(indices, device))


def encode_in_batches(
    forward: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """The teacher's embeddings, (B, S, D), of each prompt the same, bit for bit, in every batch."""
    # Matrix products round by the size of their batch: all have one, the last one is filled up.
    encoded = []
    for start in range(0, len(input_ids), _BATCH):
        stop = min(start + _BATCH, len(input_ids))
        index = [min(i, stop - 1) for i in range(start, start + _BATCH)]
        mask = None if attention_mask is None else attention_mask[index]
        with torch.no_grad():
            encoded.append(call_encoder(forward, input_ids[index], mask)[: stop - start])
    return torch.cat(encoded)


def prompt_keys(input_ids: Tensor, attention_mask: Tensor | None) -> list[str]:
    """The SHA-256 of each prompt's ids and mask (B, S), in hex: its name on every machine."""
    ids = input_ids.to("cpu", torch.int32).numpy()
    masks = None if attention_mask is None else attention_mask.to("cpu", torch.bool).numpy()
    contents = [  # no mask is another prompt than a mask of ones
        row.tobytes() + (b"" if masks is None else b"mask" + masks[i].tobytes())
        for i, row in enumerate(ids)
    ]
    return [hashlib.sha256(content).hexdigest() for content in contents]


def tokenize_empty(
    pipe: Any, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The empty prompt, ids and mask (1, S), padded as those of the batch that was passed."""
    tokens = TextSlot(pipe).tokenizer(
        [""], padding="max_length", max_length=input_ids.shape[1], return_tensors="pt"
    )
    mask = None if attention_mask is None else tokens.attention_mask.to(attention_mask)
    return tokens.input_ids.to(input_ids), mask
