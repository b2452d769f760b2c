"""`scumble status|sample|save|stop`: show and control runs from another terminal."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from scumble.configs.errors import Refused

from ..run.folder import is_run, request, status_of

Runs = Annotated[Path, Parameter(help="Folder of the run, for example runs/NAME")]


def register(app: App) -> None:
    """Add the commands to the command line."""
    for command in (status, sample, save, stop):
        app.command(command)


def status(
    *runs: Annotated[Path, Parameter(name="RUNS", help="Folders of runs; default: all in runs/")],
    as_json: Annotated[bool, Parameter(name="--json", help="Print JSON, for programs", negative="")] = False,
) -> None:
    """Show the state of runs: running, done, stopped (resumable), failed, or lost (the process died)."""
    found = runs or tuple(sorted(path for path in Path("runs").glob("*") if is_run(path)))
    for run in found:
        if not is_run(run):
            raise Refused(f"{run}: not a run folder; runs are in runs/")
    statuses = {str(run): status_of(run) for run in found}
    if as_json:
        print(json.dumps({run: asdict(one) for run, one in statuses.items()}, ensure_ascii=False))
        return
    width = max(map(len, statuses), default=0)
    for run, one in statuses.items():
        print(f"{run:<{width}}  {one.state:<7}  step {one.step} of {one.num_steps}  {one.reason}")
    if not statuses:
        print("no runs in runs/")


def sample(run: Runs, /) -> None:
    """Ask a run to render previews after its next step."""
    request(run, "sample")
    print(f"{run}: previews requested; after the next step they are in {run / 'previews'}")


def save(run: Runs, /) -> None:
    """Ask a run to save its adapter and state after its next step."""
    request(run, "save")
    print(f"{run}: checkpoint requested; after the next step it is in {run / 'checkpoints'}")


def stop(run: Runs, /) -> None:
    """Ask a run to save and stop after its next step. `scumble train RUN` resumes it."""
    request(run, "stop")
    print(f"{run}: stop requested after the next step; then resume with `scumble train {run}`")
