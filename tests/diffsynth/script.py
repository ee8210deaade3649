"""A training script of the same shape as DiffSynth's own, from its parts: module, parser, launcher, logger.

Its own are not in the package; with DIFFSYNTH_REPOSITORY they are run too (test_scripts.py).
"""

import argparse

import accelerate
import torch
from diffsynth.core import UnifiedDataset
from diffsynth.diffusion import *  # noqa: F403
from diffsynth.diffusion import (
    DiffusionTrainingModule,
    FlowMatchSFTLoss,
    ModelLogger,
    add_general_config,
    add_video_size_config,
    launch_data_process_task,
)
from diffsynth.pipelines.wan_video import ModelConfig, WanVideoPipeline


class Module(DiffusionTrainingModule):
    pipeline = WanVideoPipeline
    removes_unnecessary = False

    def __init__(self, args, device):
        super().__init__()
        configs = self.parse_model_configs(args.model_paths, None, fp8_models=args.fp8_models, device=device)
        tokenizer = None if args.tokenizer_path is None else ModelConfig(args.tokenizer_path)
        self.pipe = self.pipeline.from_pretrained(
            torch_dtype=torch.bfloat16, device=device, model_configs=configs, tokenizer_config=tokenizer
        )
        self.split_pipeline_units(
            args.task,
            self.pipe,
            args.trainable_models,
            args.lora_base_model,
            remove_unnecessary_params=self.removes_unnecessary,
        )
        self.switch_pipe_to_training_mode(
            self.pipe,
            args.trainable_models,
            args.lora_base_model,
            args.lora_target_modules,
            args.lora_rank,
            task=args.task,
        )
        self.args = args
        self.task = args.task
        self.use_gradient_checkpointing = True
        self.use_gradient_checkpointing_offload = args.use_gradient_checkpointing_offload

    def inputs_of(self, data):
        video, args = data["video"], self.args
        shared = {"input_video": video, "num_frames": len(video), "cfg_scale": 1, "tiled": False}
        shared |= {"width": video[0].size[0], "height": video[0].size[1]}
        shared |= {"rand_device": self.pipe.device, "cfg_merge": False}
        shared |= {"max_timestep_boundary": args.max_timestep_boundary, "min_timestep_boundary": 0}
        if args.extra_inputs == "input_image":
            shared["input_image"] = video[0]
        return shared, {"prompt": data["prompt"]}, {}

    def forward(self, data, inputs=None):
        shared, positive, negative = self.inputs_of(data) if inputs is None else inputs
        shared = {"use_gradient_checkpointing": True, **shared}
        inputs = (shared, positive, negative)
        inputs = self.transfer_data_to_device(inputs, self.pipe.device, self.pipe.torch_dtype)
        for unit in self.pipe.units:
            inputs = self.pipe.unit_runner(unit, self.pipe, *inputs)
        if self.task.endswith(":data_process"):
            return inputs
        return FlowMatchSFTLoss(self.pipe, **inputs[0], **inputs[1])


def video_operator(args):
    return UnifiedDataset.default_video_operator(
        base_path=args.dataset_base_path,
        height=args.height or 32,
        width=args.width or 32,
        num_frames=args.num_frames,
    )


def main(module=Module, operator=video_operator):
    parser = add_video_size_config(add_general_config(argparse.ArgumentParser()))
    parser.add_argument("--tokenizer_path")
    parser.add_argument("--max_timestep_boundary", type=float, default=1.0)
    parser.add_argument("--initialize_model_on_cpu", action="store_true")
    args = parser.parse_args()
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
    dataset = UnifiedDataset(
        base_path=args.dataset_base_path,
        metadata_path=args.dataset_metadata_path,
        repeat=args.dataset_repeat,
        data_file_keys=args.data_file_keys.split(","),
        main_data_operator=operator(args),
    )
    model = module(args, "cpu" if args.initialize_model_on_cpu else accelerator.device)
    logger = ModelLogger(
        args.output_path, remove_prefix_in_ckpt=args.remove_prefix_in_ckpt, enable_csv_log=args.enable_csv_log
    )
    launch = launch_data_process_task if args.task.endswith(":data_process") else launch_training_task  # noqa: F405
    launch(accelerator, dataset, model, logger, args=args)


if __name__ == "__main__":
    main()
