"""Captioning models on disk: a folder, or a hub id that the local cache or the hub has."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import UNAVAILABLE

TRANSFORMERS_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")


def located(model: str, patterns: Sequence[str]) -> Path:
    """The folder of a model. Raises `Refused` (69) where it is neither here nor to be had."""
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
            f"--model {model}: no such folder here, not in the hub's local cache, and the hub cannot be reached", 69
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise Refused(
            f"--model {model}: no such folder here, and the hub refuses it ({_first(error)})", UNAVAILABLE
        ) from None


def transformers_folder(model: str, kinds: Sequence[str] = ()) -> Path:
    """The folder of a model of one of these kinds (`model_type`; none: any), with safetensors, without own programs.

    Raises `Refused` for any other before a weight is loaded.
    """
    folder = located(model, TRANSFORMERS_FILES)
    config = _config(model, folder)
    kind = str(config.get("model_type", "of no kind"))
    if "auto_map" in config:
        cure = "; florence-community/Florence-2-large is the same without" if "florence" in kind.lower() else ""
        raise Refused(f"--model {model}: brings a program of its own, which is not run{cure}")
    if kinds and kind not in kinds:
        raise Refused(f"--model {model}: is {kind}, not {' or '.join(kinds)}; --captioner vlm takes others")
    if not any(folder.glob("*.safetensors")):
        raise Refused(f"--model {model}: has no .safetensors; pickles (.bin) can run any program")
    return folder


def quiet() -> None:
    """No bars and warnings of transformers: the command shows its own progress."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_packages(captioner: str, packages: Sequence[str]) -> None:
    """Raises `Refused` (69) with the command that installs what is not there."""
    for package in packages:
        if find_spec(package) is None:
            raise Refused(
                f'--captioner {captioner}: {package} is not installed; pip install "scumble[captions]"', UNAVAILABLE
            )


def _config(model: str, folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refused(f"--model {model}: no config.json in {folder}, so it is no model of transformers") from None
    except (OSError, ValueError) as error:
        raise Refused(f"--model {model}: {path} cannot be read ({error})") from None
    return config if isinstance(config, dict) else {}


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
