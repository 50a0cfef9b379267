"""Models of transformers: loading, checking, saving, converting them with the experts kept apart."""
