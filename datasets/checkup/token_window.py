"""Counts the tokens of captions with the base model's own tokenizer, without loading the model or transformers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from scumble.configs.errors import Refused

NAMES = ("merges.txt", "tokenizer.json")
NUM_SPECIAL = 2  # the begin and end tokens are part of the window
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class TokenCount:
    """The number of tokens of a text, and the parts of the text inside (`kept`) and beyond (`lost`) the window."""

    tokens: int
    kept: str
    lost: str


@dataclass(frozen=True)
class Window:
    """A tokenizer and the number of text tokens that the text encoder reads: 75 of CLIP's 77."""

    tokenizer: Tokenizer
    size: int

    def count(self, text: str) -> TokenCount:
        """Count the tokens of a text, and split it after the last token inside the window, possibly within a word."""
        spans = self.tokenizer.encode(text, add_special_tokens=False).offsets
        end = spans[self.size - 1][1] if len(spans) > self.size else len(text)
        return TokenCount(len(spans), text[:end].rstrip(), text[end:].strip())


def read_windows(folders: Sequence[Path]) -> list[Window]:
    """Return the windows of a base's tokenizers without duplicates: SDXL's two differ only in padding."""
    files = {folder: next((one for name in NAMES if (one := folder / name).is_file()), None) for folder in folders}
    distinct = {file.read_bytes() if file else b"": folder for folder, file in reversed(files.items())}
    return [read_window(folder) for folder in distinct.values()]


def read_window(folder: Path) -> Window:
    """Read a tokenizer folder with CLIP's `vocab.json` and `merges.txt`, or with `tokenizer.json`.

    CLIP's tokenizer (Radford et al. 2021) is built as in transformers: lower case, words by regular expression, then
    byte-pair encoding. Raises `Refused` if the files are missing or cannot be read.
    """
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        size = int(config.get("model_max_length", 77)) - NUM_SPECIAL
        if not (folder / "merges.txt").is_file():
            whole = Tokenizer.from_file(str(folder / "tokenizer.json"))
            whole.no_truncation()
            whole.no_padding()
            return Window(whole, size)
        vocab, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # noqa: BLE001  (tokenizers raises plain Exception)
        raise Refused(f"{folder}: its tokenizer cannot be read ({error})") from None
    tokenizer = Tokenizer(
        BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return Window(tokenizer, size)
