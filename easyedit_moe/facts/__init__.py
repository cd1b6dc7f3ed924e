"""What is to be edited: requests, records of datasets, and where a fact sits among the tokens of its prompt."""
