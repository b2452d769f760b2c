"""Detect steps that are much slower than the median of the run, and report the likely cause once."""

import os
import statistics
from collections import deque

import torch

SLOWDOWN_FACTOR = 2.0
NUM_RECENT, MIN_BASELINE, MAX_BASELINE = 5, 20, 200  # steps: compared, and in the baseline


class SlowdownWatch:
    """Compares the median duration of recent steps with the baseline, the median of earlier ones."""

    def __init__(self, device: torch.device):
        self.device = device
        self.baseline: list[float] = []
        self.recent: deque[float] = deque(maxlen=NUM_RECENT)
        self.has_warned = False

    def add(self, seconds: float) -> str:
        """Add the duration of a step. Returns a one-line warning at most once per run, otherwise an empty string."""
        self.recent.append(seconds)
        if not self.has_warned and len(self.baseline) >= MIN_BASELINE and len(self.recent) == NUM_RECENT:
            before, now = statistics.median(self.baseline), statistics.median(self.recent)
            if now > SLOWDOWN_FACTOR * before:
                self.has_warned = True
                cause = likely_cause(self.device)
                return f"steps now take {now:.2f} s, {now / before:.1f} times as long as before: {cause}"
        if len(self.recent) == NUM_RECENT and len(self.baseline) < MAX_BASELINE:
            self.baseline.append(self.recent[0])
        return ""


def likely_cause(device: torch.device) -> str:
    """The likely cause, according to memory use and system load: full memory, other programs, or heat."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if free < 0.03 * total:
            return "GPU memory is full and may spill into system memory; close other programs or lower --batch-size"
        return "another program may be using the GPU, or it may be throttling due to heat"
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load > 1.5 * cores:
        return f"other programs are using the CPU (load {load:.1f} on {cores} cores)"
    return "the machine may be throttling due to heat, or may have been suspended"
