"""The machine: device, memory, signals and output paths."""
