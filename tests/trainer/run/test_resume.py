"""Interrupted runs resume bit for bit, changes are reported, and two processes never train the same run."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import SAMPLES, adapter_of, assert_same, interrupted_run, resume_run, train_run

from scumble.configs.errors import Refused
from scumble.trainer import cli
from scumble.trainer.adapters.targets import LAYOUT
from scumble.trainer.run import fingerprint
from scumble.trainer.run.events import Event
from scumble.trainer.run.folder import FORMAT, RunFolder, status_of, write_json
from scumble.trainer.run.state import newest_state

OPTIMIZERS = ["adamw", "adamw8bit", "lion", "prodigy", "adafactor", "schedule_free"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_interrupted_twice_gives_the_same_adapter_as_an_uninterrupted_run(optimizer: str, tmp_path: Path):
    tables: dict[str, Any] = {
        "data": {"shuffle_tags": True, "caption_dropout": 0.3, "random_flip": True},
        "network": {"lora_dropout": 0.2},
        "optimization": {
            "optimizer": optimizer,
            "steps": 8,
            "gradient_accumulation_steps": 2,
            "ema_decay": 0.5,
            "batch_size": 3,
        },
        "output": {"preview_every": 3, "save_every": 4, "save_precision": "fp32"},
    }
    if optimizer == "schedule_free":
        tables["optimization"]["ema_decay"] = 0.0
    uninterrupted = train_run(tmp_path / "a", **tables)
    interrupted = interrupted_run(tmp_path / "b", stop_at=3, **tables)
    resume_run(interrupted, stop_at=5)
    last = resume_run(interrupted)
    assert last.events[-1]["kind"] == "done" and [event["step"] for event in last.of("step")] == [6, 7, 8]
    assert last.losses == uninterrupted.losses[5:]
    assert_same(adapter_of(interrupted), adapter_of(uninterrupted.folder))
    assert (interrupted / "previews/grid.png").read_bytes() == (uninterrupted.folder / "previews/grid.png").read_bytes()
    assert json.loads((interrupted / "exit.json").read_text())["code"] == 0


def test_a_finished_run_is_not_changed_and_more_steps_resume_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = {"preview_every": 0, "save_every": 0, "save_precision": "fp32"}
    plain = {"lr_scheduler": "constant", "lr_warmup_steps": 0.0}
    longer = train_run(tmp_path / "a", optimization=plain | {"steps": 5}, output=output)
    run = train_run(tmp_path / "b", optimization=plain | {"steps": 3}, output=output).folder
    cli.main(["train", str(run)])
    assert f"{run} is finished" in capsys.readouterr().out
    cli.main(["train", str(run), "--steps", "5", "--json"])
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert any("changed: --steps 5 instead of 3" in line for line in events[0]["reasons"])
    assert [event["step"] for event in events if event["kind"] == "step"] == [4, 5]
    assert_same(adapter_of(run), adapter_of(longer.folder))


def test_a_longer_run_reports_the_change_of_its_learning_rate(tmp_path: Path):
    output = {"preview_every": 0, "save_every": 0}
    run = train_run(
        tmp_path, optimization={"steps": 2, "lr_scheduler": "linear", "lr_warmup_steps": 0.0}, output=output
    ).folder
    (plan,) = resume_run(run, optimization={"steps": 4}).of("plan")  # shares of the peak: 1, 1/2, then 2/4, 1/4
    assert (
        "the linear schedule now spans 4 steps: the learning rate changes from 50.0% to 50.0% of its peak"
        in plan["reasons"]
    )


def test_a_moved_run_can_be_resumed(tmp_path: Path):
    tables: dict[str, Any] = {"optimization": {"steps": 4}, "output": {"preview_every": 2, "save_precision": "fp32"}}
    uninterrupted = train_run(tmp_path / "a", **tables)
    interrupted = interrupted_run(tmp_path / "b", stop_at=2, **tables)
    moved, images = tmp_path / "elsewhere", tmp_path / "images"
    shutil.move(interrupted, moved)
    shutil.copytree(SAMPLES, images)
    resume_run(moved, data={"images": str(images)})
    assert_same(adapter_of(moved), adapter_of(uninterrupted.folder))


def test_the_resume_flag_starts_a_new_run_or_resumes_an_existing_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = [
        "train", str(SAMPLES), "--output-name", "it", "--output-dir", str(tmp_path), "--resume", "--preview-every", "0",
        "--device", "cpu", "--mixed-precision", "fp32",
    ]  # fmt: skip
    cli.main([*command, "--steps", "2"])
    loaded = newest_state(tmp_path / "it", pytest.fail)
    assert loaded and loaded.state.step == 2
    cli.main([*command, "--steps", "3"])
    assert "resumed after step 2" in capsys.readouterr().out
    before = (tmp_path / "it" / "events.jsonl").read_text()
    cli.main([*command, "--steps", "3"])
    assert "is finished" in capsys.readouterr().out and (tmp_path / "it" / "events.jsonl").read_text() == before
    cli.main(command)
    assert "is finished" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_changes_since_the_start_are_reported_and_require_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = tmp_path / "images"
    shutil.copytree(SAMPLES, images)
    run = interrupted_run(tmp_path, 1, data={"images": str(images)}, output={"preview_every": 0})
    with pytest.raises(Refused, match=r"--rank 4: the run uses 16, which cannot change within a run; start a new run"):
        resume_run(run, network={"rank": 4})
    with pytest.raises(Refused, match=r"--optimizer lion: the run uses adamw"):
        resume_run(run, optimization={"optimizer": "lion"})
    monkeypatch.setattr(fingerprint, "LAYOUT", LAYOUT + 1)
    with pytest.raises(Refused, match=r"optimizer state: the run uses the layout of another scumble version"):
        resume_run(run)
    monkeypatch.undo()
    captions = sorted(images.glob("*.txt"))
    captions[0].write_text("another caption")
    with pytest.raises(Refused, match=rf"{captions[0].stem}\.webp: image, caption.* changed.* --force"):
        resume_run(run)
    assert status_of(run).state == "stopped"
    last = resume_run(run, force=True, optimization={"learning_rate": 1e-4})
    reasons = "\n".join(last.of("plan")[0]["reasons"])
    assert "changed: --learning-rate 0.0001 instead of" in reasons and f"{captions[0].stem}.webp: image" in reasons
    assert {event["learning_rate"] for event in last.of("step")} and max(
        event["learning_rate"] for event in last.of("step")
    ) <= 1e-4


@pytest.mark.parametrize("damaged", ["adapter.safetensors", "optimizer.pt", "state.json"])
def test_a_damaged_state_is_skipped_and_the_previous_one_is_used(damaged: str, tmp_path: Path):
    tables: dict[str, Any] = {
        "optimization": {"steps": 4},
        "output": {"preview_every": 0, "save_every": 1, "save_precision": "fp32"},
    }
    uninterrupted = train_run(tmp_path / "a", **tables)
    interrupted = interrupted_run(tmp_path / "b", stop_at=3, **tables)
    file = interrupted / "state/000003" / damaged
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    last = resume_run(interrupted)
    assert any("000003 is damaged; skipping it" in line for line in last.of("plan")[0]["reasons"])
    assert [event["step"] for event in last.of("step")] == [3, 4]
    assert_same(adapter_of(interrupted), adapter_of(uninterrupted.folder))


def test_a_running_run_is_protected_and_a_run_that_lost_ownership_writes_nothing_more(tmp_path: Path):
    run = tmp_path / "runs/clay"
    with RunFolder(run).claim() as first:
        with pytest.raises(Refused, match=rf"{run}: process {os.getpid()} on .* is training this run") as error:
            RunFolder(run).claim()
        assert error.value.exit_code == 75
        RunFolder(run).claim(force=True)
        with pytest.raises(Refused, match=r"another process took over this run; .* writes no more files") as error:
            first.check_owner()
        assert error.value.exit_code == 75
        (run / "owner.json").unlink()
        with pytest.raises(Refused, match=r"owner\.json is missing or cannot be read; .* writes no more files"):
            first.check_owner()
    assert not (run / "exit.json").exists()


def test_a_process_that_lost_its_run_stops_before_writing(tmp_path: Path):
    run = tmp_path / "runs/clay"

    def read(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 2:
            write_json(run / "owner.json", {"token": "another's"})

    with pytest.raises(Refused, match="another process took over this run"):
        train_run(tmp_path, readers=[read], optimization={"steps": 4}, output={"preview_every": 0, "save_every": 2})
    assert not (run / "checkpoints").exists() and not (run / "state").exists() and not (run / "exit.json").exists()


def test_a_running_run_accepts_requests_and_reports_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, statuses = tmp_path / "runs/clay", []

    def read(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 1:
            cli.main(["sample", str(run)])
            cli.main(["save", str(run)])
            statuses.append(status_of(run))

    result = train_run(
        tmp_path, readers=[read], optimization={"steps": 3}, output={"preview_every": 0, "save_every": 0}
    )
    assert [(one.state, one.step, one.num_steps) for one in statuses] == [("running", 0, 3)]  # not yet a new heartbeat
    assert [event["step"] for event in result.of("preview")] == [1, 1]
    assert (run / "checkpoints/clay-000001.safetensors").is_file()
    capsys.readouterr()
    cli.main(["status", str(run), "--json"])
    status = json.loads(capsys.readouterr().out)[str(run)]
    assert status == {"state": "done", "reason": "finished", "step": 3, "num_steps": 3}
    with pytest.raises(SystemExit):
        cli.main(["stop", str(run)])
    assert f"{run}: cannot stop; the run is done: finished" in capsys.readouterr().err


def test_a_run_whose_process_died_is_lost_even_if_its_process_id_is_reused(tmp_path: Path):
    run = tmp_path / "it"
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
    RunFolder(run).claim()
    owner = json.loads((run / "owner.json").read_text())
    write_json(run / "owner.json", owner | {"pid": process.pid})
    assert status_of(run).state == "lost"
    write_json(run / "owner.json", owner | {"born": "1"})  # another process has this process id now
    assert status_of(run).state == "lost"


@pytest.fixture(autouse=True)
def sighup() -> Iterator[None]:
    """Enable SIGHUP, even if the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


