"""Files of adapters and of base models: one module per format, read and written without trusting what is in them."""
