"""Measurements of `frugax`, each a module to run with `python -m`."""
