"""Independent implementations of the formats, without code of the product: tests compare both."""
