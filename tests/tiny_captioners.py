"""Tiny captioning models in the real layouts, trained in seconds to caption two colors; and an ONNX tagger."""

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    Florence2Config,
    Florence2ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

CAPTIONS = {"red": "a red cat on the mat", "blue": "a blue dog in the house"}
WORDS = ["a", "the", "red", "blue", "cat", "dog", "on", "in", "mat", "house"]
TASK_PROMPT = ["Describe", "in", "detail", "what", "is", "shown", "in", "the", "image", "."]  # of Florence-2
CHAT = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def color_image(name: str, size: tuple[int, int] = (48, 32)) -> Image.Image:
    return Image.new("RGB", size, name)


def tiny_blip(folder: Path) -> Path:
    """A two-layer BLIP that has learned `CAPTIONS`."""
    tokenizer = write_tokenizer(folder, pad="[PAD]", unk="[UNK]", bos="[DEC]", eos="[SEP]", add_bos_eos=True)
    write_processor(folder, "BlipProcessor", "BlipImageProcessor", size={"height": 16, "width": 16})
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": len(tokenizer), "encoder_hidden_size": 32, "max_position_embeddings": 64,
        "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0, **sizes,
    }  # fmt: skip
    vision = {"image_size": 16, "patch_size": 8, **sizes}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    pixels = torch.stack([pixels_of(name, 16) for name in CAPTIONS])
    captions = tokenizer(list(CAPTIONS.values()), padding=True, return_tensors="pt")
    labels = captions.input_ids.masked_fill(captions.attention_mask == 0, -100)
    train(model, lambda: model(pixel_values=pixels, input_ids=captions.input_ids, labels=labels).loss)
    model.save_pretrained(folder)
    return folder


def tiny_florence(folder: Path) -> Path:
    """A Florence-2 (DaViT and BART) with one layer per stage that has learned to answer its task with `CAPTIONS`."""
    tokenizer = write_tokenizer(folder, pad="<pad>", unk="<unk>", bos="<s>", eos="</s>", image="<image>")
    square = {"height": 64, "width": 64}
    settings = {"size": square, "crop_size": square, "do_center_crop": False, "image_seq_length": 5}
    write_processor(folder, "Florence2Processor", "CLIPImageProcessor", **settings)
    torch.manual_seed(0)
    vision = {
        "depths": (1, 1, 1, 1), "embed_dim": (16, 16, 32, 32), "num_heads": (2, 2, 2, 2), "num_groups": (2, 2, 2, 2),
        "window_size": 2, "projection_dim": 32, "drop_path_rate": 0.0,
    }  # fmt: skip
    text = {
        "model_type": "bart", "vocab_size": len(tokenizer), "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
        "decoder_start_token_id": 3, "forced_bos_token_id": None, "dropout": 0.0,
    }  # fmt: skip
    image_id = tokenizer.get_vocab()["<image>"]
    ids: Any = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = Florence2Config(vision_config=vision, text_config=text, image_token_id=image_id, **ids)
    model = Florence2ForConditionalGeneration(config)
    model.generation_config.update(decoder_start_token_id=3, forced_bos_token_id=None, **ids)
    pixels = torch.stack([pixels_of(name, 64) for name in CAPTIONS])
    question = "<image>" * 5 + f"<s> {' '.join(TASK_PROMPT)} </s>"
    inputs = tokenizer([question] * 2, return_tensors="pt")
    captions = tokenizer([f"{text} </s>" for text in CAPTIONS.values()], padding=True, return_tensors="pt")
    labels = captions.input_ids.masked_fill(captions.attention_mask == 0, -100)
    train(model, lambda: model(pixel_values=pixels, **inputs, labels=labels).loss)
    model.save_pretrained(folder)
    return folder


def tiny_qwen(folder: Path) -> Path:
    """A two-layer Qwen2-VL that has learned `CAPTIONS`; its processor, the real one, has a video processor too."""
    tokenizer = write_tokenizer(
        folder, pad="<|endoftext|>", unk="<unk>", bos="<|im_start|>", eos="<|im_end|>",
        others=("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"), chat_template=CHAT,
    )  # fmt: skip
    patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    write_processor(
        folder, "Qwen2VLProcessor", "Qwen2VLImageProcessor", min_pixels=28 * 28, max_pixels=56 * 56, **patches
    )
    torch.manual_seed(0)
    start, image, end, video = (tokenizer.get_vocab()[token] for token in tokenizer.extra_special_tokens)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "rope_parameters": {"type": "mrope", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    ids: Any = {"vision_start_token_id": start, "image_token_id": image, "vision_end_token_id": end}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, video_token_id=video, **ids)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.update(bos_token_id=2, eos_token_id=3, pad_token_id=0)
    model.save_pretrained(folder)  # the processor needs its config

    from scumble.captioning.captioners.vlm import load_processor

    processor = load_processor(folder)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe"}]}]
    prompt = processor.apply_chat_template(message, add_generation_prompt=True)
    texts = [f"{prompt} {text} <|im_end|>" for text in CAPTIONS.values()]
    batch = processor(images=[[color_image(name)] for name in CAPTIONS], text=texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].clone()
    for row in labels:  # train on the answer only
        row[: int((row == 2).nonzero()[-1]) + 1] = -100
    labels[batch["input_ids"] == 0] = -100
    train(model, lambda: model(**batch, labels=labels).loss)
    model.save_pretrained(folder)
    return folder


