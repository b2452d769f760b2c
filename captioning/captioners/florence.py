"""Florence-2 (Xiao et al. 2023): a sentence or a paragraph, at home with drawings too. Small for what it sees."""

from collections.abc import Sequence

import torch
from transformers import AutoProcessor, Florence2ForConditionalGeneration

from .checkpoint import quiet, transformers_folder
from .picture import Picture, in_halves
from .request import Detail

TASKS: dict[Detail, str] = {
    "short": "<CAPTION>",
    "medium": "<DETAILED_CAPTION>",
    "long": "<MORE_DETAILED_CAPTION>",
}
NUM_BEAMS = 3


class Florence:
    """A loaded Florence-2; `task` is one of its own tokens, or what a finetune of it was taught."""

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype, task: str, max_tokens: int):
        folder = transformers_folder(model, ("florence2",))
        quiet()
        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self.model = Florence2ForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        ).to(device)
        self.model.eval()
        self.device, self.dtype, self.task, self.max_tokens = device, dtype, task, max_tokens

    def captions(self, pictures: Sequence[Picture]) -> list[str]:
        return in_halves(pictures, self._describe)

    @torch.inference_mode()
    def _describe(self, pictures: Sequence[Picture]) -> list[str]:
        inputs = self.processor(
            images=[one.pixels for one in pictures], text=[self.task] * len(pictures), padding=True, return_tensors="pt"
        )
        ids = self.model.generate(
            **inputs.to(self.device, self.dtype),
            max_new_tokens=self.max_tokens, num_beams=NUM_BEAMS, do_sample=False,
        )  # fmt: skip
        return self.processor.batch_decode(ids, skip_special_tokens=True)
