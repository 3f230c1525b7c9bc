"""Federated LoRA fine-tuning of language models across unequal clients."""

__version__ = "0.1.0"
