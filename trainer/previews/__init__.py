"""Preview prompts, sampling and labeled grids."""
