"""The state of a run at a step: all that a later process needs to go on as if nothing had happened.

A folder `state/000123/` holds `adapter.safetensors` (the trained parameters in fp32, and their moving average),
`optimizer.pt` (of the optimiser and the loss scaler) and `state.json` (numbers, the digests of the two files, and its
own). It is staged under another name, synced and renamed, so it is there whole or not at all, and never pairs one
step's adapter with another's optimiser. Random generators have no state: every draw is a function of (seed, step).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import CANNOT_WRITE

from .folder import FORMAT

ADAPTER, OPTIMIZER, NUMBERS = "adapter.safetensors", "optimizer.pt", "state.json"
FOLDER, STAGED = "state", ".staged"
NUM_KEPT = 2


@dataclass(frozen=True)
class State:
    """`step` steps are done. `rows` are the previews that stand in the grid: label, epoch, step.

    `checkpoints` are saved adapters with the loss by which they are ranked, `validation_losses` steps with the loss on held-out
    pictures after them.
    """

    step: int = 0
    started: float = 0.0
    losses: list[float] = field(default_factory=list)
    lr_factor: float = 1.0
    non_finite_in_a_row: int = 0
    micro_batch: int = 0
    checkpointing_level: int = 0
    bits: int = 16
    compiled: bool = False
    rows: list[tuple[str, int, int]] = field(default_factory=list)
    checkpoints: list[tuple[str, float]] = field(default_factory=list)
    validation_losses: list[tuple[int, float]] = field(default_factory=list)
    identity: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedState:
    """A state as read: `tensors` by name, `optimizer` as its `state_dict` gave it."""

    state: State
    tensors: dict[str, torch.Tensor]
    optimizer: dict[str, Any]


def save_state(
    run: Path,
    state: State,
    tensors: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, Any],
    check_owner: Callable[[], None],
) -> Path:
    """Write a state into the run's folder; older ones but one go. `check_owner` is called before the rename.

    Raises `Refused` (73) where the place cannot be written; the states that were there stay.
    """
    staged = run / FOLDER / f"{STAGED}-{os.getpid()}"
    final = run / FOLDER / f"{state.step:06}"
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, staged / ADAPTER)
        with (staged / OPTIMIZER).open("wb") as file:
            torch.save(dict(optimizer), file)
        digests = {name: _digest(staged / name) for name in (ADAPTER, OPTIMIZER)}
        told = json.dumps({"format": FORMAT} | asdict(state) | {"digests": digests})
        (staged / NUMBERS).write_text(f"{told}\n{_digest_of(told)}\n", encoding="utf-8")
        for path in (*staged.iterdir(), staged):
            _sync(path)
        check_owner()
        if final.exists():  # from before a resume that came back here
            final.rename(staged.with_name(f"{STAGED}-old"))
        staged.rename(final)
        _sync(final.parent)
    except (OSError, RuntimeError) as error:  # torch and safetensors raise RuntimeError where the disk is full
        if isinstance(error, RuntimeError) and not _is_about_writing(error):
            raise
        shutil.rmtree(staged, ignore_errors=True)
        reason = (error.strerror or error) if isinstance(error, OSError) else "the disk is full"
        raise Refused(f"{final}: cannot be written ({reason})", CANNOT_WRITE) from None
    for path in [*_states(run)[:-NUM_KEPT], *(run / FOLDER).glob(f"{STAGED}-*")]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def newest_state(run: Path, say: Callable[[str], None], before: float = inf) -> LoadedState | None:
    """The newest whole state of a step below `before`; `say` is told of each that is not whole. None where is none."""
    for path in reversed([path for path in _states(run) if int(path.name) < before]):
        with suppress(OSError, ValueError, TypeError, KeyError):
            text, digest = (path / NUMBERS).read_text(encoding="utf-8").splitlines()
            if _digest_of(text) != digest:
                raise ValueError(path)
            told = json.loads(text)
            digests = told.pop("digests")
            if told.pop("format", None) != FORMAT:
                raise ValueError(path)
            if all(_digest(path / name) == digests[name] for name in (ADAPTER, OPTIMIZER)):
                for name in ("rows", "checkpoints", "validation_losses"):
                    told[name] = [tuple(row) for row in told.get(name, ())]
                optimizer = torch.load(path / OPTIMIZER, weights_only=True, map_location="cpu")
                return LoadedState(State(**told), load_file(path / ADAPTER), optimizer)
        say(f"{path} is damaged and left aside")
    return None


def _states(run: Path) -> list[Path]:
    found = [path for path in (run / FOLDER).glob("[0-9]*") if path.is_dir() and path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_about_writing(error: RuntimeError) -> bool:
    said = str(error).lower()
    return any(word in said for word in ("no space", "os error", "i/o error", "write", "writing"))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows syncs no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
