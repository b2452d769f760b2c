"""Florence-2 (Xiao et al. 2023): a sentence or a paragraph, for photos and drawings. Small for its accuracy."""

from collections.abc import Sequence

import torch
from transformers import AutoProcessor, Florence2ForConditionalGeneration

from .checkpoint import silence_transformers, transformers_folder
from .picture import ImageFile, split_on_oom
from .request import Detail

TASKS: dict[Detail, str] = {
    "short": "<CAPTION>",
    "medium": "<DETAILED_CAPTION>",
    "long": "<MORE_DETAILED_CAPTION>",
}
NUM_BEAMS = 3


class Florence:
    """A loaded Florence-2 model. `task` is one of its task tokens, or the prompt of a fine-tuned version."""

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype, task: str, max_tokens: int):
        folder = transformers_folder(model, ("florence2",))
        silence_transformers()
        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self.model = Florence2ForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        ).to(device)
        self.model.eval()
        self.device, self.dtype, self.task, self.max_tokens = device, dtype, task, max_tokens

    def captions(self, images: Sequence[ImageFile]) -> list[str]:
        return split_on_oom(images, self._generate)

    @torch.inference_mode()
    def _generate(self, images: Sequence[ImageFile]) -> list[str]:
        inputs = self.processor(
            images=[image.pixels for image in images], text=[self.task] * len(images), padding=True, return_tensors="pt"
        )
        ids = self.model.generate(
            **inputs.to(self.device, self.dtype),
            max_new_tokens=self.max_tokens, num_beams=NUM_BEAMS, do_sample=False,
        )  # fmt: skip
        return self.processor.batch_decode(ids, skip_special_tokens=True)
