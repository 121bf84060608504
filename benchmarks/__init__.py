"""Measurements that are not part of the tests: times as ratios within one process, errors against published errors."""
