"""The settings of a run: their types, defaults and presets, and how they are read from YAML and the command line."""
