"""The forms of LoRA files, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tworeel.lora.naming import Naming
from tworeel.lora.scaling import AlphaPlace

FormName = Literal["comfyui", "diffusers", "diffsynth", "kohya"]


@dataclass(frozen=True, kw_only=True)
class Form:
    """How one tool spells a LoRA: `<prefix><layer><ending>`."""

    name: FormName
    prefix: str
    native: bool
    """Layers are those of the authors' code, with its names, not diffusers'."""
    joint: Literal[".", "_"] = "."
    """What joins the parts of a layer's name."""
    down: str = ".lora_A.weight"
    up: str = ".lora_B.weight"
    magnitude: str | None
    """DoRA's magnitude; None if the form has no place for it."""
    magnitude_dims: Literal[1, 2] = 2
    alpha: AlphaPlace

    def is_native(self, naming: Naming) -> bool:
        """Tell whether a family's layers are the native ones in this form."""
        return self.native and (self.name != "diffsynth" or naming.diffsynth_names == "native")

    def stem(self, module: str, naming: Naming) -> str:
        """Spell a layer's name, without the ending."""
        return self.spelled(naming.to_native(module) if self.is_native(naming) else module)

    def spelled(self, name: str) -> str:
        """Spell the name that a layer has in this form."""
        return self.prefix + name.replace(".", self.joint)


FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        Form(
            name="comfyui",
            prefix="diffusion_model.",
            native=True,
            magnitude=".dora_scale",
            alpha="tensor",
        ),
        Form(
            name="diffusers",
            prefix="transformer.",
            native=False,
            magnitude=".lora_magnitude_vector",
            magnitude_dims=1,
            alpha="header",
        ),
        Form(
            name="diffsynth",
            prefix="",
            native=True,
            down=".lora_A.default.weight",
            up=".lora_B.default.weight",
            magnitude=None,
            alpha="folded",
        ),
        Form(
            name="kohya",
            prefix="lora_unet_",
            native=True,
            joint="_",
            down=".lora_down.weight",
            up=".lora_up.weight",
            magnitude=".dora_scale",
            alpha="always",  # diffusers raises a KeyError without it
        ),
    )
}
