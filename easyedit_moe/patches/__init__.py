"""What an edit writes into a model, as a value that can be applied, reverted and saved."""
