"""What trains clients: many at once over one frozen base, or one after the other as the oracle."""
