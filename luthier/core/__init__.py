"""What all methods share: small, stable, fast."""
