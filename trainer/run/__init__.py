"""What a run is on disk: its folder, state, events and plots."""
