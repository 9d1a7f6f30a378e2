"""Model cards: facts about experts, compositions and models, licences, and rendering with the templates.

Does not cover the README.md of an existing folder (`flexmoe.card_files`).
"""
