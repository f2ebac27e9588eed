"""An encoder without context: a table of the teacher's mean embeddings, by word and by position.

It shows how much of a text encoder a denoiser uses at all, and what a student is worth beyond a
table. Spingarn et al. find that such a bag of position-tagged words guides diffusion transformers
about as well as their text encoder does.

Source: Spingarn et al., 2026, "Text-to-Image Models Need Less from Text Encoders Than You Think",
arXiv 2606.03715.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PretrainedConfig
from transformers import PreTrainedModel as PreTrainedModel  # diffusers looks for it in this module
from transformers.modeling_outputs import BaseModelOutput

from t5slim.distill.pipeline import check_pipeline_kwargs, frozen, teacher_of, tokenize
from t5slim.distill.prompts import PromptSource
from t5slim.distill.teacher import TeacherEmbeddings
from t5slim.slot import TextSlot

_BATCH = 64
_NO_TOKEN = -1
# The kinds of tokens: inside a word, at its start, or a word of its own.
_INNER, _FIRST, _ALONE = range(3)
_WORD_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's


class ContextlessConfig(PretrainedConfig):
    """Configuration of a `ContextlessEncoder`.

    Args:
        vocab_size: Of the tokenizer.
        project_out_dim: Width D of the embeddings. By this name, which a `SlimT5Config` uses too,
            t5slim recognises an encoder for a T5 slot.
        num_words: Words of several tokens in the table.
        num_word_tokens: All tokens of these words together.
        max_word_tokens: Tokens of the longest of them.
        num_positions: Positions with an embedding of their own; those behind have the last one's.
        **kwargs: As in transformers' `PretrainedConfig`.
    """

    model_type = "contextless"

    def __init__(
        self,
        vocab_size: int = 1,
        project_out_dim: int = 1,
        num_words: int = 0,
        num_word_tokens: int = 0,
        max_word_tokens: int = 0,
        num_positions: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.project_out_dim = project_out_dim
        self.num_words = num_words
        self.num_word_tokens = num_word_tokens
        self.max_word_tokens = max_word_tokens
        self.num_positions = num_positions


class ContextlessEncoder(PreTrainedModel):
    """A table in the place of a T5: an embedding of each token in its word, plus one of its
    position.

    There is no transformer in it and nothing to train: no token depends on any outside its word. A
    word of several tokens that isn't in the table is read token by token, and a token that isn't as
    the mean of all.

    `output.last_hidden_state`, also `output[0]`, is (B, T, project_out_dim).
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
        self.positions = nn.Embedding(config.num_positions, config.project_out_dim)
        self.requires_grad_(False)
        shape = (config.num_words, config.max_word_tokens)
        self.register_buffer("words", torch.full(shape, _NO_TOKEN, dtype=torch.int32))
        kinds = torch.full((config.vocab_size,), _ALONE, dtype=torch.uint8)
        self.register_buffer("kinds", kinds)
        self._lookup: tuple[list[int], dict[tuple[int, ...], int]] | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the tables come from `from_teacher`, or from a file."""

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
            attention_mask: Ignored: no token attends to another one.
            return_dict: False for a tuple.

        Returns:
            A BaseModelOutput, or a tuple; the first is (B, T, project_out_dim) in `self.dtype`.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = positions.clamp(max=self.config.num_positions - 1)
        embeddings = self.entries(self.entries_of(input_ids)) + self.positions(positions)
        if return_dict is False:
            return (embeddings,)
        return BaseModelOutput(last_hidden_state=embeddings)

    def entries_of(self, input_ids: Tensor) -> Tensor:
        """(B, T), the index of each token's entry: that in its word, or else the token's own."""
        if self._lookup is None:
            first_entries, end = {}, self.config.vocab_size
            for padded in self.words.tolist():
                word = tuple(token for token in padded if token != _NO_TOKEN)
                first_entries[word] = end
                end += len(word)
            self._lookup = self.kinds.tolist(), first_entries
        kinds, first_entries = self._lookup
        entries = input_ids.tolist()
        for of_prompt in entries:
            for start, word in words_of(of_prompt, kinds):
                if (first := first_entries.get(word)) is not None:
                    of_prompt[start : start + len(word)] = range(first, first + len(word))
        return torch.tensor(entries, device=input_ids.device)

    @classmethod
    @torch.no_grad()
    def from_teacher(
        cls, pipe: Any, prompts: Any, *, pipeline_kwargs: Mapping[str, Any] | None = None
    ) -> ContextlessEncoder:
        """Average a teacher's embeddings of each word over the contexts in which `prompts` have it.

        They are fitted by least squares as the sum of two tables, one of words and one of
        positions. Padding and the end of a prompt are words like others, since FLUX.1 and SD3 read
        their embeddings, too.

        Args:
            pipe: A pipeline with the teacher in its text slot, or within `cached_teacher`.
            prompts: A list or a file, as for `train`. Thousands: each word should stand in many
                contexts and at many positions.
            pipeline_kwargs: How to call the pipeline, as for `train`. `max_sequence_length` decides
                how many positions there are.

        Returns:
            The encoder, on the device and in the dtype of the teacher's embeddings.

        Raises:
            NoT5SlotError: The pipeline has no T5.
            DistillError: There are no prompts; or the pipeline doesn't take `pipeline_kwargs`.
        """
        texts, kwargs = [*PromptSource(prompts).all(), ""], dict(pipeline_kwargs or {})
        check_pipeline_kwargs(pipe, kwargs)
        teacher, embeddings = teacher_of(pipe), TeacherEmbeddings()
        with frozen(pipe, gradient_checkpointing=False):
            for start in tqdm(range(0, len(texts), _BATCH), "encode", unit="batch"):
                for tokens in tokenize(pipe, texts[start : start + _BATCH], kwargs):
                    embeddings.add(*tokens)
            ids, _ = embeddings.tokens(range(len(embeddings.indices)), torch.device("cpu"))
            encoder: Any = cls._empty(ids.tolist(), TextSlot(pipe))
            encoder.to(pipe._execution_device)
            sums = torch.zeros_like(encoder.entries.weight)
            of_positions = torch.zeros_like(encoder.positions.weight)
            counts = sums.new_zeros(len(sums), len(of_positions))
            for start in range(0, len(embeddings.indices), _BATCH):
                indices = range(start, min(start + _BATCH, len(embeddings.indices)))
                entries = encoder.entries_of(embeddings.tokens(indices, sums.device)[0])
                encoded = embeddings.get(teacher, indices, sums.device).to(sums)
                sums.index_add_(0, entries.flatten(), encoded.flatten(0, 1))
                of_positions[: entries.shape[1]] += encoded.sum(0)
                positions = torch.arange(entries.shape[1], device=sums.device).expand_as(entries)
                counts.index_put_((entries, positions), counts.new_ones(()), accumulate=True)
            pipe.maybe_free_model_hooks()
        encoder.positions.weight.copy_(_position_table(sums, of_positions, counts))
        sums -= counts @ encoder.positions.weight
        seen = counts.sum(1, keepdim=True)
        mean = sums.sum(0) / seen.sum()
        # A token that never stood alone means what it does in the words that it was seen in.
        in_words = encoder.words[encoder.words != _NO_TOKEN]
        alone = seen > 0
        for totals in (sums, seen):
            of_words = totals[encoder.config.vocab_size :]
            by_token = torch.zeros_like(totals).index_add(0, in_words, of_words)
            totals.copy_(torch.where(alone, totals, by_token))
        encoder.entries.weight.copy_(torch.where(seen > 0, sums / seen.clamp(min=1), mean))
        return encoder.to(teacher.dtype).eval()

    @classmethod
    def _empty(cls, prompts: list[list[int]], slot: TextSlot) -> ContextlessEncoder:
        """One with the words of these prompts, before their embeddings are known."""
        kinds = token_kinds(slot.tokenizer)
        found = {word for ids in prompts for _, word in words_of(ids, kinds)}
        words = sorted(word for word in found if len(word) > 1)
        config = ContextlessConfig(
            vocab_size=len(kinds),
            project_out_dim=slot.width or 0,
            num_words=len(words),
            num_word_tokens=sum(map(len, words)),
            max_word_tokens=max(map(len, words), default=0),
            num_positions=len(prompts[0]),
        )
        encoder = cls(config)
        encoder.kinds.copy_(torch.tensor(kinds))
        for padded, word in zip(encoder.words, words, strict=True):
            padded[: len(word)] = torch.tensor(word)
        return encoder


def words_of(ids: Sequence[int], kinds: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
    """The words of a prompt, each with the position of its first token."""
    inner = range(1, len(ids))
    ends = [i for i in inner if kinds[ids[i]] != _INNER or kinds[ids[i - 1]] == _ALONE]
    return [(start, tuple(ids[start:end])) for start, end in pairwise([0, *ends, len(ids)])]


def token_kinds(tokenizer: Any) -> list[int]:
    """The kind of each token of a vocabulary.

    SentencePiece marks those that begin a word. Tokens without a letter or digit stand alone:
    special ones, of which padding repeats, and punctuation, so that "cat," is the word "cat".
    Without marks, every token is a word.
    """
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    if not any(token.startswith(_WORD_MARK) for token in tokens):
        return [_ALONE] * len(tokens)
    return [
        _ALONE
        if token in special or not any(map(str.isalnum, token))
        else _FIRST
        if token.startswith(_WORD_MARK)
        else _INNER
        for token in tokens
    ]


def _position_table(sums: Tensor, of_positions: Tensor, counts: Tensor) -> Tensor:
    """The table of positions that, with the best one of words, is nearest to all embeddings.

    Args:
        sums: (E, D), of the embeddings of each entry.
        of_positions: (P, D), of the embeddings at each position.
        counts: (E, P), how often an entry stood at a position.

    Returns:
        (P, D). Of all that fit alike, for what one table adds the other can take, the shortest.
    """
    # The normal equations, from which the entries are eliminated: P of them are left.
    counts = counts.to("cpu", torch.float64)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    left = torch.diag(counts.sum(0)) - counts.T @ shares
    right = of_positions.to("cpu", torch.float64) - shares.T @ sums.to("cpu", torch.float64)
    return torch.linalg.pinv(left, hermitian=True) @ right
