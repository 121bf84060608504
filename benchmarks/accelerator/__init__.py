"""Measurements for the first ten minutes on an accelerator, in one record."""
