"""Prunes a dense checkpoint in one run; also plans and sweeps of runs."""
