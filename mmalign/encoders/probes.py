"""What goes into a fingerprint for a tokenizer: how it cuts a few fixed sentences.

Serialised tokenizers change between library versions; the tokens they produce must not.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["token_probe"]

_SENTENCES = ["A photo of 3 dogs, running.", "Żółta łódź na jeziorze; 猫 & naïve café"]


def token_probe(tokenize: Callable[[list[str]], list[list[int]]]) -> list[list[int]]:
    """Token ids of two fixed sentences (case, digits, punctuation, accents, other scripts)."""
    return [[int(token) for token in row] for row in tokenize(_SENTENCES)]
