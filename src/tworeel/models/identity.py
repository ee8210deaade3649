"""What tells two sets of encoders apart, without loading them."""

from __future__ import annotations

import hashlib
import json

from tworeel.models.family import Component
from tworeel.weights.tensor_files import TensorFiles


def identity(component: Component) -> str:
    """Describe one network: its weights and its configuration."""
    with TensorFiles(*component.files) as files:
        return f"{files.fingerprint()} {config_identity(component)}"


def config_identity(component: Component) -> str:
    """Write a component's config in one way; the entries that libraries add for themselves do not count."""
    own = {key: value for key, value in component.config.items() if not key.startswith("_")}
    return json.dumps(own, sort_keys=True)


def digest(*parts: str) -> str:
    """Hash some texts together."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
