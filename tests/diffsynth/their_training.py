"""A micro-batch of `same_case`, trained by DiffSynth: its units, model function, schedule and loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from same_case import RANK, SIZE, TEXT, Case, Trained, source_of
from torch import Tensor, nn

from tworeel.lora.files import load_lora


def trained_by_diffsynth(case: Case) -> Trained:
    """By its loss function, over the units and the model function of its pipeline; writes its LoRA's file."""
    from diffsynth.diffusion import FlowMatchSFTLoss
    from diffsynth.diffusion.training_module import DiffusionTrainingModule

    pipe = _pipeline(case)
    module = DiffusionTrainingModule()
    module.pipe = pipe
    torch.manual_seed(1)
    module.switch_pipe_to_training_mode(pipe, None, "dit", case.kind.targets, RANK)
    for name, parameter in pipe.dit.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    _save(module, {name: p for name, p in module.named_parameters() if p.requires_grad}, case.lora)
    inputs = _wan_inputs(case, pipe) if case.kind.family == "wan" else _flux2_inputs(case, pipe)
    inputs |= {"min_timestep_boundary": (case.index + 0.5) / 1000}
    inputs |= {"max_timestep_boundary": (case.index + 1.5) / 1000, "use_gradient_checkpointing": True}
    torch.manual_seed(5)
    loss = FlowMatchSFTLoss(pipe, **inputs)
    loss.backward()
    # Named as its LoRA is, so that the same code turns the names.
    path = case.folder / "gradients.safetensors"
    _save(module, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, path)
    parts = load_lora(path, case.naming).modules
    gradients = {f"{name}.lora_A": part.down for name, part in parts.items()}
    return Trained(loss.item(), gradients | {f"{name}.lora_B": part.up for name, part in parts.items()})


def _save(module: Any, tensors: Mapping[str, Tensor], path: Path) -> None:
    exported = module.export_trainable_state_dict(dict(tensors), remove_prefix="pipe.dit.")
    save_file({key: value.detach().contiguous() for key, value in exported.items()}, path)


def _pipeline(case: Case) -> Any:
    """DiffSynth's pipeline, with its own transformer of the checkpoint's values."""
    from diffsynth.pipelines.flux2_image import Flux2ImagePipeline
    from diffsynth.pipelines.wan_video import WanVideoPipeline

    kind = WanVideoPipeline if case.kind.family == "wan" else Flux2ImagePipeline
    pipe = kind(device="cpu", torch_dtype=torch.float32)
    component = source_of(case).transformer
    # Found apart from our reading of the index.
    shards = component.files[0].parent.glob("diffusion_pytorch_model*.safetensors")
    tensors = {key: value for shard in shards for key, value in load_file(shard).items()}
    pipe.dit = (_wan if case.kind.family == "wan" else _flux2)(component.config)
    pipe.dit.load_state_dict(tensors)
    pipe.vae = nn.Module()
    return pipe


def _wan(config: Mapping[str, Any]) -> nn.Module:
    from diffsynth.models.wan_video_dit import WanModel

    has_clip, fused = config["image_dim"] is not None, config["in_channels"] == 48
    return WanModel(
        dim=config["num_attention_heads"] * config["attention_head_dim"],
        in_dim=config["in_channels"],
        ffn_dim=config["ffn_dim"],
        out_dim=config["out_channels"],
        text_dim=config["text_dim"],
        freq_dim=config["freq_dim"],
        eps=1e-6,
        patch_size=(1, 2, 2),
        num_heads=config["num_attention_heads"],
        num_layers=config["num_layers"],
        has_image_input=has_clip,
        require_clip_embedding=has_clip,
        require_vae_embedding=not fused,
        seperated_timestep=fused,
        fuse_vae_embedding_in_latents=fused,
    )


def _flux2(config: Mapping[str, Any]) -> nn.Module:
    from diffsynth.models.flux2_dit import Flux2DiT

    taken = ("in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads")
    taken = (*taken, "joint_attention_dim", "timestep_guidance_channels", "axes_dims_rope", "guidance_embeds")
    return Flux2DiT(**{key: config[key] for key in taken})


def _wan_inputs(case: Case, pipe: Any) -> dict[str, Any]:
    from diffsynth.pipelines import wan_video
    from PIL import Image

    cached, inputs = case.cached, {"input_latents": case.cached["latents"][None]}
    # DiffSynth's text encoder is given 512 tokens, and what the padding became is set to zero.
    text = torch.zeros(1, 512, TEXT)
    text[0, : len(cached["text"])] = cached["text"]
    image, frames = Image.new("RGB", (SIZE, SIZE)), 4 * (case.kind.latents[1] - 1) + 1
    if "image_latents" in cached:
        pipe.vae.encode = lambda *_args, **_named: [cached["image_latents"]]
        inputs |= wan_video.WanVideoUnit_ImageEmbedderVAE().process(
            pipe, image, None, frames, SIZE, SIZE, False, None, None
        )
    if "image_embeds" in cached:
        pipe.image_encoder = SimpleNamespace(encode_image=lambda _: cached["image_embeds"][None])
        inputs |= wan_video.WanVideoUnit_ImageEmbedderCLIP().process(pipe, image, None, SIZE, SIZE)
    if "first_latent" in cached:
        pipe.vae.encode = lambda *_args, **_named: cached["first_latent"][None]
        noise = torch.zeros(1, *case.kind.latents)
        inputs |= wan_video.WanVideoUnit_ImageEmbedderFused().process(
            pipe, image, noise, SIZE, SIZE, False, None, None
        )
    return inputs | {"context": text}


def _flux2_inputs(case: Case, pipe: Any) -> dict[str, Any]:
    from diffsynth.pipelines import flux2_image
    from PIL import Image

    _, _, height, width = case.kind.latents
    images = [case.cached["latents"]]
    images += [tensor for name, tensor in case.cached.items() if name.startswith("reference")]
    encoded = iter([image.movedim(1, 0) for image in images])
    pipe.vae.encode = lambda _: next(encoded)
    picture = Image.new("RGB", (16, 16))
    inputs = flux2_image.Flux2Unit_InputImageEmbedder().process(pipe, picture, None)
    inputs |= flux2_image.Flux2Unit_ImageIDs().process(pipe, 16 * height, 16 * width)
    if len(images) > 1:
        inputs |= flux2_image.Flux2Unit_EditImageEmbedder().process(
            pipe, [picture] * (len(images) - 1), False
        )
    text = case.cached["text"][None]
    ids = flux2_image.Flux2Unit_PromptEmbedder().prepare_text_ids(text)
    return inputs | {"prompt_embeds": text, "text_ids": ids, "embedded_guidance": 1.0}
