"""Jinja templates of model cards: expert packages, compositions and merged models.

Does not cover rendering them (`flexmoe.cards`).
"""
