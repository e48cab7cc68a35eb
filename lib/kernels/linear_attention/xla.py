from .reference import forward