def tiny_tagger(folder: Path, fixed_batch: bool = False) -> Path:
    """A tagger whose probabilities are weighted means of blue, green and red (BGR) in the center of the image."""
    side = 8
    rows = [
        ("blue_sky", "0"), ("green_hair", "0"), ("red_dress", "0"), ("^_^", "0"), ("sketch", "0"),
        ("red_(hero)", "4"), ("general", "9"), ("explicit", "9"),
    ]  # fmt: skip
    with (folder / "selected_tags.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["tag_id", "name", "category", "count"])
        table.writerows([index, name, category, 1000 - index] for index, (name, category) in enumerate(rows))
    mix = np.zeros((3, len(rows)), dtype=np.float32)
    for column, weights in enumerate(
        [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0.9), (0, 0, 0.8), (0, 0, 0.9), (0, 0.3, 0.6), (0.1, 0, 0)]
    ):
        mix[:, column] = np.array(weights) / 255
    middle = {"starts": [3, 3], "ends": [5, 5], "axes": [1, 2]}
    constants = [numpy_helper.from_array(np.array(value, dtype=np.int64), name) for name, value in middle.items()]
    constants += [numpy_helper.from_array(mix, "mix"), numpy_helper.from_array(np.array([1, 2]), "area")]
    nodes = [
        helper.make_node("Slice", ["input", "starts", "ends", "axes"], ["middle"]),
        helper.make_node("ReduceMean", ["middle", "area"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "mix"], ["output"]),
    ]
    size = 2 if fixed_batch else "batch"
    graph_input = helper.make_tensor_value_info("input", TensorProto.FLOAT, [size, side, side, 3])
    graph_output = helper.make_tensor_value_info("output", TensorProto.FLOAT, [size, len(rows)])
    graph = helper.make_graph(nodes, "tagger", [graph_input], [graph_output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, str(folder / "model.onnx"))
    return folder


def train(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor], max_steps: int = 400) -> None:
    """Train until the model reproduces the captions."""
    model.eval()  # no dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(max_steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.02:
            return
    raise AssertionError(f"captions not learned: loss {loss.item():.3f}")


def pixels_of(name: str, side: int) -> torch.Tensor:
    """(3, side, side), normalized like the image processors of CLIP and BLIP."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    values = np.asarray(color_image(name, (side, side)), dtype=np.float32) / 255
    return torch.from_numpy((values - np.array(mean, "float32")) / np.array(std, "float32")).permute(2, 0, 1)


def write_tokenizer(
    folder: Path, pad: str, unk: str, bos: str, eos: str, image: str = "", others: tuple[str, ...] = (),
    chat_template: str = "", add_bos_eos: bool = False,
) -> PreTrainedTokenizerFast:  # fmt: skip
    """A whole-word tokenizer. Its first tokens are pad, unk, bos and eos; `add_bos_eos` adds bos and eos to a text."""
    special = [pad, unk, bos, eos, *([image] if image else []), *others]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*special, *WORDS, *TASK_PROMPT]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(special)
    if add_bos_eos:
        ends = [(bos, vocabulary[bos]), (eos, vocabulary[eos])]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A {eos}", special_tokens=ends)
    extra: Any = {"image_token": image} if image else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, unk_token=unk, bos_token=bos, eos_token=eos,
        extra_special_tokens=extra or list(others), model_max_length=512,
    )  # fmt: skip
    if chat_template:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_processor(folder: Path, processor: str, image_processor: str, **settings: Any) -> None:
    """Write preprocessor_config.json in the format of published models."""
    write_json(
        folder / "preprocessor_config.json",
        {"processor_class": processor, "image_processor_type": image_processor, "do_resize": True, "do_rescale": True,
         "do_normalize": True, "do_convert_rgb": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
         "image_std": [0.26862954, 0.26130258, 0.27577711], "rescale_factor": 1 / 255, "resample": 3, **settings},
    )  # fmt: skip


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value))
