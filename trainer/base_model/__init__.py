"""Base models: detected, loaded, quantized, placed on a device."""
