"""Notices once when steps become much slower than the run's own median, and says the likely cause."""

import os
import statistics
from collections import deque

import torch

SLOWER = 2.0
RECENT, FEWEST, MOST = 5, 20, 200  # steps: those judged, and those that tell what is usual


class SlowdownWatch:
    """Fed with the seconds of each step; the run's first step warms up and does not count."""

    def __init__(self, device: torch.device):
        self.device = device
        self.usual: list[float] = []
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.said = False

    def add(self, seconds: float) -> str:
        """What to say after this step: one line, once in a run, else nothing."""
        self.recent.append(seconds)
        if not self.said and len(self.usual) >= FEWEST and len(self.recent) == RECENT:
            usual, now = statistics.median(self.usual), statistics.median(self.recent)
            if now > SLOWER * usual:
                self.said = True
                return f"steps take {now:.2f} s, {now / usual:.1f} times as long as before: {likely_cause(self.device)}"
        if len(self.recent) == RECENT and len(self.usual) < MOST:
            self.usual.append(self.recent[0])
        return ""


def likely_cause(device: torch.device) -> str:
    """By what the machine tells: device memory that spills, other programs, or heat."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if free < 0.03 * total:
            return "the card's memory is full and may spill into the machine's; close programs or lower --batch-size"
        return "another program may use the card, or it is hot and slows down"
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load > 1.5 * cores:
        return f"other programs use the processor (load {load:.1f} on {cores} cores)"
    return "the machine may be hot and slow down, or sleep and wake"
