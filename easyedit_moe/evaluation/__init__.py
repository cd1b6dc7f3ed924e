"""Scores of an edited model by the papers' protocol and by EasyEdit's, and routing similarity."""
