"""Prompts to completions: the decoding engine."""
