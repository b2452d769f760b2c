"""BLIP (Li et al. 2022): one short sentence, of photos above all. Small and quick."""

from collections.abc import Sequence

import torch
from transformers import AutoProcessor, BlipForConditionalGeneration

from .checkpoint import quiet, transformers_folder
from .picture import Picture, in_halves

NUM_BEAMS = 3


class Blip:
    """A loaded BLIP. It goes on from `prompt` where there is one, as `a photo of`."""

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype, prompt: str, max_tokens: int):
        folder = transformers_folder(model, ("blip",))
        quiet()
        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self.model = BlipForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        ).to(device)
        self.model.eval()
        self.device, self.dtype, self.prompt, self.max_tokens = device, dtype, prompt, max_tokens

    def captions(self, pictures: Sequence[Picture]) -> list[str]:
        return in_halves(pictures, self._describe)

    @torch.inference_mode()
    def _describe(self, pictures: Sequence[Picture]) -> list[str]:
        text = [self.prompt] * len(pictures) if self.prompt else None
        inputs = self.processor(images=[one.pixels for one in pictures], text=text, return_tensors="pt")
        ids = self.model.generate(
            **inputs.to(self.device, self.dtype),
            max_new_tokens=self.max_tokens, num_beams=NUM_BEAMS, do_sample=False, repetition_penalty=1.2,
        )  # fmt: skip
        return self.processor.batch_decode(ids, skip_special_tokens=True)
