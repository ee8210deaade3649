"""As much of torchvision as DiffSynth needs to import and to resize: not every torch has a build of it."""

from torchvision import transforms

__all__ = ["transforms"]
