"""Second moments of keys and Tucker bases of the weights: collected once per model and corpus, kept on disk."""
