"""BLIP (Li et al. 2022): one short sentence, best for photos. Small and fast."""

from collections.abc import Sequence

import torch
from transformers import AutoProcessor, BlipForConditionalGeneration

from .checkpoint import silence_transformers, transformers_folder
from .picture import ImageFile, split_on_oom

NUM_BEAMS = 3


class Blip:
    """A loaded BLIP model. If `prompt` is not empty, each caption continues it (`a photo of`)."""

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype, prompt: str, max_tokens: int):
        folder = transformers_folder(model, ("blip",))
        silence_transformers()
        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self.model = BlipForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        ).to(device)
        self.model.eval()
        self.device, self.dtype, self.prompt, self.max_tokens = device, dtype, prompt, max_tokens

    def captions(self, images: Sequence[ImageFile]) -> list[str]:
        return split_on_oom(images, self._generate)

    @torch.inference_mode()
    def _generate(self, images: Sequence[ImageFile]) -> list[str]:
        text = [self.prompt] * len(images) if self.prompt else None
        inputs = self.processor(images=[image.pixels for image in images], text=text, return_tensors="pt")
        ids = self.model.generate(
            **inputs.to(self.device, self.dtype),
            max_new_tokens=self.max_tokens, num_beams=NUM_BEAMS, do_sample=False, repetition_penalty=1.2,
        )  # fmt: skip
        return self.processor.batch_decode(ids, skip_special_tokens=True)
