"""Any image-text-to-text model of transformers (Qwen-VL, Gemma, LLaVA, SmolVLM and so on): it does as it is told."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import UNAVAILABLE

from .checkpoint import quiet, transformers_folder
from .picture import Picture, in_halves, within

SIDE_PX = 1024  # of what the model sees: some take a picture's own size, and 12 megapixels are 16,000 tokens


class Vlm:
    """A loaded model that is given one picture and `prompt`."""

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype, prompt: str, max_tokens: int):
        folder = transformers_folder(model)
        quiet()
        try:
            self.processor = processor_in(folder)
            self.model = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True
            ).to(device)
        except ImportError as error:
            raise Refused(f"--model {model}: {' '.join(str(error).split())}", UNAVAILABLE) from None
        except (ValueError, KeyError, AttributeError) as error:
            what = str(error).strip().partition("\n")[0][:200]
            raise Refused(
                f"--model {model}: transformers cannot load it as a model of pictures and text: {what}"
            ) from None
        self.model.eval()
        self.device, self.dtype, self.max_tokens = device, dtype, max_tokens
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # so that answers of a batch begin at one place
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.prompt = self._framed(prompt)
        bos = self.tokenizer.bos_token
        self.begins = bool(bos) and self.prompt.startswith(bos)

    def captions(self, pictures: Sequence[Picture]) -> list[str]:
        return in_halves(pictures, self._describe)

    def _framed(self, prompt: str) -> str:
        """The prompt as the model's chat template puts it, or bare for a model without one."""
        if not (self.processor.chat_template or self.tokenizer.chat_template):
            return prompt
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        return self.processor.apply_chat_template(said, add_generation_prompt=True)

    @torch.inference_mode()
    def _describe(self, pictures: Sequence[Picture]) -> list[str]:
        inputs = self.processor(
            images=[[within(one.pixels, SIDE_PX)] for one in pictures], text=[self.prompt] * len(pictures),
            padding=True, add_special_tokens=not self.begins, return_tensors="pt",
        ).to(self.device, self.dtype)  # fmt: skip
        ids = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        if not self.model.config.is_encoder_decoder:
            ids = ids[:, inputs["input_ids"].shape[1] :]  # what follows the prompt
        return self.processor.batch_decode(ids, skip_special_tokens=True)


def processor_in(folder: Path) -> Any:
    """The processor of a model; one that would read videos too is made without that where torchvision is missing."""
    if find_spec("torchvision") is None:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        kind: Any = PROCESSOR_MAPPING.get(type(config), None)
        if kind is not None and "video_processor" in kind.get_attributes():
            return pictures_only(kind).from_pretrained(folder, local_files_only=True)
    return AutoProcessor.from_pretrained(folder, local_files_only=True)


def pictures_only(kind: Any) -> Any:
    """A kind of processor without its part for videos, the only one that has no form without torchvision."""

    class PicturesOnly(kind):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in kind.get_attributes() if part != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **settings: Any) -> Any:
            return super().from_args_and_dict(args, {"video_processor": None} | processor_dict, **settings)

    return PicturesOnly
