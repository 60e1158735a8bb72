"""Training a Still compactor against a frozen base model."""
