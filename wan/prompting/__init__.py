"""Rewriting a short prompt into one as detailed as the models were trained on, by a language model."""
