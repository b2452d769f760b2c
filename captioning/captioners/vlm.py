"""Any image-text-to-text model of transformers (Qwen-VL, Gemma, LLaVA, SmolVLM, …), given a prompt."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import UNAVAILABLE

from .checkpoint import silence_transformers, transformers_folder
from .picture import ImageFile, shrink, split_on_oom

MAX_SIDE_PX = 1024  # some models keep the image size, and 12 megapixels are 16,000 tokens


class Vlm:
    """A loaded model that answers `prompt` for each image."""

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype, prompt: str, max_tokens: int):
        folder = transformers_folder(model)
        silence_transformers()
        try:
            self.processor = load_processor(folder)
            self.model = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True
            ).to(device)
        except ImportError as error:
            raise Refused(f"--model {model}: {' '.join(str(error).split())}", UNAVAILABLE) from None
        except (ValueError, KeyError, AttributeError) as error:
            reason = str(error).strip().partition("\n")[0][:200]
            raise Refused(
                f"--model {model}: transformers cannot load it as an image-text-to-text model ({reason})"
            ) from None
        self.model.eval()
        self.device, self.dtype, self.max_tokens = device, dtype, max_tokens
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # aligns the answers of a batch
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.prompt = self._apply_chat_template(prompt)
        bos = self.tokenizer.bos_token
        self.has_bos = bool(bos) and self.prompt.startswith(bos)

    def captions(self, images: Sequence[ImageFile]) -> list[str]:
        return split_on_oom(images, self._generate)

    def _apply_chat_template(self, prompt: str) -> str:
        """The prompt in the chat template of the model, or unchanged if it has none."""
        if not (self.processor.chat_template or self.tokenizer.chat_template):
            return prompt
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    @torch.inference_mode()
    def _generate(self, images: Sequence[ImageFile]) -> list[str]:
        inputs = self.processor(
            images=[[shrink(image.pixels, MAX_SIDE_PX)] for image in images], text=[self.prompt] * len(images),
            padding=True, add_special_tokens=not self.has_bos, return_tensors="pt",
        ).to(self.device, self.dtype)  # fmt: skip
        ids = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        if not self.model.config.is_encoder_decoder:
            ids = ids[:, inputs["input_ids"].shape[1] :]  # only the answer
        return self.processor.batch_decode(ids, skip_special_tokens=True)


def load_processor(folder: Path) -> Any:
    """The processor of a model; without torchvision, its video processor is omitted."""
    if find_spec("torchvision") is None:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        kind: Any = PROCESSOR_MAPPING.get(type(config), None)
        if kind is not None and "video_processor" in kind.get_attributes():
            return without_videos(kind).from_pretrained(folder, local_files_only=True)
    return AutoProcessor.from_pretrained(folder, local_files_only=True)


def without_videos(kind: Any) -> Any:
    """A processor class without its video processor, the only part that requires torchvision."""

    class WithoutVideos(kind):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in kind.get_attributes() if part != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **settings: Any) -> Any:
            return super().from_args_and_dict(args, {"video_processor": None} | processor_dict, **settings)

    return WithoutVideos
