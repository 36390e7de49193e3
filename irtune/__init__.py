"""irtune: layer-wise fine-tuning of language models with IR-Tuning under DeepSpeed ZeRO."""

__version__ = "0.1.0"
