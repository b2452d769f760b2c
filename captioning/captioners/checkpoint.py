"""Locates captioning models: a folder, or a hub id from the local cache or the hub."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import UNAVAILABLE

TRANSFORMERS_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")


def locate_model(model: str, patterns: Sequence[str]) -> Path:
    """The folder of a model, downloaded if necessary. Raises `Refused` (69) if it is not available."""
    if Path(model).is_dir():
        return Path(model)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise Refused(f"--model {model}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns)))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise Refused(
            f"--model {model}: no such folder, not in the hub's local cache, and the hub cannot be reached", UNAVAILABLE
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise Refused(
            f"--model {model}: no such folder, and the hub returned an error ({_first_line(error)})", UNAVAILABLE
        ) from None


def transformers_folder(model: str, kinds: Sequence[str] = ()) -> Path:
    """The folder of a transformers model, checked before any weight is loaded.

    Raises `Refused` if its `model_type` is not in `kinds` (empty: any), if it needs remote code, or if it has no
    safetensors weights.
    """
    folder = locate_model(model, TRANSFORMERS_FILES)
    config = _config(model, folder)
    kind = str(config.get("model_type", "unknown"))
    if "auto_map" in config:
        fix = "; use florence-community/Florence-2-large instead" if "florence" in kind.lower() else ""
        raise Refused(f"--model {model}: requires custom code (auto_map), which is never executed{fix}")
    if kinds and kind not in kinds:
        raise Refused(f"--model {model}: has model type {kind}, not {' or '.join(kinds)}; use --captioner vlm")
    if not any(folder.glob("*.safetensors")):
        raise Refused(f"--model {model}: has no .safetensors weights; pickles (.bin) are unsafe to load")
    return folder


def silence_transformers() -> None:
    """Turn off the progress bars and warnings of transformers; the command shows its own progress."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_packages(captioner: str, packages: Sequence[str]) -> None:
    """Raises `Refused` (69) with the install command if a package is missing."""
    for package in packages:
        if find_spec(package) is None:
            raise Refused(
                f'--captioner {captioner}: {package} is not installed; run pip install "scumble[captions]"', UNAVAILABLE
            )


def _config(model: str, folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refused(f"--model {model}: not a transformers model (no config.json in {folder})") from None
    except (OSError, ValueError) as error:
        raise Refused(f"--model {model}: {path} cannot be read ({error})") from None
    return config if isinstance(config, dict) else {}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
