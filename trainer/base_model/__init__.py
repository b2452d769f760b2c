"""Base models: detection, loading, quantization and placement on a device."""
