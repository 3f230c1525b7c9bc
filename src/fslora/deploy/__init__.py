"""The same rounds over a network: a server, and sites that keep their data. Flower is imported by `flower` alone."""
