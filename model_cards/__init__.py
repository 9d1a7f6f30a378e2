"""flexmoe.model_cards: the templates of model cards, what fills them, and the table of licences.

Not here: where a card's facts come from (`flexmoe.modeling.cards_flexmoe`), and its file (`flexmoe.cards`).
"""
