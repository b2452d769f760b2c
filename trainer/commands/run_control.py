"""`scumble status|sample|save|stop`: runs looked at, and spoken to, from another terminal."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from scumble.configs.errors import Refused

from ..run.folder import is_run, request, status_of

Runs = Annotated[Path, Parameter(help="Folder of the run, as runs/NAME")]


def register(app: App) -> None:
    """Put the commands on the command line."""
    for command in (status, sample, save, stop):
        app.command(command)


def status(
    *runs: Annotated[Path, Parameter(name="RUNS", help="Folders of runs; none: all in runs/")],
    as_json: Annotated[bool, Parameter(name="--json", help="Print JSON, for programs", negative="")] = False,
) -> None:
    """Say what runs do: running, done, stopped (can go on), failed, or lost (the process ended without a word)."""
    found = runs or tuple(sorted(path for path in Path("runs").glob("*") if is_run(path)))
    for run in found:
        if not is_run(run):
            raise Refused(f"{run}: no folder of a run; they lie in runs/")
    told = {str(run): status_of(run) for run in found}
    if as_json:
        print(json.dumps({run: asdict(one) for run, one in told.items()}, ensure_ascii=False))
        return
    width = max(map(len, told), default=0)
    for run, one in told.items():
        print(f"{run:<{width}}  {one.state:<7}  step {one.step} of {one.num_steps}  {one.reason}")
    if not told:
        print("no runs in runs/")


def sample(run: Runs, /) -> None:
    """Ask a run for previews after its next step."""
    request(run, "sample")
    print(f"{run}: previews come after the next step, in {run / 'previews'}")


def save(run: Runs, /) -> None:
    """Ask a run to save adapter and state after its next step."""
    request(run, "save")
    print(f"{run}: saves after the next step, in {run / 'checkpoints'}")


def stop(run: Runs, /) -> None:
    """Ask a run to save and stop after its next step; `scumble train RUN` goes on with it."""
    request(run, "stop")
    print(f"{run}: stops after the next step; `scumble train {run}` goes on")
