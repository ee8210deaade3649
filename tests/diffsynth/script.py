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
    launch_data_process_task,
)
from diffsynth.pipelines.wan_video import ModelConfig, WanVideoPipeline


class Module(DiffusionTrainingModule):
    def __init__(self, args, device):
        super().__init__()
        configs = self.parse_model_configs(args.model_paths, None, fp8_models=args.fp8_models, device=device)
        tokenizer = None if args.tokenizer_path is None else ModelConfig(args.tokenizer_path)
        pipe = WanVideoPipeline.from_pretrained(
            torch_dtype=torch.bfloat16, device=device, model_configs=configs, tokenizer_config=tokenizer
        )
        self.pipe = self.split_pipeline_units(args.task, pipe, args.trainable_models, args.lora_base_model)
        self.switch_pipe_to_training_mode(
            self.pipe,
            args.trainable_models,
            args.lora_base_model,
            args.lora_target_modules,
            args.lora_rank,
            task=args.task,
        )
        self.task = args.task
        self.use_gradient_checkpointing = True
        self.use_gradient_checkpointing_offload = args.use_gradient_checkpointing_offload

    def forward(self, data, inputs=None):
        if inputs is None:
            shared = {"input_video": data["video"], "num_frames": len(data["video"]), "cfg_scale": 1}
            shared |= {"width": data["video"][0].size[0], "height": data["video"][0].size[1]}
            shared |= {"tiled": False, "rand_device": self.pipe.device, "cfg_merge": False}
            inputs = (shared, {"prompt": data["prompt"]}, {})
        shared = {"use_gradient_checkpointing": True, **inputs[0]}
        inputs = self.transfer_data_to_device((shared, *inputs[1:]), self.pipe.device, self.pipe.torch_dtype)
        for unit in self.pipe.units:
            inputs = self.pipe.unit_runner(unit, self.pipe, *inputs)
        if self.task.endswith(":data_process"):
            return inputs
        return FlowMatchSFTLoss(self.pipe, **inputs[0], **inputs[1])


def main():
    parser = add_general_config(argparse.ArgumentParser())
    parser.add_argument("--tokenizer_path")
    parser.add_argument("--num_frames", type=int, default=5)
    parser.add_argument("--initialize_model_on_cpu", action="store_true")
    args = parser.parse_args()
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
    dataset = UnifiedDataset(
        base_path=args.dataset_base_path,
        metadata_path=args.dataset_metadata_path,
        repeat=args.dataset_repeat,
        data_file_keys=args.data_file_keys.split(","),
        main_data_operator=UnifiedDataset.default_video_operator(
            base_path=args.dataset_base_path, height=32, width=32, num_frames=args.num_frames
        ),
    )
    model = Module(args, "cpu" if args.initialize_model_on_cpu else accelerator.device)
    logger = ModelLogger(
        args.output_path, remove_prefix_in_ckpt=args.remove_prefix_in_ckpt, enable_csv_log=args.enable_csv_log
    )
    launch = launch_data_process_task if args.task.endswith(":data_process") else launch_training_task  # noqa: F405
    launch(accelerator, dataset, model, logger, args=args)


if __name__ == "__main__":
    main()
