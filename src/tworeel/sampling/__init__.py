"""Previews: pictures and clips with and without a LoRA, side by side."""
