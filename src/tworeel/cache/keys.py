"""Names of cache entries: a hash of everything that the content of an entry depends on.

A changed clip, caption, encoder, size, cut or precision gives another key, so a stale entry is never read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tworeel.data.clips import Clip

FORMAT_VERSION = 1
"""Raised whenever the same inputs give other tensors: another resize, another layout of an entry."""


def latent_key(clip: Clip, file_hashes: Mapping[Path, str], identity: str, dtype: torch.dtype) -> str:
    """Return the key of a clip's latents, `latents/<sha256>`.

    Args:
        clip: its bucket and frame indices (which stand for the frame rate too) count, its name does not.
        file_hashes: SHA-256 of the clip's file and of its condition and reference images, by path.
        identity: the hash of the encoders' weights (`Family.latent_identity`).
        dtype: the precision that the encoders compute in.
    """
    content: dict[str, Any] = {
        "clip": file_hashes[clip.path],
        "images": {name: file_hashes[path] for name, path in clip.images.items()},
        "size": [clip.bucket.frames, clip.bucket.height, clip.bucket.width],
        "frame_indices": list(clip.frame_indices),
    }
    if clip.references:
        content["references"] = [
            [file_hashes[one.path], *one.scaled, one.width, one.height] for one in clip.references
        ]
    return _key("latents", content, identity, dtype)


def text_key(caption: str, identity: str, dtype: torch.dtype) -> str:
    """Return the key of a caption's embedding, `text/<sha256>`; arguments as in `latent_key`."""
    return _key("text", {"caption": caption}, identity, dtype)


def _key(kind: str, content: dict[str, Any], identity: str, dtype: torch.dtype) -> str:
    described = {
        "format": FORMAT_VERSION,
        "kind": kind,
        "content": content,
        "encoder": identity,
        "dtype": str(dtype).removeprefix("torch."),
    }
    canonical = json.dumps(described, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"{kind}/{hashlib.sha256(canonical.encode()).hexdigest()}"
