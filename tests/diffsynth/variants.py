"""The variants that DiffSynth trains, at toy size: its own classes with few and narrow blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

D, HEADS, FFN, TEXT, BLOCKS = 48, 2, 64, 32, 6
FRAMES, HEIGHT, WIDTH = 2, 4, 4
"""Of the latents."""


@dataclass
class Toy:
    """A variant: the models that run at each step, and what its model function takes besides."""

    models: dict[str, nn.Module]
    inputs: dict[str, Any]
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "o", "ffn.0", "ffn.2"])
    """Layers that get a LoRA."""
    lora_base: str = "dit"


def wan(**options: Any) -> nn.Module:
    from diffsynth.models.wan_video_dit import WanModel

    given = {"dim": D, "in_dim": 16, "ffn_dim": FFN, "out_dim": 16, "text_dim": TEXT, "freq_dim": 32}
    given |= {"eps": 1e-6, "patch_size": (1, 2, 2), "num_heads": HEADS, "num_layers": BLOCKS}
    return WanModel(**{**given, "has_image_input": False, **options})


def latents(channels: int = 16, *, frames: int = FRAMES) -> Tensor:
    return torch.randn(1, channels, frames, HEIGHT, WIDTH)


def basic(channels: int = 16) -> dict[str, Any]:
    return {
        "latents": latents(channels),
        "timestep": torch.tensor([500.0]),
        "context": torch.randn(1, 5, TEXT),
    }


def clip(pictures: int = 1) -> Tensor:
    return torch.randn(1, 257 * pictures, 1280)


def t2v() -> Toy:
    return Toy({"dit": wan()}, basic())


def i2v() -> Toy:
    dit = wan(has_image_input=True, in_dim=36)
    return Toy({"dit": dit}, {**basic(), "clip_feature": clip(), "y": latents(20)})


def i2v_a14b() -> Toy:
    dit = wan(in_dim=36, require_clip_embedding=False)
    return Toy({"dit": dit}, {**basic(), "y": latents(20)})


def flf2v() -> Toy:
    dit = wan(has_image_input=True, has_image_pos_emb=True, in_dim=36)
    return Toy({"dit": dit}, {**basic(), "clip_feature": clip(2), "y": latents(20)})


def ti2v_5b() -> Toy:
    own = {"seperated_timestep": True, "require_vae_embedding": False, "require_clip_embedding": False}
    dit = wan(in_dim=48, out_dim=48, fuse_vae_embedding_in_latents=True, **own)
    return Toy({"dit": dit}, {**basic(48), "fuse_vae_embedding_in_latents": True})


def fun_control() -> Toy:
    dit = wan(has_image_input=True, in_dim=48)
    return Toy({"dit": dit}, {**basic(), "clip_feature": clip(), "y": latents(32)})


def fun_inp() -> Toy:
    return i2v()


def fun_camera() -> Toy:
    dit = wan(has_image_input=True, in_dim=32, add_control_adapter=True, in_dim_control_adapter=24)
    camera = torch.randn(1, 24, FRAMES, 8 * HEIGHT, 8 * WIDTH)
    inputs = {**basic(), "clip_feature": clip(), "y": latents(16), "control_camera_latents_input": camera}
    return Toy({"dit": dit}, inputs)


def ref_conv() -> Toy:
    dit = wan(has_image_input=True, in_dim=48, has_ref_conv=True)
    inputs = {**basic(), "clip_feature": clip(), "y": latents(32), "reference_latents": latents(frames=1)}
    return Toy({"dit": dit}, inputs)


def fun_a14b_control() -> Toy:
    dit = wan(in_dim=52, has_ref_conv=True, require_clip_embedding=False)
    return Toy({"dit": dit}, {**basic(), "y": latents(36), "reference_latents": latents(frames=1)})


def fun_a14b_camera() -> Toy:
    own = {"add_control_adapter": True, "in_dim_control_adapter": 24, "require_clip_embedding": False}
    dit = wan(in_dim=36, **own)
    camera = torch.randn(1, 24, FRAMES, 8 * HEIGHT, 8 * WIDTH)
    return Toy({"dit": dit}, {**basic(), "y": latents(20), "control_camera_latents_input": camera})


def vace(lora_base: str = "dit") -> Toy:
    from diffsynth.models.wan_video_vace import VaceWanModel

    model = VaceWanModel(vace_layers=(0, 2, 4), vace_in_dim=96, dim=D, num_heads=HEADS, ffn_dim=FFN)
    inputs = {**basic(), "vace_context": latents(96), "vace_scale": 1.0}
    return Toy({"dit": wan(), "vace": model}, inputs, lora_base=lora_base)


def speed_control() -> Toy:
    from diffsynth.models.wan_video_motion_controller import WanMotionControllerModel

    toy = i2v()
    toy.models["motion_controller"] = WanMotionControllerModel(freq_dim=32, dim=D)
    toy.inputs["motion_bucket_id"] = torch.tensor([20.0])
    return toy


def animate() -> Toy:
    from diffsynth.models import wan_video_animate_adapter as parts

    adapter = parts.WanAnimateAdapter.__new__(parts.WanAnimateAdapter)
    nn.Module.__init__(adapter)  # the class builds itself for the 14B model only
    adapter.pose_patch_embedding = nn.Conv3d(16, D, kernel_size=(1, 2, 2), stride=(1, 2, 2))
    adapter.motion_encoder = parts.Generator(size=16, style_dim=512, motion_dim=20)
    adapter.face_adapter = parts.FaceAdapter(heads_num=HEADS, hidden_dim=D, num_adapter_layers=2)
    adapter.face_encoder = parts.FaceEncoder(in_dim=512, hidden_dim=D, num_heads=4)
    toy = i2v()
    toy.models["animate_adapter"] = adapter
    faces = torch.randn(1, 3, 4 * (FRAMES - 1), 16, 16)
    toy.inputs |= {"pose_latents": latents(frames=FRAMES - 1), "face_pixel_values": faces}
    return toy


def animate_2() -> Toy:
    from diffsynth.models.wan_animate_2_dit import WanAnimate2Transformer

    # Flex attention takes heads as wide as a power of two.
    given = {"dim": 64, "ffn_dim": FFN, "num_heads": HEADS, "num_layers": BLOCKS, "text_dim": TEXT}
    dit = WanAnimate2Transformer(**given, freq_dim=32, text_len=6)
    tokens = HEIGHT * WIDTH // 4
    whole = {"clip_feature": clip(), "y": latents(20), "context": torch.randn(1, 5, TEXT)}
    reference = {"clip_fea_ref": clip(), "condition_y": latents(20)[0]}
    reference |= {"context_ref": torch.randn(1, 5, TEXT)}
    sizes = {"seq_len": FRAMES * tokens, "seq_len_ref": FRAMES * tokens}
    sizes |= {"origin_len": 4, "origin_area": [8 * HEIGHT, 8 * WIDTH]}
    inputs = {**basic(), **whole, **reference, **sizes, "condition_latents": [latents()[0]]}
    return Toy({"dit": dit}, inputs)


def s2v() -> Toy:
    from diffsynth.models.wan_video_dit_s2v import WanS2VModel

    given = {"dim": D, "in_dim": 16, "ffn_dim": FFN, "out_dim": 16, "text_dim": TEXT, "freq_dim": 32}
    given |= {"eps": 1e-6, "patch_size": (1, 2, 2), "num_heads": HEADS, "num_layers": BLOCKS, "cond_dim": 16}
    dit = WanS2VModel(**given, audio_dim=16, num_audio_token=4, audio_inject_layers=[0, 2, 5])
    large = {"latents": torch.randn(1, 16, 3, 8, 8), "motion_latents": torch.randn(1, 16, 19, 8, 8)}
    own = {"audio_embeds": torch.randn(1, 25, 16, 8), "drop_motion_frames": False, "s2v_pose_latents": None}
    return Toy({"dit": dit}, {**basic(), **large, **own})


def wantodance(*, fps: float = 30.0) -> Toy:
    switches = ("music_inject", "refimage", "refface", "global", "dynamicfps", "unimodel")
    own = {f"wantodance_enable_{name}": True for name in switches}
    dit = wan(has_image_input=True, in_dim=36, wantodance_music_inject_layers=[0, 2, 4], **own)
    inputs = {**basic(), "clip_feature": clip(), "y": latents(20), "wantodance_fps": fps}
    # The music has eight steps a frame, and the tokens of each have to be as many.
    inputs |= {"latents": torch.randn(1, 16, FRAMES, 8, 8), "y": torch.randn(1, 20, FRAMES, 8, 8)}
    inputs |= {"wantodance_refimage_feature": clip(), "music_feature": torch.randn(16, 35)}
    return Toy({"dit": dit}, inputs)


def wantodance_global() -> Toy:
    return wantodance(fps=7.5)


def video_as_prompt() -> Toy:
    from diffsynth.models.wan_video_mot import MotWanModel

    own = {"dim": D, "num_heads": HEADS, "ffn_dim": FFN, "freq_dim": 32, "text_dim": TEXT, "in_dim": 36}
    toy = i2v()
    toy.models["vap"] = MotWanModel(mot_layers=(0, 2, 4), **own)
    toy.inputs |= {"vap_hidden_state": latents(36), "vap_clip_feature": clip()}
    toy.inputs |= {"context_vap": torch.randn(1, 5, TEXT)}
    return toy


def longcat() -> Toy:
    from diffsynth.models.longcat_video_dit import LongCatVideoTransformer3DModel

    dit = LongCatVideoTransformer3DModel(
        hidden_size=D,
        depth=BLOCKS,
        num_heads=HEADS,
        caption_channels=TEXT,
        adaln_tembed_dim=32,
        frequency_embedding_size=32,
        enable_flashattn2=False,
    )
    inputs = {**basic(), "longcat_latents": latents(frames=1), "context": torch.randn(1, 5, TEXT)}
    return Toy({"dit": dit}, inputs, targets=["qkv", "q_linear", "kv_linear", "w1", "w2", "w3"])


def flux2(*, guidance: bool = True) -> Toy:
    from diffsynth.models.flux2_dit import Flux2DiT

    dit = Flux2DiT(
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    inputs = {
        "latents": torch.randn(1, 6, 16),
        "timestep": torch.tensor([500.0]),
        "embedded_guidance": 1.0,
        "prompt_embeds": torch.randn(1, 5, TEXT),
        "text_ids": torch.arange(5).float()[None, :, None].expand(1, 5, 4),
        "image_ids": torch.arange(6).float()[None, :, None].expand(1, 6, 4),
    }
    return Toy({"dit": dit}, inputs, targets=["to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"])


def flux2_klein() -> Toy:
    return flux2(guidance=False)


def vace_lora() -> Toy:
    return vace("vace")


VARIANTS: Mapping[str, Callable[[], Toy]] = {
    builder.__name__: builder
    for builder in (
        t2v,
        i2v,
        i2v_a14b,
        flf2v,
        ti2v_5b,
        fun_control,
        fun_inp,
        fun_camera,
        ref_conv,
        fun_a14b_control,
        fun_a14b_camera,
        speed_control,
        vace,
        vace_lora,
        animate,
        animate_2,
        s2v,
        wantodance,
        wantodance_global,
        video_as_prompt,
        longcat,
        flux2,
        flux2_klein,
    )
}


def model_function(name: str) -> Callable[..., Any]:
    if name.startswith("flux2"):
        from diffsynth.pipelines.flux2_image import model_fn_flux2

        return model_fn_flux2
    from diffsynth.pipelines.wan_video import model_fn_wan_video

    return model_fn_wan_video
