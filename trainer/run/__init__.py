"""Runs on disk: folder, state, events, plots, and the terminal view."""
