"""flexmoe.model_cards: where card templates go. Empty so far: an expert's card is written with its package."""
