"""The state of a run at a step: everything that a later process needs to resume it bit for bit.

A folder `state/000123/` holds `adapter.safetensors` (the trained parameters in fp32, and their moving average),
`optimizer.pt` (the state of the optimizer and the loss scaler) and `state.json` (numbers, the digests of the two files,
and its own digest). The folder is staged under another name, synced and renamed. It is therefore complete or absent,
and never combines adapter and optimizer of different steps. No random state is saved, because all randomness is a
function of (seed, step).
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
    """`step` is the number of completed steps. `rows` are the previews in the grid: label, epoch, step.

    `checkpoints` are the names of saved adapters and the losses that rank them. `validation_losses` are steps and the
    validation losses after them.
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
    """A state read from disk: `tensors` by name, and `optimizer`, the state dict."""

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
    """Write a state into the run folder, and delete all older ones but one. Calls `check_owner` before the rename.

    Raises `Refused` (73) if the state cannot be written. Existing states are then kept.
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
        numbers = json.dumps({"format": FORMAT} | asdict(state) | {"digests": digests})
        (staged / NUMBERS).write_text(f"{numbers}\n{_digest_of(numbers)}\n", encoding="utf-8")
        for path in (*staged.iterdir(), staged):
            _sync(path)
        check_owner()
        if final.exists():  # written before the run resumed from an earlier state
            final.rename(staged.with_name(f"{STAGED}-old"))
        staged.rename(final)
        _sync(final.parent)
    except (OSError, RuntimeError) as error:  # torch and safetensors raise RuntimeError if the disk is full
        if isinstance(error, RuntimeError) and not _is_write_error(error):
            raise
        shutil.rmtree(staged, ignore_errors=True)
        reason = (error.strerror or error) if isinstance(error, OSError) else "the disk is full"
        raise Refused(f"{final}: cannot be written ({reason})", CANNOT_WRITE) from None
    for path in [*_states(run)[:-NUM_KEPT], *(run / FOLDER).glob(f"{STAGED}-*")]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def newest_state(run: Path, report: Callable[[str], None], before: float = inf) -> LoadedState | None:
    """Load the newest intact state of a step below `before`, or None. `report` receives a line for each damaged one.

    Raises `Refused` if another version of scumble wrote it.
    """
    for path in reversed([path for path in _states(run) if int(path.name) < before]):
        with suppress(OSError, ValueError, TypeError, KeyError):
            text, digest = (path / NUMBERS).read_text(encoding="utf-8").splitlines()
            if _digest_of(text) != digest:
                raise ValueError(path)
            numbers = json.loads(text)
            digests = numbers.pop("digests")
            if numbers.pop("format", None) != FORMAT:
                raise Refused(f"{path}: written by another version of scumble; start a new run")
            if all(_digest(path / name) == digests[name] for name in (ADAPTER, OPTIMIZER)):
                for name in ("rows", "checkpoints", "validation_losses"):
                    numbers[name] = [tuple(row) for row in numbers.get(name, ())]
                optimizer = torch.load(path / OPTIMIZER, weights_only=True, map_location="cpu")
                return LoadedState(State(**numbers), load_file(path / ADAPTER), optimizer)
        report(f"{path} is damaged; skipping it")
    return None


def _states(run: Path) -> list[Path]:
    found = [path for path in (run / FOLDER).glob("[0-9]*") if path.is_dir() and path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_write_error(error: RuntimeError) -> bool:
    message = str(error).lower()
    return any(word in message for word in ("no space", "os error", "i/o error", "write", "writing"))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot sync folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
