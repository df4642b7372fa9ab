"""Settings live in pyproject.toml; nothing is compiled (ninja_build.md says what will be)."""

from setuptools import setup

setup()
