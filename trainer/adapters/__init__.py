"""Finished adapter files: their names, metadata, reading and writing. Needs no diffusers."""
