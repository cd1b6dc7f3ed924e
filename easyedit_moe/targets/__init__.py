"""Target vectors: what the hidden state at a fact token should be."""
