"""From a file of facts to a deployed model: each command of the command line as a Python function of its name."""
