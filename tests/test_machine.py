"""Devices, launchers and memory, as far as a machine without an accelerator can show them."""

from pathlib import Path

import pytest
from test_train import SAMPLES

from scumble.trainer import cli
from scumble.trainer.machine import SIZES_OF_LAUNCHES


@pytest.mark.parametrize("name", SIZES_OF_LAUNCHES)
def test_a_run_of_several_processes_is_refused_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(name, "2")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", str(SAMPLES), "--steps", "1", "--runs", str(tmp_path / "runs")])
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"scumble: 2 processes ({name}): a run is one process on one device; start it without a launcher, or with "
        "--num_processes 1"
    ]
    assert not list(tmp_path.iterdir())


def test_a_launcher_of_one_process_may_start_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    cli.main(["train", str(SAMPLES), "--dry-run", "--runs", str(tmp_path / "runs")])
