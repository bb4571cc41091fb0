"""The beginning of tiny Shakespeare, in the public domain, for work without a data folder and without a network."""
