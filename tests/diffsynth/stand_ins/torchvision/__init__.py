"""As much of torchvision as DiffSynth needs to import and to resize pictures: there is no build of it for every
torch that the tests run with."""

from torchvision import transforms

__all__ = ["transforms"]
