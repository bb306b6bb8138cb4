"""Stage embed: one row an item and a user, from training interactions (collaborative.py) and from text (textual.py)."""
