"""An encoder without context: a table of what the teacher says of each word, wherever it stands.

It shows how much of a text encoder a denoiser uses at all, and what a student is worth beyond a
table. Source: Spingarn et al., "Text-to-Image Models Need Less from Text Encoders Than You Think"
(2026, arXiv 2606.03715), who find that such a bag of position-tagged words guides diffusion
transformers about as well as their text encoder does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers import PreTrainedModel as PreTrainedModel  # diffusers looks for it in this module
from transformers.modeling_outputs import BaseModelOutput

from . import checkpoint

_ENCODED_TOGETHER = 64
_NO_TOKEN = -1
# What a token is in a word.
_GOES_ON, _BEGINS, _ALONE = range(3)
_WORD_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's


class ContextlessConfig(PretrainedConfig):
    """Configuration of a `ContextlessEncoder`.

    Args:
        vocab_size: Of the tokenizer.
        project_out_dim: Width D of the rows.
        num_words: Words of several tokens that are in the table.
        num_word_tokens: All tokens of these words together.
        max_word_tokens: Tokens of the longest of them.
        num_places: Positions that have a tag of their own; those behind have the last one's.
        **kwargs: As in transformers' `PretrainedConfig`.
    """

    model_type = "slim_t5_contextless"

    def __init__(
        self,
        vocab_size: int = 1,
        project_out_dim: int = 1,
        num_words: int = 0,
        num_word_tokens: int = 0,
        max_word_tokens: int = 0,
        num_places: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.project_out_dim = project_out_dim
        self.num_words = num_words
        self.num_word_tokens = num_word_tokens
        self.max_word_tokens = max_word_tokens
        self.num_places = num_places

    @property
    def d_model(self) -> int:
        """The width of the rows: the encoder has no other."""
        return self.project_out_dim


class ContextlessEncoder(PreTrainedModel):
    """A table in the place of a T5: what a token means in its word, plus a tag of its position.

    Make one with `from_teacher`, put it into a pipeline with `patch_pipeline`, measure it with
    `evaluate.compare`. It has no transformer and nothing to train: no token knows of any outside
    its own word. A word of several tokens that isn't in the table is read token by token, and a
    token that isn't as the mean of all.

    `output.last_hidden_state`, also `output[0]`, is (B, T, project_out_dim).

    Source: Spingarn et al., 2026, arXiv 2606.03715.
    """

    config_class = ContextlessConfig
    config: ContextlessConfig
    main_input_name = "input_ids"
    words: Tensor
    kinds: Tensor

    def __init__(self, config: ContextlessConfig) -> None:
        super().__init__(config)
        # First the tokens, by their ids; then those of the words, one word after the other.
        entries = config.vocab_size + config.num_word_tokens
        self.entries = nn.Embedding(entries, config.project_out_dim)
        self.places = nn.Embedding(config.num_places, config.project_out_dim)
        self.requires_grad_(False)
        shape = (config.num_words, config.max_word_tokens)
        self.register_buffer("words", torch.full(shape, _NO_TOKEN, dtype=torch.int32))
        kinds = torch.full((config.vocab_size,), _ALONE, dtype=torch.uint8)
        self.register_buffer("kinds", kinds)
        self._lookup: tuple[list[int], dict[tuple[int, ...], int]] | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the tables come from `from_teacher`, or from a file."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutput | tuple[Tensor]:
        """Look tokens up.

        Args:
            input_ids: (B, T) int64 token ids.
            attention_mask: Not read: no token attends to another one.
            return_dict: False for a tuple.

        Returns:
            A BaseModelOutput, or a tuple; the first is (B, T, project_out_dim) in `self.dtype`.
        """
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        places = places.clamp(max=self.config.num_places - 1)
        rows = self.entries(self._entries_of(input_ids)) + self.places(places)
        return (rows,) if return_dict is False else BaseModelOutput(last_hidden_state=rows)

    def _entries_of(self, input_ids: Tensor) -> Tensor:
        """(B, T), the number of each token's entry: that of its word, or else the token's own."""
        if not self.config.num_words:
            return input_ids
        if self._lookup is None:
            numbers, end = {}, self.config.vocab_size
            for row in self.words.tolist():
                word = tuple(token for token in row if token != _NO_TOKEN)
                numbers[word] = end
                end += len(word)
            self._lookup = self.kinds.tolist(), numbers
        kinds, first_entry = self._lookup
        entries = input_ids.tolist()
        for row in entries:
            for start, word in _words_of(row, kinds):
                first = first_entry.get(word)
                if first is not None:
                    row[start : start + len(word)] = range(first, first + len(word))
        return torch.tensor(entries, device=input_ids.device)

    @classmethod
    @torch.no_grad()
    def from_teacher(
        cls, pipe: Any, prompts: Any, *, pipeline_kwargs: Mapping[str, Any] | None = None
    ) -> ContextlessEncoder:
        """Average a teacher's rows of each word over the contexts in which it stands in `prompts`.

        The rows are fitted by least squares as the sum of two tables, one of words and one of
        positions. Padding and the end of a prompt are words like others, since FLUX.1 and SD3 read
        their rows, too.

        Args:
            pipe: A pipeline with the teacher in its text slot, or within
                `distill.cached_teacher` with its cached rows.
            prompts: A list or a file, as for `distill.train`. Thousands: each word should stand in
                many contexts and at many positions.
            pipeline_kwargs: How the pipeline is called, as for `distill.train`.
                `max_sequence_length` decides how many positions there are.

        Returns:
            The encoder, on the device and in the dtype of the teacher's rows.

        Raises:
            NoT5SlotError: The pipeline has no T5.
            DistillError: There are no prompts; or the pipeline doesn't take `pipeline_kwargs`.
        """
        # Not above: `import t5slim` is light.
        from .distill.cached import tokenized
        from .distill.checks import load_prompts
        from .distill.pipeline import check_pipeline_kwargs, teacher_of
        from .distill.states import frozen
        from .distill.teacher import encode_alike
        from .slot import denoiser_text_width, find_text_slot

        texts, kwargs = load_prompts(prompts), dict(pipeline_kwargs or {})
        check_pipeline_kwargs(pipe, kwargs)
        teacher: Any = teacher_of(pipe)
        width = denoiser_text_width(pipe)
        assert width is not None  # the encoder's own, if the denoiser doesn't say
        table, device = tokenized(pipe, texts, kwargs, _ENCODED_TOGETHER)
        ids = table.batch(range(len(table)), torch.device("cpu"))[0]
        kinds = _kinds(getattr(pipe, find_text_slot(pipe).tokenizer_name))
        encoder: Any = cls._empty(ids.tolist(), kinds, width)
        encoder.to(device)

        sums = torch.zeros_like(encoder.entries.weight)
        of_places = torch.zeros_like(encoder.places.weight)
        counts = sums.new_zeros(len(sums), len(of_places))
        with frozen(pipe, gradient_checkpointing=False):
            starts = range(0, len(table), _ENCODED_TOGETHER)
            for start in tqdm(starts, desc="contexts", unit="batch"):
                stop = min(start + _ENCODED_TOGETHER, len(table))
                ids, mask = table.batch(range(start, stop), device)
                rows = encode_alike(teacher, ids, mask).to(sums)
                entries = encoder._entries_of(ids)
                sums.index_add_(0, entries.flatten(), rows.flatten(0, 1))
                of_places[: ids.shape[1]] += rows.sum(0)
                places = torch.arange(ids.shape[1], device=device).expand_as(ids)
                counts.index_put_((entries, places), counts.new_ones(()), accumulate=True)
            pipe.maybe_free_model_hooks()
        encoder.places.weight.copy_(_tags(sums, of_places, counts))
        sums -= counts @ encoder.places.weight
        seen = counts.sum(1, keepdim=True)
        mean = sums.sum(0) / seen.sum()
        # A token that never stood alone means what it does in the words that it was seen in.
        in_words = encoder.words[encoder.words != _NO_TOKEN]
        alone = seen > 0
        for totals in (sums, seen):
            of_words = torch.zeros_like(totals).index_add(
                0, in_words, totals[encoder.config.vocab_size :]
            )
            totals.copy_(torch.where(alone, totals, of_words))
        encoder.entries.weight.copy_(torch.where(seen > 0, sums / seen.clamp(min=1), mean))
        return encoder.to(teacher.dtype).eval()

    @classmethod
    def _empty(cls, prompts: list[list[int]], kinds: list[int], width: int) -> ContextlessEncoder:
        """One with the words of these prompts, before their meaning is known."""
        found = {word for row in prompts for _, word in _words_of(row, kinds)}
        words = sorted(word for word in found if len(word) > 1)
        config = ContextlessConfig(
            vocab_size=len(kinds),
            project_out_dim=width,
            num_words=len(words),
            num_word_tokens=sum(map(len, words)),
            max_word_tokens=max(map(len, words), default=0),
            num_places=len(prompts[0]),
        )
        encoder = cls(config)
        encoder.kinds.copy_(torch.tensor(kinds))
        for row, word in zip(encoder.words, words, strict=True):
            row[: len(word)] = torch.tensor(word)
        return encoder

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], *, variant: str | None = None, **kwargs: Any
    ) -> None:
        """Write `config.json` and `model.safetensors`, each under another name first."""
        with checkpoint.written_into(save_directory, variant) as temporary:
            super().save_pretrained(temporary, variant=variant, **kwargs)


def _words_of(ids: Sequence[int], kinds: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
    """The words of a prompt, each with the position of its first token."""
    inner = range(1, len(ids))
    ends = [i for i in inner if kinds[ids[i]] != _GOES_ON or kinds[ids[i - 1]] == _ALONE]
    return [(start, tuple(ids[start:end])) for start, end in pairwise([0, *ends, len(ids)])]


def _kinds(tokenizer: Any) -> list[int]:
    """What each token of a vocabulary is in a word.

    SentencePiece marks those that begin one. What has no letter and no digit stands alone: special
    tokens, of which padding repeats, and punctuation, so that "cat," is the word "cat". Without
    marks, every token is a word.
    """
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    alone = set(tokenizer.all_special_tokens)
    if not any(token.startswith(_WORD_MARK) for token in tokens):
        return [_ALONE] * len(tokens)
    return [
        _ALONE
        if token in alone or not any(map(str.isalnum, token))
        else _BEGINS
        if token.startswith(_WORD_MARK)
        else _GOES_ON
        for token in tokens
    ]


def _tags(sums: Tensor, of_places: Tensor, counts: Tensor) -> Tensor:
    """The table of positions that, with the best one of words, is nearest to all rows.

    Args:
        sums: (E, D), of the rows of each entry.
        of_places: (P, D), of the rows of each position.
        counts: (E, P), how often an entry stood at a position.

    Returns:
        (P, D). Of all that fit alike, for what one table adds the other can take, the shortest.
    """
    # The normal equations, from which the entries are eliminated: P of them are left.
    counts = counts.to("cpu", torch.float64)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    left = torch.diag(counts.sum(0)) - counts.T @ shares
    right = of_places.to("cpu", torch.float64) - shares.T @ sums.to("cpu", torch.float64)
    return torch.linalg.pinv(left, hermitian=True) @ right


# What makes `import t5slim` enough for AutoModel, and for diffusers, to load one.
AutoConfig.register(ContextlessConfig.model_type, ContextlessConfig)
AutoModel.register(ContextlessConfig, ContextlessEncoder)
