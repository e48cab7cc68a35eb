"""The import name is `frugax`, its folder `lib`: all packages below it, which pyproject.toml can't say."""

from setuptools import find_packages, setup

setup(
    package_dir={"frugax": "lib"},
    packages=["frugax", *(f"frugax.{name}" for name in find_packages("lib"))],
    package_data={"": ["*.toml", "py.typed"]},
)
