"""The frozen base model and the places in it where adapters act."""
