"""Loading models and tokenizers; forward passes."""
