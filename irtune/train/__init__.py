"""The run: set up, train, select layers, evaluate, save, resume."""
