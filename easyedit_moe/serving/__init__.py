"""Edits as adapters in the formats that serving engines read."""
