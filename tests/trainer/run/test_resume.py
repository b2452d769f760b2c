"""A run that is cut goes on bit for bit; what changed since is named; two processes never train one run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import SAMPLES, adapter_of, assert_same, begun, go_on, ran

from scumble.configs.errors import Refused
from scumble.trainer import cli
from scumble.trainer.adapters.targets import LAYOUT
from scumble.trainer.run import fingerprint
from scumble.trainer.run.events import Event
from scumble.trainer.run.folder import RunFolder, status_of, write_json
from scumble.trainer.run.state import newest_state

OPTIMISERS = ["adamw", "adamw8bit", "lion", "prodigy", "adafactor", "schedule_free"]


@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_a_run_cut_twice_ends_with_the_very_adapter_of_an_unbroken_one(optimizer: str, tmp_path: Path):
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
    unbroken = ran(tmp_path / "a", **tables)
    cut = begun(tmp_path / "b", stop_at=3, **tables)
    go_on(cut, stop_at=5)
    last = go_on(cut)
    assert last.events[-1]["kind"] == "done" and [event["step"] for event in last.of("step")] == [6, 7, 8]
    assert last.losses == unbroken.losses[5:]
    assert_same(adapter_of(cut), adapter_of(unbroken.folder))
    assert (cut / "previews/grid.png").read_bytes() == (unbroken.folder / "previews/grid.png").read_bytes()
    assert json.loads((cut / "exit.json").read_text())["code"] == 0


def test_a_finished_run_is_left_alone_and_more_steps_go_on_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = {"preview_every": 0, "save_every": 0, "save_precision": "fp32"}
    plain = {"lr_scheduler": "constant", "lr_warmup_steps": 0.0}
    longer = ran(tmp_path / "a", optimization=plain | {"steps": 5}, output=output)
    run = ran(tmp_path / "b", optimization=plain | {"steps": 3}, output=output).folder
    cli.main(["train", str(run)])
    assert f"{run} is finished" in capsys.readouterr().out
    cli.main(["train", str(run), "--steps", "5", "--json"])
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert any("changed: --steps 5 instead of 3" in line for line in events[0]["reasons"])
    assert [event["step"] for event in events if event["kind"] == "step"] == [4, 5]
    assert_same(adapter_of(run), adapter_of(longer.folder))


def test_a_longer_run_says_what_becomes_of_its_rate(tmp_path: Path):
    output = {"preview_every": 0, "save_every": 0}
    run = ran(
        tmp_path, optimization={"steps": 2, "lr_scheduler": "linear", "lr_warmup_steps": 0.0}, output=output
    ).folder
    (plan,) = go_on(run, optimization={"steps": 4}).of("plan")  # shares of the peak: 1, 1/2, then 2/4, 1/4
    assert (
        "the linear schedule now spans 4 steps: the learning rate changes from 50.0% to 50.0% of its peak"
        in plan["reasons"]
    )


def test_a_run_moved_to_another_place_goes_on_there(tmp_path: Path):
    tables: dict[str, Any] = {"optimization": {"steps": 4}, "output": {"preview_every": 2, "save_precision": "fp32"}}
    unbroken = ran(tmp_path / "a", **tables)
    cut = begun(tmp_path / "b", stop_at=2, **tables)
    moved, pictures = tmp_path / "elsewhere", tmp_path / "pictures"
    shutil.move(cut, moved)
    shutil.copytree(SAMPLES, pictures)
    go_on(moved, data={"images": str(pictures)})
    assert_same(adapter_of(moved), adapter_of(unbroken.folder))


def test_the_resume_flag_begins_what_is_not_there_and_goes_on_with_what_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = [
        "train", str(SAMPLES), "--output-name", "it", "--output-dir", str(tmp_path), "--resume", "--preview-every", "0",
        "--device", "cpu", "--mixed-precision", "fp32",
    ]  # fmt: skip
    cli.main([*command, "--steps", "2"])
    kept = newest_state(tmp_path / "it", pytest.fail)
    assert kept and kept.state.step == 2
    cli.main([*command, "--steps", "3"])
    assert "goes on after step 2" in capsys.readouterr().out
    before = (tmp_path / "it" / "events.jsonl").read_text()
    cli.main([*command, "--steps", "3"])
    assert "is finished" in capsys.readouterr().out and (tmp_path / "it" / "events.jsonl").read_text() == before
    cli.main(command)
    assert "is finished" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_what_changed_since_is_named_and_taken_only_when_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pictures = tmp_path / "pictures"
    shutil.copytree(SAMPLES, pictures)
    run = begun(tmp_path, 1, data={"images": str(pictures)}, output={"preview_every": 0})
    with pytest.raises(Refused, match=r"--rank 4: the run has 16, and cannot change on its way; start a new run"):
        go_on(run, network={"rank": 4})
    with pytest.raises(Refused, match=r"--optimizer lion: the run has adamw"):
        go_on(run, optimization={"optimizer": "lion"})
    monkeypatch.setattr(fingerprint, "LAYOUT", LAYOUT + 1)
    with pytest.raises(Refused, match=r"the layout of the optimiser's state: .* of another scumble, and cannot change"):
        go_on(run)
    monkeypatch.undo()
    captions = sorted(pictures.glob("*.txt"))
    captions[0].write_text("another caption")
    with pytest.raises(Refused, match=rf"{captions[0].stem}\.webp: picture, caption.* changed; put it back, or --fo"):
        go_on(run)
    assert status_of(run).state == "stopped"
    last = go_on(run, force=True, optimization={"learning_rate": 1e-4})
    why = "\n".join(last.of("plan")[0]["reasons"])
    assert "changed: --learning-rate 0.0001 instead of" in why and f"{captions[0].stem}.webp: picture" in why
    assert {event["learning_rate"] for event in last.of("step")} and max(
        event["learning_rate"] for event in last.of("step")
    ) <= 1e-4


@pytest.mark.parametrize("damaged", ["adapter.safetensors", "optimizer.pt", "state.json"])
def test_a_damaged_state_is_left_aside_and_the_one_before_goes_on(damaged: str, tmp_path: Path):
    tables: dict[str, Any] = {
        "optimization": {"steps": 4},
        "output": {"preview_every": 0, "save_every": 1, "save_precision": "fp32"},
    }
    unbroken = ran(tmp_path / "a", **tables)
    cut = begun(tmp_path / "b", stop_at=3, **tables)
    file = cut / "state/000003" / damaged
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    last = go_on(cut)
    assert any("000003 is damaged and left aside" in line for line in last.of("plan")[0]["reasons"])
    assert [event["step"] for event in last.of("step")] == [3, 4]
    assert_same(adapter_of(cut), adapter_of(unbroken.folder))


def test_a_run_that_lives_is_not_taken_and_one_that_was_taken_writes_nothing_more(tmp_path: Path):
    run = tmp_path / "runs/clay"
    with RunFolder(run).claim() as first:
        with pytest.raises(Refused, match=rf"{run}: is being trained by process {os.getpid()} on ") as error:
            RunFolder(run).claim()
        assert error.value.exit_code == 75
        RunFolder(run).claim(force=True)
        with pytest.raises(Refused, match=r"another process has taken this run over; .* writes nothing more") as error:
            first.check_owner()
        assert error.value.exit_code == 75
        (run / "owner.json").unlink()
        with pytest.raises(Refused, match=r"owner\.json has gone or cannot be read; .* writes nothing more"):
            first.check_owner()
    assert not (run / "exit.json").exists()


def test_a_process_that_lost_its_run_ends_before_it_writes(tmp_path: Path):
    run = tmp_path / "runs/clay"

    def read(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 2:
            write_json(run / "owner.json", {"token": "another's"})

    with pytest.raises(Refused, match="another process has taken this run over"):
        ran(tmp_path, readers=[read], optimization={"steps": 4}, output={"preview_every": 0, "save_every": 2})
    assert not (run / "checkpoints").exists() and not (run / "state").exists() and not (run / "exit.json").exists()


def test_a_run_is_asked_for_previews_and_files_and_tells_where_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, seen = tmp_path / "runs/clay", []

    def read(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 1:
            cli.main(["sample", str(run)])
            cli.main(["save", str(run)])
            seen.append(status_of(run))

    result = ran(tmp_path, readers=[read], optimization={"steps": 3}, output={"preview_every": 0, "save_every": 0})
    assert [(one.state, one.step, one.num_steps) for one in seen] == [("running", 0, 3)]  # a beat takes some seconds
    assert [event["step"] for event in result.of("preview")] == [1, 1]
    assert (run / "checkpoints/clay-000001.safetensors").is_file()
    capsys.readouterr()
    cli.main(["status", str(run), "--json"])
    told = json.loads(capsys.readouterr().out)[str(run)]
    assert told == {"state": "done", "reason": "finished", "step": 3, "num_steps": 3}
    with pytest.raises(SystemExit):
        cli.main(["stop", str(run)])
    assert f"{run}: the run is done (finished), so there is nothing to stop" in capsys.readouterr().err


def test_a_process_that_died_is_lost_whatever_its_number_does_now(tmp_path: Path):
    run = tmp_path / "it"
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
    RunFolder(run).claim()
    owner = json.loads((run / "owner.json").read_text())
    write_json(run / "owner.json", owner | {"pid": process.pid})
    assert status_of(run).state == "lost"
    write_json(run / "owner.json", owner | {"born": "1"})  # the number is another process's now
    assert status_of(run).state == "lost"


@pytest.fixture(autouse=True)
def hung_up() -> Iterator[None]:
    """A closed terminal counts, even where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


