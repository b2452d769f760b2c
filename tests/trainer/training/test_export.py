"""Exported files contain no paths and no user names."""

import json
import shutil
from pathlib import Path

import pytest
from paths import CHECKOUT

from scumble.configs import files
from scumble.trainer import cli
from scumble.trainer.base_model.detect import EMBEDDED
from scumble.trainer.system.safetensors_header import read_header
from scumble.trainer.train import train

SAMPLES = CHECKOUT / "datasets/samples/clay-style"
USER = "annabel"


@pytest.mark.parametrize("folder", ["my clay", ""])  # a folder in the home folder, and the home folder itself
def test_exported_files_contain_no_path_and_no_user_name(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home = tmp_path / "home" / USER
    (home / folder).mkdir(parents=True)
    (home / ".models").mkdir()
    (home / ".models/my base").symlink_to(EMBEDDED)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    for name in ("fox.webp", "fox.txt"):
        shutil.copy(SAMPLES / name, home / folder / name)
    flags = {
        "model": {"base": str(home / ".models/my base")},
        "data": {"images": str(home / folder)},
        "optimization": {"steps": 1},
        "previews": {"prompts": ("owl",), "num_inference_steps": 1},
        "output": {"output_dir": str(home / "runs"), "output_name": "clay"},
    }
    result = train(files.resolve(flags=flags), [], dry_run=False)
    assert result
    cli.main(["adapter", "convert", str(result.adapter), "--to", "peft"])
    cli.main(["adapter", "convert", str(result.adapter.with_name("clay-peft.safetensors")), "--to", "kohya"])
    published = [path for path in result.adapter.parent.rglob("*") if path.suffix in (".safetensors", ".png")]
    assert {path.name for path in published} >= {"clay.safetensors", "clay.png", "clay-peft-kohya.safetensors"}
    for path in published:
        data = path.read_bytes()
        assert USER.encode() not in data and str(tmp_path).encode() not in data, path
    metadata = read_header(result.adapter).metadata
    assert metadata["ss_sd_model_name"] == "my base"
    assert list(json.loads(metadata["ss_dataset_dirs"])) == [folder or "images"]
    assert not [key for key, text in metadata.items() if text.startswith(("/", "\\", "~")) or ":\\" in text]
