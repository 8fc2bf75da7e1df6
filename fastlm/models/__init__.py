"""One decoder for every architecture: what differs is its Config."""

from fastlm.models.cache import KVCache
from fastlm.models.config import Config
from fastlm.models.decoder import Decoder

__all__ = ["Config", "Decoder", "KVCache"]
