"""Attention of public trainers by the names under which they import it, one module a repository."""
