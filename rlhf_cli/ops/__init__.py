"""Pure tensor functions: tensors and floats in, tensors out."""
