"""The settings of a run: types, defaults, presets, and how they are read."""
