"""Text to tokens on disk, and tokens to batches.

`fastlm.data.prepare.prepare` reads, cleans, de-duplicates and tokenises;
`fastlm.data.shards.TokenDataset` opens its result; `fastlm.data.packing` packs documents.
"""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used; the message names the file, what was expected and what came."""
