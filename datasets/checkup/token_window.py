"""How much of a caption a base hears: its own tokenizer, read from its files without the model or transformers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from scumble.configs.errors import Refused

NAMES = ("merges.txt", "tokenizer.json")
ENDS = 2  # the marks of begin and end stand in the window too
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class TokenCount:
    """A text as a base hears it: how many tokens it has, and what of it lies within and beyond the window."""

    tokens: int
    kept: str
    lost: str


@dataclass(frozen=True)
class Window:
    """A tokenizer and how many tokens of text the base hears, 75 for CLIP's 77."""

    tokenizer: Tokenizer
    size: int

    def count(self, text: str) -> TokenCount:
        """Where the window ends in a text: at the last token that is within, so perhaps inside a word."""
        spans = self.tokenizer.encode(text, add_special_tokens=False).offsets
        end = spans[self.size - 1][1] if len(spans) > self.size else len(text)
        return TokenCount(len(spans), text[:end].rstrip(), text[end:].strip())


def read_windows(folders: Sequence[Path]) -> list[Window]:
    """The windows of a base's tokenizers, of those alike one: SDXL's two differ in what they pad with."""
    files = {folder: next((one for name in NAMES if (one := folder / name).is_file()), None) for folder in folders}
    distinct = {file.read_bytes() if file else b"": folder for folder, file in reversed(files.items())}
    return [read_window(folder) for folder in distinct.values()]


def read_window(folder: Path) -> Window:
    """The window of a tokenizer's folder: CLIP's `vocab.json` and `merges.txt`, or a `tokenizer.json`.

    CLIP's rules are those of Radford et al. 2021 as transformers builds them: lower case, words by that pattern, then
    byte pairs. Raises `Refused` where the files are not there or cannot be read.
    """
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        size = int(config.get("model_max_length", 77)) - ENDS
        if not (folder / "merges.txt").is_file():
            whole = Tokenizer.from_file(str(folder / "tokenizer.json"))
            whole.no_truncation()
            whole.no_padding()
            return Window(whole, size)
        vocab, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # noqa: BLE001  (tokenizers raises Exception itself)
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
