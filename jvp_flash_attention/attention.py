"""Reached only where another distribution's `__init__.py` has taken the place of ours."""

from .shadowed import not_a_module

raise not_a_module("attention")
