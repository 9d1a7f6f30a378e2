"""Tests; a package so that helpers shared by several of them import as `tests.<name>`."""
