"""Pretrained sequence classifiers and where their parts are."""

from irtune.models.classifier import DTYPES, Classifier, RunFacts, load_classifier

__all__ = ["DTYPES", "Classifier", "RunFacts", "load_classifier"]
