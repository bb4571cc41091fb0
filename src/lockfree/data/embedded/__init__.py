"""A class-balanced sample of Fashion-MNIST, for work without a data folder and without a network."""
