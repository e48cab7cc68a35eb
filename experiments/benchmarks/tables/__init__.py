"""The tables of README.md and docs/."""
