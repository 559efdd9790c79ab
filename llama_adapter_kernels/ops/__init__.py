"""The operation: public functions, argument checks, choice of the backend, op registration and the reference."""
