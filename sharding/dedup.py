"""Exact duplicates: of notes with the same cleaned text the first in input order stays.

Copies would be learned by heart, and a copy of a training note in the test set would make the test too easy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

# 128 bits: among 10^9 notes the chance of one false match is about 10^-21.
DIGEST_BYTES = 16


def text_digest(text: str) -> bytes:
    """Digest of a cleaned text; equal texts, equal digest, on every machine."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def first_occurrences(digests: Sequence[bytes], met: set[bytes]) -> np.ndarray:
    """Mask of the digests that are not in `met` nor earlier in `digests`; they are added to `met`."""
    keep = np.zeros(len(digests), dtype=bool)
    for place, digest in enumerate(digests):
        if digest not in met:
            met.add(digest)
            keep[place] = True
    return keep