SIGNALS = [
    (signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 75, "SIGTERM"), (signal.SIGHUP, 75, "the closed terminal"),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "code", "name"), SIGNALS)
def test_a_signal_finishes_the_step_and_the_run_can_go_on(sent: signal.Signals, code: int, name: str, tmp_path: Path):
    run, before = tmp_path / "runs/clay", signal.getsignal(signal.SIGINT)

    def read(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 2:
            signal.raise_signal(sent)

    ran(tmp_path, readers=[read], optimization={"steps": 4}, output={"preview_every": 0})
    ended = json.loads((run / "exit.json").read_text())
    assert (ended["code"], ended["step"]) == (code, 2) and status_of(run).state == "stopped"
    assert ended["reason"] == f"stopped by {name}"
    assert signal.getsignal(signal.SIGINT) == before
    assert [event["step"] for event in go_on(run).of("step")] == [3, 4]


def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path):
    def read(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 1:
            signal.raise_signal(signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = ran(tmp_path, readers=[read], optimization={"steps": 2}, output={"preview_every": 0})
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(run.losses) == 2 and status_of(run.folder).state == "done"


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["terminal", "json"])
def test_a_run_whose_output_is_no_longer_read_goes_on_to_its_end(flags: list[str], tmp_path: Path):
    command = [sys.executable, "-m", "scumble.trainer.cli", "train", str(SAMPLES), *flags, "--steps", "2",
               "--preview-every", "0", "--output-dir", str(tmp_path), "--output-name", "it"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, "")
    assert (tmp_path / "it/it.safetensors").is_file() and status_of(tmp_path / "it").state == "done"


@pytest.mark.parametrize(("sent", "code", "name"), SIGNALS)
def test_a_second_signal_stops_at_once_and_says_how_to_go_on(
    sent: signal.Signals, code: int, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    run = tmp_path / "runs/clay"

    def read(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 2:
            signal.raise_signal(sent)
            assert "stops after this step and saves; once more stops at once" in capfd.readouterr().err
            signal.raise_signal(sent)

    with pytest.raises(Refused, match=rf"stopped by {name}; `scumble train .*clay` goes on") as error:
        ran(tmp_path, readers=[read], optimization={"steps": 4}, output={"preview_every": 0, "save_every": 1})
    assert error.value.exit_code == code
    assert (status_of(run).state, status_of(run).reason) == ("stopped", f"stopped by {name}")
    assert [event["step"] for event in go_on(run).of("step")] == [2, 3, 4]


def test_ctrl_c_before_a_run_begins_ends_with_one_line_and_130(capsys: pytest.CaptureFixture[str]):
    def cut(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("scumble.trainer.train.train", cut)
        cli.main(["train", str(SAMPLES)])
    assert ended.value.code == 130 and capsys.readouterr().err == "scumble: stopped by Ctrl-C\n"


def test_the_run_without_a_state_begins_anew_in_its_folder(tmp_path: Path):
    run = ran(tmp_path, optimization={"steps": 2}, output={"preview_every": 0}).folder
    before = adapter_of(run)
    shutil.rmtree(run / "state")
    (run / "exit.json").unlink()
    assert status_of(run).state in ("running", "lost")  # this process lives
    last = go_on(run, force=True)
    assert [event["step"] for event in last.of("step")] == [1, 2]
    assert_same(adapter_of(run), before)


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tables: dict[str, Any] = {"optimization": {"steps": 4}, "output": {"preview_every": 2, "save_precision": "fp32"}}
    plain = ran(tmp_path / "a", **tables)
    ahead_s, real, run = [0.0], time.time, tmp_path / "b/runs/clay"
    monkeypatch.setattr(time, "time", lambda: real() + ahead_s[0])
    states = []

    def jump(event: Event) -> None:
        if event["kind"] == "step":
            ahead_s[0] = (-7200.0, 86400.0)[event["step"] % 2]
            states.append(status_of(run).state)

    jumped = ran(tmp_path / "b", readers=[jump], **tables)
    assert states == ["running"] * 4 and status_of(run).state == "done"
    assert [note["text"] for note in jumped.of("note")] == [note["text"] for note in plain.of("note")]
    assert all(event["steps_per_s"] > 0 for event in jumped.of("step"))
    assert_same(adapter_of(run), adapter_of(plain.folder))
