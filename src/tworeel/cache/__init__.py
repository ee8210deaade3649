"""Latents and text embeddings on disk: built once, by all devices side by side."""

from tworeel.cache.build import CacheIndex, build_cache
from tworeel.cache.store import BadEntry, CacheStore
from tworeel.workers import Observer, SilentObserver

__all__ = ["BadEntry", "CacheIndex", "CacheStore", "Observer", "SilentObserver", "build_cache"]
