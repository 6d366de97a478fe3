"""Measurements, each a command: `python -m bench.NAME --help`. README.md says which answers what."""
