"""Tokenizers of a thousand entries, from the vocabulary that open_clip carries in its package."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, T5TokenizerFast

__all__ = ["VOCABULARY_SIZE", "clip_tokenizer", "t5_tokenizer"]

VOCABULARY_SIZE = 1000
_BYTE_SYMBOLS = 512


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with its first 486 merges: any text in, at most 77 tokens out.

    The ending token has the largest id, so that both of transformers' rules for the pooled position agree.
    """
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    full = SimpleTokenizer()
    merges = list(full.bpe_ranks)[: VOCABULARY_SIZE - _BYTE_SYMBOLS - 2]
    symbols = [*list(full.encoder)[: _BYTE_SYMBOLS + len(merges)], "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: position for position, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)


def t5_tokenizer(max_length: int) -> T5TokenizerFast:
    """A unigram tokenizer over CLIP's letters and first merges, with T5's padding 0, end 1 and unknown 2."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import T5TokenizerFast

    clip = SimpleTokenizer()
    letters = [symbol for symbol in list(clip.encoder)[: _BYTE_SYMBOLS // 2] if symbol != "▁"]
    words = dict.fromkeys("".join(merge) for merge in clip.bpe_ranks)
    pieces = [("▁" + word.removesuffix("</w>")) if word.endswith("</w>") else word for word in words]
    room = VOCABULARY_SIZE - len(letters) - 4
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(piece, -4.0) for piece in pieces[:room]] + [(letter, -10.0) for letter in letters]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=max_length)
