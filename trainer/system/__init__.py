"""The machine underneath: device, memory, signals, output paths."""
