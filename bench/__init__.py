"""Cases, timing, references, peers and the results that the README's numbers are made from. Not installed."""
