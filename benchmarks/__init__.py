"""Benchmarks of easyedit_moe; see ``python -m benchmarks --help``."""
