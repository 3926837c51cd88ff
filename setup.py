"""Builds the wheel."""

from setuptools import setup

setup()
