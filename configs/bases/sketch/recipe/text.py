"""The text part of the recipe: a byte-level BPE tokenizer in CLIP's layout, a small CLIP text encoder, and captions.

Prompts have only 16 tokens because padding is read like text: with 32 tokens it outweighed the few words of a caption,
and training needed five times as many steps for the same accuracy.
"""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

NUM_PIECES = 2048
MAX_TOKENS = 16
WORDS_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def make_tokenizer(emojibase: Path, captions: list[str], folder: Path) -> CLIPTokenizer:
    """Train a tokenizer in CLIP's layout: 256 bytes, 256 word-final bytes, merges, begin and end (Radford et al. 2021).

    The merges are learned from the captions and from the tags of all emoji, so that common English words have few
    tokens. Writes vocab.json and merges.txt to `folder`, which every CLIP tool can read.
    """
    from tokenizers import Regex

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS_PATTERN), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    emoji = json.loads((emojibase / "en/data.json").read_text())
    tags = [" ".join([entry["label"], *entry.get("tags", ())]) for entry in emoji if entry.get("group") != 9]
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_PIECES - 2,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions * 5 + tags, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    pieces = dict.fromkeys(alphabet + [byte + "</w>" for byte in alphabet] + [a + b for a, b in merges])
    specials = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *specials])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {"unk_token": specials[1], "pad_token": specials[1], "model_max_length": MAX_TOKENS}
    config = {"tokenizer_class": "CLIPTokenizer", "bos_token": specials[0], "eos_token": specials[1]} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def make_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def caption(name: str, style: str, rng: random.Random) -> str:
    """Draw a caption: 8 % empty, 8 % without the style, 4 % only the style, otherwise name and style."""
    uniform = rng.random()
    article = rng.choice(["", "", "", "", "an " if name[0] in "aeiou" else "a "])
    if uniform < 0.08:
        return ""
    if uniform < 0.16:
        return article + name
    if uniform < 0.20:
        return style
    return f"{article}{name}, {style}"
