"""All that a Hopper GPU is needed for, in one command of a few minutes."""
