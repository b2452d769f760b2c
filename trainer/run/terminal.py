"""The terminal view of a run."""

import sys
from contextlib import suppress
from typing import Any

from .events import Event


class Terminal:
    """Prints the plan of a run, a progress bar, and the paths of its files."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        class PipeConsole(Console):
            def on_broken_pipe(self) -> None:
                """Raises an error; rich would end the process."""
                raise BrokenPipeError

        self.console = PipeConsole(highlight=False, markup=False)  # [brackets] in names are not markup
        self.smoothed: float | None = None
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=not sys.stdout.isatty(),
            disable=not sys.stdout.isatty(),
        )
        self.encoding: Any = None
        self.task: Any = None

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self.progress.stop()

    def __call__(self, event: Event) -> None:
        shown = getattr(self, f"_{event['kind']}", None)
        if shown:
            shown(event)

    def _note(self, event: Event) -> None:
        self.progress.console.print(event["text"], soft_wrap=True)

    _measured = _resumed = _validation = _note

    def _images(self, event: Event) -> None:
        if event["text"]:
            self._note(event)

    _checkup = _images

    def _encoded(self, event: Event) -> None:
        if self.encoding is None:
            self.progress.start()
            self.encoding = self.progress.add_task("encoding images", total=event["total"], shown="")
        self.progress.update(self.encoding, completed=event["done"])
        if event["done"] == event["total"]:
            self.progress.remove_task(self.encoding)

    def _plan(self, event: Event) -> None:
        for reason in event["reasons"]:
            self.console.print(f"  {reason}", soft_wrap=True)

    def _step(self, event: Event) -> None:
        if self.task is None:
            self.progress.start()
            self.task = self.progress.add_task("training", total=event["num_steps"], shown="")
        if event["loss"] is not None:
            self.smoothed = event["loss"] if self.smoothed is None else 0.95 * self.smoothed + 0.05 * event["loss"]
        loss = "" if self.smoothed is None else f"loss {self.smoothed:.4f}"
        speed = f"{event['steps_per_s']:.2f} steps/s"
        self.progress.update(
            self.task,
            completed=event["step"],
            shown=f"epoch {event['epoch']}  {loss}  {speed}  {event['memory_mb']} MB",
        )
        if self.progress.disable and event["step"] % max(1, event["num_steps"] // 10) == 0:
            self.console.print(f"  step {event['step']}/{event['num_steps']}  {loss}  {speed}")

    def _preview(self, event: Event) -> None:
        if event["prompt_index"] == 0:
            self.progress.console.print(f"  previews ({event['label']}): {event['grid']}")

    def _done(self, event: Event) -> None:
        self.progress.stop()
        self.console.print(event["text"], soft_wrap=True)
