"""As `script.py`, for FLUX.2: images, and another pipeline."""

from diffsynth.core import UnifiedDataset
from diffsynth.pipelines.flux2_image import Flux2ImagePipeline
from script import Module, main


class Flux2Module(Module):
    pipeline = Flux2ImagePipeline
    removes_unnecessary = True

    def inputs_of(self, data):
        image = data["image"]
        shared = {"input_image": image, "width": image.size[0], "height": image.size[1], "cfg_scale": 1}
        shared |= {"embedded_guidance": 1.0, "rand_device": self.pipe.device}
        return shared, {"prompt": data["prompt"]}, {"negative_prompt": ""}


def image_operator(args):
    return UnifiedDataset.default_image_operator(
        base_path=args.dataset_base_path, height=args.height, width=args.width
    )


if __name__ == "__main__":
    main(Flux2Module, image_operator)
