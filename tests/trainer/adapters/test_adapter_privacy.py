"""File paths in metadata are removed, and text that only looks like a path is kept."""

import base64
import json
import time
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
import torch
from safetensors.torch import save_file

from scumble.trainer import cli
from scumble.trainer.adapters.files import write_adapter
from scumble.trainer.adapters.privacy import without_paths
from scumble.trainer.system.safetensors_header import read_header

STEM = "lora_unet_mid_block_attentions_0_proj_in"
TENSORS = {f"{STEM}.lora_down.weight": torch.ones(2, 8), f"{STEM}.lora_up.weight": torch.ones(8, 2)}


def cut(text: str) -> str:
    return without_paths({"it": text})[0]["it"]


@pytest.mark.parametrize(
    "path",
    ["/home/annabel/models/base.safetensors", "/Users/annabel/My Pictures/a cat.png", "/mnt/d/annabel/x",
     "/workspace/annabel/out/x.safetensors", r"C:\Users\annabel\x.png", r"D:\lora\annabel\set one\x.png",
     "C:/Users/annabel/x", r"\\server\annabel\x.png", "/home/annabel/a long name of five words/x (1).png"],
)  # fmt: skip
def test_a_value_that_is_a_path_becomes_its_last_part_as_in_pathlib(path: str):
    kind = PurePosixPath if path.startswith("/") else PureWindowsPath
    assert cut(path) == kind(path).name


@pytest.mark.parametrize(
    "home",
    ["/home/annabel", "/home/annabel/", "/Users/annabel", r"C:\Users\Annabel Lee", "/mnt/c/Users/annabel", "~annabel/",
     r"C:\Documents and Settings\annabel"],
)  # fmt: skip
def test_a_home_folder_becomes_a_tilde(home: str):
    assert cut(home) == "~"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trained on /home/annabel/set, with love", "trained on set, with love"),
        (r"from C:\Users\Annabel Lee\My Pictures\set to E:\out", "from set to out"),
        ("--train_data_dir=/data/annabel/set --rank 4", "--train_data_dir=set --rank 4"),
        ("config:/home/annabel/c.toml", "config:c.toml"),
        ("['/mnt/annabel/a.png', 'C:\\\\Users\\\\annabel\\\\b.png']", "['a.png', 'b.png']"),
        ("see file:///home/annabel/a.png or file:///C:/annabel/b.png", "see a.png or b.png"),
        ("../../home/annabel/set, ~/lora/set", "set, set"),
    ],
)
def test_paths_within_a_text_are_found(text: str, expected: str):
    assert cut(text) == expected


@pytest.mark.parametrize(
    "text",
    ["o/", r"\o/", r"\m/", "/o/", ">:/", "1/2", "10/10/2024", "16:9", "black/white", "a / b", "and/or", "w/ hat",
     "~5/10", "https://civitai.com/models/1?a=/b", "https://github.com/Stability-AI/generative-models", "/", "",
     "home/office", "stabilityai/stable-diffusion-xl-base-1.0", "2024-01-01T10:00:00", "(512, 512)",
     "AdamW8bit(weight_decay=0.1)", "stable-diffusion-v1/lora", "masterpiece, :/",
     '{"a": {"black/white": 1, "o/": 2}}',
     "data:image/jpeg;base64,/9j/4AAQ/SkZJRg/"],
)  # fmt: skip
def test_other_text_is_kept(text: str):
    assert without_paths({"it": text}) == ({"it": text}, [])


def test_base64_images_are_kept_under_any_key():
    image = base64.b64encode(b"\xff\xd8\xff" + bytes(range(256)) * 40).decode()
    metadata = {"ssmd_cover_images": json.dumps([image]), "modelspec.thumbnail": image, "other": image}
    assert image.startswith("/9j/") and without_paths(metadata) == (metadata, [])


def test_paths_within_json_are_cut_and_keys_that_become_equal_are_numbered():
    metadata = {
        "ss_dataset_dirs": json.dumps({"/home/annabel/set": {"img_count": 1}, r"D:\annabel\set": {"img_count": 2}}),
        "config": json.dumps(
            {"base": "C:\\Users\\annabel\\b.safetensors", "sets": [{"path": "/x/annabel/s"}], "n": 1.5}
        ),
        "/home/annabel/x": "1",
        "ss_steps": "10",
    }
    clean, changed = without_paths(metadata)
    assert json.loads(clean["ss_dataset_dirs"]) == {"set": {"img_count": 1}, "set (2)": {"img_count": 2}}
    assert json.loads(clean["config"]) == {"base": "b.safetensors", "sets": [{"path": "s"}], "n": 1.5}
    assert clean["x"] == "1" and changed == ["ss_dataset_dirs", "config", "/home/annabel/x"]


def test_megabytes_of_slashes_are_cleaned_in_seconds():
    start = time.monotonic()
    for evil in ("/", "/a ", "home/", "../", "C:", "~", "/a a a a a", "\\\\"):
        cut(evil * 50_000)
    assert time.monotonic() - start < 20  # takes a few seconds; quadratic time would take hours


def test_files_are_written_without_paths_and_the_edited_entries_are_returned(tmp_path: Path):
    original = {"ss_sd_model_name": r"C:\Users\annabel\b.safetensors", "ss_steps": "10"}
    assert write_adapter(TENSORS, original, tmp_path / "x.safetensors") == ["ss_sd_model_name"]
    metadata = read_header(tmp_path / "x.safetensors").metadata
    assert metadata["ss_sd_model_name"] == "b.safetensors" and metadata["ss_steps"] == "10"


@pytest.mark.parametrize("command", [["convert"], ["convert", "--to", "peft"], ["merge"], ["resize", "--rank", "1"]])
def test_every_command_removes_file_paths_and_inspect_warns_about_them(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    metadata = {"ss_sd_model_name": "/home/annabel/b.safetensors", "modelspec.trigger_phrase": r"C:\Users\annabel\zwx",
                "ot_config": json.dumps({"concept_file": r"C:\Users\annabel\c.json"})}  # fmt: skip
    source, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    save_file(TENSORS, source, metadata)
    cli.main(["adapter", "inspect", str(source)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "the metadata contains file paths (" in shown and "ot_config" in shown
    cli.main(["adapter", command[0], str(source), *command[1:], "--out", str(out)])
    printed = capsys.readouterr().out
    assert "removed file paths from the metadata: " in printed and "ss_sd_model_name" in printed
    assert b"annabel" not in out.read_bytes()
    cli.main(["adapter", "inspect", "--json", str(out)])
    assert json.loads(capsys.readouterr().out)["paths_in_metadata"] == []
