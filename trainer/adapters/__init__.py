"""Finished adapter files: keys, metadata, I/O, arithmetic. Only `applied`, `forward_check`, `verify` need diffusers."""
