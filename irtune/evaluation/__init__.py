"""Metrics over ranks, the bootstrap, and a saved run that predicts."""
