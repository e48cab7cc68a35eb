"""Experiments over `frugax`: training, evaluation, generation and benchmarks."""
