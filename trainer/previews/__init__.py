"""Prompts, sampling and labelled grids."""