SIGNALS = [
    (signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 75, "SIGTERM"), (signal.SIGHUP, 75, "SIGHUP (terminal closed)"),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "code", "name"), SIGNALS)
def test_after_a_signal_the_step_finishes_and_the_run_can_be_resumed(
    sent: signal.Signals, code: int, name: str, tmp_path: Path
):
    run, before = tmp_path / "runs/clay", signal.getsignal(signal.SIGINT)

    def read(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 2:
            signal.raise_signal(sent)

    train_run(tmp_path, readers=[read], optimization={"steps": 4}, output={"preview_every": 0})
    ended = json.loads((run / "exit.json").read_text())
    assert (ended["code"], ended["step"]) == (code, 2) and status_of(run).state == "stopped"
    assert ended["reason"] == f"stopped by {name}"
    assert signal.getsignal(signal.SIGINT) == before
    assert [event["step"] for event in resume_run(run).of("step")] == [3, 4]


def test_a_run_under_nohup_survives_its_terminal(tmp_path: Path):
    def read(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 1:
            signal.raise_signal(signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = train_run(tmp_path, readers=[read], optimization={"steps": 2}, output={"preview_every": 0})
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(run.losses) == 2 and status_of(run.folder).state == "done"


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["terminal", "json"])
def test_a_run_whose_output_pipe_is_closed_finishes(flags: list[str], tmp_path: Path):
    command = [sys.executable, "-m", "scumble.trainer.cli", "train", str(SAMPLES), *flags, "--steps", "2",
               "--preview-every", "0", "--output-dir", str(tmp_path), "--output-name", "it"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, "")
    assert (tmp_path / "it/it.safetensors").is_file() and status_of(tmp_path / "it").state == "done"


@pytest.mark.parametrize(("sent", "code", "name"), SIGNALS)
def test_a_second_signal_stops_immediately_and_reports_how_to_resume(
    sent: signal.Signals, code: int, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    run = tmp_path / "runs/clay"

    def read(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 2:
            signal.raise_signal(sent)
            assert "will save and stop after this step; interrupt again to stop immediately" in capfd.readouterr().err
            signal.raise_signal(sent)

    with pytest.raises(Refused, match=rf"stopped by {re.escape(name)}; resume with `scumble train .*clay`") as error:
        train_run(tmp_path, readers=[read], optimization={"steps": 4}, output={"preview_every": 0, "save_every": 1})
    assert error.value.exit_code == code
    assert (status_of(run).state, status_of(run).reason) == ("stopped", f"stopped by {name}")
    assert [event["step"] for event in resume_run(run).of("step")] == [2, 3, 4]


def test_ctrl_c_before_a_run_starts_exits_with_one_line_and_code_130(capsys: pytest.CaptureFixture[str]):
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("scumble.trainer.train.train", interrupt)
        cli.main(["train", str(SAMPLES)])
    assert ended.value.code == 130 and capsys.readouterr().err == "scumble: stopped by Ctrl-C\n"


def test_a_run_without_a_state_starts_again_in_its_folder(tmp_path: Path):
    run = train_run(tmp_path, optimization={"steps": 2}, output={"preview_every": 0}).folder
    before = adapter_of(run)
    shutil.rmtree(run / "state")
    (run / "exit.json").unlink()
    assert status_of(run).state in ("running", "lost")  # this process is still running
    last = resume_run(run, force=True)
    assert [event["step"] for event in last.of("step")] == [1, 2]
    assert_same(adapter_of(run), before)


def test_clock_changes_do_not_affect_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tables: dict[str, Any] = {"optimization": {"steps": 4}, "output": {"preview_every": 2, "save_precision": "fp32"}}
    plain = train_run(tmp_path / "a", **tables)
    ahead_s, real, run = [0.0], time.time, tmp_path / "b/runs/clay"
    monkeypatch.setattr(time, "time", lambda: real() + ahead_s[0])
    states = []

    def jump(event: Event) -> None:
        if event["kind"] == "step":
            ahead_s[0] = (-7200.0, 86400.0)[event["step"] % 2]
            states.append(status_of(run).state)

    jumped = train_run(tmp_path / "b", readers=[jump], **tables)
    assert states == ["running"] * 4 and status_of(run).state == "done"
    assert [note["text"] for note in jumped.of("note")] == [note["text"] for note in plain.of("note")]
    assert all(event["steps_per_s"] > 0 for event in jumped.of("step"))
    assert_same(adapter_of(run), adapter_of(plain.folder))


def test_a_run_of_another_version_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = interrupted_run(tmp_path, 1)
    owner = json.loads((run / "owner.json").read_text())
    assert owner["format"] == FORMAT
    for found, words in ((None, "no format number, older than the first release"), (99, "format 99")):
        changed = {key: value for key, value in owner.items() if key != "format"} | ({"format": found} if found else {})
        (run / "owner.json").write_text(json.dumps(changed))
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", str(run)])
        assert stop.value.code == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and f"{run}: written by another version of scumble ({words}; " in line


def test_a_state_of_another_version_is_refused_and_never_skipped(tmp_path: Path):
    run = interrupted_run(tmp_path, 1)
    (numbers,) = run.glob("state/*/state.json")
    text = json.dumps(json.loads(numbers.read_text().splitlines()[0]) | {"format": 99})
    numbers.write_text(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")
    with pytest.raises(Refused, match="written by another version of scumble; start a new run"):
        newest_state(run, pytest.fail)
