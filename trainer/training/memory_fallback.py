"""What a run does when a step does not fit into memory: one measure after another, the cheapest first.

Release captured passes, checkpoint more blocks, split the batch into micro-batches (the effective batch stays), and
keep the frozen base in fewer bits. All but the last leave the gradients unchanged.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from scumble.configs.exit_codes import RESUMABLE
from scumble.configs.words import counted

from ..system.device import free_unused
from ..system.out_of_memory import TooLarge, unless_too_large


class Releasable(Protocol):
    """Captured passes: `forget` releases them and returns whether there were any."""

    def forget(self) -> bool: ...


class MemoryFallback:
    """The measures that are left. `micro_batch` is the largest number of samples in one pass, 0 for the whole batch.

    Each of `checkpointing` enables gradient checkpointing for more blocks; `checkpointing_level` of them are taken, at
    first those of a resumed run. `quantize` keeps the base in fewer bits and returns how many, 0 if there are none, or
    is None if that is not allowed. `report` is called with a line about each measure.
    """

    def __init__(
        self,
        captured: Releasable,
        device: torch.device,
        report: Callable[[str], None] = lambda line: None,
        checkpointing: Sequence[Callable[[], None]] = (),
        quantize: Callable[[], int] | None = None,
        micro_batch: int = 0,
        checkpointing_level: int = 0,
    ):
        self.captured, self.device, self.report, self.quantize = captured, device, report, quantize
        self.micro_batch, self.checkpointing_level, self.checkpointing = micro_batch, 0, list(checkpointing)
        for _ in range(min(checkpointing_level, len(self.checkpointing))):
            self._checkpoint_more()

    @property
    def checkpoints_all(self) -> bool:
        """Whether every block is checkpointed that can be."""
        return not self.checkpointing

    def fit(self, step: int, largest: int, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The result of `compute`, a step with batches of up to `largest` samples, after as many measures as it needs.

        `compute` must leave nothing behind when it fails. Raises `TooLarge` (75) if no measure is left.
        """
        was_released = False
        while (result := unless_too_large(compute)) is None:
            if not was_released and self.captured.forget():  # passes of other shapes keep memory of their own
                was_released = True
                free_unused()
            elif not self.need_less(largest):
                raise TooLarge(
                    f"step {step + 1} does not fit into the memory of the {self.device.type} device; "
                    "close other programs, or lower --resolution",
                    RESUMABLE,
                )
        return result

    def need_less(self, largest: int) -> bool:
        """Take the next measure for passes of up to `largest` samples. Returns False if none is left."""
        self.captured.forget()
        at_once = min(self.micro_batch or largest, largest)
        if self.checkpointing:
            which = "more" if self.checkpointing_level else "some" if len(self.checkpointing) > 1 else "all"
            self._checkpoint_more()
            self.report(f"out of memory: gradient checkpointing for {which} blocks from now on (slower, same result)")
        elif at_once > 1:
            self.micro_batch = -(-at_once // 2)
            self.report(
                f"out of memory: {counted(self.micro_batch, 'image')} per pass from now on (same effective batch size)"
            )
        elif self.quantize is not None and (bits := self.quantize()):
            self.report(f"out of memory: the base is kept in {bits} bits from now on (slower, slightly less exact)")
        else:
            return False
        return True

    def _checkpoint_more(self) -> None:
        self.checkpointing.pop(0)()
        self.checkpointing_level += 1
